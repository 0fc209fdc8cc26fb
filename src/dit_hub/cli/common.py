"""Options, checks and tables that several commands share."""

from pathlib import Path
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


def find_config(model: str, image_size: int) -> Any:
    """The `DiTConfig` of a size by name at an image size, or of a model on the Hub or in a folder."""
    from ..configuration_dit import PUBLISHED_MODELS, DiTConfig

    named = model.casefold() in {name.casefold() for name in (*PUBLISHED_MODELS, "toy")}
    if named or (model.startswith("DiT-") and not Path(model).exists()):
        return DiTConfig.from_name(model, image_size=image_size)
    from ..pipeline_dit import DiTPipeline

    return DiTPipeline.from_pretrained(model).transformer.config


def make_table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table
