"""Options, checks and tables that several commands share."""

from typing import Annotated, Any

import typer

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output if it exists; a folder, if all in it is dit-hub's.")
]
Model = Annotated[str, typer.Argument(help="A Hub id, a folder, or dit-toy-shapes, which comes with the package.")]


def check_device(name: str) -> None:
    """Raise ValueError where PyTorch has no such device, or one that does not compute."""
    import torch

    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):  # a name that torch does not know; one it lacks
        raise ValueError(f"There is no device {name!r} here.") from None
    if device.type not in ("cpu", "cuda", "mps", "xpu"):  # such as meta, whose tensors hold nothing
        raise ValueError(f"--device must be cpu, cuda or mps, not {name!r}.")


def make_table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table
