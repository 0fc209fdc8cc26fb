"""Packages that lie apart from the others, since importing them costs every process seconds: torchao, bitsandbytes and
cache-dit. `make test` runs these with build/ecosystem on the path."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import DDIMScheduler, PipelineQuantizationConfig
from torch import Tensor
from transformers import BitsAndBytesConfig, TorchAoConfig

from dit_hub import DiTPipeline, DiTTransformer
from dit_hub.export import export_onnx
from dit_hub.layers import Float32Linear

# Not imported by name, so that what checks types need not have them.
cache_dit, bitsandbytes, torchao = (
    pytest.importorskip(package, reason=f"waits for {package}: `make test` installs it in build/ecosystem")
    for package in ("cache_dit", "bitsandbytes", "torchao.quantization")
)

TorchAOBaseTensor: Any = pytest.importorskip("torchao.utils").TorchAOBaseTensor
MakeModel = Callable[..., DiTTransformer]

STEPS = 8


def predict(model: Any, precomputed: bool = False) -> Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    timestep, labels = torch.tensor([100, 700]), torch.tensor([1, 2])
    with torch.no_grad():
        if precomputed:
            return model(latents, precomputed=model.precompute(timestep, labels)).sample
        return model(latents, timestep, labels).sample


def draw(pipe: DiTPipeline) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe([1, 2], num_inference_steps=STEPS, generator=generator, output_type="latent").images


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


# The configuration, the weights it quantises in a block, and a bound on the error for random weights.
QUANTISED: dict[str, tuple[Any, list[str], float]] = {
    "torchao int8": (
        TorchAoConfig(torchao.Int8WeightOnlyConfig()),
        ["attn.qkv", "mlp.fc1", "adaLN_modulation.1"],
        0.02,
    ),
    "torchao float8": (
        TorchAoConfig(torchao.Float8WeightOnlyConfig()),
        ["attn.qkv", "mlp.fc1", "adaLN_modulation.1"],
        0.06,
    ),
    "bitsandbytes 8 bit": (BitsAndBytesConfig(load_in_8bit=True), ["attn.qkv", "mlp.fc1"], 0.03),
    "bitsandbytes 4 bit": (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
        ["attn.qkv", "mlp.fc1"],
        0.25,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_loading(make_model: MakeModel, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config, layers, bound = QUANTISED[name]
    model = make_model(hidden_size=128)
    DiTPipeline(model, DDIMScheduler()).save_pretrained(tmp_path / "plain")
    quantised: Any = DiTTransformer.from_pretrained(
        tmp_path / "plain" / "transformer", quantization_config=config, dtype=dtype
    )
    modules = dict(quantised.blocks[0].named_modules())
    for layer in layers:
        assert type(modules[layer].weight) is not torch.nn.Parameter, layer
    expected = predict(model)
    for precomputed in (False, True):
        assert 1e-4 < relative_error(predict(quantised, precomputed).float(), expected) < bound
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    pipe = DiTPipeline.from_pretrained(tmp_path / "plain", quantization_config=mapping, dtype=dtype)
    # Before the first pass: bitsandbytes then packs 4-bit weights for the CPU, and does not get them back exactly.
    pipe.save_pretrained(tmp_path / "quantised")
    sizes = [(tmp_path / name / "transformer" / "model.safetensors").stat().st_size for name in ("plain", "quantised")]
    assert sizes[1] < 0.6 * sizes[0]
    assert relative_error(predict(pipe.transformer).float(), predict(quantised).float()) < bound / 2
    assert torch.isfinite(draw(pipe)).all()
    again = DiTPipeline.from_pretrained(tmp_path / "quantised").transformer
    assert relative_error(predict(again).float(), predict(quantised).float()) < bound / 2


@pytest.mark.parametrize("name", QUANTISED)
def test_adapters_on_quantised_weights(make_model: MakeModel, name: str, tmp_path: Path) -> None:
    config, _, bound = QUANTISED[name]
    model: Any = make_model(hidden_size=128)
    model.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["qkv", "fc1"], init_lora_weights=False)
    adapted: Any = peft.get_peft_model(model, settings)
    adapted.save_pretrained(str(tmp_path / "style"))
    expected = predict(adapted)
    quantised = DiTTransformer.from_pretrained(tmp_path / "model", quantization_config=config)
    pipe = DiTPipeline(quantised, DDIMScheduler())
    pipe.load_lora_weights(tmp_path / "style", adapter_name="style")
    assert relative_error(predict(quantised), expected) < bound
    pipe.load_lora_weights(tmp_path / "style", adapter_name="again")
    pipe.unload_lora_weights()
    assert relative_error(predict(quantised), predict(make_model(hidden_size=128))) < bound


def test_weights_of_bitsandbytes_are_not_exported(make_model: MakeModel, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    config = BitsAndBytesConfig(load_in_4bit=True)
    pipe = DiTPipeline(DiTTransformer.from_pretrained(tmp_path / "model", quantization_config=config), DDIMScheduler())
    with pytest.raises(ValueError, match="bitsandbytes has quantised the denoiser; give the model"):
        export_onnx(pipe, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_weights_that_torchao_only_multiplies_with(make_model: MakeModel) -> None:
    """As int4 on a GPU: its tensors cannot be taken back to floats, and want the dtype that they were made of."""

    class Weight(TorchAOBaseTensor):
        tensor_data_names = ["qdata"]
        tensor_attribute_names: list[str] = []

        def __new__(cls, qdata: Tensor) -> Any:
            return Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=qdata.dtype)

        def __init__(self, qdata: Tensor):
            self.qdata = qdata

    @Weight.implements_torch_function([torch.nn.functional.linear])
    def product(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
        input, weight, bias = args
        assert input.dtype == bias.dtype == torch.bfloat16
        return torch.nn.functional.linear(input, weight.qdata, bias)

    model: Any = make_model()
    expected = predict(model)
    layers = [layer for layer in model.modules() if isinstance(layer, Float32Linear)]
    assert len(layers) > 2
    for layer in layers:
        layer.weight = torch.nn.Parameter(Weight(layer.weight.detach().bfloat16()), requires_grad=False)
    assert relative_error(predict(model), expected) < 0.02


def test_what_quantised_weights_cannot_do_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    """torchao's files of learned positions do not load; weights that are rounded anew are not what they were."""
    make_model(hidden_size=128, pos_embed="learned").save_pretrained(tmp_path / "plain")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    pipe = DiTPipeline(DiTTransformer.from_pretrained(tmp_path / "plain", quantization_config=config), DDIMScheduler())
    with pytest.raises(ValueError, match="has learned positions; nothing was written"):
        pipe.save_pretrained(tmp_path / "quantised")
    assert not (tmp_path / "quantised").exists()
    with pytest.raises(ValueError, match="would be rounded anew"):
        pipe.fuse_lora()


@pytest.mark.skipif(torch.cuda.is_available(), reason="waits for a machine without a GPU")
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (torchao.Int4WeightOnlyConfig(), "Int4WeightOnlyConfig does not run on this machine's cpu: "),
        (
            torchao.Float8DynamicActivationFloat8WeightConfig(),
            "Float8DynamicActivationFloat8WeightConfig does not run on this",
        ),
    ],
)
def test_what_needs_a_gpu_is_refused_in_a_sentence(
    make_model: MakeModel, config: Any, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_model(hidden_size=128).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words) as caught:
        DiTTransformer.from_pretrained(tmp_path, quantization_config=TorchAoConfig(config))
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("conditioning", ["adaln_zero", "cross_attention", "in_context"])
def test_cache_dit_through_a_block_adapter(make_model: MakeModel, conditioning: str) -> None:
    model: Any = make_model(conditioning=conditioning, num_hidden_layers=8)
    pipe = DiTPipeline(model, DDIMScheduler())
    expected = draw(pipe)
    calls: list[int] = []
    model.blocks[4].attn.qkv.register_forward_hook(lambda _, inputs, output: calls.append(len(output)))
    # Its own table knows classes by the start of their names and takes ours for diffusers' DiT.
    adapter = cache_dit.BlockAdapter(
        pipe=pipe, transformer=model, blocks=model.blocks, forward_pattern=cache_dit.ForwardPattern.Pattern_3,
        has_separate_cfg=False,
    )  # fmt: skip
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=1.0, max_warmup_steps=2,
        num_inference_steps=STEPS, enable_separate_cfg=False,
    )  # fmt: skip
    cache_dit.enable_cache(adapter, cache_config=config)
    cached = draw(pipe)
    assert len(calls) < STEPS
    assert 0 < relative_error(cached, expected) < 0.6
    cache_dit.disable_cache(pipe)
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=0)
