"""What a server grants, and how it refuses."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """Bounds of what a server takes on.

    Args:
        images: of a request.
        steps: of an image.
        side: of an image, in pixels; None for twice that of the model's own images.
        waiting: images that may wait in all; above that a request is refused with status 429.
        seconds: until a request must be answered.
        body_bytes: of a request's body.
        body_seconds: until a request's headers, and then its body, have arrived.
        write_seconds: a client that takes less than 64 KiB of its answer in that time is cut off.
        answer_seconds: a client that has not taken what an answer holds in memory in that time is cut off.
        connections: open at once; above that all but probes are refused with status 503.
        batch_bytes: of a batch's file.
        batches: that are not finished.
    """

    images: int = 10
    steps: int = 250
    side: int | None = None
    waiting: int = 1024
    seconds: float = 300.0
    body_bytes: int = 2**16
    body_seconds: float = 10.0
    write_seconds: float = 30.0
    answer_seconds: float = 600.0
    connections: int = 2048
    batch_bytes: int = 2**26
    batches: int = 16

    @property
    def images_at_once(self) -> int:
        """Images of a request that the queue can ever have room for."""
        return min(self.images, self.waiting)


# The status, in logs and metrics, of a client that left before its answer; nginx's.
CLIENT_LEFT = 499

# What OpenAI's clients call the kinds of errors.
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than success: one sentence in the shape that OpenAI's clients read.

    Args:
        status: of HTTP.
        message: the sentence.
        param: the field that is wrong.
        code: a short name for programs.
        headers: further headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def content(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def retry_later(status: int, message: str, seconds: float, code: str) -> ApiError:
    """An error that ends by itself; clients should come back after so many seconds."""
    return ApiError(status, message, code=code, headers={"Retry-After": str(max(1, round(min(seconds, 3600))))})
