"""The difference of the model and the pipeline from the official code, whose outputs are in tests/golden."""

import json
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from safetensors.torch import load_file

from dit_hub import DiTPipeline, DiTTransformer
from dit_hub.conversion import config_from_official

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@torch.no_grad()
def compare(folder: Path) -> None:
    weights = torch.load(folder / "released.pt", weights_only=True)
    heads = json.loads((folder / "official_args.json").read_text())["num_heads"]
    model = DiTTransformer(config_from_official(weights, heads)).eval()
    model.load_state_dict({name: weight for name, weight in weights.items() if name != "pos_embed"})
    golden = load_file(folder / "expected.safetensors")

    sample = model(golden["forward.x"], golden["forward.t"], golden["forward.y"]).sample
    print(f"{folder.name}  forward, fp32: largest difference {(sample - golden['forward.out']).abs().max():.1e}")

    variance = "learned_range" if model.config.learn_sigma else "fixed_large"
    ddpm = DDPMScheduler(variance_type=variance, timestep_spacing="linspace", clip_sample=False)
    ddim = DPMSolverMultistepScheduler.from_config(
        ddpm.config, solver_order=1, algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )
    for name, scheduler in (("ddpm", ddpm), ("ddim", ddim)):
        pipeline = DiTPipeline(model, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        latents, steps = golden[f"{name}.z"], len(golden[f"{name}.timesteps"])
        drawn = iter(golden["ddpm.noises"][:, : len(latents)])  # of both halves of the guided batch; ours is the first
        with patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", side_effect=drawn):
            result = pipeline(
                golden[f"{name}.y"][: len(latents)],
                guidance_scale=4.0,
                num_inference_steps=steps,
                timesteps="official",
                latents=latents,
                output_type="latent",
            ).images
        error = relative(result, golden[f"{name}.out"])
        print(f"{folder.name}  {steps} guided steps of {name}: relative error {error:.1e}")


if __name__ == "__main__":
    for name in ("dit_a", "dit_b"):
        compare(GOLDEN / name)
