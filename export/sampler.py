"""The whole denoising loop as one ONNX file, which needs nothing of Python to sample."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop

from dit_hub.configuration_dit import DiTConfig
from dit_hub.guidance import guide
from dit_hub.modeling_dit import DiTTransformer
from dit_hub.pipeline_dit import DiTPipeline
from dit_hub.solvers import COLUMNS, solver_table

from .component import DRAWS_DIMENSION, MODEL_FILE, ROWS_DIMENSION, STEPS_DIMENSION
from .graphs import export_graph
from .parts import BATCHES, MAX_DECODED, in_float32, write_settings
from .reference import write_reference

# Attention as one operator (opset 23) does not build inside a loop in TensorRT, and Scan does not run in OpenVINO; a
# Loop of opset 20 runs everywhere.
SAMPLER_OPSET = 20

# The table that the file carries for those who bring none.
DEFAULT_STEPS = 50

_STEPS = 4  # of the reference


class _Sampler(nn.Module):
    """The loop of `DiTPipeline` over a table of `dit_hub.solvers`, with the modulations computed before it."""

    def __init__(self, transformer: DiTTransformer, vae: Any, draws_pictures: bool):
        super().__init__()
        self.transformer, self.vae, self.config = transformer, vae, transformer.config
        self._draws_pictures = draws_pictures

    def forward(
        self,
        latents: Tensor,
        table: Tensor,
        noise: Tensor,
        class_labels: Tensor | None = None,
        guidance_scale: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The loop.

        Args:
            latents: (N, C, H, W) noise.
            table: (S, 9) of `dit_hub.solvers`.
            noise: (M, N, C, H, W) of the steps of a stochastic solver; the last one stands for all further steps.
            class_labels: (N,), or (2N,) for guidance: the classes, then N times the null class.
            guidance_scale: a scalar; without effect on N labels.

        Returns:
            (N, C, H, W) latents; and pictures, (N, height, width, channels) in uint8, where the graph has them.
        """
        channels, steps = self.config.in_channels, table.shape[0]
        last_noise = torch.scalar_tensor(noise.shape[0] - 1, dtype=torch.int64)
        conditions = self._conditions(table[:, 0], class_labels)  # (S, rows, K, D)

        def unfinished(step: Tensor, sample: Tensor, previous: Tensor) -> Tensor:
            return step < steps

        def advance(step: Tensor, sample: Tensor, previous: Tensor) -> tuple[Tensor, ...]:
            # Each of shape (1,): split takes one operator, scalars would take two for each.
            _, p, q, clip, a, b, c, scale, exponent = table.index_select(0, step.view(1)).view(-1).split(1)
            condition = conditions.index_select(0, step.view(1)).squeeze(0)
            prediction = self._predict(sample, condition, guidance_scale)
            estimate = p * sample + q * prediction[:, :channels]
            estimate = torch.minimum(torch.maximum(estimate, -clip), clip)
            fresh = noise.index_select(0, torch.minimum(step, last_noise).view(1)).squeeze(0)
            if self.config.learn_sigma:
                fresh = fresh * (exponent * prediction[:, channels:]).exp()
            return step + 1, a * sample + b * estimate + c * previous + scale * fresh, estimate

        start = (torch.zeros((), dtype=torch.int64), latents, torch.zeros_like(latents))
        sample = while_loop(unfinished, advance, start)[1]
        return (sample, self._pictures(sample)) if self._draws_pictures else (sample,)

    def _conditions(self, timesteps: Tensor, class_labels: Tensor | None) -> Tensor:
        """(S, rows, K, D): every pair of timestep and row, once."""
        steps = timesteps.shape[0]
        if class_labels is None:
            return self.transformer.precompute(timesteps)[:, None]
        rows = class_labels.shape[0]
        pairs = timesteps[:, None].expand(steps, rows).reshape(-1), class_labels[None].expand(steps, rows).reshape(-1)
        conditions = self.transformer.precompute(*pairs)
        return conditions.view(steps, rows, *conditions.shape[1:])

    def _predict(self, sample: Tensor, condition: Tensor, guidance_scale: Tensor | None) -> Tensor:
        count, rows = sample.shape[0], condition.shape[0]
        if guidance_scale is None:
            return self.transformer(sample, precomputed=condition.expand(count, -1, -1)).sample
        # Where there are as many rows as pictures, both halves below are the whole, and guidance adds nothing.
        prediction = self.transformer(torch.cat([sample, sample])[:rows], precomputed=condition).sample
        return guide(prediction[:count], prediction[rows - count :], guidance_scale, self.config.guided_channels)

    def _pictures(self, sample: Tensor) -> Tensor:
        """(N, height, width, channels) uint8."""
        if self.vae is not None:
            shift = getattr(self.vae.config, "shift_factor", None) or 0.0
            sample = self.vae.decode(sample / self.vae.config.scaling_factor + shift).sample
        return ((sample / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


class _Recorder:
    """Stands for a sampler in a pipeline and keeps what it is given."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, config: DiTConfig):
        self.config = config
        self.inputs: dict[str, Any] = {}

    def sample(self, latents: Tensor, class_labels: Any, guidance_scale: float, table: Any, noise: Tensor) -> Tensor:
        self.inputs = {"latents": latents, "table": torch.from_numpy(table), "noise": noise}
        if class_labels is not None:
            self.inputs |= {"class_labels": class_labels, "guidance_scale": torch.tensor(guidance_scale)}
        return latents


@torch.no_grad()
def write_sampler(
    pipeline: DiTPipeline,
    exported: Any,
    folder: Path,
    decode: bool = False,
    pictures: bool = True,
    opset: int = SAMPLER_OPSET,
) -> Any:
    """Write the sampler of a pipeline into a component folder, there already.

    Args:
        pipeline: its transformer in float32; the reference is what it samples.
        exported: the transformer in the precision of the file.
        folder: of the component.
        decode: put the VAE into the file.
        pictures: also return pictures where the model is of pixels or the VAE is in the file.
        opset: version of the ONNX operators.

    Returns:
        The scheduler whose table the file carries, and which a pipeline of it takes.
    """
    config: Any = pipeline.transformer.config
    vae = in_float32(pipeline.vae) if decode and pipeline.vae is not None else None
    scheduler = _table_scheduler(pipeline.scheduler)
    config.save_pretrained(folder)
    write_settings(folder, config.sample_height_width)
    generator = torch.Generator().manual_seed(0)
    shape = (2, config.in_channels, *config.sample_height_width)
    inputs = {
        "latents": torch.randn(shape, generator=generator),
        "table": torch.from_numpy(solver_table(scheduler, 3)),
        "noise": torch.randn(3, *shape, generator=generator),
    }
    batch = torch.export.Dim("batch", max=MAX_DECODED) if vae is not None else "batch"
    dimensions: dict[str, Any] = {
        "latents": {0: batch},
        "table": {0: STEPS_DIMENSION},
        "noise": {0: DRAWS_DIMENSION, 1: batch},
    }
    if config.num_classes:
        inputs["class_labels"], dimensions["class_labels"] = torch.tensor([0, config.num_classes - 1]), {0: batch}
    if config.null_class is not None:
        inputs["class_labels"] = torch.tensor([0, config.num_classes - 1, config.null_class, config.null_class])
        inputs["guidance_scale"], dimensions["guidance_scale"] = torch.tensor(4.0), None
        dimensions["class_labels"] = {0: ROWS_DIMENSION}
    draws = pictures and (vae is not None or config.draws_pixels)
    sampler = _Sampler(exported, vae, draws)
    outputs = ["sample", "images"][: 1 + draws]
    facts = {
        "id2label": pipeline.id2label,
        "null_class": config.null_class,
        "columns": COLUMNS,
        "table": solver_table(scheduler, DEFAULT_STEPS).tolist(),
        "latents": list(shape[1:]),
        "scheduler": type(scheduler).__name__,
    }
    metadata = {f"dit_hub.{name}": json.dumps(value) for name, value in facts.items()}
    export_graph(sampler, inputs, dimensions, outputs, folder / MODEL_FILE, opset, metadata)
    recorder = _Recorder(config)
    recording, reference = DiTPipeline(recorder, scheduler), DiTPipeline(pipeline.transformer, scheduler)
    cases = []
    for count in BATCHES:
        sample_latents(recording, count, _STEPS)
        cases.append((recorder.inputs, sample_latents(reference, count, _STEPS)))
    write_reference(folder, cases)
    return scheduler


def _table_scheduler(scheduler: Any) -> Any:
    """The scheduler itself, or DPM-Solver++ for the same noise levels where it cannot be written as a table."""
    try:
        solver_table(scheduler, 2)
    except ValueError:
        return diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config)
    return scheduler


def sample_latents(pipeline: DiTPipeline, batch: int, steps: int) -> Tensor:
    """What a pipeline samples from a noise that depends on the batch alone."""
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.transformer.config
    return pipeline(
        [index % config.num_classes for index in range(batch)] if config.num_classes else None,
        num_images_per_label=1 if config.num_classes else batch,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(batch),
        output_type="latent",
    ).images


def sample_reference(pipeline: DiTPipeline, inputs: dict[str, Tensor]) -> Tensor:
    """What a pipeline makes of a case of the sampler's reference."""
    return sample_latents(pipeline, len(inputs["latents"]), _STEPS)
