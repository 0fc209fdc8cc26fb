"""Logs for programs: one line of JSON for each event, on standard error."""

import json
import logging
import sys
from datetime import datetime, timezone

LOGGER = logging.getLogger("dit_hub.serving")


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _StandardError(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def log_as_json() -> None:
    """Send the logs of the server, and of uvicorn below it, to standard error as lines of JSON."""
    handler = _StandardError()
    handler.setFormatter(_JsonLines())
    for name, level in (("dit_hub.serving", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def log(event: str, level: int = logging.INFO, error: BaseException | None = None, **fields: object) -> None:
    """Log an event with its fields."""
    LOGGER.log(level, event, exc_info=error, extra={"fields": fields})
