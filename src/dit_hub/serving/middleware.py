"""Around every request: its id, who may ask, shutting down, the log, and what nobody expected."""

import hmac
import json
import logging
import re
import time
import uuid
from dataclasses import dataclass
from typing import Any

from .limits import CLIENT_LEFT, ApiError, Limits, retry_later
from .logs import log
from .metrics import Metrics

# Which probes ask without a key, and which are answered until the end.
_PROBES = ("/health", "/ready")
_ALWAYS = (*_PROBES, "/metrics")

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass
class Service:
    """Whether a server is shutting down, how many requests are at work, and how many connections are open."""

    closing: bool = False
    active: int = 0
    connections: int = 0


class Guard:
    """An ASGI application around another one.

    Args:
        app: the other one.
        service: counted here.
        metrics: counted here.
        limits: of which it looks after the number of connections.
        api_key: asked of everyone but probes; None for nobody.
    """

    def __init__(self, app: Any, service: Service, metrics: Metrics, limits: Limits, api_key: str | None = None):
        self.app, self.service, self.metrics, self._limits = app, service, metrics, limits
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        facts: dict[str, Any] = {}
        scope.setdefault("state", {})["facts"] = facts
        begun, status, counted = time.monotonic(), 0, scope["path"] not in _ALWAYS

        async def send_with_id(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        self.service.active += counted
        try:
            self._admit(scope["path"], headers)
            await self.app(scope, receive, send_with_id)
        except ApiError as error:
            await send_error(send_with_id, error)
        except Exception as error:
            log("error", logging.ERROR, error, request_id=request_id)
            if status:  # too late for an answer; the connection is closed
                raise
            await send_error(send_with_id, ApiError(500, "The server has failed; its log says how.", code="internal"))
        finally:
            self.service.active -= counted
            status = facts.pop("status", status) or CLIENT_LEFT
            seconds = time.monotonic() - begun
            self.metrics.observe_request(status, seconds, facts.get("model"))
            if counted or status >= 400:
                log("request", request_id=request_id, method=scope["method"], path=scope["path"][:100], status=status,
                    ms=round(seconds * 1000, 1), **facts)  # fmt: skip

    def _admit(self, path: str, headers: dict[bytes, bytes]) -> None:
        given = headers.get(b"authorization", b"")
        if self._expected is not None and path not in _PROBES and not hmac.compare_digest(given, self._expected):
            raise ApiError(401, "This server wants its key: Authorization: Bearer KEY.", code="invalid_api_key",
                           headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
        if self.service.connections > self._limits.connections and path not in _ALWAYS:
            error = retry_later(503, "Too many connections are open; try again.", 1, "too_many_connections")
            error.headers["Connection"] = "close"
            raise error
        if self.service.closing and path not in _ALWAYS:
            raise retry_later(503, "The server is shutting down; try again.", 1, "shutting_down")


async def send_error(send: Any, error: ApiError) -> None:
    """Answer with an error."""
    body = json.dumps(error.content).encode()
    pairs = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    headers = [(name.lower().encode(), value.encode()) for name, value in pairs.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
