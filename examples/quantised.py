"""Error and memory of quantised weights: `python examples/quantised.py`, with torchao and bitsandbytes installed.

Of the model S/2 with random weights, one forward pass of two rows against float32.
"""

import tempfile
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]
from torchao.utils import get_model_size_in_bytes  # pyright: ignore[reportMissingImports]
from transformers import BitsAndBytesConfig, TorchAoConfig

from dit_hub import DiTConfig, DiTTransformer

CONFIGURATIONS: dict[str, Any] = {
    "none": None,
    "torchao int8": TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao float8": TorchAoConfig(Float8WeightOnlyConfig()),
    "bitsandbytes 8 bit": BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes 4 bit (nf4)": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
}


def main() -> None:
    torch.manual_seed(0)
    model = DiTTransformer(DiTConfig.from_name("DiT-S/2")).eval()
    for parameter in model.parameters():  # a fresh one would predict zero
        torch.nn.init.normal_(parameter, std=0.02)
    inputs = (torch.randn(2, 4, 32, 32), torch.tensor([321, 700]), torch.tensor([207, 360]))
    table = Table("weights", "other weights", "MB", "relative error")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        expected = model(*inputs).sample
        model.save_pretrained(folder)
        for name, config in CONFIGURATIONS.items():
            for dtype in (torch.float32, torch.bfloat16):
                loaded = DiTTransformer.from_pretrained(folder, quantization_config=config, dtype=dtype)
                error = (loaded(*inputs).sample - expected).norm() / expected.norm()
                size = get_model_size_in_bytes(loaded) / 1e6
                table.add_row(name, str(dtype).removeprefix("torch."), f"{size:.1f}", f"{error:.1e}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
