"""Classifier-free guidance, and the denoiser of one sampling run with all that can be computed ahead of its loop."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from .checks import real_number
from .configuration_dit import DiTConfig
from .ecosystem import check_cache_of_unguided_steps, takes_precomputed

# Bound on the modulations held at a time. One (step, class) pair of XL/2 takes 0.78 MB, so that 250 guided steps of one
# class fit; where not all steps fit, as many as do are computed together, then the next ones.
MODULATION_BYTES = 512 * 2**20


def guide(cond: Tensor, uncond: Tensor, guidance_scale: float | Tensor, channels: int) -> Tensor:
    """Classifier-free guidance (paper, Section 3.1): uncond + scale * (cond - uncond) on the leading `channels`.

    Args:
        cond, uncond: (N, C, H, W) predictions with and without the class.
        guidance_scale: 1 means no guidance.
        channels: how many leading channels to guide; the others stay `cond`'s. Officially 3.

    Returns:
        (N, C, H, W).
    """
    guided = uncond[:, :channels] + guidance_scale * (cond[:, :channels] - uncond[:, :channels])
    return torch.cat([guided, cond[:, channels:]], dim=1)


def default_guidance(config: DiTConfig) -> float:
    """The guidance scale of a run that names none: 4 where the model has a null class, else 1, which is none."""
    return 1.0 if config.null_class is None else 4.0


def resolved_guidance(config: DiTConfig, guidance_scale: float | None) -> float:
    """The guidance scale of a run.

    Raises:
        ValueError: no finite number, or guidance of a model without a null class.
    """
    if guidance_scale is None:
        return default_guidance(config)
    guidance_scale = real_number("guidance_scale", guidance_scale)
    if guidance_scale != 1 and config.null_class is None:
        raise ValueError(f"guidance_scale {guidance_scale} needs a null class, which this model was trained without.")
    return guidance_scale


class GuidedDenoiser:
    """The predictions of one sampling run: `denoiser(step, model_input)`, guided in the steps that should be.

    Args:
        transformer: the denoiser of a pipeline, of any runtime.
        timesteps: (S,), of the scheduler.
        class_labels: the class id of each of N images; None for an unconditional model.
        guided: of each step, whether it is guided.
        guidance_scale, channels: see `guide`.
        device: where the transformer computes.
        every: of the guided steps, every such one computes both predictions; those between take over the difference
            of the last one that did, and cost one pass.

    Raises:
        ValueError: the transformer has a cache, and `every` is above 1, or it cannot do without guidance.
    """

    def __init__(
        self,
        transformer: Any,
        timesteps: Tensor,
        class_labels: Sequence[int] | None,
        guided: Sequence[bool],
        guidance_scale: float,
        channels: int,
        device: torch.device,
        every: int = 1,
    ):
        self.transformer, self.timesteps, self.guided = transformer, timesteps, guided
        count = accumulate(guided)  # of the guided steps up to each
        self._computes_both = [is_guided and (n - 1) % every == 0 for is_guided, n in zip(guided, count, strict=True)]
        self._difference: Tensor | None = None  # cond - uncond on the guided channels, of the last step with both
        self.guidance_scale, self.channels = guidance_scale, channels
        config: DiTConfig = transformer.config
        self.labels = None if class_labels is None else torch.tensor(class_labels, device=device)
        self.doubled = None  # unconditional first, as diffusers' caches expect
        if self.labels is not None:
            self.doubled = torch.cat([torch.full_like(self.labels, config.null_class or 0), self.labels])
        self._ahead = takes_precomputed(transformer)
        if self._ahead:
            self._plan(config)
        modules = transformer.modules() if isinstance(transformer, nn.Module) else ()
        self._is_hooked = any(hasattr(module, "_diffusers_hook") for module in modules)
        if not all(self._computes_both):
            check_cache_of_unguided_steps(transformer)
        if every > 1 and any(guided) and getattr(transformer, "_cache_config", None) is not None:
            raise ValueError("guidance_every starts a cache anew whenever the number of rows changes, so that it saves "
                             "nothing; leave out guidance_every or the cache.")  # fmt: skip

    def __call__(self, step: int, model_input: Tensor) -> Tensor:
        """(N, C, H, W) model input of a step -> (N, C or 2C, H, W) prediction."""
        if self._computes_both[step]:
            uncond, cond = self._predict(step, torch.cat([model_input, model_input])).chunk(2)
            self._difference = cond[:, : self.channels] - uncond[:, : self.channels]
            return guide(cond, uncond, self.guidance_scale, self.channels)
        cond = self._predict(step, model_input)
        if not self.guided[step] or self._difference is None:
            return cond
        guided = cond[:, : self.channels] + (self.guidance_scale - 1) * self._difference
        return torch.cat([guided, cond[:, self.channels :]], dim=1)

    def _predict(self, step: int, rows: Tensor) -> Tensor:
        timestep, labels = self.timesteps[step], self.doubled if self._computes_both[step] else self.labels
        if self._ahead:
            inputs: dict[str, Any] = {"precomputed": self._precomputed(step, len(rows))}
        elif self._is_hooked:
            inputs = {"timestep": timestep.expand(len(rows)), "class_labels": labels}
        else:
            return self.transformer(rows, timestep.expand(len(rows)), labels).sample
        if not self._is_hooked:
            return self.transformer(rows, **inputs).sample
        # Caches know arguments by their names and outputs as tuples. A step of both has twice the rows: states are kept
        # apart, and those of a cache that does not are of no use after a change, nor those of a run that was cut off.
        both = self._computes_both
        if not step or both[step] != both[step - 1]:
            self.transformer._reset_stateful_cache()
        with self.transformer.cache_context("guided" if both[step] else "unguided"):
            return self.transformer(hidden_states=rows, **inputs, return_dict=False)[0]

    # --- Modulations, ahead of the loop ------------------------------------------------------------------------------

    def _plan(self, config: DiTConfig) -> None:
        """Note the classes of the run, and of each row of a guided step which class is its own."""
        self._classes, self._rows = None, torch.zeros_like(self.timesteps[:1], dtype=torch.long)
        if self.labels is not None:
            asked = self.doubled if any(self.guided) else self.labels
            self._classes, self._rows = torch.unique(asked, return_inverse=True)
        self._pairs_per_step = 1 if self._classes is None else len(self._classes)
        bytes_per_step = self._pairs_per_step * config.precomputed_length * config.hidden_size * 4
        self._steps_held = max(1, MODULATION_BYTES // bytes_per_step)
        self._held: dict[int, Tensor] = {}

    def _precomputed(self, step: int, count: int) -> Tensor:
        """(count, K, D) of a step, one for each row; the last rows of a guided step are the conditional ones."""
        if step not in self._held:
            self._held.clear()
            self._held.update(self._compute_from(step))
        if self._classes is None:
            return self._held[step].expand(count, -1, -1)
        return self._held[step][self._rows[-count:]]

    def _compute_from(self, first: int) -> dict[int, Tensor]:
        """(classes, K, D) by step, from `first` on for as many steps as `MODULATION_BYTES` hold.

        They depend on timestep and class alone, so each pair is computed once, in float32.
        """
        timesteps = self.timesteps[first : first + self._steps_held]
        labels = None if self._classes is None else self._classes.repeat(len(timesteps))
        computed = self.transformer.precompute(timesteps.repeat_interleave(self._pairs_per_step), labels)
        return dict(enumerate(computed.unflatten(0, (len(timesteps), -1)).unbind(0), start=first))
