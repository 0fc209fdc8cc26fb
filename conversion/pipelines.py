"""Checkpoints of every layout to folders of every layout, checked by a forward pass on both sides.

The one module of this package that knows pipelines, which are built on the others.
"""

import copy
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from torch import Tensor

from dit_hub.configuration_dit import DiTConfig
from dit_hub.conversion.diffusers_layout import OFFICIAL_NUMERICS_PATCH, diffusers_config, to_diffusers
from dit_hub.conversion.official import check_official, to_official
from dit_hub.conversion.origin import DEFAULT_VAE, Origin
from dit_hub.conversion.self_contained import add_code
from dit_hub.conversion.single_file import load_single_file
from dit_hub.files import check_free, new_folder
from dit_hub.loading import GUIDANCE_KEY, SHIFT_KEY
from dit_hub.model_cards import render_card
from dit_hub.modeling_dit import DiTTransformer
from dit_hub.pipeline_dit import DiTPipeline
from dit_hub.sources import CARD_FILE, is_url, local_folder
from dit_hub.visualize import draw_samples

LAYOUTS = ("dit-hub", "official", "diffusers")

# The largest relative L2 distance of two forward passes. With equal weights it is rounding: diffusers' class uses other
# kernels, and some processors choose theirs by how the weights are aligned in memory.
MAX_RELATIVE_ERROR = 1e-5

# The weights in the "official" layout.
OFFICIAL_FILE = "model.pt"


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Args:
        origin: source, licence and the keys "from", "to" and "parity" of the conversion.
        config: the model's configuration.
        parity: relative L2 error of forward passes, by what was compared.
        patch: a line of code to run after loading the result, if it needs one.
    """

    origin: Origin
    config: DiTConfig
    parity: dict[str, float]
    patch: str | None = None


def convert(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    to: str = "dit-hub",
    self_contained: bool = False,
    license: str | None = None,
    vae: Any = DEFAULT_VAE,
    timestep_freq_shift: float | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Conversion:
    """Convert a checkpoint; the folder appears only once its numbers have been checked.

    Args:
        source: a checkpoint file, a pipeline folder of ours or of diffusers, or a Hub id.
        output_dir: the new folder, with a card. "dit-hub": a pipeline folder. "diffusers": one for stock diffusers.
            "official": model.pt, a bare state dict like the official weights.
        to: one of `LAYOUTS`.
        self_contained: put the code beside the weights, for people without dit_hub.
        license: identifier of the weights' licence, if the source does not name it; a known one cannot be changed.
        vae, timestep_freq_shift, options: as for `DiTPipeline.from_single_file` or `DiTPipeline.from_pretrained`.
        overwrite: replace an existing folder, as `new_folder` does.

    Raises:
        ValueError: an unreadable source, a layout that cannot express the model, an error above `MAX_RELATIVE_ERROR`.
    """
    _check_layout(to, self_contained)
    check_free(output_dir, overwrite)
    pipeline = _open(source, vae, timestep_freq_shift, options)
    assert pipeline.origin is not None
    origin, config = pipeline.origin.with_license(license), pipeline.transformer.config
    with new_folder(output_dir, overwrite) as folder:
        size = None if "diffusers" in (origin.layout, to) else _small(config)  # its class takes only the training size
        expected = _passes(config, _in_float32(pipeline.transformer), size)
        parity = _parity_with_diffusers(pipeline.transformer, expected) if origin.layout == "diffusers" else {}
        facts = {"from": origin.layout, "to": to, "parity": parity, "self_contained": self_contained}
        facts |= _settings(pipeline, to)
        _WRITERS[to](pipeline, folder)
        draw_samples(pipeline, folder)
        del pipeline  # so that the weights are in memory only once
        where = "in diffusers' own class" if to == "diffusers" else "read back"
        parity[f"before against after, {where}"] = _relative_error(expected, _read_back(config, folder, to, size))
        _check_parity(parity)
        if self_contained:
            add_code(folder)
        origin = replace(origin, modified=False, conversion=facts)
        origin.save(folder)
        render_card(folder, Path(output_dir).name).save(folder / CARD_FILE)
    needs_patch = to == "diffusers" and config.timestep_freq_shift == 0
    return Conversion(origin, config, parity, OFFICIAL_NUMERICS_PATCH if needs_patch else None)


def _check_layout(to: str, self_contained: bool) -> None:
    if to not in LAYOUTS:
        raise ValueError(f"There is no layout {to!r}; known: {', '.join(LAYOUTS)}.")
    if self_contained and to != "dit-hub":
        raise ValueError(f"--self-contained puts dit-hub's code beside the weights; it does not go with --to {to}.")


def _open(
    source: str | os.PathLike, vae: Any, timestep_freq_shift: float | None, options: dict[str, Any]
) -> DiTPipeline:
    """The pipeline of a file, a folder or a repository."""
    if (Path(source).is_file() and Path(source).suffix != ".onnx") or is_url(source):
        shift = {} if timestep_freq_shift is None else {"timestep_freq_shift": timestep_freq_shift}
        return DiTPipeline.from_single_file(source, vae=vae, **shift, **options)
    folder = local_folder(source)
    if folder is not None and not (folder / DiTPipeline.config_name).is_file():
        raise ValueError(
            f"{source} is no pipeline folder: it has no {DiTPipeline.config_name}; give a checkpoint file."
        )
    for_files = {"weights", "family", "num_attention_heads", *DiTConfig.__annotations__} & options.keys()
    if misplaced := sorted(for_files | ({"vae"} if vae is not DEFAULT_VAE else set())):
        raise ValueError(f"{', '.join(misplaced)}: for checkpoint files only; {source} has a configuration of its own.")
    pipeline = DiTPipeline.from_pretrained(source, timestep_freq_shift=timestep_freq_shift, **options)
    if not isinstance(pipeline.transformer, DiTTransformer):
        raise ValueError(f"{source} holds a {type(pipeline.transformer).__name__}, which cannot be converted back.")
    return pipeline


# --- Writing ---------------------------------------------------------------------------------------------------------


def _settings(pipeline: DiTPipeline, to: str) -> dict[str, Any]:
    """What the origin keeps of a pipeline: its configuration, and what the official layout has no place for."""
    settings: dict[str, Any] = {"config": _fields(pipeline.transformer.config)}
    if to == "official":
        settings |= {"scheduler": json.loads(pipeline.scheduler.to_json_string()), "id2label": pipeline.id2label}
    return settings


def _write_ours(pipeline: DiTPipeline, folder: Path) -> None:
    pipeline.save_pretrained(folder)


def _write_official(pipeline: DiTPipeline, folder: Path) -> None:
    check_official(pipeline.transformer.config)
    torch.save(to_official(pipeline.transformer.state_dict(), pipeline.transformer.config), folder / OFFICIAL_FILE)


def _write_diffusers(pipeline: DiTPipeline, folder: Path) -> None:
    scheduler = pipeline.scheduler
    if isinstance(scheduler, diffusers.DDPMScheduler):  # stock discards the learned variance that it may need
        kept = {"variance_type": "fixed_small", "timestep_spacing": "leading"}
        scheduler = diffusers.DDIMScheduler.from_config({**scheduler.config, **kept})
    stock: Any = diffusers.DiTPipeline(_stock(pipeline.transformer), pipeline.vae, cast(Any, scheduler))
    stock.save_pretrained(folder)
    config, index = pipeline.transformer.config, json.loads((folder / "model_index.json").read_text())
    index.update({SHIFT_KEY: config.timestep_freq_shift, GUIDANCE_KEY: config.guidance_channels})
    index["id2label"] = pipeline.id2label  # stock reads the names but does not write them
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


_WRITERS = {"dit-hub": _write_ours, "official": _write_official, "diffusers": _write_diffusers}


def _stock(transformer: DiTTransformer) -> Any:
    """diffusers' own model with the weights and numerics of ours."""
    with torch.device("meta"):
        stock = diffusers.DiTTransformer2DModel(**diffusers_config(transformer.config))
    weights = to_diffusers(transformer.state_dict(), transformer.config.num_hidden_layers)
    positions = diffusers.DiTTransformer2DModel(**{**diffusers_config(transformer.config), "num_layers": 1}).pos_embed
    stock.load_state_dict(weights, strict=True, assign=True)
    stock.pos_embed.pos_embed = positions.pos_embed
    return stock.eval()


# --- Checking --------------------------------------------------------------------------------------------------------


def _parity_with_diffusers(transformer: DiTTransformer, expected: list[Tensor]) -> dict[str, float]:
    """The error of diffusers' own class with the weights that were read from its layout."""
    stock = _stock_passes(transformer.config, _stock(_in_float32(transformer)))
    return {"diffusers' own class against ours": _relative_error(stock, expected)}


def _check_parity(parity: dict[str, float]) -> None:
    if not all(error <= MAX_RELATIVE_ERROR for error in parity.values()):  # also catches NaN
        listed = ", ".join(f"{what}: {error:.1e}" for what, error in parity.items())
        raise ValueError(f"The converted model differs by more than {MAX_RELATIVE_ERROR:.0e}: {listed}.")


def _read_back(config: DiTConfig, folder: Path, to: str, size: tuple[int, int] | None) -> list[Tensor]:
    """Passes of the model that was written."""
    if to == "diffusers":
        stock: Any = diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer")
        return _stock_passes(config, stock.float())
    if to == "official":
        model, _ = load_single_file(folder / OFFICIAL_FILE, **_fields(config))
    else:
        model = DiTTransformer.from_pretrained(folder / "transformer")
    return _passes(config, _in_float32(model), size)


def _in_float32(model: DiTTransformer) -> Any:
    """The model, or a float32 copy of one in half precision, whose rounding would hide what is compared."""
    return copy.deepcopy(model).float() if model.dtype.itemsize < 4 else model


def _small(config: DiTConfig) -> tuple[int, int]:
    """The smallest input that uses every weight; XL/2 is 16 times faster on it than on its own size."""
    height, width = config.sample_height_width
    if config.pos_embed == "learned":
        return height, width
    return min(height, 4 * config.patch_size), min(width, 4 * config.patch_size)


def _stock_passes(config: DiTConfig, stock: Any) -> list[Tensor]:
    """Passes of diffusers' class with the numerics that the weights were trained with."""
    for block in stock.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = config.timestep_freq_shift
    return _passes(config, stock)


@torch.no_grad()
def _passes(config: DiTConfig, model: Any, size: tuple[int, int] | None = None) -> list[Tensor]:
    """A model's predictions for noise, of the training size by default, at an early and at a late timestep."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, config.in_channels, *(size or config.sample_height_width), generator=generator)
    labels = torch.tensor([0, config.num_classes - 1]) if config.num_classes else None
    predictions = []
    for index, timestep in enumerate((17, 801)):
        label = labels[index : index + 1] if labels is not None else None
        latent = latents[index : index + 1].to(model.dtype)
        predictions.append(model(latent, torch.tensor([timestep]), class_labels=label).sample.float())
    return predictions


def _relative_error(expected: list[Tensor], actual: list[Tensor]) -> float:
    difference = torch.stack(actual).double() - torch.stack(expected).double()
    return difference.norm().item() / (torch.stack(expected).double().norm().item() or 1.0)


def _fields(config: DiTConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in DiTConfig.__annotations__}
