"""How long passes take, and how many rows are worth sharing one."""

import math
from collections import defaultdict, deque
from statistics import median

# Rows are not worth adding where fewer draw as much a second, up to this share. They would only make each image wait
# for the others: with S/2 on a processor, where a pass takes time in proportion to its rows, the 99th percentile of
# latency at 70 % load is 1.5 times as long with 16 images a pass as with one or two.
_WORTH = 0.95

# Of passes of alike numbers of rows, so many are kept, and so few are needed for a median to count.
_KEPT, _NEEDED = 15, 8

# After so many passes all are measured anew.
_FORGOTTEN = 4096


class Pace:
    """Seconds a row takes, by the number of rows of a pass: 1, 2 to 3, 4 to 7 and so on."""

    def __init__(self) -> None:
        self._seconds: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT))
        self._recent: deque[float] = deque(maxlen=_KEPT)
        self._passes, self._useful = 0, math.inf

    def note(self, rows: int, seconds: float) -> None:
        """A pass."""
        each = seconds / rows
        self._recent.append(each)
        self._passes += 1
        if self._passes % _FORGOTTEN == 0:
            self._seconds.clear()
        self._seconds[rows.bit_length()].append(each)
        if self._passes % _NEEDED == 0:
            self._useful = self._fewest()

    @property
    def seconds_per_row(self) -> float:
        """Of late; 0 after the first few passes, which may have compiled something."""
        return median(self._recent) if len(self._recent) >= _NEEDED else 0.0

    @property
    def useful_rows(self) -> float:
        """How many rows are worth sharing a pass; infinity where more are always better, as far as is known."""
        return self._useful

    def _fewest(self) -> float:
        known = {bits: median(times) for bits, times in sorted(self._seconds.items()) if len(times) >= _NEEDED}
        if not known:
            return math.inf
        enough = min(known.values()) / _WORTH
        fewest = next(bits for bits, each in known.items() if each <= enough)
        return math.inf if fewest == max(known) else 2**fewest - 1
