"""Export the embedded model to every target and print the errors, as docs/export.md shows them.

    python examples/export_matrix.py

A model of latents, for the decoder and for other sizes, has random weights. TensorRT needs no GPU here: tensorrt_rtx
builds without one, and the error is then that of the ONNX file on ONNX Runtime, or of PyTorch with that rounding.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler

from dit_hub import DiTConfig, DiTPipeline, DiTTransformer
from dit_hub.export import export_onnx, export_tensorrt, export_web
from dit_hub.extras import quiet_libraries

TOY = "dit-toy-shapes"


def latent_pipeline() -> DiTPipeline:
    """A small model of latents with a small VAE."""
    torch.manual_seed(0)
    model = DiTTransformer(DiTConfig(sample_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    for parameter in model.parameters():  # a fresh model predicts zero
        torch.nn.init.normal_(parameter, std=0.05)
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
    }
    vae = AutoencoderKL(**blocks, norm_num_groups=4)
    return DiTPipeline(model.eval(), DDIMScheduler(), vae.eval())


# Target, part, what is exported, and the options, as `dit-hub export` names them.
Row = tuple[str, str, str, dict[str, Any]]
ROWS: list[Row] = [
    *(("onnx", "transformer", TOY, options) for options in (
        {}, {"precompute": True}, {"opset": 20}, {"precision": "fp16"}, {"precision": "int8"},
        {"precision": "int8", "precompute": True}, {"precision": "int8", "static": True},
        {"runtime": "openvino"}, {"runtime": "openvino", "precision": "bf16", "precompute": True},
        {"runtime": "openvino", "precision": "int8"},
        {"runtime": "openvino", "precision": "int8", "precompute": True},
    )),
    ("onnx", "transformer", "latent", {"dynamic_size": True}),
    ("onnx", "vae", "latent", {}),
    *(("onnx", "sampler", TOY, {"parts": ["all"], **options}) for options in (
        {}, {"precision": "fp16"}, {"precision": "int8"}, {"precision": "int8", "static": True})),
    *(("tensorrt", "transformer", TOY, {"precision": precision})
      for precision in ("fp32", "fp16", "bf16", "fp8", "int8")),
    ("tensorrt", "transformer", "latent", {"precision": "fp16", "size": (8, 16, 32)}),
    ("tensorrt", "vae", "latent", {}),
    *(("tensorrt", "sampler", TOY, {"parts": ["all"], "precision": precision})
      for precision in ("fp32", "fp16", "bf16")),
    ("web", "sampler", TOY, {}),
]  # fmt: skip


def main() -> None:
    quiet_libraries()
    latent = latent_pipeline()
    print("| target | part | options | error | measured on |\n|---|---|---|---|---|")
    for target, part, source, options in ROWS:
        model = latent if source == "latent" else source
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "export"
            if target == "web":
                parity = export_web(model, folder)
            else:
                export = export_onnx if target == "onnx" else export_tensorrt
                parity = export(model, folder, **options)[part]
        # As on the command line.
        words = []
        for name, value in options.items():
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            words.append(f"`--{name.replace('_', '-')}{'' if value is True else ' ' + text}`")
        print(f"| {target} | {part} | {' '.join(words)} | {parity.relative_error:.1e} | {parity.measured_on} |")


if __name__ == "__main__":
    main()
