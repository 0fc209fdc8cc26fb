"""What the OpenAPI document says of answers other than success."""

from typing import Any

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

_MEANINGS = {
    400: "A field is wrong; the message is one sentence.",
    401: "The key is missing or wrong.",
    404: "There is no such thing.",
    405: "There is no such method.",
    408: "The body did not arrive in time.",
    409: "Not in this state.",
    413: "The body is too long.",
    415: "Another Content-Type is needed.",
    429: "Too much is waiting; Retry-After says when to come back.",
    500: "An image could not be drawn.",
    503: "Not ready: loading, shutting down or stopped.",
    504: "Not drawn in time.",
    507: "The disk is full.",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of answers other than success."""
    content = {"application/json": {"schema": _ERROR}}
    return {status: {"description": _MEANINGS[status], "content": content} for status in (401, 503, *statuses)}
