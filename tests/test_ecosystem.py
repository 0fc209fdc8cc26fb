"""What diffusers, accelerate and transformers offer to every model, taken by ours: each as its own users use it."""

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from accelerate.test_utils import torch_device
from diffusers import (
    DDIMScheduler,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor
from transformers import Trainer, TrainingArguments

from dit_hub import DiTPipeline, DiTTransformer, cache_preset
from dit_hub.export import export_onnx

from .conftest import small_vae

MakeModel = Callable[..., DiTTransformer]

STEPS = 8
each_conditioning = pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln", "cross_attention", "in_context"])


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return latents, torch.tensor([100, 700]), torch.tensor([1, 2])


def predict(model: Any) -> Tensor:
    with torch.no_grad():
        return model(*inputs()).sample


def pipeline_of(model: Any, **components: Any) -> DiTPipeline:
    pipe = DiTPipeline(model, DDIMScheduler(), **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: DiTPipeline, **arguments: Any) -> Tensor:
    """Latents of two guided images."""
    arguments = {"guidance_scale": 4.0, "num_inference_steps": STEPS, "output_type": "latent", **arguments}
    return pipe([1, 2], generator=torch.Generator().manual_seed(0), **arguments).images


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


# --- Hooks on blocks and layers --------------------------------------------------------------------------------------


@each_conditioning
@pytest.mark.parametrize(
    "options", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offloading(make_model: MakeModel, conditioning: str, options: dict[str, Any]) -> None:
    model = make_model(conditioning=conditioning, num_hidden_layers=3)
    expected = predict(model), draw(pipeline_of(model))
    cpu = torch.device("cpu")
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, **options)
    torch.testing.assert_close(predict(model), expected[0], rtol=0, atol=0)
    # Here each block computes its modulations, without offloading all are computed ahead: the sums are ordered
    # differently, and eight guided steps carry that on.
    assert relative_error(draw(pipeline_of(model)), expected[1]) < 1e-5


@each_conditioning
def test_layerwise_casting(make_model: MakeModel, conditioning: str) -> None:
    model = make_model(conditioning=conditioning)
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Embedding)):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    apply_layerwise_casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.blocks[0].attn.qkv.weight.dtype == torch.float8_e4m3fn  # pyright: ignore
    assert relative_error(predict(model), predict(rounded)) < 1e-6
    half = make_model(conditioning=conditioning)
    expected = predict(half)
    half.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert relative_error(predict(half), expected) < 0.1


def test_a_denoiser_with_hooks_is_not_exported(make_model: MakeModel, tmp_path: Path) -> None:
    pipe = pipeline_of(make_model())
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match=r"diffusers' hooks .* give one without them"):
        export_onnx(pipe, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_model_cpu_offload(make_model: MakeModel) -> None:
    pipe = pipeline_of(make_model(), vae=small_vae())
    expected = draw(pipe, output_type="pt")
    pipe.enable_model_cpu_offload(device="cpu")
    torch.testing.assert_close(draw(pipe, output_type="pt"), expected, rtol=0, atol=1e-5)


def test_sequential_cpu_offload(make_model: MakeModel) -> None:
    """The weights of both components are elsewhere until their layers are called."""
    pipe = pipeline_of(make_model(), vae=small_vae())
    expected = draw(pipe, output_type="pt")
    for component in (pipe.transformer, pipe.vae):  # as `enable_sequential_cpu_offload` does on accelerators
        accelerate.cpu_offload(component, torch.device("cpu"), offload_buffers=len(component._parameters) > 0)
    assert pipe.vae.device.type == "meta"
    torch.testing.assert_close(draw(pipe, output_type="pt"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, {"": "disk"}])
def test_device_maps(make_model: MakeModel, device_map: Any, tmp_path: Path) -> None:
    model = make_model(num_hidden_layers=3)
    model.save_pretrained(tmp_path / "model")
    loaded = DiTTransformer.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "disk")
    )
    torch.testing.assert_close(predict(loaded).cpu(), predict(model), rtol=0, atol=1e-5 if torch_device != "cpu" else 0)


def test_accelerate_keeps_blocks_whole(make_model: MakeModel) -> None:
    """`_no_split_modules` names the blocks, so that a device map never cuts through a residual sum."""
    model = make_model(num_hidden_layers=4)
    block = sum(parameter.numel() * 4 for parameter in model.blocks[0].parameters())
    device_map = accelerate.infer_auto_device_map(
        model, {"cpu": 3 * block, "disk": 10**9}, no_split_module_classes=sorted(model._no_split_modules or ())
    )
    assert {"blocks.3"} <= device_map.keys()
    assert not any(name.startswith("blocks.") and name.count(".") > 1 for name in device_map)


@each_conditioning
def test_repeated_blocks_are_compiled_once(make_model: MakeModel, conditioning: str) -> None:
    model = make_model(conditioning=conditioning, num_hidden_layers=4)
    expected = predict(model)
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model.compile_repeated_blocks(backend=backend, fullgraph=True)
    torch.testing.assert_close(predict(model), expected, rtol=0, atol=1e-6)
    assert len(graphs) == 1  # four blocks, one graph


# --- Caches ----------------------------------------------------------------------------------------------------------

CACHES: dict[str, Callable[[DiTPipeline], Any]] = {
    "FirstBlockCache": lambda pipe: FirstBlockCacheConfig(threshold=1.0),
    "MagCache": lambda pipe: MagCacheConfig(mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS),
    "TaylorSeer": lambda pipe: TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32
    ),
    "FasterCache": lambda pipe: FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 900),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 900),
        tensor_format="BCHW",
        attention_weight_callback=lambda _: 0.3,
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "PyramidAttentionBroadcast": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 900),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "cache_preset": lambda pipe: cache_preset(pipe.transformer),
}


@pytest.mark.parametrize("conditioning", ["adaln_zero", "cross_attention", "in_context"])
@pytest.mark.parametrize("name", CACHES)
def test_caches_skip_work_and_leave_no_trace(make_model: MakeModel, name: str, conditioning: str) -> None:
    model = make_model(conditioning=conditioning, num_hidden_layers=4)
    pipe = pipeline_of(model)
    expected = draw(pipe)
    rows = []
    block: Any = model.blocks[1]
    hook = block.attn.qkv.register_forward_hook(lambda _, inputs, output: rows.append(len(output)))
    model.enable_cache(CACHES[name](pipe))
    cached, again = draw(pipe), draw(pipe)
    assert sum(rows) / 2 < 0.8 * 4 * STEPS  # of the four rows of each guided step, in two runs
    torch.testing.assert_close(again, cached, rtol=0, atol=0)  # each run starts afresh
    # Of random weights, where nothing changes slowly; the preset leaves out all blocks.
    assert 0 < relative_error(cached, expected) < (1.5 if name == "cache_preset" else 0.6)
    # Guided and unguided steps of one run have different numbers of rows, and states of their own.
    if name == "FasterCache":
        for options in ({"guidance_interval": (0.3, 0.8)}, {"guidance_every": 2}):
            with pytest.raises(ValueError, match="takes half of every batch for the unconditional one"):
                draw(pipe, **options)
    else:
        assert torch.isfinite(draw(pipe, guidance_interval=(0.3, 0.8))).all()
        assert torch.isfinite(draw(pipe, guidance_every=2, guidance_scale=1.0)).all()
        with pytest.raises(ValueError, match="guidance_every starts a cache anew whenever"):
            draw(pipe, guidance_every=2)
    model.disable_cache()
    hook.remove()
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=0)


def test_a_run_that_was_cut_off_leaves_nothing_to_the_next(make_model: MakeModel) -> None:
    model = make_model(num_hidden_layers=4)
    pipe = pipeline_of(model)
    model.enable_cache(CACHES["FirstBlockCache"](pipe))
    expected = draw(pipe)

    def fail(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 3:
            raise InterruptedError
        return {}

    with pytest.raises(InterruptedError):
        pipe([5, 6], num_inference_steps=STEPS, output_type="latent", callback_on_step_end=fail)
    assert pipe.current_timestep is None
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=0)


@pytest.mark.parametrize("conditioning", ["adaln_zero", "cross_attention", "in_context"])
@pytest.mark.parametrize(("every", "full"), [(2, [0, 1, 3, 5, 7]), (3, [0, 1, 3, 6]), (4, [0, 1, 3, 7])])
def test_the_preset_forecasts_what_the_last_block_gives_along_a_line(
    make_model: MakeModel, conditioning: str, every: int, full: list[int]
) -> None:
    model = make_model(conditioning=conditioning, num_hidden_layers=12)  # "blocks.1" is not the last of twelve
    pipe, computed, tokens = pipeline_of(model), [], []
    model.enable_cache(cache_preset(model, every))
    blocks: Any = model.blocks
    hooks = [block.attn.qkv.register_forward_hook(lambda *_: computed.append(len(tokens))) for block in blocks]
    hooks.append(model.final_layer.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].clone())))
    draw(pipe)
    assert computed == [step for step in full for _ in blocks]  # all of them, in these steps alone
    for step in set(range(STEPS)) - set(full):
        before, last = [each for each in full if each < step][-2:]
        slope = (tokens[last] - tokens[before]) / (last - before)
        expected = tokens[last] + (step - last) * slope
        torch.testing.assert_close(tokens[step], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("every", [1, 0, 2.5, None])
def test_a_preset_that_forecasts_nothing_is_an_error(make_model: MakeModel, every: Any) -> None:
    with pytest.raises(ValueError, match="every must be"):
        cache_preset(make_model(), every)


def test_a_cache_of_an_export_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    export_onnx(pipeline_of(make_model()), tmp_path / "onnx")
    exported = DiTPipeline.from_pretrained(tmp_path / "onnx").transformer
    with pytest.raises(ValueError, match="for denoisers in PyTorch, and this is a ORTDiTTransformer"):
        cache_preset(exported)


def test_a_cache_that_never_skips_changes_nothing(make_model: MakeModel) -> None:
    model = make_model(num_hidden_layers=4)
    pipe = pipeline_of(model)
    expected = draw(pipe)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=0)


@pytest.fixture(autouse=True)
def own_backend() -> Iterator[None]:
    """`set_attention_backend` sets diffusers' default for the process as well."""
    with attention_backend("native"):
        yield


# --- Attention -------------------------------------------------------------------------------------------------------


@each_conditioning
@pytest.mark.parametrize("backend", ["native", "flex", "_native_math"])
def test_attention_backends_of_diffusers(make_model: MakeModel, backend: str, conditioning: str) -> None:
    pipe = pipeline_of(make_model(conditioning=conditioning))
    expected, predicted = draw(pipe), predict(pipe.transformer)
    pipe.transformer.set_attention_backend(backend)
    torch.testing.assert_close(predict(pipe.transformer), predicted, rtol=0, atol=1e-6)
    assert relative_error(draw(pipe), expected) < 1e-5
    pipe.transformer.reset_attention_backend()
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=0)


def test_the_backend_that_is_set_computes(make_model: MakeModel) -> None:
    """This one has no kernel for a CPU, and says so."""
    model = make_model()
    with attention_backend("_native_efficient"):
        predict(model)  # as transformers' functions compute, which do not ask diffusers
        model.set_attn_implementation("diffusers")
        with pytest.raises(RuntimeError, match="No viable backend"):
            predict(model)
    predict(model)
    model.set_attention_backend("_native_efficient")
    with pytest.raises(RuntimeError, match="No viable backend"):
        predict(model)
    model.reset_attention_backend()


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention", "diffusers"])
def test_attention_functions_of_transformers(make_model: MakeModel, implementation: str) -> None:
    model = make_model()
    expected = predict(model)
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(predict(model), expected, rtol=0, atol=1e-6)


def test_a_backend_that_is_not_there_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        make_model().set_attention_backend("flsh")


# --- Pipelines -------------------------------------------------------------------------------------------------------


def test_words_of_diffusers_pipelines(make_model: MakeModel) -> None:
    pipe = pipeline_of(make_model())
    seen: list[tuple[Any, ...]] = []

    def look(pipeline: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert pipeline.current_timestep == timestep
        seen.append((step, pipeline.num_timesteps, pipeline.guidance_scale, sorted(tensors)))
        return {}

    images = draw(
        pipe,
        num_images_per_prompt=2,
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["latents", "noise_pred"],
    )
    assert seen == [(step, STEPS, 4.0, ["latents", "noise_pred"]) for step in range(STEPS)]
    torch.testing.assert_close(images, draw(pipe, num_images_per_label=2), rtol=0, atol=0)
    assert pipe.current_timestep is None
    with pytest.raises(ValueError, match="are the same; give one"):
        draw(pipe, num_images_per_prompt=2, num_images_per_label=3)
    for names in (None, "latents"):
        with pytest.raises(ValueError, match="must be a list of names"):
            draw(pipe, callback_on_step_end_tensor_inputs=names)
    with pytest.raises(ValueError, match="may name latents, noise_pred, not 'prompt_embeds'"):
        draw(pipe, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_a_callback_can_end_a_run(make_model: MakeModel) -> None:
    pipe = pipeline_of(make_model())
    kept: list[Tensor] = []

    def stop(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept.append(tensors["latents"])
        pipeline._interrupt = step == 2
        return {}

    torch.testing.assert_close(draw(pipe, callback_on_step_end=stop), kept[2], rtol=0, atol=0)
    assert len(kept) == 3
    assert not torch.equal(draw(pipe), kept[2])  # the next run goes to its end


def test_sigmas(make_model: MakeModel) -> None:
    model = make_model(parameterization="flow", learn_sigma=False)
    pipe = DiTPipeline(model, diffusers.FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    sigmas = torch.linspace(1, 1 / STEPS, STEPS).tolist()
    visited: list[float] = []
    draw(pipe, sigmas=sigmas, callback_on_step_end=lambda p, i, t, tensors: visited.append(float(t)))
    torch.testing.assert_close(visited, [1000 * sigma for sigma in sigmas], rtol=1e-6, atol=0)
    for wrong, words in (([0.1, 0.5], "must fall"), ([], "must fall"), (3, "list of numbers"), (["a"], "number")):
        with pytest.raises(ValueError, match=words):
            draw(pipe, sigmas=wrong)
    with pytest.raises(ValueError, match="timesteps or sigmas, not both"):
        draw(pipe, sigmas=sigmas, timesteps="official")
    with pytest.raises(ValueError, match="DDIMScheduler takes no sigmas"):
        draw(pipeline_of(make_model()), sigmas=sigmas)


def test_copies_and_pickles_draw_the_same(make_model: MakeModel) -> None:
    pipe = pipeline_of(make_model(), vae=small_vae(), id2label={3: "perch"})
    expected = draw(pipe, output_type="pt")
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe)), DiTPipeline.from_pipe(pipe)):
        torch.testing.assert_close(draw(other, output_type="pt"), expected, rtol=0, atol=1e-6)
        assert other.id2label == {3: "perch"}


def test_from_pipe_keeps_the_licence(make_model: MakeModel, tmp_path: Path) -> None:
    pipeline_of(make_model()).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "evaluation.json").write_text("{}")
    pipe = DiTPipeline.from_pretrained(tmp_path / "model")
    other = DiTPipeline.from_pipe(pipe)
    assert other.origin is pipe.origin is not None
    other.save_pretrained(tmp_path / "other")
    written = {path.name for path in (tmp_path / "other").iterdir()}
    assert written == {path.name for path in (tmp_path / "model").iterdir()} | {"origin.json"}


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_both_names_of_the_dtype(make_model: MakeModel, name: str, tmp_path: Path) -> None:
    pipeline_of(make_model()).save_pretrained(tmp_path)
    options: Any = {name: torch.bfloat16}
    assert DiTPipeline.from_pretrained(tmp_path, **options).transformer.dtype == torch.bfloat16
    assert DiTTransformer.from_pretrained(tmp_path / "transformer", **options).dtype == torch.bfloat16


def dc_ae() -> Any:
    blocks = {"block_out_channels": (8, 16, 16), "layers_per_block": (1, 1, 1), "qkv_multiscales": ((), (), ())}
    named = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in blocks.items()}
    named |= {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
    return diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=8, scaling_factor=0.5, **named)


def tiny() -> Any:
    widths: Any = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    return diffusers.AutoencoderTiny(**widths, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1))


def vq() -> Any:
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    fields = {"latent_channels": 4, "num_vq_embeddings": 16, "norm_num_groups": 4, "scaling_factor": 0.5}
    return diffusers.VQModel(**kinds, block_out_channels=(8, 16), **fields)


def rae() -> Any:
    encoder: Any = {"encoder_hidden_size": 64, "encoder_patch_size": 14, "encoder_num_hidden_layers": 1}
    decoder: Any = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    sizes: Any = {"decoder_intermediate_size": 32, "patch_size": 4, "encoder_input_size": 112}
    return diffusers.AutoencoderRAE(encoder_type="mae", **encoder, **decoder, **sizes, scaling_factor=0.5)


@pytest.mark.parametrize(("make", "factor"), [(dc_ae, 4), (tiny, 4), (vq, 2), (rae, 4)])
def test_other_autoencoders(make_model: MakeModel, make: Callable[[], Any], factor: int) -> None:
    torch.manual_seed(0)
    vae = make().eval()
    pipe = pipeline_of(make_model(in_channels=64 if make is rae else 4), vae=vae)
    assert pipe.vae_scale_factor == factor
    images = draw(pipe, output_type="pt", height=8 * factor, width=8 * factor)
    assert images.shape == (2, 3, 8 * factor, 8 * factor)
    latents = draw(pipe)
    with torch.no_grad():
        if make is rae:  # its decoder undoes the scale itself, and its images are in 0..1
            expected = vae.decode(latents).sample
        else:
            expected = vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5
    torch.testing.assert_close(images, expected.clamp(0, 1), rtol=0, atol=1e-5)


def test_latents_with_a_mean_and_a_deviation(make_model: MakeModel) -> None:
    """As SDXL's VAE may have them: latents * std / scaling_factor + mean."""
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 1.5]
    vae = small_vae(latents_mean=mean, latents_std=std, scaling_factor=0.5)
    pipe = pipeline_of(make_model(), vae=vae)
    latents = inputs()[0]
    with torch.no_grad():
        scaled = latents * torch.tensor(std).view(1, 4, 1, 1) / 0.5 + torch.tensor(mean).view(1, 4, 1, 1)
        expected = (vae.decode(scaled).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pipe.decode(latents, "pt"), expected, rtol=0, atol=1e-5)


# --- transformers' Trainer -------------------------------------------------------------------------------------------


def test_the_trainer_of_transformers_trains_a_model(make_model: MakeModel, tmp_path: Path) -> None:
    """With the collator of docs/ecosystem.md."""
    text = (Path(__file__).parents[1] / "docs" / "ecosystem.md").read_text()
    names: dict[str, Any] = {}
    exec(text.split("```python\n# collator\n")[1].split("```")[0], names)
    model = make_model(learn_sigma=False)
    generator = torch.Generator().manual_seed(0)
    data = [{"latents": torch.randn(4, 8, 8, generator=generator), "label": index % 10} for index in range(32)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=30, per_device_train_batch_size=16, learning_rate=3e-3, logging_steps=1,
        remove_unused_columns=False, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", seed=0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=names["collate"])  # pyright: ignore
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_target_gives_a_loss(make_model: MakeModel) -> None:
    model, (latents, timestep, labels) = make_model(), inputs()
    with torch.no_grad():
        output = model(latents, timestep, labels, target=latents)
    expected = (output.sample[:, :4] - latents).square().mean()
    torch.testing.assert_close(output.loss, expected)
    assert model(latents, timestep, labels).loss is None
