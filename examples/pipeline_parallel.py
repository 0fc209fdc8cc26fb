"""The blocks of a DiT on several devices, one after the other (GPipe), by torch.distributed.pipelining.

    torchrun --nproc-per-node 2 examples/pipeline_parallel.py [MODEL] [--out image.png]

Each process holds a share of the blocks with their modulations, and passes the tokens on; the rows of a pass (the
halves of guidance, several images) follow each other through them. All processes draw the same images. By the cost
model of docs/scaling-out.md this is for models that do not fit into one device's memory.
"""

import argparse
import math
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from dit_hub import DiTPipeline, DiTTransformer
from dit_hub.modeling_dit import DiTTransformerOutput


class _Stage(nn.Module):
    """Some of a model's blocks, in turn; the first stage embeds, the last one predicts."""

    def __init__(self, model: Any, index: int, count: int):
        super().__init__()
        share = math.ceil(model.config.num_hidden_layers / count)
        self.blocks = nn.ModuleList(model.blocks[index * share : (index + 1) * share])
        self.is_first, self.is_last = index == 0, index == count - 1
        self.final_layer: Any = model.final_layer if self.is_last else None
        model.blocks, model.final_layer = nn.ModuleList(), nn.Identity()  # the others' weights are let go
        self.rows = model.config.modulation_rows
        self._held = (model,)  # embeds and conditions; in a tuple it is no part of this module

    @property
    def model(self) -> Any:
        return self._held[0]

    def modulations(self, condition: Tensor) -> Tensor:
        """(N, D) condition -> (N, K, D), those of this stage's layers."""
        layers: list[Any] = [*self.blocks, *([self.final_layer] if self.is_last else [])]
        return torch.cat([row for layer in layers for row in layer.adaLN_modulation(condition)], dim=1)

    def forward(self, hidden_states: Tensor, precomputed: Tensor) -> Tensor:
        size = self.model.config.sample_height_width
        modulations = precomputed.unsqueeze(2).unbind(1)
        tokens: Any = self.model.embed(hidden_states) if self.is_first else hidden_states
        for index, block in enumerate(self.blocks):
            tokens = block(tokens, None, modulations[index * self.rows : (index + 1) * self.rows])
        if not self.is_last:
            return tokens.contiguous()  # which sending needs
        return self.model.unpatchify(self.final_layer(tokens, None, modulations[-2:]), *size).float()


class PipelinedDenoiser(nn.Module):
    """A denoiser of adaLN-Zero or adaLN, in place of a pipeline's transformer; each process has a stage of it.

    Args:
        model: whole, and of no use afterwards; its blocks at the training size.
        group: of processes; None for all.
    """

    def __init__(self, model: DiTTransformer, group: Any = None):
        super().__init__()
        self.group, self.count = group, dist.get_world_size(group)
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        self.stage = _Stage(model, dist.get_rank(group), self.count)
        self._schedules: dict[tuple[int, ...], Any] = {}

    def precompute(self, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """As `DiTTransformer.precompute`, of this stage's layers alone."""
        return self.stage.modulations(self.stage.model.condition(timestep, class_labels))

    @torch.no_grad()
    def forward(
        self, hidden_states: Tensor, timestep: Any = None, class_labels: Any = None, precomputed: Any = None
    ) -> DiTTransformerOutput:
        if precomputed is None:
            precomputed = self.precompute(torch.as_tensor(timestep).expand(len(hidden_states)), class_labels)
        schedule = self._schedule(hidden_states)
        inputs = (hidden_states,) if self.stage.is_first else ()
        output: Any = schedule.eval(*inputs, precomputed=precomputed)
        if not self.stage.is_last:
            shape = (len(hidden_states), self.config.out_channels, *hidden_states.shape[2:])
            output = hidden_states.new_empty(shape)
        output = output.contiguous()
        dist.broadcast(output, group_src=self.count - 1, group=self.group)
        return DiTTransformerOutput(sample=output)

    def _schedule(self, hidden_states: Tensor) -> Any:
        """A row at a time; one schedule for each shape of a pass, since stages keep their buffers."""
        shape = tuple(hidden_states.shape)
        if shape not in self._schedules:
            stage = PipelineStage(self.stage, dist.get_rank(self.group), self.count, self.device, group=self.group)
            self._schedules[shape] = ScheduleGPipe(stage, n_microbatches=shape[0])
        return self._schedules[shape]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="dit-toy-shapes")
    parser.add_argument("--out", default="pipeline.png")
    arguments = parser.parse_args()
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpus else "gloo")
    pipe: Any = DiTPipeline.from_pretrained(arguments.model)
    if on_gpus:
        pipe.to("cuda")
    pipe.transformer = PipelinedDenoiser(pipe.transformer)
    labels = [0] if pipe.transformer.config.num_classes else None
    images = pipe(labels, generator=torch.Generator().manual_seed(0), num_images_per_label=4).images
    if dist.get_rank() == 0:
        images[0].save(arguments.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
