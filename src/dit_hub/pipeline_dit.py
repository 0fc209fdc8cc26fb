"""DiTPipeline: labels -> noise -> denoise -> decode, with diffusers' schedulers and any runtime's denoiser."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from diffusers import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dit_hub.conversion.origin import DEFAULT_VAE

from .checks import (
    initial_noise,
    random_source,
    replaced_latents,
    rising_pair,
    shown,
    whole_number,
)
from .configuration_dit import DiTConfig
from .guidance import GuidedDenoiser, resolved_guidance
from .hub import HubPipeline
from .labels import Labels, label_ids
from .lora import LoraMixin
from .schedulers import (
    check_scheduler,
    checked_eta,
    default_steps,
    prediction_for,
    scaled_input,
    set_timesteps,
    without_foreign_variance,
)
from .solvers import solver_table
from .tables import COLUMNS
from .vaes import decode_latents, spatial_compression


@contextmanager
def _evaluation(components: Iterable[Any]) -> Iterator[None]:
    """Modules compute as in evaluation within the block; each part has its own mode back after it."""
    modules = [component for component in components if isinstance(component, torch.nn.Module)]
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


class DiTPipeline(HubPipeline, LoraMixin):
    """Class-conditional (or unconditional) image generation with a Diffusion Transformer.

    Args:
        transformer: the denoiser: a `DiTTransformer` or any runtime's equivalent, with `.config`, `.dtype`, `.device`
            and `transformer(hidden_states, timestep, class_labels).sample`.
        scheduler: any diffusers scheduler of the DDPM, Karras or flow-matching families.
        vae: decodes latents to images; None for models of pixels.
        id2label: names of the classes by id; several names of one class are separated by commas.

    A scheduler that takes the place of this one later must have its noise levels, which the model was trained for.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents", "noise_pred"]

    def __init__(self, transformer: Any, scheduler: Any, vae: Any = None, id2label: dict | None = None):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label={int(key): name for key, name in id2label.items()} if id2label else None)
        self._own_scheduler = scheduler
        self._class_labels: list[int | None] = []
        self._guidance_scale, self._num_timesteps, self._interrupt = 1.0, 0, False
        self._current_timestep: Tensor | None = None

    @property
    def components(self) -> dict[str, Any]:
        """The arguments of another pipeline of the same model: `DiTPipeline(**pipe.components)`."""
        return {**super().components, "id2label": self.id2label or None}

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As diffusers' `from_pipe`, with what is known of the weights: their origin and licence.

        By itself that leaves out a decoder whose class our signature does not name.
        """
        made = super().from_pipe(pipeline, **{"vae": getattr(pipeline, "vae", None), **kwargs})
        for name in (
            "origin",
            "_facts",
            "_loaded_weights",
            "_sources",
            "_own_classes",
            "_base_classes",
            "_merged_adapters",
        ):
            if hasattr(pipeline, name):
                setattr(made, name, getattr(pipeline, name))
        return made

    @property
    def class_labels(self) -> list[int | None]:
        """For callbacks: the class id of each image of the run, None where the model is unconditional."""
        return self._class_labels

    @property
    def guidance_scale(self) -> float:
        """For callbacks: the guidance scale of the run."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """For callbacks: the steps of the run."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Any:
        """For callbacks and caches: the timestep of the step being computed; None outside of a run."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether the run is to end after the step being computed; a callback sets it with `pipe._interrupt = True`."""
        return self._interrupt

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes by id; empty where they have none."""
        return {int(key): name for key, name in (self.config.get("id2label") or {}).items()}

    @property
    def _execution_device(self) -> torch.device:
        if isinstance(self.transformer, torch.nn.Module):
            return super()._execution_device
        return self.transformer.device  # other runtimes are no modules, so diffusers does not see where they compute

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As diffusers' `to`.

        Raises:
            ValueError: a component of another runtime, which stays where it was loaded, should move.
        """
        for component in (self.transformer, self.vae):
            if not isinstance(component, torch.nn.Module) and hasattr(component, "to"):
                component.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent pixel along a side: 8 for Stable Diffusion's VAE, 1 for models of pixels."""
        return spatial_compression(self.vae)

    def get_label_ids(self, labels: Labels) -> list[int]:
        """Class ids of labels given by id or by name; a lone one counts as a list of one.

        Raises:
            ValueError: an id out of range, or an unknown or ambiguous name; the message lists the nearest names.
        """
        return label_ids(labels, self.id2label, self.transformer.config.num_classes)

    def latent_height_width(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Height and width of the latents of an image; see `__call__` for the arguments.

        Raises:
            ValueError: a size that the model does not draw.
        """
        config: DiTConfig = self.transformer.config
        factor, (default_height, default_width) = self.vae_scale_factor, config.sample_height_width
        height = default_height * factor if height is None else whole_number("height", height)
        width = default_width * factor if width is None else whole_number("width", width)
        for name, side in (("height", height), ("width", width)):
            if side <= 0 or side % (factor * config.patch_size):
                raise ValueError(
                    f"{name} {side} is not divisible by {factor * config.patch_size}, as this model needs."
                )
        size = height // factor, width // factor
        if config.pos_embed == "learned" and size != config.sample_height_width:
            raise ValueError(f"This model has learned positions and draws {default_width * factor}x"
                             f"{default_height * factor} images only, not {width}x{height}.")  # fmt: skip
        return size

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        num_images_per_label: int = 1,
        num_images_per_prompt: int | None = None,
        guidance_channels: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_every: int = 1,
        timesteps: Sequence[int] | Literal["official"] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Tensor]], dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Generate images.

        Args:
            class_labels: class ids or names; one, a list, or an integer tensor. None for unconditional models.
            guidance_scale: strength of classifier-free guidance; None means 4.0 where the model has a null class, else
                1.0, which is no guidance.
            num_inference_steps: denoising steps; None means 50, or as `default_steps` says of the scheduler.
            num_images_per_label: images of each label, one after the other.
            num_images_per_prompt: diffusers' name of the same.
            guidance_channels: how many leading channels guidance touches; None means the model's own (officially 3).
            guidance_interval: guide only where timestep / training timesteps lies within these two, both included
                (Kynkäänniemi et al. 2024); the other steps cost one pass, not two.
            guidance_every: predict without the class in every such guided step only; those between guide by the last
                difference that the class made, and cost one pass.
            timesteps: the timesteps to visit, from noise to data; "official" means `official_timesteps`. None leaves
                them to the scheduler.
            sigmas: the noise levels to visit, for schedulers whose `set_timesteps` takes them, in its terms.
            eta: the DDIM paper's eta, for schedulers that take it.
            generator: source of all noise; a list holds one for each image.
            latents: (N, C, height, width) initial noise of unit variance, instead of drawing it.
            height, width: of the image, in pixels; None means the training size.
            output_type: "pil", "np" (N, H, W, C in 0..1), "pt" (N, C, H, W in 0..1) or "latent" (undecoded).
            return_dict: return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called as f(pipeline, step, timestep, tensors) after each step; the latents of a
                returned dict replace the current ones.
            callback_on_step_end_tensor_inputs: what `tensors` holds: "latents", "noise_pred" (the guided prediction).

        Returns:
            An `ImagePipelineOutput` whose `images` are as `output_type` says.

        Raises:
            ValueError: arguments that the model or the scheduler cannot serve.
        """
        self._check_output(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        latents = None if latents is None else initial_noise(latents)
        if num_images_per_prompt is not None:
            if num_images_per_label != 1:
                raise ValueError("num_images_per_prompt and num_images_per_label are the same; give one.")
            num_images_per_label = whole_number("num_images_per_prompt", num_images_per_prompt, 1)
        labels = self._expand_labels(class_labels, num_images_per_label, latents)
        self._class_labels = labels
        generator = random_source(generator, len(labels))
        guidance_scale = self._guidance_scale = resolved_guidance(self.transformer.config, guidance_scale)
        interval = rising_pair("guidance_interval", guidance_interval)
        config: DiTConfig = self.transformer.config
        every = whole_number("guidance_every", guidance_every, 1)
        channels = config.guided_channels
        if guidance_channels is not None:
            channels = whole_number("guidance_channels", guidance_channels, 1, config.in_channels)
        latent = self.vae is not None or not config.draws_pixels
        check_scheduler(self.scheduler, config, self._own_scheduler, latent)
        self.scheduler = without_foreign_variance(self.scheduler)
        step_kwargs = self._step_kwargs(generator, eta)
        whole_loop = hasattr(self.transformer, "sample")  # in one call of a runtime
        if whole_loop and (
            callback_on_step_end
            or sigmas is not None
            or (interval, every) != ((0, 1), 1)
            or channels != config.guided_channels
        ):
            raise ValueError("An exported sampler runs its loop as a whole: without callback, sigmas, guidance "
                             "interval or every, or guidance of other channels than it was exported with.")  # fmt: skip
        if num_inference_steps is None:
            num_inference_steps = default_steps(self.scheduler)
        set_timesteps(self.scheduler, num_inference_steps, timesteps, self._execution_device, sigmas)
        self._num_timesteps, self._interrupt = len(self.scheduler.timesteps), False
        sample: Any = self._initial_latents(latents, len(labels), height, width, generator)
        with _evaluation(self.components.values()):
            if whole_loop:
                table = solver_table(self.scheduler, num_inference_steps, timesteps, step_kwargs.get("eta", 0.0))
                sample = self._sample_at_once(sample, labels, guidance_scale, table, step_kwargs.get("generator"))
            else:
                guided = [guidance_scale != 1 and self._within(t, interval) for t in self.scheduler.timesteps]
                classes = None if labels[0] is None else [label for label in labels if label is not None]
                predict = GuidedDenoiser(self.transformer, self.scheduler.timesteps, classes, guided, guidance_scale,
                                         channels, self._execution_device, every)  # fmt: skip
                sample = self._denoise(
                    sample, predict, step_kwargs, callback_on_step_end, callback_on_step_end_tensor_inputs
                )
            images: Any = sample if output_type == "latent" else self.decode(sample, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: Literal["pil", "np", "pt"] = "pil") -> Any:
        """(N, C, H, W) latents, or pixels in -1..1 without a VAE -> images, as `__call__` returns them."""
        pixels = latents if self.vae is None else decode_latents(self.vae, latents)
        images = (pixels.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.cpu().permute(0, 2, 3, 1).numpy()
        return arrays if output_type == "np" else self.numpy_to_pil(arrays)

    # --- Preparation -------------------------------------------------------------------------------------------------

    def _check_output(self, output_type: str, callback: Any, tensor_inputs: Sequence[str]) -> None:
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be pil, np, pt or latent, not {output_type!r}.")
        if output_type == "pil" and self.vae is None and not self.transformer.config.draws_pixels:
            raise ValueError(
                f"This model draws latents of {self.transformer.config.in_channels} channels and the pipeline has no "
                f'decoder for them: set pipe.vae = AutoencoderKL.from_pretrained("{DEFAULT_VAE}"), or pass '
                'output_type="latent".'
            )
        if callback is not None and not callable(callback):
            raise ValueError(f"callback_on_step_end must be a function, not {shown(callback)}.")
        if isinstance(tensor_inputs, str) or not isinstance(tensor_inputs, Sequence):
            raise ValueError(f"callback_on_step_end_tensor_inputs must be a list of names, not {shown(tensor_inputs)}.")
        for name in tensor_inputs:
            if name not in self._callback_tensor_inputs:
                known = ", ".join(self._callback_tensor_inputs)
                raise ValueError(f"callback_on_step_end_tensor_inputs may name {known}, not {shown(name)}.")

    def _expand_labels(self, class_labels: Labels, per_label: int, latents: Tensor | None) -> list[int | None]:
        per_label = whole_number("num_images_per_label", per_label, 1)
        if self.transformer.config.num_classes:
            labels = self.get_label_ids(class_labels)
            if not labels:
                raise ValueError(f"Give at least one label of the {self.transformer.config.num_classes} classes.")
            return [label for label in labels for _ in range(per_label)]
        if class_labels is not None:
            raise ValueError(f"This model is unconditional and takes no class_labels, but got {shown(class_labels)}.")
        return [None] * (per_label if latents is None or per_label > 1 else len(latents))

    def _initial_latents(
        self,
        latents: Tensor | None,
        count: int,
        height: int | None,
        width: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Tensor:
        shape = (count, self.transformer.config.in_channels, *self.latent_height_width(height, width))
        if latents is None:
            # float32 whatever the weights are: the solver's sums stay exact.
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must have the shape {shape}, not {tuple(latents.shape)}.")
        return latents.to(self._execution_device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _step_kwargs(self, generator: Any, eta: float) -> dict[str, Any]:
        eta, accepted = checked_eta(self.scheduler, eta), inspect.signature(self.scheduler.step).parameters
        return {key: value for key, value in {"generator": generator, "eta": eta}.items() if key in accepted}

    def _within(self, timestep: Tensor, interval: tuple[float, float]) -> bool:
        return interval[0] <= float(timestep) / self.scheduler.config.num_train_timesteps <= interval[1]

    # --- Denoising ---------------------------------------------------------------------------------------------------

    def _denoise(
        self,
        sample: Any,
        predict: GuidedDenoiser,
        step_kwargs: dict[str, Any],
        callback_on_step_end: Callable[..., Any] | None,
        tensor_inputs: Sequence[str],
    ) -> Tensor:
        """(N, C, H, W) noise -> latents."""
        try:
            with self.progress_bar(total=len(self.scheduler.timesteps)) as progress:  # pyright: ignore[reportCallIssue]
                for i, t in enumerate(self.scheduler.timesteps):
                    if self._interrupt:
                        break
                    self._current_timestep = t
                    prediction = predict(i, scaled_input(self.scheduler, sample, t))
                    prediction = prediction_for(self.scheduler, prediction, sample.shape[1])
                    sample = self.scheduler.step(prediction, t, sample, **step_kwargs, return_dict=False)[0]
                    if callback_on_step_end is not None:
                        tensors = {"latents": sample, "noise_pred": prediction}
                        given = {name: tensors[name] for name in tensor_inputs}
                        sample = replaced_latents(sample, callback_on_step_end(self, i, t, given))
                    progress.update()
        finally:
            self._current_timestep = None
        return sample

    def _sample_at_once(
        self,
        sample: Tensor,
        labels: list[int | None],
        guidance_scale: float,
        table: np.ndarray,
        generator: Any,
    ) -> Tensor:
        """The same in one call of the runtime, with the noise that the scheduler would draw."""
        sample = scaled_input(self.scheduler, sample, self.scheduler.timesteps[0])
        scales = table[:, COLUMNS.index("noise")]
        # Drawn as the scheduler would: nothing for a step without noise. One of zeros is enough where none has any.
        draws = [
            randn_tensor(sample.shape, generator=generator, device=sample.device) if scale else torch.zeros_like(sample)
            for scale in scales
        ]
        noise = torch.stack(draws if scales.any() else draws[:1])
        class_labels = None if labels[0] is None else torch.tensor(labels)
        return self.transformer.sample(sample, class_labels, guidance_scale, table, noise)
