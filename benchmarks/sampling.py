"""Sampling 16 toy images in 50 steps: stock diffusers' pipeline against ours and the exported sampler (`make bench`).

All hold the same random weights, without guidance, and draw with DDIM from the same noise; each is a process of its own
and they take turns.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

COUNT, STEPS = 16, 50
BASELINE = "diffusers' pipeline"


def ours() -> Any:
    """The toy's size as stock diffusers can express it, with random weights."""
    from diffusers import DDIMScheduler

    from dit_hub import DiTConfig, DiTPipeline, DiTTransformer

    torch.manual_seed(0)
    stock = {"timestep_freq_shift": 1.0, "timestep_freq_dim": 256, "pos_embed": "sincos", "class_dropout_prob": 0.1}
    model = DiTTransformer(DiTConfig.from_name("toy", **stock)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return DiTPipeline(model, DDIMScheduler(clip_sample=False))


def diffusers_pipeline() -> Any:
    """Stock diffusers; it needs a VAE, here one that changes nothing."""
    import diffusers
    from diffusers.models.autoencoders.vae import DecoderOutput

    from dit_hub.conversion import diffusers_config, to_diffusers

    pipeline = ours()
    stock = diffusers.DiTTransformer2DModel(**diffusers_config(pipeline.transformer.config)).eval()
    stock.load_state_dict(to_diffusers(pipeline.transformer.state_dict(), 4), strict=True)

    class Identity(torch.nn.Module):
        config = diffusers.configuration_utils.FrozenDict(scaling_factor=1.0)
        dtype, device = torch.float32, torch.device("cpu")

        def decode(self, latents: torch.Tensor) -> Any:
            return DecoderOutput(sample=latents)

    return diffusers.DiTPipeline(stock, Identity(), pipeline.scheduler)  # pyright: ignore[reportArgumentType]


def sampler(**options: Any) -> Any:
    from dit_hub import DiTPipeline
    from dit_hub.export import export_onnx

    with tempfile.TemporaryDirectory() as folder:
        export_onnx(ours(), Path(folder, "export"), parts=["sampler"], **options)
        return DiTPipeline.from_pretrained(Path(folder, "export"))


CONTENDERS: dict[str, Callable[[], Any]] = {
    BASELINE: diffusers_pipeline,
    "dit-hub, PyTorch": ours,
    "dit-hub, sampler in one ONNX file": sampler,
    "the same, int8": partial(sampler, precision="int8"),
}


def contend(contender: str, pipe: Connection) -> None:
    """The process of one contender: it sends its images, and the seconds of each run it is asked for."""
    pipeline = CONTENDERS[contender]()
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipeline(list(range(COUNT)), guidance_scale=1.0, num_inference_steps=STEPS, generator=generator,
                        output_type="np").images  # fmt: skip

    draw()
    pipe.send(draw())
    while pipe.recv():
        start = time.perf_counter()
        draw()
        pipe.send(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    context, pipes, images = multiprocessing.get_context("spawn"), {}, {}
    for contender in CONTENDERS:
        here, there = context.Pipe()
        context.Process(target=contend, args=(contender, there), daemon=True).start()
        there.close()  # so that a contender that fails ends the wait for it
        images[contender], pipes[contender] = here.recv(), here
    seconds: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    for _ in range(rounds):
        for contender, pipe in pipes.items():
            time.sleep(0.05)  # lets the threads of the previous one stop waiting for work
            pipe.send(True)
            seconds[contender].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    table = Table(title=f"{COUNT} toy images, {STEPS} steps of DDIM, {rounds} rounds", title_justify="left")
    for column in ("contender", "median s", f"times {BASELINE}", "largest difference"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for contender, times in seconds.items():
        ratio = statistics.median(b / s for b, s in zip(seconds[BASELINE], times, strict=True))
        difference = abs(images[contender] - images[BASELINE]).max()
        table.add_row(contender, f"{statistics.median(times):.3f}", f"{ratio:.2f}", f"{difference:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
