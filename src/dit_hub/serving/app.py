"""The HTTP interface: OpenAI's images API, and what a service is watched by."""

import time
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from .. import __version__
from ..checks import shown
from .answers import EventStream, Json, whole_answer
from .batch_routes import batch_routes
from .batches import Batches
from .bodies import images_schema, parse_images, parse_json, read_body
from .drawing import drawing
from .limits import ApiError, Limits, retry_later
from .metrics import Metrics
from .middleware import Guard, Service
from .models import Loaded, Models
from .openapi import documented


def create_app(
    models: Models, limits: Limits | None = None, api_key: str | None = None, batches: Batches | None = None
) -> FastAPI:
    """The ASGI application of a server.

    Args:
        models: which it serves; whoever calls this starts and closes them.
        limits: bounds of what it takes on.
        api_key: asked of everyone but /health and /ready; None for nobody.
        batches: for /v1/batches, which is off without them.
    """
    app = FastAPI(title="dit-hub", version=__version__, docs_url=None, redoc_url=None)
    metrics, service = Metrics(models), Service()
    models.observer = metrics.observe_pass
    if batches is not None:
        batches.count = metrics.count_images
    app.state.models, app.state.limits = models, limits or Limits()
    app.state.metrics, app.state.service, app.state.batches = metrics, service, batches
    app.add_middleware(Guard, service=service, metrics=metrics, limits=app.state.limits, api_key=api_key)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    _add_routes(app)
    app.include_router(batch_routes())
    return app


def _add_routes(app: FastAPI) -> None:
    success = {
        "description": "The images.",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "image/png": {"schema": {"type": "string", "format": "binary"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
    schema = images_schema(app.state.limits)
    app.add_api_route(
        "/v1/images/generations", generate, methods=["POST"], response_class=Json,
        responses={200: success, **documented(400, 404, 408, 413, 415, 429, 500, 504)},
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
    )  # fmt: skip
    app.add_api_route("/v1/models", list_models, response_class=Json, responses=documented())
    app.add_api_route("/v1/models/{name:path}", show_model, response_class=Json, responses=documented(404))
    for path, answer in (("/health", health), ("/ready", ready)):
        app.add_api_route(path, answer, response_class=Json, responses=documented())
        app.add_api_route(path, answer, methods=["HEAD"], response_class=Json, include_in_schema=False)
    metrics_content = {200: {"description": "For Prometheus.", "content": {"text/plain": {"schema": {}}}}}
    app.add_api_route("/metrics", show_metrics, response_class=Response, responses={**metrics_content, **documented()})


async def _api_error(request: Request, error: Any) -> Response:
    if error.status == 500 and request.app.state.service.closing:
        error = retry_later(503, error.message, 1, "shutting_down")
    return Json(error.content, error.status, headers=error.headers)


async def _http_error(request: Request, error: Any) -> Response:
    """What the framework refuses: paths and methods that are not there."""
    said = {404: f"There is nothing at {shown(request.url.path)}.", 405: f"{request.method} is not for this path."}
    problem = ApiError(error.status_code, said.get(error.status_code, str(error.detail)), headers=error.headers)
    return Json(problem.content, problem.status, headers=problem.headers)


# --- Images ----------------------------------------------------------------------------------------------------------


async def generate(request: Request) -> Response:
    """Draw images of a class."""
    state, facts = request.app.state, request.state.facts
    limits: Limits = state.limits
    body = parse_images(parse_json(await read_body(request, limits)), limits)
    name = state.models.names[0] if body.model is None else body.model
    async with AsyncExitStack() as held:
        model: Loaded = held.enter_context(state.models.lease(name))
        asked = body.to_request(limits, model, limits.seconds)
        facts |= {"model": name, "images": asked.n, "steps": asked.num_inference_steps}
        work = await held.enter_async_context(drawing(model, asked))
        count = partial(state.metrics.count_images, name)
        if body.stream:
            return EventStream(work, body.partial_images or 0, held.pop_all(), facts, count)
        return await whole_answer(request, work, body.response_format == "png", count)


# --- Models ----------------------------------------------------------------------------------------------------------


def _model_facts(models: Models, name: str, created: int) -> dict[str, Any]:
    loaded = models.loaded().get(name)
    facts = {} if loaded is None else loaded.facts()
    return {"id": name, "object": "model", "created": created, "owned_by": "dit-hub",
            "state": models.states()[name], **facts}  # fmt: skip


async def list_models(request: Request) -> Response:
    """The models, and of those that are loaded their classes, sizes and steps."""
    models: Models = request.app.state.models
    return Json({"object": "list", "data": [_model_facts(models, name, int(time.time())) for name in models.names]})


async def show_model(request: Request, name: str) -> Response:
    """One model."""
    models: Models = request.app.state.models
    if name not in models.names:
        raise ApiError(404, f"There is no model {shown(name)} here.", "model", "model_not_found")
    return Json(_model_facts(models, name, int(time.time())))


# --- The service -----------------------------------------------------------------------------------------------------


async def health(request: Request) -> Response:
    """Whether the process does its work; 503 where an engine has stopped and only a new process helps."""
    stopped = request.app.state.models.failures()
    if stopped:
        names = ", ".join(stopped)
        raise ApiError(503, f"The engine of {names} has stopped; the server must be restarted.", code="engine_stopped")
    return Json({"status": "ok"})


async def ready(request: Request) -> Response:
    """Whether requests should be sent here."""
    models: Models = request.app.state.models
    states = models.states()
    if request.app.state.service.closing:
        raise ApiError(503, "The server is shutting down.", code="shutting_down")
    if models.failures():
        raise ApiError(503, "An engine has stopped; see /health.", code="engine_stopped")
    failed = [name for name, state in states.items() if state == "failed"]
    first = models.names[0]
    models.retry(first)
    if states[first] == "failed":
        raise ApiError(503, f"The model {first} could not be loaded; the server's log says why.", code="model_failed")
    if not models.was_ready:
        raise ApiError(503, f"The model {first} is being loaded.", code="model_loading")
    return Json({"status": "ready", "failed": failed})


async def show_metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
