"""A pass: the next step of many images, each at its own timestep, with its own class, scale and solver."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ecosystem import takes_precomputed
from ..guidance import MODULATION_BYTES, guide
from ..runtime import few_batch_sizes
from ..tables import COLUMNS, NO_CLIP, advance
from .plans import Plan
from .requests import Job

_CLIP, _NOISE = COLUMNS.index("clip"), COLUMNS.index("noise")


class Row:
    """An image in flight.

    Args:
        job, index: of which request it is which image.
        plan: of its request.
        due: the earlier, the sooner it is served.
    """

    __slots__ = ("drawn", "due", "generator", "history", "index", "job", "plan", "preview", "ready", "sample", "step")

    def __init__(self, job: Job, index: int, plan: Plan, due: float):
        self.job, self.index, self.plan, self.due = job, index, plan, due
        self.step = 0
        self.sample: Any = None  # (C, H, W); None until it begins
        self.history: list[Tensor] = []
        self.generator: Any = None
        self.drawn: Tensor | None = None  # noise of a step that is not taken yet
        self.preview: Tensor | None = None  # (C, H, W), the estimate of the data at the last step, where one is wanted
        self.ready: Any = None  # on a GPU, the event of the last step's end

    @property
    def order(self) -> tuple[float, int, int]:
        """By which rows are served."""
        return self.due, self.job.number, self.index

    @property
    def is_guided(self) -> bool:
        """Whether its next step is."""
        return self.plan.guided[self.step]

    @property
    def cost(self) -> int:
        """Of its next step, in rows of the model's own size."""
        return (1 + self.is_guided) * self.plan.weight

    @property
    def is_finished(self) -> bool:
        """Whether all steps are taken."""
        return self.step == len(self.plan.guided)

    @property
    def timestep(self) -> float:
        """Of its next step."""
        return float(self.plan.solver.table[self.step, 0])

    def begin(self, device: torch.device) -> None:
        """Draw the first noise as a pipeline does for one image."""
        self.generator = torch.Generator().manual_seed(self.plan.request.seed + self.index)
        self.sample = self._noise(device) * self.plan.solver.scale

    def noise(self, device: torch.device) -> Tensor:
        """(C, H, W) of unit variance for its next step; the same again, should the step be repeated."""
        if self.drawn is None:
            self.drawn = self._noise(device)
        return self.drawn

    def _noise(self, device: torch.device) -> Tensor:
        return uploaded(torch.randn((1, *self.plan.shape), generator=self.generator)[0], device)


def uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the processor on a device; a GPU gets it without that anybody waits for what it computes."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


Pair = tuple[float, int | None]

# Steps ahead for which modulations are computed in one call: a call for one step takes 0.25 ms with the toy, 5 % of a
# pass of 16 rows, and one for 16 steps hardly more.
_STEPS_AHEAD = 16


class Modulations:
    """What `precompute` makes of pairs of timestep and class, kept for the passes that need them next.

    Args:
        transformer: the denoiser.
        device: of the inputs.
        most_bytes: of what is kept; the pairs used longest ago go first.
    """

    def __init__(self, transformer: Any, device: torch.device, most_bytes: int = MODULATION_BYTES):
        self.transformer, self.device = transformer, device
        config = transformer.config
        self._most = max(1, most_bytes // (config.precomputed_length * config.hidden_size * 4))
        self._kept: OrderedDict[Pair, Tensor] = OrderedDict()

    def __call__(self, pairs: Sequence[Pair], later: Iterable[Pair] = ()) -> Tensor:
        """(N, K, D) of N pairs.

        Where some are not kept, they are computed in one call together with those that are needed later, as many as may
        be kept.
        """
        if any(pair not in self._kept for pair in pairs):
            wanted = islice(dict.fromkeys([*pairs, *later]), max(self._most, len(pairs)))
            self._compute([pair for pair in wanted if pair not in self._kept])
        for pair in pairs:
            self._kept.move_to_end(pair)
        stacked = torch.stack([self._kept[pair] for pair in pairs])
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return stacked

    def _compute(self, pairs: list[Pair]) -> None:
        computed = self.transformer.precompute(*as_inputs(pairs, self.device))
        # Copies, since a part of a tensor would keep all of it in memory.
        self._kept.update(zip(pairs, [row.clone() for row in computed], strict=True))


def as_inputs(pairs: Sequence[Pair], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """(N,) timesteps and (N,) class labels, None for unconditional models."""
    timesteps, labels = zip(*pairs, strict=True)
    return (
        uploaded(torch.tensor(timesteps), device),
        None if labels[0] is None else uploaded(torch.tensor(labels), device),
    )


def batch_sizes_of(transformer: Any, most: int) -> Sequence[int]:
    """The numbers of rows that a denoiser's runtime should see, up to about `most`; none where it takes any as well.

    Exports say so themselves. `torch.compile` compiles for each number, until it gives up.
    """
    if hasattr(transformer, "batch_sizes"):
        return transformer.batch_sizes(most)
    return few_batch_sizes(most) if getattr(transformer, "_compiled_call_impl", None) is not None else ()


class Passes:
    """The computing of passes for one denoiser.

    Args:
        transformer: of any runtime.
        device: where it computes.
        batch_sizes: rising numbers of rows that the denoiser sees; none for any.
    """

    def __init__(self, transformer: Any, device: torch.device, batch_sizes: Sequence[int]):
        self.transformer, self.device, self.batch_sizes = transformer, device, batch_sizes
        self.config = transformer.config
        self._modulations = Modulations(transformer, device) if takes_precomputed(transformer) else None
        self._queued: torch.cuda.Event | None = None  # the end of the last pass, on a GPU

    @torch.no_grad()
    def __call__(self, rows: Sequence[Row]) -> None:
        """Take the next step of rows of one shape, the guided ones first; an error leaves them as they were."""
        for row in rows:
            if row.sample is None:
                row.begin(self.device)
        # All that is uploaded goes first, so that nothing waits for the denoiser.
        numbers, scales = self._numbers(rows), self._column([row.plan.scale for row in rows if row.is_guided])
        sample = torch.stack([row.sample for row in rows])
        prediction = self._predict(rows, sample, scales)
        previews = self._previews(rows, sample, prediction)
        advanced, estimates = self._advance(rows, numbers, sample, prediction)
        self._keep_pace()
        for index, row in enumerate(rows):
            row.sample, row.preview, row.ready, row.drawn = advanced[index], previews[index], self._queued, None
            row.history = [estimates[index], *row.history][: row.plan.solver.depth]
            row.step += 1

    def _keep_pace(self) -> None:
        """Wait for the pass before this one: a GPU computes one while the next is prepared, and no more wait.

        Without it, passes would be queued long before they are computed: who joins and who leaves would be settled too
        early, and their times would say nothing.
        """
        if self.device.type != "cuda":
            return
        before, self._queued = self._queued, torch.cuda.Event()
        self._queued.record(torch.cuda.current_stream(self.device))
        if before is not None:
            before.synchronize()

    def _predict(self, rows: Sequence[Row], sample: Tensor, scales: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C or 2C, H, W), guided where rows are, by (guided, 1, 1, 1) scales."""
        guided = sum(row.is_guided for row in rows)
        pairs: list[Pair] = [(row.timestep, self.config.null_class) for row in rows[:guided]]
        pairs += [(row.timestep, row.plan.label) for row in rows]
        inputs = torch.cat([sample[:guided], sample])
        if filled := self._filled(len(pairs)):
            pairs += pairs[-1:] * filled
            inputs = torch.cat([inputs, inputs[-1:].expand(filled, -1, -1, -1)])
        if self._modulations is not None:
            output = self.transformer(inputs, precomputed=self._modulations(pairs, self._later(rows))).sample
        else:
            output = self.transformer(inputs, *as_inputs(pairs, self.device)).sample
        uncond, cond = output[:guided], output[guided : guided + len(rows)]
        if not guided:
            return cond
        with_guidance = guide(cond[:guided], uncond, scales, self.config.guided_channels)
        return torch.cat([with_guidance, cond[guided:]])

    def _later(self, rows: Sequence[Row]) -> Iterator[Pair]:
        """The pairs of the next steps of rows, the nearest first."""
        for ahead in range(1, _STEPS_AHEAD):
            for row in rows:
                step = row.step + ahead
                if step < len(row.plan.guided):
                    timestep = float(row.plan.solver.table[step, 0])
                    yield timestep, row.plan.label
                    if row.plan.guided[step]:
                        yield timestep, self.config.null_class

    def _filled(self, count: int) -> int:
        """How many rows a pass is filled up with."""
        return next((size - count for size in self.batch_sizes if size >= count), 0)

    def _numbers(self, rows: Sequence[Row]) -> list[Any]:
        """The columns of the rows' tables, (N, 1, 1, 1) each, but for a bound that bounds none."""
        depth = max(row.plan.solver.depth for row in rows)
        table = np.zeros((len(rows), len(COLUMNS) + max(depth - 1, 0)), np.float32)
        for index, row in enumerate(rows):
            numbers = row.plan.solver.table[row.step, : table.shape[1]]
            table[index, : len(numbers)] = numbers
        columns: list[Any] = list(self._column(table).unbind(1))
        if table[:, _CLIP].min() >= NO_CLIP:
            columns[_CLIP] = NO_CLIP
        return columns

    def _advance(
        self, rows: Sequence[Row], numbers: list[Any], sample: Tensor, prediction: Tensor
    ) -> tuple[list[Tensor], list[Any]]:
        """Apply each row's coefficients: the new samples, and the estimates where a solver remembers them."""
        zeros = torch.zeros_like(sample[0])
        depth = max(row.plan.solver.depth for row in rows)
        history = [
            torch.stack([row.history[k] if k < len(row.history) else zeros for row in rows]) for k in range(depth)
        ]
        draws = [bool(row.plan.solver.table[row.step, _NOISE]) for row in rows]

        def noise() -> Tensor:
            pairs = zip(rows, draws, strict=True)
            return torch.stack([row.noise(self.device) if drawn else zeros for row, drawn in pairs])

        result = advance(numbers, sample, prediction, history, noise if any(draws) else None)
        # Copies, since a part of a tensor would keep those of all rows in memory, however long this one waits.
        estimates = [history[0][k].clone() if row.plan.solver.depth else None for k, row in enumerate(rows)]
        return [row.clone() for row in result.unbind()], estimates

    def _previews(self, rows: Sequence[Row], sample: Tensor, prediction: Tensor) -> list[Tensor | None]:
        previews: list[Tensor | None] = []
        for index, row in enumerate(rows):
            every, done = row.plan.request.preview_every, row.step + 1
            estimate = None
            if every and done % every == 0 and done < len(row.plan.guided):
                of_sample, of_prediction = row.plan.solver.data[row.step].tolist()
                estimate = of_sample * sample[index] + of_prediction * prediction[index, : len(sample[index])]
            previews.append(estimate)
        return previews

    def _column(self, values: Any) -> Tensor:
        """(N,) or (N, K) numbers -> (N, 1, 1, 1) or (N, K, 1, 1, 1), on the device."""
        return uploaded(torch.as_tensor(values, dtype=torch.float32), self.device)[..., None, None, None]
