"""The folder that a training run leaves: the pipeline, training.json, images and the card."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dit_hub.model_cards import render_card

from ..adapters import save_adapters
from ..files import new_folder
from ..sources import CARD_FILE, EMBEDDED_MODELS
from ..visualize import SAMPLES_FILE, Trajectory, draws_quickly, loss_curve, sample_grid
from .checkpoints import LOGS_FOLDER
from .recipe import get_recipe
from .result import TrainingResult

logger = logging.getLogger(__name__)

# Mean loss by epoch, as the published series reports it for its toy.
PUBLISHED_TOY_LOSSES = {1: 0.9147, 4: 0.2467, 8: 0.1685, 16: 0.1409, 24: 0.1262, 30: 0.1228}


def published_losses(result: TrainingResult) -> dict[int, float]:
    """The published losses by epoch, if the recipe is the published one."""
    return PUBLISHED_TOY_LOSSES if result.recipe == get_recipe("toy") else {}


def save_result(
    result: TrainingResult, output_dir: str | os.PathLike, command: str, overwrite: bool = False, late: bool = False
) -> None:
    """Write the result to a new folder, whole or not at all.

    Args:
        result: the trained model.
        output_dir: a pipeline folder, ready for `DiTPipeline.from_pretrained`.
        command: the command that started the run, for the card.
        overwrite, late: see `new_folder`.
    """
    with new_folder(output_dir, overwrite, late) as folder:
        write_result(result, folder, command)
        _draw(result, folder)
        if result.logs is not None and result.logs.is_dir():
            with _warn_on_error("The logs were not copied completely"):
                shutil.copytree(result.logs, folder / LOGS_FOLDER)
        name = Path(output_dir).name
        render_card(folder, name if name in EMBEDDED_MODELS else str(output_dir)).save(folder / CARD_FILE)


def write_result(result: TrainingResult, folder: Path, command: str = "") -> None:
    """Write the pipeline, or the adapters, and training.json to a folder."""
    recipe = result.recipe
    if result.adapted is not None:
        save_adapters(result.adapted, recipe.lora_rank, recipe.init_from, result.pipeline.id2label, folder)
        result.pipeline.transformer.config.save_pretrained(folder)  # for the card
        result.pipeline.save_facts(folder)
    else:
        result.pipeline.save_pretrained(folder)
    for variant, weights in result.averages.items():
        result.pipeline.transformer.save_pretrained(folder / "transformer", variant=variant, state_dict=weights)
    training = {
        "command": command,
        "license": "apache-2.0" if result.dataset.license == "apache-2.0" else "unknown",
        "data": result.dataset.description,
        "recipe": asdict(recipe),
        "epoch_losses": [round(loss, 6) for loss in result.epoch_losses],
    }
    (folder / "training.json").write_text(json.dumps(training, indent=2) + "\n")


def _draw(result: TrainingResult, folder: Path) -> None:
    """Draw samples, a trajectory and the losses into a folder."""
    pipeline: Any = result.pipeline
    trajectory = Trajectory()
    pipeline.set_progress_bar_config(disable=True)
    with _warn_on_error("No samples were drawn"):
        pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        if draws_quickly(pipeline):
            sample_grid(pipeline, callback=trajectory).save(folder / SAMPLES_FILE)
            trajectory.image(pipeline).save(folder / "trajectory.png")
    with _warn_on_error("No losses were drawn"):
        loss_curve(result.epoch_losses, folder / "loss.png", published_losses(result), _title(result))


@contextmanager
def _warn_on_error(problem: str) -> Iterator[None]:
    """Turn an error in the block into a warning: its work must not cost the weights."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        logger.warning("%s: %s", problem, str(error) or type(error).__name__)


def _title(result: TrainingResult) -> str:
    """The title of a plot: model and data of the run."""
    recipe, count = result.recipe, result.pipeline.transformer.num_parameters()
    known = recipe.init_from or (recipe.model if isinstance(recipe.model, str) else "")
    model = (Path(known).name if Path(known).is_dir() else known) if known else f"DiT of {count:,} parameters"
    data = recipe.data.removeprefix("hf:") if recipe.data.startswith("hf:") else Path(recipe.data).name
    return f"{model} trained on {data or recipe.data}"
