"""Peak memory of caching latents does not grow with the data. Run as a script, this file is the process measured."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from command_line import python
from conftest import small_vae
from dit_hub.training.data import Batch, Key
from dit_hub.training.latents import cache_latents

STATUS = Path("/proc/self/status")


class RandomPictures:
    """Images that are drawn when they are read, so that the data set itself takes no memory."""

    id2label, sample_shape, is_latent, scaling_factor = {0: "even", 1: "odd"}, (3, 32, 32), False, 1.0
    shift_factor, description, license, notes = 0.0, "", "unknown", ()

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def read(self, keys: Sequence[Key]) -> Batch:
        positions = [position for position, _ in keys]
        generator = torch.Generator().manual_seed(positions[0])
        images = 2 * torch.rand(len(positions), *self.sample_shape, generator=generator) - 1
        return Batch(images, torch.tensor(positions) % 2, positions, [])


def peak_memory() -> int:
    """Of this process, in kB. `resource.getrusage` would not do: there a child starts from its parent's peak."""
    return int(next(line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")))


def peak_of_caching(count: int, folder: Path) -> int:
    """In a process of its own."""
    run = python(__file__, count, folder, cwd=folder.parent)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.skipif(not STATUS.exists(), reason="peak memory is read from /proc")
def test_memory_of_caching_does_not_depend_on_the_amount_of_data(tmp_path: Path) -> None:
    few, many = (peak_of_caching(count, tmp_path / str(count)) for count in (512, 2048))
    # Peaks of equal runs differ by 1 %, of 500 MB. The latents that the larger set has more, 100 MB, would be 20 %.
    assert abs(many / few - 1) < 0.05


if __name__ == "__main__":
    torch.set_num_threads(1)
    # 32 channels: 66 kB of latents for each image at hardly any cost, so that holding on to them would show.
    cache_latents(RandomPictures(int(sys.argv[1])), small_vae(latent_channels=32), sys.argv[2], shard_size=128)
    print(peak_memory())
