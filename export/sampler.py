"""The whole denoising loop as one ONNX file, which samples without Python."""

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
from dit_hub.schedulers import TableScheduler, default_steps
from dit_hub.solvers import solver_table, starts_from_unit_noise
from dit_hub.tables import COLUMNS, MAX_HISTORY
from dit_hub.vaes import decode_latents

from .component import DRAWS, MODEL_FILE, NUMBERS, ROWS, STEPS
from .graphs import export_graph
from .parts import BATCHES, MAX_DECODED, Plan, write_facts

_STEPS = 4  # of the reference


class _Sampler(nn.Module):
    """The loop of `DiTPipeline` over a table of `dit_hub.solvers`, with the modulations computed before it."""

    def __init__(self, transformer: DiTTransformer, vae: Any, returns_images: bool):
        super().__init__()
        self.transformer, self.vae, self.config = transformer, vae, transformer.config
        self._returns_images = returns_images

    def forward(
        self,
        latents: Tensor,
        table: Tensor,
        noise: Tensor,
        class_labels: Tensor | None = None,
        guidance_scale: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Denoise, as `dit_hub.export.component.Sampler.sample` does.

        Guidance takes (2N,) labels, the classes and then N times the null class; its scale has no effect on N labels.

        Returns:
            (N, C, H, W) latents; and images, (N, height, width, channels) in uint8, where the graph has them.
        """
        channels, steps = self.config.in_channels, table.shape[0]
        last_noise = torch.scalar_tensor(noise.shape[0] - 1, dtype=torch.int64)
        conditions = self._conditions(table[:, 0], class_labels)  # (S, rows, K, D)

        def unfinished(step: Tensor, sample: Tensor, history: Tensor) -> Tensor:
            return step < steps

        def advance(step: Tensor, sample: Tensor, history: Tensor) -> tuple[Tensor, ...]:
            row = table.index_select(0, step.view(1)).view(-1)
            # Each of shape (1,): split takes one operator, scalars would take two for each.
            _, p, q, clip, a, b, c, scale, exponent = row[: len(COLUMNS)].split(1)
            condition = conditions.index_select(0, step.view(1)).squeeze(0)
            prediction = self._predict(sample, condition, guidance_scale)
            estimate = p * sample + q * prediction[:, :channels]
            estimate = torch.minimum(torch.maximum(estimate, -clip), clip)
            fresh = noise.index_select(0, torch.minimum(step, last_noise).view(1)).squeeze(0)
            if self.config.learn_sigma:
                fresh = fresh * (exponent * prediction[:, channels:]).exp()
            weights = torch.cat([c, row[len(COLUMNS) :]])
            remembered = (weights.view(-1, 1, 1, 1, 1) * history).sum(0)
            sample = a * sample + b * estimate + remembered + scale * fresh
            return step + 1, sample, torch.cat([estimate[None], history[:-1]])

        history = torch.zeros_like(latents)[None].expand(table.shape[1] - len(COLUMNS) + 1, -1, -1, -1, -1)
        start = (torch.zeros((), dtype=torch.int64), latents, history.clone())
        sample = while_loop(unfinished, advance, start)[1]
        return (sample, self._images(sample)) if self._returns_images else (sample,)

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
        # Where there are as many rows as images, both halves below are the whole, and guidance adds nothing.
        prediction = self.transformer(torch.cat([sample, sample])[:rows], precomputed=condition).sample
        uncond = prediction.narrow(0, rows - count, count)
        return guide(prediction[:count], uncond, guidance_scale, self.config.guided_channels)

    def _images(self, sample: Tensor) -> Tensor:
        """(N, height, width, channels) uint8."""
        if self.vae is not None:
            sample = decode_latents(self.vae, sample)
        return ((sample / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


class _Recorder:
    """A stand-in for a sampler in a pipeline, which keeps what it is given."""

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
def write_sampler(pipeline: DiTPipeline, exported: Any, vae: Any, folder: Path, plan: Plan) -> Any:
    """Write the sampler of a pipeline into a component's folder, there already.

    Args:
        pipeline: its transformer in float32; the reference is what it samples.
        exported: the transformer in the precision of the file.
        vae: goes into the file, in float32; or None.
        folder: of the component.
        plan: how to write it.

    Returns:
        The scheduler whose table the file carries, and which a pipeline of it takes.
    """
    config: Any = pipeline.transformer.config
    scheduler = _table_scheduler(pipeline.scheduler)
    batch = "batch" if vae is None else torch.export.Dim("batch", max=MAX_DECODED)
    inputs, dimensions = _example(config, batch)
    returns_images = plan.images and (vae is not None or config.draws_pixels)
    facts = {
        "id2label": pipeline.id2label,
        "null_class": config.null_class,
        "columns": COLUMNS,
        "table": solver_table(scheduler, default_steps(scheduler)).tolist(),
        "latents": [config.in_channels, *config.sample_height_width],
        "scheduler": type(scheduler).__name__,
    }
    metadata = {f"dit_hub.{name}": json.dumps(value) for name, value in facts.items()}
    outputs = ["sample", "images"] if returns_images else ["sample"]
    sampler = _Sampler(exported, vae, returns_images)
    export_graph(sampler, inputs, dimensions, outputs, folder / MODEL_FILE, plan.sampler_opset, metadata)

    recorder = _Recorder(config)
    recording, reference = DiTPipeline(recorder, scheduler), DiTPipeline(pipeline.transformer, scheduler)
    cases = []
    for count in BATCHES:
        sample_latents(recording, count)
        cases.append((recorder.inputs, sample_latents(reference, count)))
    config.save_pretrained(folder)
    write_facts(folder, cases, config.sample_height_width, history=MAX_HISTORY)
    return scheduler


def _example(config: Any, batch: Any) -> tuple[dict[str, Tensor], dict[str, dict[int, Any]]]:
    """Inputs of a sampler, two samples, and their dynamic dimensions."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, config.in_channels, *config.sample_height_width)
    inputs = {
        "latents": torch.randn(shape, generator=generator),
        "table": torch.zeros(3, len(COLUMNS) + 2),
        "noise": torch.randn(3, *shape, generator=generator),
    }
    dimensions = {"latents": {0: batch}, "table": {0: STEPS, 1: NUMBERS}, "noise": {0: DRAWS, 1: batch}}
    labels = [0, config.num_classes - 1]
    if config.null_class is not None:
        inputs["class_labels"] = torch.tensor([*labels, config.null_class, config.null_class])
        inputs["guidance_scale"] = torch.tensor(4.0)
        dimensions |= {"class_labels": {0: ROWS}, "guidance_scale": {}}
    elif config.num_classes:
        inputs["class_labels"], dimensions["class_labels"] = torch.tensor(labels), {0: batch}
    return inputs, dimensions


def _table_scheduler(scheduler: Any) -> Any:
    """The scheduler itself, or DPM-Solver++ for the same noise levels where no table says all.

    Of another form, or starting from noise of another variance than one, which those who bring the noise must know.
    """
    try:
        steps = default_steps(scheduler)
        solver_table(scheduler, steps)
        if starts_from_unit_noise(scheduler, steps):
            return scheduler
    except ValueError:
        pass
    return diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config)


def sample_latents(pipeline: DiTPipeline, batch: int, steps: int = _STEPS) -> Tensor:
    """The latents that a pipeline samples from a noise that depends on the batch alone; by default as the reference."""
    pipeline.set_progress_bar_config(disable=True)
    if isinstance(pipeline.scheduler, TableScheduler):
        steps = default_steps(pipeline.scheduler)
    config = pipeline.transformer.config
    return pipeline(
        [index % config.num_classes for index in range(batch)] if config.num_classes else None,
        num_images_per_label=1 if config.num_classes else batch,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(batch),
        output_type="latent",
    ).images
