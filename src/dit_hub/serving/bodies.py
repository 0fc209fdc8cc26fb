"""What clients send: bodies within bounds, JSON without surprises, and the fields of a request for images."""

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from ..checks import shown
from ..configuration_dit import nearest
from ..labels import parse_labels
from ..schedulers import SCHEDULERS
from ..tables import published
from .limits import CLIENT_LEFT, ApiError, Limits
from .models import Loaded
from .requests import ImageRequest

# Seeds of an image and of those after it, as torch's generators take them.
_SEEDS = 2**63


async def body_chunks(request: Request, most: int, seconds: float, total_seconds: float) -> AsyncIterator[bytes]:
    """The body of a request as it arrives.

    Args:
        request: whose body was not read yet.
        most: bytes.
        seconds: until the next piece.
        total_seconds: until the end.

    Raises:
        ApiError: it is too long (413), does not arrive in time (408), or not at all (499).
    """
    too_long = ApiError(413, f"The body is longer than the {most} bytes that this server takes.", code="too_large")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 15 or int(announced) > most):
        raise too_long
    loop, chunks, size = asyncio.get_running_loop(), aiter(request.stream()), 0
    end = loop.time() + total_seconds
    while True:
        try:
            chunk = await asyncio.wait_for(anext(chunks), max(0.001, min(seconds, end - loop.time())))
        except StopAsyncIteration:
            return
        except ClientDisconnect:
            raise ApiError(CLIENT_LEFT, "The client left before the end of its body.") from None
        except (TimeoutError, asyncio.TimeoutError):
            message = "The body did not arrive in time; send it again."
            raise ApiError(408, message, code="timeout", headers={"Connection": "close"}) from None
        size += len(chunk)
        if size > most:
            raise too_long
        yield chunk


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body of a request for images; see `body_chunks`."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # which web pages of other sites cannot send without being asked for
        raise ApiError(415, f"The Content-Type must be application/json, not {shown(kind)}.", code="unsupported_type")
    chunks = body_chunks(request, limits.body_bytes, limits.body_seconds, limits.body_seconds)
    return b"".join([chunk async for chunk in chunks])


def parse_json(data: bytes | str) -> dict[str, Any]:
    """A JSON object, of finite numbers.

    Raises:
        ApiError: it is none.
    """

    def no_number(name: str) -> None:
        raise ValueError(f"{name} is no number in JSON")

    try:
        value = json.loads(data, parse_constant=no_number)
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.", code="invalid_json") from None
    except ValueError as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) or "JSON" in str(error) else "not UTF-8, or a "\
            "number of too many digits"  # fmt: skip
        raise ApiError(400, f"The body is not JSON: {reason}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "The body must be a JSON object with the fields of a request.", code="invalid_json")
    return value


class ImageBody(BaseModel):
    """A request for images of one class, in the shape of OpenAI's images API."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = Field(None, max_length=200, description="Of GET /v1/models; null: the server's first.")
    prompt: Annotated[str, Field(max_length=200)] | int | None = Field(
        None, description="A class name or id; null: of a model without classes."
    )
    n: int | None = Field(None, ge=1, description="Number of images; null: 1.")
    size: str | None = Field(None, pattern=r"^(auto|\d{1,5}x\d{1,5})$", description="WIDTHxHEIGHT, or auto.")
    seed: int | None = Field(None, ge=0, lt=_SEEDS - 2**16, description="Image k has seed + k; null: any.")
    num_inference_steps: int | None = Field(None, ge=1, description="null: the model's.")
    guidance_scale: float | None = Field(None, ge=-100, le=100, description="1 is none; null: the model's.")
    guidance_interval: list[float] | None = Field(
        None, min_length=2, max_length=2, description="Guide only between these shares of the timesteps; null: [0, 1]."
    )
    scheduler: str | None = Field(None, max_length=50, description="ddim, dpm++, searched, …; null: the model's.")
    eta: float | None = Field(None, ge=0, le=1, description="Noise of DDIM; null: 0.")
    priority: int | None = Field(None, ge=-8, le=8, description="Each level halves the wait beside others; null: 0.")
    response_format: Literal["b64_json", "png"] | None = Field(None, description="png: the image itself, of n = 1.")
    stream: bool | None = Field(None, description="Server-sent events.")
    partial_images: int | None = Field(None, ge=0, le=3, description="Previews of each image in the stream.")
    # OpenAI's further fields, where they ask for what is done anyway.
    output_format: Literal["png"] | None = None
    output_compression: Literal[100] | None = None
    background: Literal["auto", "opaque"] | None = None
    quality: Literal["auto", "standard"] | None = None
    moderation: Literal["auto", "low"] | None = None
    style: None = None
    user: str | None = None
    safety_identifier: str | None = None

    def label(self, id2label: dict[int, str]) -> int | str | None:
        """The class as the engine takes it; a number that is the name of no class is an id."""
        if isinstance(self.prompt, str):
            return parse_labels([self.prompt], id2label)[0] if self.prompt.strip() else None
        return self.prompt

    def to_request(self, limits: Limits, model: Loaded, deadline: float | None) -> ImageRequest:
        """The request for the engine.

        Args:
            limits: of the server, which `parse_images` has compared as far as it could.
            model: for which it is.
            deadline: in seconds.

        Raises:
            ApiError: a limit that only the model tells.
            ValueError: there is no such class.
        """
        height, width = model.size
        if self.size not in (None, "auto"):
            width, height = map(int, self.size.split("x"))
            most = 2 * max(model.size) if limits.side is None else limits.side
            check_limit("A side of size", max(width, height), most, "size")
        steps = model.usual_steps(self.scheduler) if self.num_inference_steps is None else self.num_inference_steps
        check_limit("num_inference_steps", steps, limits.steps)
        start, end = self.guidance_interval or (0.0, 1.0)
        return ImageRequest(
            label=self.label(model.id2label),
            n=self.n or 1,
            seed=secrets.randbelow(2**31) if self.seed is None else self.seed,
            num_inference_steps=steps,
            guidance_scale=self.guidance_scale,
            guidance_interval=(start, end),
            scheduler=self.scheduler,
            eta=self.eta or 0.0,
            height=height,
            width=width,
            priority=self.priority or 0,
            deadline=deadline,
            preview_every=-(-steps // (self.partial_images + 1)) if self.stream and self.partial_images else 0,
        )


def parse_images(fields: dict[str, Any], limits: Limits) -> ImageBody:
    """The fields of a request for images, checked as far as they can be without the model.

    Raises:
        ApiError: one sentence about the first field that is wrong.
    """
    try:
        body = ImageBody.model_validate(fields)
    except ValidationError as error:
        raise _field_error(error, list(ImageBody.model_fields)) from None
    check_limit("n", body.n or 1, limits.images_at_once)
    check_limit("num_inference_steps", body.num_inference_steps or 1, limits.steps)
    known = [*SCHEDULERS, *published()]
    if body.scheduler is not None and body.scheduler not in known:  # a file's name, too, is only an unknown name
        message = f"There is no scheduler named {shown(body.scheduler)}; known: {', '.join(known)}."
        raise ApiError(400, message, "scheduler")
    if body.stream and body.response_format == "png":
        raise ApiError(400, "response_format png is one image, not a stream; leave out stream.", "response_format")
    if body.response_format == "png" and (body.n or 1) > 1:
        raise ApiError(400, f"response_format png is one image, and n is {body.n}; ask for b64_json.",
                       "response_format")  # fmt: skip
    if body.partial_images and not body.stream:
        raise ApiError(400, "partial_images come with stream: true only.", "partial_images")
    return body


def check_limit(name: str, value: int, most: int, field: str | None = None) -> None:
    """Raise `ApiError` for more than a server's limit."""
    if value > most:
        raise ApiError(400, f"{name} must be at most {most} on this server, not {shown(value)}.", field or name)


# What fields are called elsewhere.
_OTHER_NAMES = {
    "steps": "num_inference_steps",
    "sampling_steps": "num_inference_steps",
    "label": "prompt",
    "class_label": "prompt",
    "class_labels": "prompt",
    "guidance": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "num_images": "n",
    "num_images_per_prompt": "n",
    "width": "size",
    "height": "size",
    "sampler": "scheduler",
}


def _field_error(error: ValidationError, known: list[str]) -> ApiError:
    problem = error.errors(include_url=False)[0]
    field, value = str(problem["loc"][0]) if problem["loc"] else "", shown(problem["input"])
    if problem["type"] == "extra_forbidden":
        meant = _OTHER_NAMES.get(field) or nearest(field[:100], known, 3)
        return ApiError(400, f"There is no field {shown(field)}; the nearest: {meant}.",
                        shown(field)[1:-1], "unknown_field")  # fmt: skip
    if field == "prompt":
        said = "must be a class name or id, of at most 200 characters"
    elif field == "size":
        said = 'must be "WIDTHxHEIGHT" or "auto"'
    elif field == "style":
        said = "is for OpenAI's own models; leave it out"
    else:
        said = re.sub(r"^(Input|String|List|Value) should", "must", problem["msg"])
        said = re.sub(r" after validation.*", "", said)
    return ApiError(400, f"{field} {said}, not {value}.", field, "invalid_value")


def images_schema(limits: Limits) -> dict[str, Any]:
    """The JSON schema of a request on a server with these limits."""
    schema = ImageBody.model_json_schema()
    for name, most in (("n", limits.images_at_once), ("num_inference_steps", limits.steps)):
        schema["properties"][name]["anyOf"][0]["maximum"] = most
    return schema
