"""Finished samples to images, a batch at a time, beside the passes."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .passes import Row

# Images of the model's own size that the decoder sees at a time: its activations for one of 256x256 take 240 MB.
_DECODED = 8


class Problem(NamedTuple):
    """Why a pass or a decoding failed, as words: an exception holds what its frames hold, which may be a GPU's memory.

    Args:
        text: the error's first line.
        of_memory, of_request: whether for want of memory, or by what was asked for.
    """

    text: str
    of_memory: bool
    of_request: bool

    @classmethod
    def of(cls, error: Exception) -> "Problem":
        """What an error says."""
        first = next(iter(str(error).strip().splitlines()), "no message")
        memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        return cls(f"{type(error).__name__}: {first}", memory, isinstance(error, ValueError))


def next_batch(ready: deque[tuple[Row, Any]]) -> list[tuple[Row, Any]]:
    """As many entries from the left as the decoder sees at a time, whose images have one shape; the others stay."""
    batch: list[tuple[Row, Any]] = []
    while ready and (not batch or ready[0][0].plan.shape == batch[0][0].plan.shape):
        if (len(batch) + 1) * ready[0][0].plan.weight > _DECODED and batch:
            break
        batch.append(ready.popleft())
    return batch


class Decoding:
    """The decoding for one pipeline.

    Args:
        pipeline: a `DiTPipeline`.
        device: where the samples are.
    """

    def __init__(self, pipeline: Any, device: torch.device):
        self._pipeline = pipeline
        # Of its own, so that a GPU decodes beside the next passes.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def outputs(self, rows: Sequence[Row], samples: Sequence[Tensor]) -> list[np.ndarray | None]:
        """What each request wants of its (C, H, W) sample, an image or a latent; None where it is not finite."""
        with self._beside_passes(rows, samples):
            finite = torch.stack(list(samples)).isfinite().flatten(1).all(1).tolist()
            wanted = [row.plan.request.output_type for row in rows]
            decoded = [one for one, ok, kind in zip(samples, finite, wanted, strict=True) if ok and kind == "image"]
            images = iter(self.images(decoded))
            return [
                (next(images) if kind == "image" else sample.cpu().numpy()) if ok else None
                for sample, ok, kind in zip(samples, finite, wanted, strict=True)
            ]

    def previews(self, rows: Sequence[Row], estimates: Sequence[Tensor]) -> Sequence[np.ndarray]:
        """Images of (C, H, W) estimates."""
        with self._beside_passes(rows, estimates):
            return self.images(estimates)

    def images(self, samples: Sequence[Tensor]) -> Sequence[np.ndarray]:
        """(C, H, W) each -> (height, width, 1 or 3) uint8 each, rounded as a pipeline's PIL images are."""
        if not samples:
            return ()
        return (self._pipeline.decode(torch.stack(list(samples)), "np") * 255).round().astype(np.uint8)

    @contextmanager
    def _beside_passes(self, rows: Sequence[Row], samples: Sequence[Tensor]) -> Iterator[None]:
        """On a GPU, compute on a stream of its own, after the passes that made the samples."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            for row, sample in zip(rows, samples, strict=True):
                self._stream.wait_event(row.ready)
                sample.record_stream(self._stream)
            yield
