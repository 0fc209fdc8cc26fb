"""Peak memory of sampling does not grow with the images. Run as a script, this file is the process measured."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from command_line import python
from dit_hub import DiTConfig, DiTPipeline, DiTTransformer
from dit_hub.evaluation import sample_images
from test_latents_memory import STATUS, peak_memory


def peak_of_sampling(num: int, folder: Path) -> int:
    """In a process of its own."""
    run = python(__file__, num, folder, cwd=folder.parent)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.skipif(not STATUS.exists(), reason="peak memory is read from /proc")
def test_memory_of_sampling_does_not_depend_on_the_number_of_images(tmp_path: Path) -> None:
    few, many = (peak_of_sampling(num, tmp_path / str(num)) for num in (96, 352))
    # The heap of a process grows by up to 25 MB, and then no more. The images that the larger set has more are 50 MB.
    assert many - few < (352 - 96) * 256 * 256 * 3 // 1024 // 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    model = DiTTransformer(DiTConfig(sample_size=256, patch_size=64, in_channels=3, hidden_size=32, num_classes=0,
                                     num_hidden_layers=1, num_attention_heads=2, learn_sigma=False))  # fmt: skip
    torch.nn.init.constant_(model.final_layer.linear.bias, 1000.0)  # images of one colour, which are quickly compressed
    sample_images(DiTPipeline(model, DDIMScheduler()), sys.argv[2], int(sys.argv[1]), batch_size=2,
                  num_inference_steps=1)  # fmt: skip
    print(peak_memory())
