"""A training run as data: one short dataclass, one short YAML file."""

import math
import types
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..configuration_dit import DiTConfig, nearest
from .ladder import check_distillation
from .old_names import OLD_NAMES

OBJECTIVES = ("noise", "v", "flow")

# Bound of the sum of all betas. The signal's power is about exp(-sum), which schedulers divide by, and float32 ends at
# exp(-87).
_MOST_NOISE = 80

_ABOVE_ZERO = ("images_per_class", "epochs", "batch_size", "gradient_accumulation_steps", "num_train_timesteps",
               "student_steps", "teacher_steps", "learning_rate", "keep_last")  # fmt: skip
_AT_LEAST_ZERO = ("steps", "max_grad_norm", "weight_decay", "min_snr_gamma", "lora_rank", "save_every", "sample_every",
                  "num_workers")  # fmt: skip
# Far above any use, so that a slip of the keyboard is refused before the work.
_AT_MOST = {
    "epochs": 1_000_000,
    "steps": 1_000_000_000,
    "lora_rank": 4096,
    "num_train_timesteps": 1_000_000,
    "num_workers": 1024,
}

_CHOICES = {
    "mixed_precision": ("no", "tf32", "bf16", "fp16"),
    "objective": OBJECTIVES,
    "lr_scheduler": ("cosine", "constant"),
}


@dataclass(frozen=True)
class Recipe:
    """What a training run does. The defaults are the toy's, after a published build-in-public series.

    Args:
        model: name of a size, as `DiTConfig.from_name` takes it, or fields of `DiTConfig`. Unless the fields say
            `num_classes`, the model has the classes of the data.
        init_from: start from this pipeline (a folder, Hub id or checkpoint file) rather than from a new `model`.
        data: "shapes", "digits", a folder of images or of class folders, an .npz archive, a folder of `dit-hub
            latents`, or "hf:NAME" or "hf:NAME:SPLIT" for a data set of the Hub (or a folder of its files).
        streaming: read a data set of the Hub while it downloads, rather than download it first.
        images_per_class: number of images of each class of the shapes.
        random_flip: flip half of the images left to right.
        objective: "noise" (with the variational bound where the model learns its variance), "v" or "flow".
        logit_normal: draw the timesteps of "flow" from a logit-normal distribution rather than evenly.
        min_snr_gamma: bound of the signal-to-noise ratio in the loss weights of "noise" and "v"; 0 for no weights.
        distill: train the model of `init_from` to do with less: "guidance" (in one pass what it does guided in two),
            "progressive" (in `student_steps` steps what it does in `teacher_steps`) or "consistency" (in any few
            steps); "" for no distillation. The student has no null class, and predicts what `objective` says.
        guidance_scale: scale at which the teacher is guided, which the student has built in; 1 for no guidance.
        student_steps: sampling steps of a progressive student.
        teacher_steps: sampling steps that progressive distillation halves until they are `student_steps`, in equal
            parts of the run; of consistency, the number of its teacher's steps.
        epochs: passes over the data.
        steps: optimizer steps, in place of `epochs` where above 0.
        batch_size: images per step, over all processes.
        gradient_accumulation_steps: micro-batches into which each process divides its share of a batch, to save memory.
        learning_rate: AdamW's learning rate.
        lr_scheduler: "cosine", which falls to zero at the end, or "constant".
        weight_decay: AdamW's weight decay.
        max_grad_norm: gradients are clipped to this norm; 0 for no clipping.
        num_train_timesteps: noise levels T.
        beta_start, beta_end: ends of the linear noise schedule.
        ema_decay: keep an exponential moving average of the weights, and save it as the model; 0 for none. Of a list,
            the first is the pipeline's and the others become variants, such as "ema-9999".
        lora_rank: train low-rank adapters of the blocks' linear layers and the class table alone; 0 for all weights.
        merge_adapters: merge the adapters at the end, rather than save them as files of their own.
        freeze: a regular expression; parameters in whose names it is found are not trained.
        mixed_precision: "no", "tf32" (float32 with faster matrix products on NVIDIA GPUs), "bf16" or "fp16".
        fsdp: shard weights and optimizer state over the processes (FSDP2).
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        compile: compile each block.
        save_every: steps between checkpoints; 0 for one after the last step only.
        keep_last: number of checkpoints to keep.
        skip_nan: skip and count steps whose loss is not finite, rather than stop.
        tracker: where losses and samples are logged: "tensorboard", another tracker of accelerate's, or "none".
        sample_every: steps between samples drawn while training; 0 for none.
        vae: decoder of the finished pipeline and of samples drawn while training, for latents: a folder or Hub id.
        push_to_hub: a repository, "organisation/name", which gets checkpoints during training, and the result.
        num_workers: processes that read data, for each process that trains.
        seed: seed of data, order, weights and noise.

    Raises:
        ValueError: a value out of range, or fields that do not go together.
    """

    model: str | dict[str, Any] = "toy"
    init_from: str = ""
    data: str = "shapes"
    streaming: bool = False
    images_per_class: int = 200
    random_flip: bool = False
    objective: str = "noise"
    logit_normal: bool = False
    min_snr_gamma: float = 0.0
    distill: str = ""
    guidance_scale: float = 1.0
    student_steps: int = 4
    teacher_steps: int = 64
    epochs: int = 30
    steps: int = 0
    batch_size: int = 128
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-4
    lr_scheduler: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    num_train_timesteps: int = 200
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    ema_decay: float | list[float] = 0.0
    lora_rank: int = 0
    merge_adapters: bool = True
    freeze: str = ""
    mixed_precision: str = "no"
    fsdp: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    save_every: int = 0
    keep_last: int = 2
    skip_nan: bool = False
    tracker: str = "tensorboard"
    sample_every: int = 0
    vae: str = ""
    push_to_hub: str = ""
    num_workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_noise()
        self._check_choices()
        if self.distill or self.guidance_scale != 1:
            check_distillation(self)

    def _check_ranges(self) -> None:
        for name in _ABOVE_ZERO:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}.")
        for name in _AT_LEAST_ZERO:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or above, not {getattr(self, name)}.")
        for name, largest in _AT_MOST.items():
            if getattr(self, name) > largest:
                raise ValueError(f"{name} must be at most {largest}, not {getattr(self, name)}.")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be from 0 to {2**31 - 1}, not {self.seed}.")
        decays = self.ema_decay if isinstance(self.ema_decay, list) else [self.ema_decay]
        if not all(0 <= decay < 1 for decay in decays) or len(set(decays)) < len(decays):
            raise ValueError(
                f"ema_decay must be 0 (off) or below 1, or a list of different ones, not {self.ema_decay}."
            )

    def _check_noise(self) -> None:
        betas = self.num_train_timesteps * (self.beta_start + self.beta_end) / 2
        if self.objective != "flow" and betas > _MOST_NOISE:
            raise ValueError(f"num_train_timesteps {self.num_train_timesteps} with beta_start {self.beta_start} and "
                             f"beta_end {self.beta_end} leave no signal at all; lower them.")  # fmt: skip
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_start {self.beta_start} and beta_end {self.beta_end} must rise between 0 and 1.")

    def _check_choices(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {', '.join(known[:-1])} or {known[-1]}, not {getattr(self, name)!r}.")
        if self.min_snr_gamma and self.objective == "flow":
            raise ValueError("min_snr_gamma is for the objectives noise and v.")
        if self.lora_rank and not self.init_from:
            raise ValueError("lora_rank adapts a trained model; set init_from to a folder, a Hub id or a checkpoint.")
        if not self.merge_adapters and (not self.lora_rank or len(self.ema_decays) > 1):
            raise ValueError("merge_adapters=false needs lora_rank, and at most one ema_decay.")
        if self.streaming and not self.data.startswith("hf:"):
            raise ValueError(f"streaming is for data sets of the Hub (hf:NAME), not for {self.data!r}.")

    @property
    def ema_decays(self) -> list[float]:
        """The decays of the moving averages to keep; the pipeline's first."""
        decays = self.ema_decay if isinstance(self.ema_decay, list) else [self.ema_decay]
        return [decay for decay in decays if decay]

    @property
    def config(self) -> DiTConfig:
        """The configuration of a new model.

        Raises:
            ValueError: an unknown size or field.
        """
        parameterization: dict[str, Any] = {} if self.objective == "noise" else {"learn_sigma": False}
        if self.objective == "flow":
            parameterization["parameterization"] = "flow"
        if isinstance(self.model, str):
            return DiTConfig.from_name(self.model, **parameterization)
        known = list(DiTConfig.__annotations__)
        if unknown := [str(name) for name in self.model if name not in known]:
            raise ValueError(f"A model has no field {unknown[0]!r}. The nearest names: {nearest(unknown[0], known)}.")
        return DiTConfig(**{**self.model, **parameterization})

    def with_settings(self, settings: dict[str, Any]) -> "Recipe":
        """The recipe with some fields changed; text is read as YAML would read it.

        Args:
            settings: values by field; names of older releases are understood.

        Raises:
            ValueError: a field that does not exist, or a value of the wrong type.
        """
        kinds = {field.name: field.type for field in fields(self)}
        changes = {}
        for given, value in settings.items():
            name = OLD_NAMES.get(given, given)
            if name not in kinds:
                given = str(given)
                raise ValueError(f"A recipe has no field {given!r}. The nearest names: {nearest(given, list(kinds))}.")
            if name in changes:
                old = next(old for old, new in OLD_NAMES.items() if new == name)
                raise ValueError(f"{old} is the old name of {name}, and both are set; remove {old}.")
            changes[name] = _read(name, value, kinds[name])
        return replace(self, **changes)


def _read(name: str, value: Any, kind: Any) -> Any:
    """A value from a recipe's file or the command line, as the type of its field."""
    if isinstance(kind, types.UnionType) and str in kind.__args__:  # the model: a name or fields
        parsed = _parsed(name, value, "{")
        if not isinstance(parsed, (str, dict)):
            raise ValueError(f"{name} must be a name or fields of a configuration, not {value!r}.")
        return parsed
    if isinstance(kind, types.UnionType):  # ema_decay: a number or several
        parsed = _parsed(name, value, "[")
        return [_read(name, item, float) for item in parsed] if isinstance(parsed, list) else _read(name, parsed, float)
    if kind is str:
        if value is None:  # an empty value in YAML
            return ""
        if value is False and name in ("mixed_precision", "tracker"):  # as YAML reads a bare "no"
            return "no" if name == "mixed_precision" else "none"
        if isinstance(value, (bool, list, dict)):
            raise ValueError(f"{name} must be text, not {value!r}.")
        return str(value)
    words = {"true": True, "yes": True, "false": False, "no": False}
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in words:
            return words[str(value).lower()]
        raise ValueError(f"{name} must be true or false, not {value!r}.")
    try:
        if isinstance(value, bool) or (kind is int and float(value) != int(float(value))):
            raise ValueError
        return kind(float(value))
    except (ValueError, TypeError, OverflowError):
        what = {int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"{name} must be {what}, not {value!r}.") from None


def _parsed(name: str, value: Any, bracket: str) -> Any:
    """The YAML of a value that begins with a bracket; any other value as it is."""
    if not (isinstance(value, str) and value.lstrip().startswith(bracket)):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"{name} is not valid YAML: {value!r}.") from None


def shipped_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    folder = resources.files("dit_hub.training") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def get_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or the recipe in a YAML file.

    Raises:
        ValueError: there is no such recipe, it is damaged, or it has a field that does not exist.
    """
    shipped = shipped_recipes()
    if name in shipped:
        text = (resources.files("dit_hub.training") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    elif name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ValueError(f"There is no file {name}.")
        text = Path(name).read_text(encoding="utf-8")
    else:
        known = ", ".join(shipped)
        raise ValueError(f"There is no recipe {name!r}; shipped: {known}. A file of your own ends in .yaml.")
    try:
        settings = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not valid YAML: {str(error).splitlines()[0]}.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{name} must hold fields of a recipe, not {type(settings).__name__}.")
    return Recipe().with_settings(settings)
