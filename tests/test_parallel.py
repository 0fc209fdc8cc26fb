"""Two processes compute what one does: tensor parallelism, context parallelism and stock FSDP."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, DDIMScheduler
from diffusers.hooks import apply_context_parallel
from diffusers.models._modeling_parallel import ParallelConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers.distributed import DistributedConfig

from dit_hub import DiTPipeline, DiTTransformer

from .together import PROCESSES, Together

MakeModel = Callable[..., DiTTransformer]

each_conditioning = pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln", "cross_attention", "in_context"])


def predict(model: Any, precomputed: bool = False) -> Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    timestep, labels = torch.tensor([100, 700]), torch.tensor([1, 2])
    with torch.no_grad():
        if precomputed:
            return model(latents, precomputed=model.precompute(timestep, labels)).sample
        return model(latents, timestep, labels).sample


def _end(folder: Path, outputs: dict[str, Tensor]) -> None:
    save_file(outputs, folder / f"outputs-{dist.get_rank()}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def _split_weights(folder: Path) -> None:
    dist.init_process_group("gloo")
    model: Any = DiTTransformer.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    local = model.blocks[0].mlp.fc1.weight.to_local()
    assert local.shape[0] == model.config.hidden_size * 4 // PROCESSES
    _end(folder, {"forward": predict(model), "precomputed": predict(model, True)})


def _give_the_gpu_kernel_to_cpus() -> None:
    """A ring needs the sums of each part's softmax, which on a CPU another operator returns than on a GPU."""

    def flash(
        query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
        return_debug_mask: bool = False, *, scale: float | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, sums = operator(query, key, value, dropout_p, is_causal, scale=scale)
        none = torch.empty(0)
        return output, sums, none, none, query.shape[2], key.shape[2], none, none, none

    global _library
    _library = torch.library.Library("aten", "IMPL")
    _library.impl("_scaled_dot_product_flash_attention", flash, "CPU")


def _split_tokens(folder: Path, degrees: dict[str, Any]) -> None:
    dist.init_process_group("gloo")
    if "ring_degree" in degrees:
        _give_the_gpu_kernel_to_cpus()
    model: Any = DiTTransformer.from_pretrained(folder)
    model.set_attention_backend("_native_flash" if "ring_degree" in degrees else "native")
    config = ContextParallelConfig(**degrees)
    parallel = ParallelConfig(context_parallel_config=config)
    mesh = dist.device_mesh.init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    parallel.setup(dist.get_rank(), PROCESSES, torch.device("cpu"), mesh=mesh)
    # `model.enable_parallelism(config=config)` does the rest of this, but on accelerators alone.
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = parallel
    apply_context_parallel(model, config, model._cp_plan)
    seen: list[int] = []
    model.blocks[1].register_forward_hook(lambda _, inputs, output: seen.append(output.shape[1]))
    outputs = {"forward": predict(model), "precomputed": predict(model, True)}
    whole = 16 + 2 * (model.config.conditioning == "in_context")
    assert seen == [whole // PROCESSES] * 2
    _end(folder, outputs)


def _shard_blocks(folder: Path) -> None:
    dist.init_process_group("gloo")
    model: Any = DiTTransformer.from_pretrained(folder)
    mesh = dist.device_mesh.init_device_mesh("cpu", (PROCESSES,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert model.blocks[0].adaLN_modulation[1].weight.to_local().shape[0] == model.config.hidden_size * 6 // PROCESSES
    pipe = DiTPipeline(model, DDIMScheduler())  # whose weights are whole only while a block is called
    pipe.set_progress_bar_config(disable=True)
    draws = pipe([1], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent").images
    assert torch.isfinite(draws).all()
    _end(folder, {"forward": predict(model)})


def _check(folder: Path, model: DiTTransformer, function: Callable[..., None], *arguments: Any) -> None:
    model.save_pretrained(folder)
    together = Together(function, folder, *arguments)
    ends = [together.wait(rank, timeout=120) for rank in range(PROCESSES)]
    assert [status for status, _ in ends] == [0] * PROCESSES, ends
    expected = predict(model)
    for rank in range(PROCESSES):
        for output in load_file(folder / f"outputs-{rank}.safetensors").values():
            assert (output - expected).norm() / expected.norm() < 1e-5


@each_conditioning
def test_tensor_parallelism(make_model: MakeModel, conditioning: str, tmp_path: Path) -> None:
    _check(tmp_path, make_model(conditioning=conditioning), _split_weights)


@each_conditioning
@pytest.mark.parametrize("kind", ["ring_degree", "ulysses_degree"])
def test_context_parallelism(make_model: MakeModel, conditioning: str, kind: str, tmp_path: Path) -> None:
    _check(tmp_path, make_model(conditioning=conditioning), _split_tokens, {kind: PROCESSES})


def test_fsdp_block_by_block(make_model: MakeModel, tmp_path: Path) -> None:
    _check(tmp_path, make_model(), _shard_blocks)
