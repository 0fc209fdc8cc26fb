"""Whether this evaluator gives ADM's published figures on ADM's own files."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..sharing import Progress
from .evaluate import evaluate

ADDRESS = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
REFERENCE = "VIRTUAL_imagenet256_labeled.npz"
SAMPLES = "admnet_guided_upsampled_imagenet256.npz"

# As ADM's evaluator prints them (guided-diffusion, evaluations/README.md), and how far PyTorch may be: convolutions sum
# in another order than TensorFlow's.
PUBLISHED = {
    "is": (215.8370361328125, 0.5),
    "fid": (3.9425574129223264, 0.01),
    "sfid": (6.140433703346162, 0.02),
    "precision": (0.8265, 0.002),
    "recall": (0.5309, 0.002),
}


@dataclass(frozen=True)
class Check:
    """A figure of the self-test.

    Args:
        metric: its name.
        value: what was measured.
        published: what ADM's evaluator gives.
        tolerance: the largest difference.
    """

    metric: str
    value: float
    published: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance."""
        return abs(self.value - self.published) <= self.tolerance


def self_test(
    folder: str | Path,
    inception: str | Path | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: Progress = lambda done, count: None,
) -> list[Check]:
    """Evaluate ADM's published samples against its reference archive, 50,000 and 10,000 images of 256x256.

    Args:
        folder: holds `REFERENCE` and `SAMPLES`.
        inception, batch_size, device, progress: as for `evaluate`.

    Raises:
        ValueError: a file is missing; the message says where it is published.
    """
    folder = Path(folder)
    for name in (REFERENCE, SAMPLES):
        if not (folder / name).is_file():
            raise ValueError(f"The self-test needs ADM's files, and {folder} has no {name}. Fetch {ADDRESS}{REFERENCE} "
                             f"and {ADDRESS}{SAMPLES}, and give their folder.")  # fmt: skip
    found = evaluate(folder / SAMPLES, folder / REFERENCE, list(PUBLISHED), "inception", inception=inception,
                     batch_size=batch_size, device=device, progress=progress)  # fmt: skip
    by_id = {result.id: result for result in found.results}  # empty in processes after the first
    return [Check(by_id[name].metric, by_id[name].value, *PUBLISHED[name]) for name in PUBLISHED if name in by_id]
