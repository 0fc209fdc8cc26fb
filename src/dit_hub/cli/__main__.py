"""`python -m dit_hub.cli`."""

from . import main

if __name__ == "__main__":
    main()
