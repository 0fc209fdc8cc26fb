"""The command line: each command a thin call of a public function."""

import sys
from typing import Annotated, NoReturn

import typer

from .. import __version__
from .checkpoints import card, convert, info, push
from .counting import flops
from .evaluating import evaluate
from .exporting import export_app
from .sampling import generate, sample
from .serving import serve
from .solving import solver_app
from .studying import study
from .training import SETTINGS, latents, train

app = typer.Typer(
    name="dit-hub",
    help="Diffusion Transformers: sample, train, convert, export and share them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(generate)
app.command()(sample)
app.command()(serve)
app.command()(info)
app.command()(flops)
app.command(epilog=SETTINGS)(train)
app.command()(latents)
app.command()(evaluate)
app.command()(study)
app.command()(convert)
app.command()(card)
app.command()(push)
app.add_typer(export_app, name="export")
app.add_typer(solver_app, name="solver")

# Parts of PyTorch's errors, on processors and on GPUs.
_MEMORY_ERRORS = ("can't allocate memory", "out of memory")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dit-hub {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the name of a command."""


def main() -> None:
    """Run the command line. An error that the user can correct is one sentence and exit status 2."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        _refuse(str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in _MEMORY_ERRORS):
            raise
        _refuse("There is not enough memory for this; draw fewer images at a time, or use smaller batches.")


def _refuse(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
