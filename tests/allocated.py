"""What PyTorch's profiler saw of memory."""

from typing import Any

from torch.profiler import profile


def most_allocated(profiler: profile) -> int:
    """The most bytes that were allocated at once while a profiler of memory ran."""
    live = peak = 0
    results: Any = profiler.profiler
    for event in sorted(results.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
