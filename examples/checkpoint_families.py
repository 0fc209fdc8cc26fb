"""The table of docs/checkpoints.md: every family into dit-hub and out again, and what it changes in the numbers.

The checkpoints are small, with random weights and the official code's outputs for them (tests/golden). Where weights
only change their place they are compared bit for bit; elsewhere the relative L2 distance of predictions, or of 25
sampling steps for SiT, is measured, and one below 1e-6 is rounding, which differs from processor to processor.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_hub import DiTConfig, DiTPipeline, DiTTransformer
from dit_hub.conversion import diffusers_config, load_single_file, to_diffusers
from dit_hub.conversion.pipelines import LAYOUTS, convert
from dit_hub.extras import quiet_libraries

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "dit_a"
HEADS = json.loads((GOLDEN / "official_args.json").read_text())["num_heads"]
EXPECTED = load_file(GOLDEN / "expected.safetensors")
WEIGHTS = torch.load(GOLDEN / "released.pt", weights_only=True)

# Family, direction, against what; and how far from it.
Row = tuple[str, str, str, str]

EQUAL = "weights equal, bit for bit"


def error(actual: Tensor, expected: Tensor) -> str:
    return shown(((actual - expected).norm() / expected.norm()).item())


def shown(error: float) -> str:
    return "below 1e-6" if error < 1e-6 else f"{error:.1e}"


def equality(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    different = [name for name in expected if name not in actual or not torch.equal(actual[name], expected[name])]
    return EQUAL if len(actual) == len(expected) and not different else f"{different} differ"


@torch.no_grad()
def predict(model: Any) -> Tensor:
    """The prediction for the golden inputs, of our class or diffusers'."""
    return model(EXPECTED["forward.x"], EXPECTED["forward.t"], class_labels=EXPECTED["forward.y"]).sample


def stock_folder(folder: Path, **options: Any) -> tuple[Path, Any]:
    """The golden weights in a folder that diffusers wrote, and its own model."""
    model, _ = load_single_file(GOLDEN / "released.pt", num_attention_heads=HEADS)
    stock = diffusers.DiTTransformer2DModel(**diffusers_config(model.config)).eval()
    weights = to_diffusers(model.state_dict(), model.config.num_hidden_layers)
    stock.load_state_dict(weights, strict=False)  # its fixed positions are no weights
    pipeline: Any = diffusers.DiTPipeline(stock, None, diffusers.DDIMScheduler())  # pyright: ignore[reportArgumentType]
    pipeline.save_pretrained(folder, **options)
    return folder, stock


def official_rows(folder: Path) -> list[Row]:
    """Files of the official code, whose outputs are golden."""
    prefixed = {f"module._orig_mod.{name}": tensor for name, tensor in WEIGHTS.items()}
    half = len(WEIGHTS) // 2
    parts = [dict(list(WEIGHTS.items())[:half]), dict(list(WEIGHTS.items())[half:])]
    for number, part in enumerate(parts):
        save_file(part, folder / f"part-{number}.safetensors")
    places = {name: f"part-{number}.safetensors" for number, part in enumerate(parts) for name in part}
    (folder / "weights.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    torch.save(prefixed, folder / "compiled.pt")
    save_file(WEIGHTS, folder / "weights.safetensors")
    rows = []
    for family, path in (
        ("official release, `.pt`", GOLDEN / "released.pt"),
        ("the same as `.safetensors`", folder / "weights.safetensors"),
        ("the same, sharded", folder / "weights.safetensors.index.json"),
        ("of a compiled and distributed model (`module._orig_mod.`)", folder / "compiled.pt"),
    ):
        model, _ = load_single_file(path, num_attention_heads=HEADS)
        rows.append((family, "in", "the official code", error(predict(model), EXPECTED["forward.out"])))
    return rows


def training_rows(folder: Path) -> list[Row]:
    """Official and fast-DiT training checkpoints, against the released layout of the same weights."""
    content = torch.load(GOLDEN / "train.pt", weights_only=False)  # our own file
    rows = []
    for key in ("ema", "model"):
        torch.save(content[key], folder / f"{key}.pt")
        bare, _ = load_single_file(folder / f"{key}.pt", num_attention_heads=HEADS)
        chosen, _ = load_single_file(GOLDEN / "train.pt", key, num_attention_heads=HEADS)
        family = f"official or fast-DiT training checkpoint, its `{key}`"
        rows.append((family, "in", "the same weights released", equality(chosen.state_dict(), bare.state_dict())))
    return rows


@torch.no_grad()
def sit_row(folder: Path) -> Row:
    """SiT against Euler's method on the bare network from noise (t = 0) to data (t = 1)."""
    torch.save(WEIGHTS, folder / "SiT-tiny.pt")
    pipe = DiTPipeline.from_single_file(folder / "SiT-tiny.pt", vae=None, num_attention_heads=HEADS)
    pipe.set_progress_bar_config(disable=True)
    network = DiTTransformer(DiTConfig(**{**pipe.transformer.config.to_dict(), "parameterization": "diffusion"})).eval()
    network.load_state_dict(pipe.transformer.state_dict())
    noise, labels = EXPECTED["forward.x"], EXPECTED["forward.y"].clamp(max=9)  # the null class is no label to draw
    latents = noise
    for step in range(25):
        time = torch.full((len(noise),), step / 25)
        latents = latents + network(latents, time, labels).sample[:, :4] / 25
    arguments: dict[str, Any] = {"latents": noise, "guidance_scale": 1.0, "output_type": "latent"}
    sampled = pipe(labels, num_inference_steps=25, timesteps="official", **arguments).images
    return "SiT (velocity, linear path)", "in", "25 Euler steps of the bare network", error(sampled, latents)


def diffusers_rows(folder: Path) -> list[Row]:
    """Folders that diffusers wrote, against its own class."""
    kinds: tuple[tuple[str, dict[str, Any]], ...] = (
        ("diffusers, `.safetensors`", {}),
        ("diffusers, `.bin`", {"safe_serialization": False}),
        ("diffusers, sharded", {"max_shard_size": "200KB"}),
    )
    rows = []
    for number, (family, options) in enumerate(kinds):
        path, stock = stock_folder(folder / f"stock-{number}", **options)
        model = DiTPipeline.from_pretrained(path).transformer
        rows.append((family, "in", "diffusers' own class", error(predict(model), predict(stock))))
    path, _ = stock_folder(folder / "models--facebook--DiT-XL-2-256" / "snapshots" / "0")
    model = DiTPipeline.from_pretrained(path).transformer
    against = error(predict(model), EXPECTED["forward.out"])
    return [*rows, ("diffusers, facebook/DiT-XL-2-256 and -512", "in", "the official code", against)]


def outward_rows(folder: Path) -> list[Row]:
    """Out of dit-hub, and back; into diffusers with and without the patch."""
    convert(GOLDEN / "released.pt", folder / "ours", num_attention_heads=HEADS, vae=None)
    parity = {to: list(convert(folder / "ours", folder / to, to).parity.values()) for to in LAYOUTS}
    convert(folder / "diffusers", folder / "back")

    def weights(name: str) -> dict[str, Tensor]:
        return load_file(folder / name / "transformer" / "model.safetensors")

    assert equality(weights("back"), weights("ours")) == EQUAL, "the round trip changed a weight"
    official = torch.load(folder / "official" / "model.pt", weights_only=True)
    stock = diffusers.DiTPipeline.from_pretrained(folder / "diffusers", vae=None).transformer
    return [
        ("to dit-hub", "out", "what was read", equality(weights("dit-hub"), weights("ours"))),
        ("to official code", "out", "the file that was read", equality(official, WEIGHTS)),
        ("to diffusers", "out", "diffusers' own class, patched", shown(*parity["diffusers"])),
        ("to diffusers", "out", "diffusers' own class, as it is", error(predict(stock), EXPECTED["forward.out"])),
    ]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    quiet_libraries()
    logging.disable(logging.WARNING)
    groups: tuple[Callable[[Path], list[Row]], ...] = (
        official_rows,
        training_rows,
        lambda folder: [sit_row(folder)],
        diffusers_rows,
        outward_rows,
    )
    print("| family | direction | against | difference |\n|---|---|---|---|")
    for group in groups:
        with tempfile.TemporaryDirectory() as folder:
            for row in group(Path(folder)):
                print(f"| {' | '.join(row)} |")
    print("\nRound trips official -> dit-hub -> official and dit-hub -> diffusers -> dit-hub: every weight equal.")


if __name__ == "__main__":
    main()
