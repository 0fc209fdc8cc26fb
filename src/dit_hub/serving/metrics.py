"""What Prometheus sees of a server."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily

from .models import Models
from .requests import Pass

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_PASS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 30, 50, 100, 200, 300)


class _Now:
    """Gauges that are read when they are asked for."""

    def __init__(self, models: Models):
        self._models = models

    def collect(self) -> Iterator[Any]:
        waiting = GaugeMetricFamily("dit_hub_queue_waiting", "Images that have not begun.", labels=["model"])
        running = GaugeMetricFamily("dit_hub_images_running", "Images that have begun.", labels=["model"])
        loaded = self._models.loaded()
        for name, one in loaded.items():
            waiting.add_metric([name], one.runner.engine.waiting)
            running.add_metric([name], one.runner.engine.running)
        yield from (waiting, running)
        yield GaugeMetricFamily("dit_hub_models_loaded", "Models that are ready.", value=len(loaded))
        yield GaugeMetricFamily("dit_hub_models_bytes", "Memory of the models' weights.", value=self._models.memory)


class Metrics:
    """The metrics of one server, in a registry of their own; the queue and the memory are read when asked for."""

    def __init__(self, models: Models):
        self.registry = CollectorRegistry()
        registered: dict[str, Any] = {"registry": self.registry, "namespace": "dit_hub"}
        self._rows = Histogram("pass_rows", "Rows of a pass of the denoiser.", ["model"], buckets=_ROWS, **registered)
        self._pass_seconds = Histogram(
            "pass_seconds", "Seconds of a pass of the denoiser.", ["model"], buckets=_PASS_SECONDS, **registered
        )
        self._request_seconds = Histogram(
            "request_seconds", "Seconds until a request for images was answered.", ["model", "status"],
            buckets=_REQUEST_SECONDS, **registered,
        )  # fmt: skip
        self._images = Counter("images", "Images that were drawn.", ["model"], **registered)
        self._requests = Counter("requests", "Requests of all kinds, by status.", ["code"], **registered)
        self.registry.register(_Now(models))
        ProcessCollector(registry=self.registry)

    def observe_pass(self, model: str, done: Pass) -> None:
        """Count a pass of the denoiser."""
        self._rows.labels(model).observe(done.rows)
        self._pass_seconds.labels(model).observe(done.seconds)

    def count_images(self, model: str, number: int) -> None:
        """Count images that were drawn."""
        self._images.labels(model).inc(number)

    def observe_request(self, status: int, seconds: float, model: str | None) -> None:
        """Count a request; `model` is that of a request for images, a name that the server knows."""
        self._requests.labels(status).inc()
        if model is not None:
            self._request_seconds.labels(model, status).observe(seconds)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
