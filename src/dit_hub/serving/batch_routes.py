"""/v1/batches: files of requests, and their images as shards."""

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from ..checks import shown
from .answers import Json
from .batch_files import Upload
from .batches import Batches
from .bodies import body_chunks
from .limits import ApiError, Limits
from .openapi import documented

_TYPES = ("application/jsonl", "application/x-ndjson")

# A file of requests may take so long to arrive, if it arrives piece by piece.
_UPLOAD_SECONDS = 600.0


def _batches(request: Request) -> Batches:
    if request.app.state.batches is None:
        raise ApiError(404, "This server has no batches; start it with --batch-dir.", code="no_batches")
    return request.app.state.batches


async def create(request: Request) -> Response:
    """Accept a file with a request for images on each line."""
    batches, limits = _batches(request), request.app.state.limits
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind not in _TYPES:
        raise ApiError(415, f"The Content-Type must be {_TYPES[0]}, not {shown(kind)}.", code="unsupported_type")
    batches.check_room()
    upload = None
    try:
        upload = await asyncio.to_thread(batches.begin_upload)
        await _receive(request, upload, limits)
        batch = await asyncio.to_thread(batches.add, upload)
    except ValueError as error:
        raise ApiError(400, str(error), code="invalid_value") from None
    except OSError as error:
        raise ApiError(507, f"The batch could not be written ({error.strerror}); nothing of it was kept.",
                       code="disk_full") from None  # fmt: skip
    finally:
        if upload is not None:
            upload.drop()  # nothing is there any more where it was accepted
    return Json(batch.facts)


async def _receive(request: Request, upload: Upload, limits: Limits) -> None:
    with upload.requests.open("wb") as file:
        async for chunk in body_chunks(request, limits.batch_bytes, limits.body_seconds, _UPLOAD_SECONDS):
            await asyncio.to_thread(file.write, chunk)


async def list_all(request: Request) -> Response:
    """All batches, the oldest first."""
    return Json({"object": "list", "data": [batch.facts for batch in _batches(request).all()], "has_more": False})


async def show(request: Request, name: str) -> Response:
    """A batch's status, and how many of its requests are done."""
    return Json(_batches(request).get(name).facts)


async def results(request: Request, name: str) -> Response:
    """The shards that are there: tar files in webdataset's naming."""
    files = _batches(request).get(name).shard_files()
    listed = [{"name": shard, "bytes": path.stat().st_size, "url": f"/v1/batches/{name}/results/{shard}"}
              for shard, path in files.items()]  # fmt: skip
    return Json({"object": "list", "data": listed})


async def shard(request: Request, name: str, shard: str) -> Response:
    """One shard."""
    files: dict[str, Path] = _batches(request).get(name).shard_files()
    if shard not in files:
        raise ApiError(404, f"The batch has no shard {shown(shard)}.", code="shard_not_found")
    return FileResponse(files[shard], media_type="application/x-tar")


async def resume(request: Request, name: str) -> Response:
    """Go on with a paused batch."""
    batch = _batches(request).get(name)
    _batches(request).resume(batch)
    return Json(batch.facts)


async def cancel(request: Request, name: str) -> Response:
    """End a batch; its shards stay."""
    batch = _batches(request).get(name)
    await asyncio.to_thread(_batches(request).cancel, batch)
    return Json(batch.facts)


async def remove(request: Request, name: str) -> Response:
    """Remove a batch that is over, with its images."""
    batch = _batches(request).get(name)
    await asyncio.to_thread(_batches(request).remove, batch)
    return Json({"id": name, "object": "batch", "deleted": True})


def batch_routes() -> APIRouter:
    """The routes."""
    router = APIRouter(prefix="/v1/batches", default_response_class=Json)
    lines = {"schema": {"type": "string", "description": "A request for images, as JSON, on each line."}}
    body: dict[str, Any] = {"requestBody": {"required": True, "content": {_TYPES[0]: lines}}}
    answers = documented(400, 404, 408, 413, 415, 429, 507)
    router.add_api_route("", create, methods=["POST"], responses=answers, openapi_extra=body)
    router.add_api_route("", list_all, responses=documented(404))
    router.add_api_route("/{name}", show, responses=documented(404))
    router.add_api_route("/{name}", remove, methods=["DELETE"], responses=documented(404, 409))
    router.add_api_route("/{name}/results", results, responses=documented(404))
    tar = {200: {"description": "The shard.", "content": {"application/x-tar": {}}}}
    router.add_api_route("/{name}/results/{shard}", shard, response_class=FileResponse,
                         responses={**tar, **documented(404)})  # fmt: skip
    router.add_api_route("/{name}/resume", resume, methods=["POST"], responses=documented(404, 409))
    router.add_api_route("/{name}/cancel", cancel, methods=["POST"], responses=documented(404, 409))
    return router
