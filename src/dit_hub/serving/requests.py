"""What users ask of the engine, and what they hear back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Literal, NamedTuple

import numpy as np


@dataclass(frozen=True)
class ImageRequest:
    """Images of one class, drawn as `DiTPipeline.__call__` draws them one at a time.

    Args:
        label: a class id or name; None for unconditional models.
        n: number of images.
        seed: image k is that of `pipeline(label, generator=torch.Generator().manual_seed(seed + k))`.
        num_inference_steps, guidance_scale, guidance_interval, eta, height, width: as for `DiTPipeline.__call__`.
        scheduler: a name that `dit_hub.schedulers.switch_scheduler` knows; None means the pipeline's own.
        priority: each level halves the patience with which a request waits for others; -8 to 8.
        deadline: seconds from now until the images are of no use any more; those that are late fail. None for no end.
        preview_every: a preview of each image after every so many steps; 0 for none.
        output_type: "image", or "latent" for what the decoder would get.
    """

    label: int | str | None = None
    n: int = 1
    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    scheduler: str | None = None
    eta: float = 0.0
    height: int | None = None
    width: int | None = None
    priority: int = 0
    deadline: float | None = None
    preview_every: int = 0
    output_type: Literal["image", "latent"] = "image"


class Event(NamedTuple):
    """What happened to a request. The last one of a job is "done", "failed" or "cancelled".

    Args:
        kind: "preview" or "image", with an image; "done", after all images; "failed", with an error; "cancelled".
        index: of the image within the request.
        step: of a preview, the steps that are done.
        image: (height, width, 3) uint8, or (C, H, W) float32 of a request for latents.
        error: ValueError, TimeoutError or RuntimeError, whose text is one sentence for users.
    """

    kind: Literal["preview", "image", "done", "failed", "cancelled"]
    index: int = 0
    step: int = 0
    image: np.ndarray | None = None
    error: Exception | None = None


Listener = Callable[[Event], None]

_numbers = count(1)


@dataclass(eq=False)
class Job:
    """A request that the engine has accepted.

    Args:
        request: as accepted, with the class as an id, and the steps and the guidance that it left open.
        images: as in `Event`; None where they are not drawn yet.
        error: why it failed.
        state: "waiting", "running", "done", "failed" or "cancelled".
    """

    request: ImageRequest
    listener: Listener | None = None
    images: list[np.ndarray | None] = field(default_factory=list)
    error: Exception | None = None
    state: Literal["waiting", "running", "done", "failed", "cancelled"] = "waiting"
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ("done", "failed", "cancelled")


class QueueFullError(RuntimeError):
    """The queue has no room for a request; `retry_after` is an estimate in seconds of when it has."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class ClosedError(RuntimeError):
    """The engine takes no more requests, since its process ends."""

    def __init__(self) -> None:
        super().__init__("The server is shutting down.")


class Pass(NamedTuple):
    """A pass of the denoiser, for whoever watches: its rows (guided images have two), images, and seconds."""

    rows: int
    images: int
    seconds: float


Observer = Callable[[Pass], None]
