"""Two people and a Hub: one converts a checkpoint and pushes it, the other pulls it and draws the same images.

The Hub is the small one of the tests, on this machine; the commands are those for the real one. Each person is a
process with a cache of their own.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

from local_hub import TOKEN, LocalHub, local_hub  # noqa: E402 # pyright: ignore[reportMissingImports]

SOURCE = "dit-toy-shapes"
NAME = "me/my-dit"


def terminal(person: str, hub: LocalHub, folder: Path, *command: str) -> None:
    """Run a dit-hub command as somebody, in a folder of their own, and show both."""
    print(f"\n{person}$ dit-hub {' '.join(command)}", flush=True)
    home = folder / person
    home.mkdir(exist_ok=True)
    settings = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(home / "cache"),
                "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}  # fmt: skip
    subprocess.run([sys.executable, "-m", "dit_hub.cli", *command], cwd=home, env=settings, check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary, local_hub() as hub:
        folder = Path(temporary)
        draw = ("red-circle", "blue-cross", "--steps", "20", "--out", "grid.png")
        terminal("ann", hub, folder, "convert", SOURCE, "my-dit", "--self-contained")
        terminal("ann", hub, folder, "push", "my-dit", NAME, "--private")
        terminal("ann", hub, folder, "generate", "my-dit", *draw)
        terminal("bob", hub, folder, "generate", NAME, *draw)
        same = (folder / "ann" / "grid.png").read_bytes() == (folder / "bob" / "grid.png").read_bytes()
        print(f"\nThe images are {'equal, byte for byte' if same else 'NOT equal'}.")
        sys.exit(not same)


if __name__ == "__main__":
    main()
