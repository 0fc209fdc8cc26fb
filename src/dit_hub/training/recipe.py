"""A training run as data: one short dataclass."""

from dataclasses import dataclass, fields, replace
from typing import Any

from ..configuration_dit import nearest


@dataclass(frozen=True)
class Recipe:
    """What a training run does. The defaults are the toy's, after a published build-in-public series.

    Args:
        model: name of a size, as `DiTConfig.from_name` takes it.
        images_per_class: size of the data set.
        epochs: passes over the data.
        batch_size: pictures per step.
        learning_rate: AdamW's, at the start; it falls to zero along a cosine.
        max_grad_norm: gradients are clipped to this norm.
        num_train_timesteps: noise levels T.
        beta_start, beta_end: the linear noise schedule.
        ema_decay: keep an exponential moving average of the weights, and save it instead; 0 for none.
        mixed_precision: "no", "bf16" or "fp16".
        seed: seeds data, weights and noise.
    """

    model: str = "toy"
    images_per_class: int = 200
    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 5e-4
    max_grad_norm: float = 1.0
    num_train_timesteps: int = 200
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    ema_decay: float = 0.0
    mixed_precision: str = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "images_per_class",
            "epochs",
            "batch_size",
            "num_train_timesteps",
            "learning_rate",
            "max_grad_norm",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}.")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_start {self.beta_start} and beta_end {self.beta_end} must rise between 0 and 1.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be 0 (off) or below 1, not {self.ema_decay}.")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision must be no, bf16 or fp16, not {self.mixed_precision!r}.")

    def with_settings(self, settings: dict[str, Any]) -> "Recipe":
        """The recipe with some fields changed; text is read as the field's type.

        Raises:
            ValueError: a field that does not exist, or a value of the wrong type.
        """
        types = {field.name: type(getattr(self, field.name)) for field in fields(self)}
        changes = {}
        for name, value in settings.items():
            if name not in types:
                raise ValueError(f"A recipe has no field {name!r}. The nearest names: {nearest(name, list(types))}.")
            try:
                changes[name] = types[name](value)
            except ValueError:
                kind = {int: "a whole number", float: "a number"}[types[name]]
                raise ValueError(f"{name} must be {kind}, not {value!r}.") from None
        return replace(self, **changes)


RECIPES = {
    "toy": Recipe(),
    # The embedded model: the same data and noise, trained until shapes and colours come out right every time.
    "toy-shapes": Recipe(epochs=600, learning_rate=1e-3, ema_decay=0.999),
}


def get_recipe(name: str) -> Recipe:
    """A shipped recipe by name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in RECIPES:
        raise ValueError(f"There is no recipe named {name!r}; shipped: {', '.join(RECIPES)}.")
    return RECIPES[name]
