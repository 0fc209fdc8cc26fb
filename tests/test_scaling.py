"""The model of costs against processes that do what it counts; guidance and blocks on two devices against one."""

import json
import runpy
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
from transformers.distributed import DistributedConfig

from dit_hub import DiTConfig, DiTPipeline, DiTTransformer
from dit_hub.parallel import CFGParallel
from dit_hub.scaling import H100, Machine, Plan, cost, operations, plans, recommend, tokens, transfers, weights

from .counted import counted
from .test_parallel import MakeModel, _give_the_gpu_kernel_to_cpus
from .together import Together

ROOT = Path(__file__).parents[1]
PIPELINED = runpy.run_path(str(ROOT / "examples" / "pipeline_parallel.py"))["PipelinedDenoiser"]

# Attention in operators that are counted: products, or the GPU's kernel.
EAGER: dict[str, Any] = {"attn_implementation": "eager"}


def _count(model: Any) -> tuple[Any, int]:
    """What a pass of two rows sends and computes."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    precomputed = model.precompute(torch.tensor([100, 700]), torch.tensor([1, 2]))
    model(latents, precomputed=precomputed)  # pipelines ask each other for shapes first
    return counted(lambda: model(latents, precomputed=precomputed))


def _split_tokens(folder: Path, degrees: Any, processes: Any) -> Any:
    """A model by a plan of diffusers; see `tests/test_parallel.py`."""
    model: Any = DiTTransformer.from_pretrained(folder)
    model.set_attention_backend("_native_flash")
    config = ContextParallelConfig(**degrees)
    parallel = ParallelConfig(context_parallel_config=config)
    parallel.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), mesh=processes)
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = parallel
    apply_context_parallel(model, config, model._cp_plan)
    return model


def _draw(pipeline: DiTPipeline, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline([1, 2], num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="latent",
                    **options).images  # fmt: skip


# Guided in all steps, and in some: then there are passes of two rows and of four.
RUNS: list[dict[str, Any]] = [{"guidance_scale": 3.0}, {"guidance_scale": 3.0, "guidance_interval": (0.3, 0.8)}]


@torch.no_grad()
def _two(folder: Path) -> None:
    dist.init_process_group("gloo")
    counts, drawn = {}, {}
    halves = CFGParallel(DiTTransformer.from_pretrained(folder, **EAGER))
    stages = PIPELINED(DiTTransformer.from_pretrained(folder, **EAGER))
    counts["cfg"], counts["stages"] = _count(halves), _count(stages)
    for name, denoiser in (("cfg", halves), ("stages", stages)):
        for number, run in enumerate(RUNS):
            drawn[f"{name}.{number}"] = _draw(DiTPipeline(denoiser, DDIMScheduler()), **run)
    one = DiTPipeline(halves, DDIMScheduler())([3], num_inference_steps=2, guidance_scale=1.0, output_type="latent",
                                               generator=torch.Generator().manual_seed(1)).images  # fmt: skip
    drawn["cfg.one"] = one
    counts["weights"] = sum(each.nbytes for each in stages.parameters())
    split: Any = DiTTransformer.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"), **EAGER)
    counts["tensor"] = _count(split)
    local = [getattr(each, "to_local", lambda each=each: each)() for each in split.parameters()]
    counts["tensor weights"] = sum(each.nbytes for each in local)
    _give_the_gpu_kernel_to_cpus()
    for name in ("ulysses", "ring"):
        degrees: Any = {f"{name}_degree": 2}
        config = ContextParallelConfig(**degrees)
        mesh = dist.device_mesh.init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
        counts[name] = _count(_split_tokens(folder, degrees, mesh))
    _end(folder, counts, drawn)


@torch.no_grad()
def _four(folder: Path) -> None:
    dist.init_process_group("gloo")
    _give_the_gpu_kernel_to_cpus()
    counts = {}
    config = ContextParallelConfig(ulysses_degree=2, ring_degree=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    counts["both"] = _count(_split_tokens(folder, {"ulysses_degree": 2, "ring_degree": 2}, mesh))
    config = ContextParallelConfig(ulysses_degree=2)
    names = ("cfg", *config.mesh_dim_names)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, *config.mesh_shape), mesh_dim_names=names)
    inner = _split_tokens(folder, {"ulysses_degree": 2}, mesh[config.mesh_dim_names])
    both = CFGParallel(inner, mesh["cfg"].get_group())
    counts["cfg x ulysses"] = _count(both)
    _end(folder, counts, {"cfg x ulysses.0": _draw(DiTPipeline(both, DDIMScheduler()), **RUNS[0])})


def _end(folder: Path, counts: dict[str, Any], drawn: dict[str, Tensor]) -> None:
    rank = dist.get_rank()
    (folder / f"counts-{rank}.json").write_text(json.dumps(counts))
    save_file(drawn, folder / f"drawn-{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def _run(function: Any, folder: Path, processes: int) -> tuple[list[Any], list[Any]]:
    """What each of the processes counted and drew."""
    together = Together(function, folder, processes=processes)
    ends = [together.wait(rank, timeout=120) for rank in range(processes)]
    assert [status for status, _ in ends] == [0] * processes, ends
    ranks = range(processes)
    counts = [json.loads((folder / f"counts-{rank}.json").read_text()) for rank in ranks]
    return counts, [load_file(folder / f"drawn-{rank}.safetensors") for rank in ranks]


def modelled(config: DiTConfig, plan: Plan) -> dict[str, list[int]]:
    """Calls and bytes by kind in a pass of two rows, with weights in float32."""
    found: dict[str, list[int]] = {}
    for each in transfers(config, plan, rows=2, itemsize=4):
        calls, size = found.get(each.kind, [0, 0])
        found[each.kind] = [calls + each.calls, size + each.size]
    return found


def _check(counts: list[Any], name: str, config: DiTConfig, plan: Plan) -> None:
    for sent, flops in (count[name] for count in counts):
        assert (sent, flops) == (modelled(config, plan), operations(config, plan, rows=2)), name


def test_two_processes_send_and_compute_what_the_model_says(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    counts, drawn = _run(_two, tmp_path, 2)
    config: Any = model.config
    for name in ("cfg", "tensor", "ulysses", "ring"):
        _check(counts, name, config, Plan(**{name: 2}))
    plan = Plan(stages=2)
    (first, first_flops), (last, last_flops) = (count["stages"] for count in counts)
    assert modelled(config, plan) == {"send": first["send"], "broadcast": last["broadcast"]}
    assert "send" not in last
    assert max(first_flops, last_flops) == operations(config, plan, rows=2)
    assert counts[0]["tensor weights"] == 4 * weights(config, Plan(tensor=2))
    assert max(count["weights"] for count in counts) <= 4 * weights(config, plan)  # embeddings are not parts of stages
    for number, run in enumerate(RUNS):
        expected = _draw(DiTPipeline(model, DDIMScheduler()), **run)
        for each in drawn:
            for name in ("cfg", "stages"):
                assert (each[f"{name}.{number}"] - expected).norm() / expected.norm() < 1e-5
    alone = DiTPipeline(model, DDIMScheduler())([3], num_inference_steps=2, guidance_scale=1.0, output_type="latent",
                                                generator=torch.Generator().manual_seed(1)).images  # fmt: skip
    assert (drawn[1]["cfg.one"] - alone).norm() / alone.norm() < 1e-5  # one row cannot be shared out


def test_four_processes_do_so_where_plans_are_combined(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    counts, drawn = _run(_four, tmp_path, 4)
    config: Any = model.config
    _check(counts, "both", config, Plan(ulysses=2, ring=2))
    _check(counts, "cfg x ulysses", config, Plan(cfg=2, ulysses=2))
    expected = _draw(DiTPipeline(model, DDIMScheduler()), **RUNS[0])
    for each in drawn:
        assert (each["cfg x ulysses.0"] - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize(
    "fields",
    [{}, {"conditioning": "adaln"}, {"num_classes": 0}, {"learn_sigma": False, "mlp_ratio": 2.0},
     {"sample_size": (8, 12), "pos_embed": "learned"}],
)  # fmt: skip
def test_one_gpu_computes_and_holds_what_the_model_says(make_model: MakeModel, fields: dict[str, Any]) -> None:
    model: Any = make_model(**fields)
    config = model.config
    assert weights(config, Plan()) == sum(each.numel() for each in model.parameters())
    model.set_attn_implementation("eager")
    latents = torch.zeros(2, 4, *config.sample_height_width)
    with torch.no_grad():
        labels = torch.tensor([1, 2]) if config.num_classes else None
        precomputed = model.precompute(torch.tensor([1, 2]), labels)
        sent, flops = counted(lambda: model(latents, precomputed=precomputed))
    assert (sent, flops) == ({}, operations(config, Plan(), rows=2))
    model.set_attn_implementation("sdpa")


def test_parallel_rows_need_processes_and_pytorch(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=r"have not met: call torch\.distributed\.init_process_group"):
        CFGParallel(make_model())
    with pytest.raises(ValueError, match="is for denoisers in PyTorch, and this is a str"):
        CFGParallel("transformer")


# --- What follows from the counts ------------------------------------------------------------------------------------

XL = DiTConfig.from_name("DiT-XL/2", image_size=1024)


def test_times_follow_from_counts() -> None:
    machine = Machine(efficiency=0.4, block_seconds=0, memory_bandwidth=1e18)
    one = cost(XL, Plan(), machine)
    assert one.step_seconds == pytest.approx(operations(XL, Plan(), 2) / (0.4 * 989e12))
    assert (one.sent, one.latency) == (0, pytest.approx(50 * one.step_seconds))
    halves = cost(XL, Plan(cfg=2), machine)
    gathered = 4096 * 4 * 8 * 4  # tokens, patch, channels, float32
    assert halves.sent == gathered
    assert halves.step_seconds == pytest.approx(one.step_seconds / 2 + machine.latency + gathered / 450e9)
    # The second half begins when the first one leaves the first stage: three turns, of half a pass' quarter each.
    stages = cost(XL, Plan(stages=2), machine)
    assert stages.step_seconds > 0.75 * one.step_seconds
    assert cost(XL, Plan(replicas=8), machine).throughput == pytest.approx(8 * one.throughput)
    assert cost(XL, Plan(ulysses=4), machine).sent == pytest.approx(4 * 28 * 2 * tokens(XL) * 1152 * 2 / 4 * 3 / 4
                                                                    + tokens(XL) * 2 * 32 * 2 / 4 * 3)  # fmt: skip
    hidden = Machine(efficiency=0.4, block_seconds=0, memory_bandwidth=1e18, overlap=1)
    computing = operations(XL, Plan(ulysses=4), 2) / (0.4 * 989e12)
    assert cost(XL, Plan(ulysses=4), hidden).step_seconds == pytest.approx(computing)
    slow = Machine(gpus_per_node=1, efficiency=0.4, block_seconds=0, memory_bandwidth=1e18)
    assert cost(XL, Plan(ulysses=4), slow).latency > cost(XL, Plan(ulysses=4), machine).latency


def test_advice_is_ordered_and_fits() -> None:
    by_latency = recommend(XL, 8)
    assert by_latency[0][0].cfg == 2
    assert [one.latency for _, one in by_latency] == sorted(one.latency for _, one in by_latency)
    assert all(plan.gpus == 8 and plan.is_exact for plan, _ in by_latency)
    assert recommend(XL, 8, objective="throughput")[0][0] == Plan(replicas=8)
    assert any(plan.patches for plan, _ in recommend(XL, 8, is_exact=False))
    huge = DiTConfig.from_name("DiT-XL/2", hidden_size=12288, num_hidden_layers=48, num_attention_heads=96)
    fitting = recommend(huge, 8, objective="throughput")
    assert all(plan.stages > 1 or plan.tensor > 1 for plan, _ in fitting)
    with pytest.raises(ValueError, match=r"Nothing fits: of 1 GPUs the fullest needs \d+ GB"):
        recommend(huge, 1)
    with pytest.raises(ValueError, match="objective must be latency or throughput, not 'cost'"):
        recommend(XL, 1, objective="cost")  # pyright: ignore[reportArgumentType]


def test_the_document_has_the_tables_of_the_example(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["scaling_out.py"])
    runpy.run_path(str(ROOT / "examples" / "scaling_out.py"), run_name="__main__")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    document = (ROOT / "docs" / "scaling-out.md").read_text().splitlines()
    assert len(printed) > 50
    assert [line for line in printed if line not in document] == []


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(ring=0), "The numbers of a plan are 1 or more"),
        (Plan(cfg=4), "Guidance has two halves"),
        (Plan(ulysses=32), "16 heads cannot be shared by 32 GPUs"),
        (Plan(ring=3), "4096 tokens cannot be shared by 3 GPUs"),
        (Plan(tensor=2, stages=2), "Of tokens, weights and blocks one kind can be split"),
        (Plan(stages=32), "28 blocks cannot make 32 stages"),
        (Plan(patches=4), "Patches need stages"),
    ],
)
def test_plans_that_do_not_fit_are_one_sentence(plan: Plan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cost(XL, plan, H100)
    assert plan not in list(plans(XL, plan.gpus))
