"""The start of a run: its model, its noise schedule, and the checks that everything fits together."""

import logging
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from ..adapters import add_adapters
from ..configuration_dit import DiTConfig
from ..labels import same_classes
from ..modeling_dit import DiTTransformer
from ..pipeline_dit import DiTPipeline
from .checkpoints import damaged
from .data import Dataset
from .distilling import PREDICTIONS, check_teacher
from .fingerprint import fingerprint
from .old_names import renamed
from .recipe import Recipe
from .rows import StreamedRows

logger = logging.getLogger(__name__)


def load_start(source: str) -> DiTPipeline:
    """Load a pipeline folder, a Hub id or a checkpoint file to start from, in float32."""
    file = Path(source).is_file()
    pipeline = DiTPipeline.from_single_file(source) if file else DiTPipeline.from_pretrained(source)
    if not isinstance(pipeline.transformer, DiTTransformer):
        raise ValueError(f"{source} holds a {type(pipeline.transformer).__name__}, which cannot be trained; give the "
                         "model that it was exported from.")  # fmt: skip
    pipeline.transformer.float()
    return pipeline


def make_model(recipe: Recipe, dataset: Dataset, base: DiTPipeline | None) -> DiTTransformer:
    """The model to train: a new one, or the one to start from, with a row for each class of the data."""
    classes = len(dataset.id2label)
    if base is not None:
        start: DiTTransformer = cast(Any, base).transformer
        if bool(classes) != bool(start.config.num_classes):
            raise ValueError(f"The data have {classes or 'no'} classes, and {recipe.init_from} has "
                             f"{start.config.num_classes or 'none'}.")  # fmt: skip
        if classes:
            adopt_classes(start, dataset.id2label, base.id2label, recipe)
        if recipe.distill:
            check_teacher(recipe, start)
            start.remove_null_class()
            start.remove_learned_variance()  # the loss of a student trains no variance
        model = add_adapters(start, recipe.lora_rank) if recipe.lora_rank else start
    else:
        config = recipe.config
        stated = isinstance(recipe.model, dict) and "num_classes" in recipe.model
        if not stated and config.num_classes != classes:  # sizes by name are ImageNet's
            config = DiTConfig(**{**config.to_dict(), "num_classes": classes})
        model = DiTTransformer(config)
    if recipe.freeze:
        freeze(model, recipe.freeze)
    return model


def adopt_classes(model: DiTTransformer, id2label: dict[int, str], known: dict[int, str], recipe: Recipe) -> None:
    """Give a model the classes of the data, and report which of its own it keeps.

    A class with the name of one of the model's keeps its row of the table; the others start as in a new model. Where
    one side has no names, equally many classes are taken for the same ones.

    Args:
        model: a model of the classes `known`.
        id2label, known: names of the data's and the model's classes, by id.
        recipe: of the run; its seed draws the new rows.
    """
    classes, source = len(id2label), recipe.init_from
    say: Callable[..., None] = logger.warning if PartialState().is_main_process else logger.debug
    if not _nameless(id2label) and not _nameless(known):
        same = same_classes([id2label[index] for index in range(classes)], known)
    elif id2label == known:
        return
    elif classes == model.config.num_classes:
        say("The %d classes of the data are taken for those of %s, since not both have names.", classes, source)
        return
    else:
        same = [None] * classes
    if same != list(range(model.config.num_classes)):
        if recipe.distill:
            raise ValueError(f"The data have other classes than {source}, and a teacher can teach only its own.")
        model.resize_class_labels(classes, same, torch.Generator().manual_seed(recipe.seed))
        kept = sum(old is not None for old in same)
        say(
            "%d of %d classes start from the class of the same name in %s; the others are new.",
            kept,
            classes,
            source,
        )


def _nameless(id2label: dict[int, str]) -> bool:
    """Whether classes have numbers for names, as those of an archive."""
    return all(name == str(index) for index, name in id2label.items())


def freeze(model: DiTTransformer, pattern: str) -> None:
    """Freeze the parameters in whose names a regular expression is found.

    Raises:
        ValueError: it is not a regular expression, or matches nothing or everything.
    """
    try:
        frozen = [(name, bool(re.search(pattern, name))) for name, _ in model.named_parameters()]
    except re.error as error:
        raise ValueError(f"freeze {pattern!r} is not a regular expression: {error}.") from None
    if not any(matched for _, matched in frozen):
        raise ValueError(f"freeze {pattern!r} matches no parameter; they have names like {frozen[-1][0]}.")
    for (_, matched), parameter in zip(frozen, model.parameters(), strict=True):
        parameter.requires_grad = parameter.requires_grad and not matched
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze {pattern!r} leaves nothing to train.")


def make_scheduler(recipe: Recipe, config: Any) -> Any:
    """The noise schedule of a recipe; in pixel space, sampling clips the predicted image to -1..1."""
    if recipe.objective == "flow":
        return FlowMatchEulerDiscreteScheduler(recipe.num_train_timesteps)
    learned: dict[str, Any] = {}
    if config.learn_sigma:
        learned = {"variance_type": "learned_range", "timestep_spacing": "linspace"}
    return DDPMScheduler(
        recipe.num_train_timesteps,
        beta_start=recipe.beta_start,
        beta_end=recipe.beta_end,
        beta_schedule="linear",
        clip_sample=config.draws_pixels and not config.learn_sigma,
        prediction_type="v_prediction" if recipe.objective == "v" else "epsilon",
        **learned,
    )


def check_fit(
    recipe: Recipe, model: DiTTransformer, dataset: Dataset, processes: int, base: DiTPipeline | None
) -> None:
    """Raise ValueError if data, model, batch, processes and decoder do not fit together."""
    config: Any = model.config
    channels, height, width = dataset.sample_shape
    if (channels, (height, width)) != (config.in_channels, config.sample_height_width):
        wanted = "x".join(map(str, config.sample_height_width))
        raise ValueError(f"The data are {height}x{width} in {channels} channels, and the model takes {wanted} in "
                         f"{config.in_channels}.")  # fmt: skip
    if len(dataset.id2label) == 1:
        raise ValueError("The data have only one class, and a class-conditional model needs two: add another, or leave "
                         "classes out (images directly in the folder, an archive without labels).")  # fmt: skip
    if len(dataset.id2label) != config.num_classes:
        raise ValueError(f"The data have {len(dataset.id2label)} classes and the model {config.num_classes}.")
    if recipe.batch_size > len(dataset):
        raise ValueError(f"batch_size {recipe.batch_size} is larger than the data set of {len(dataset)} images.")
    if recipe.batch_size % (processes * recipe.gradient_accumulation_steps):
        raise ValueError(f"batch_size {recipe.batch_size} cannot be divided equally between {processes} processes with "
                         f"gradient_accumulation_steps {recipe.gradient_accumulation_steps}.")  # fmt: skip
    if recipe.fsdp and processes == 1:
        raise ValueError("fsdp shards weights over several processes, and this is one; start with `accelerate launch`.")
    straight = config.parameterization != "diffusion"
    if straight != (recipe.objective == "flow"):
        raise ValueError(f"A model of parameterization {config.parameterization!r} cannot be trained with the "
                         f"objective {recipe.objective!r}.")  # fmt: skip
    if base is not None:
        check_noise_schedule(recipe, base, straight)
    decoder = bool(recipe.vae) or (base is not None and base.vae is not None)
    if recipe.vae:  # an error now, not after days of training
        check_decoder(recipe.vae, channels)
    if recipe.sample_every and not decoder and not config.draws_pixels:
        raise ValueError("sample_every needs a decoder to make images of latents: set vae, or sample_every=0.")


def check_noise_schedule(recipe: Recipe, base: DiTPipeline, straight: bool) -> None:
    """Raise ValueError if a model would be trained with other noise, or another target, than it was before."""
    theirs: Any = cast(Any, base).scheduler.config
    names = ("num_train_timesteps",) if straight else ("num_train_timesteps", "beta_start", "beta_end")
    if others := [name for name in names if theirs.get(name) != getattr(recipe, name)]:
        had, has = (" and ".join(f"{name} {value(name)}" for name in others)
                    for value in (theirs.get, lambda name: getattr(recipe, name)))  # fmt: skip
        raise ValueError(f"{recipe.init_from} was trained with {had}, and the recipe has {has}; set "
                         f"{' '.join(f'{name}={theirs.get(name)}' for name in others)}.")  # fmt: skip
    if straight:
        return
    if theirs.get("trained_betas") is not None or theirs.get("rescale_betas_zero_snr"):
        kind = "betas of its own"
    else:
        kind = f"beta_schedule {theirs.get('beta_schedule')}"
    if kind != "beta_schedule linear":
        raise ValueError(f"{recipe.init_from} was trained with {kind}, and recipes train with linear betas only.")
    prediction = theirs.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(f"{recipe.init_from} predicts {prediction!r}, which no objective trains; only noise and v do.")
    if PREDICTIONS[prediction] != recipe.objective and not recipe.distill:  # a student may learn another one
        raise ValueError(f"{recipe.init_from} predicts {prediction!r}, and the objective {recipe.objective!r} would "
                         f"train it for another target; set objective={PREDICTIONS[prediction]}.")  # fmt: skip


def check_decoder(name: str, channels: int) -> None:
    """Raise ValueError if there is no such VAE, or its latents have other channels."""
    try:
        config: Any = AutoencoderKL.load_config(name)
        if config["latent_channels"] != channels:
            raise ValueError(f"The decoder {name} takes {config['latent_channels']} channels, and the data have "
                             f"{channels}.")  # fmt: skip
    except (OSError, KeyError):
        raise ValueError(f"The decoder {name} cannot be loaded; set vae to a folder or a Hub id, or to nothing for a "
                         "pipeline that only draws latents.") from None  # fmt: skip


def describe(dataset: Dataset, processes: int) -> dict[str, Any]:
    """The facts about data that a run must find again when it resumes, for JSON."""
    facts = {"images": len(dataset), "classes": list(dataset.id2label.values()), "shape": list(dataset.sample_shape)}
    parts = {"processes": processes} if isinstance(dataset, StreamedRows) else {}  # each has a part of the stream
    return {**facts, **parts, "fingerprint": fingerprint(dataset)}


def check_same_recipe(path: Path, facts: dict[str, Any], recipe: Recipe, data: dict[str, Any]) -> None:
    """Raise ValueError if a checkpoint belongs to another recipe or other data; the message says what differs.

    Args:
        path, facts: of the checkpoint.
        recipe, data: of this run; the data as `describe` returns them.
    """
    if not isinstance(facts.get("recipe"), dict):
        raise damaged(path, ValueError("it does not say which recipe it belongs to"))
    known = renamed(facts.get("data", {}))  # an older release noted less
    different = [name for name in data if name in known and known[name] != data[name]]
    if different and (name := different[0]) == "processes":
        raise ValueError(f"{path} belongs to a stream shared by {known[name]} processes, and now there are "
                         f"{data[name]}; resume with {known[name]}, or start over with --resume never.")  # fmt: skip
    if different and name != "fingerprint":
        raise ValueError(f"{path} belongs to other data: {name} {known[name]} there, {data[name]} here.")
    # A setting that an older release did not know has its default.
    ours, theirs = asdict(recipe), asdict(Recipe()) | renamed(facts["recipe"])
    names = [name for name in ours if name not in _HARMLESS and theirs.get(name) != ours[name]]
    if names:
        differences = "; ".join(f"{name} is {theirs.get(name)!r} there and {ours[name]!r} here" for name in names)
        raise ValueError(f"{path} belongs to another recipe: {differences}. Train to another --out, or start over with "
                         "--resume never.")  # fmt: skip
    if different:
        raise ValueError(f"{path} belongs to other data: as many images, but with other content. Train to another "
                         "--out, or start over with --resume never.")  # fmt: skip


# Settings that change where and when work is done, not its result.
_HARMLESS = ("num_workers", "save_every", "keep_last", "skip_nan", "tracker", "sample_every", "vae", "push_to_hub",
             "merge_adapters", "fsdp", "gradient_checkpointing", "compile", "gradient_accumulation_steps")  # fmt: skip
