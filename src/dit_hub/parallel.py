"""A denoiser whose rows are shared out among processes: the halves of guidance on two GPUs, and more rows on more."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .modeling_dit import DiTTransformerOutput


class CFGParallel(nn.Module):
    """A denoiser that computes its share of the rows of each pass, and gathers the others' (CFG parallelism).

    A guided step has two rows for each image. With two processes one computes the unconditional rows and the other the
    conditional ones, each with the whole model; then both have all of them, and draw the same images:

        pipe.transformer = CFGParallel(pipe.transformer)
        pipe("golden retriever", generator=torch.Generator().manual_seed(0))  # in each process, with equal arguments

    The processes must be given the same seed, without which each starts from a noise of its own. Rows that cannot be
    shared out evenly, such as the one of an unguided step, are computed by all. Any number of processes may be in the
    group; more than two share the rows of several images.

    Args:
        transformer: a denoiser in PyTorch on this process' device, as it samples, with its adapters and backends. It
            may itself be split by a plan of diffusers or transformers, over other processes than those of `group`.
        group: of processes, each with the same weights; None for all. Its backend must be one for the device, such as
            NCCL for GPUs and gloo for processors.

    Raises:
        ValueError: the processes have not met yet (`torch.distributed.init_process_group`), or another runtime.
    """

    def __init__(self, transformer: Any, group: Any = None):
        super().__init__()
        if not isinstance(transformer, nn.Module):
            raise ValueError(f"CFGParallel is for denoisers in PyTorch, and this is a {type(transformer).__name__}.")
        if not dist.is_initialized():
            raise ValueError("The processes have not met: call torch.distributed.init_process_group, under torchrun.")
        self.transformer, self.group = transformer, group

    def __getattr__(self, name: str) -> Any:
        """All else is the denoiser's: `config`, `dtype`, `precompute`, caches."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("transformer"), name)

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | None = None,
        class_labels: Tensor | None = None,
        precomputed: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As `DiTTransformer.forward`, without gradients."""
        count, processes = len(hidden_states), dist.get_world_size(self.group)
        if processes == 1 or count % processes:
            return self.transformer(hidden_states, timestep, class_labels, precomputed, return_dict=return_dict)
        share = count // processes
        first = dist.get_rank(self.group) * share
        if timestep is not None:
            timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(count)
        rows = [None if each is None else each[first : first + share]
                for each in (hidden_states, timestep, class_labels, precomputed)]  # fmt: skip
        part = self.transformer(*rows, return_dict=False)[0].contiguous()
        sample = part.new_empty(count, *part.shape[1:])
        dist.all_gather_single(sample, part, group=self.group)
        return DiTTransformerOutput(sample=sample) if return_dict else (sample,)
