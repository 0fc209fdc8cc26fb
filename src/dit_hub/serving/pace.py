"""How long passes take, and how many rows are worth sharing one."""

import math

# The memory of the fit: a pass counts half after 70 further ones.
_KEPT = 0.99

# Rows are worth adding while a pass's own cost is more than this share of theirs. Beyond, sharing draws hardly more
# images a second and makes each wait for the others: with S/2 on a processor, where a pass takes time in proportion to
# its rows, the 99th percentile of latency at 70 % load is 1.5 times as long with 16 images a pass as with one or two.
_WORTH = 0.1

# The least variance of the numbers of rows for a fit.
_LEAST_VARIANCE = 0.25


class Pace:
    """The line `seconds = own + each * rows` through the last passes."""

    def __init__(self) -> None:
        self._count = self._rows = self._seconds = self._squares = self._products = 0.0

    def note(self, rows: int, seconds: float) -> None:
        """A pass."""
        self._count = _KEPT * self._count + 1
        self._rows = _KEPT * self._rows + rows
        self._seconds = _KEPT * self._seconds + seconds
        self._squares = _KEPT * self._squares + rows * rows
        self._products = _KEPT * self._products + rows * seconds

    @property
    def seconds_per_row(self) -> float:
        """On average; 0 before the first pass."""
        return self._seconds / self._rows if self._rows else 0.0

    @property
    def useful_rows(self) -> float:
        """How many rows are worth sharing a pass; infinity where the passes were too alike to say."""
        if not self._count:
            return math.inf
        rows, seconds = self._rows / self._count, self._seconds / self._count
        variance = self._squares / self._count - rows**2
        if variance < _LEAST_VARIANCE:
            return math.inf
        each = (self._products / self._count - rows * seconds) / variance
        own = seconds - each * rows
        return max(own, 0.0) / (_WORTH * each) if each > 0 else math.inf
