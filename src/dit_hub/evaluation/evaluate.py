"""Evaluating samples: images through extractors, and metrics of what they see."""

import functools
import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.distributed as dist
import transformers

from .. import __version__
from ..configuration_dit import nearest
from ..files import file_sha256
from ..sharing import Progress, Worker
from .estimates import DENSITY_NEIGHBOURS, METRICS, Collected, Estimate, Options, compute
from .extractors import Extractor, get_extractor
from .images import Images, open_reference, open_samples, shown_size
from .metrics import frechet_distance
from .results import Evaluation, Result
from .statistics import Moments, Statistics, StatisticsFile, as_array, load_statistics

# Of a larger reference, neighbours and kernels see as many images, evenly spaced, as ADM's reference archives hold.
REFERENCE_IMAGES = 10_000

# For the slowest of several processes.
_PATIENCE = timedelta(days=7)

# The outputs of which statistics are needed.
_STATISTICS_OF = ("features", "spatial")


def evaluate(
    samples: Any,
    reference: Any,
    metrics: Sequence[str] | None = None,
    extractor: "str | Extractor | Sequence[str | Extractor]" = "inception",
    held_out: Any = None,
    inception: str | Path | None = None,
    half: bool = True,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: Progress = lambda done, count: None,
) -> Evaluation:
    """Measure how near generated images are to real ones.

    Of several processes, as `accelerate launch` or torchrun starts them, each sees a part of the images, and the first
    one measures: in the others there are no results.

    Args:
        samples: a folder of `dit-hub sample`, an .npz archive with `arr_0`, uint8 (N, H, W, 3), or such an array.
        reference: an .npz archive of images, statistics or both, as ADM's; data of `dit-hub train` ("shapes", a
            folder, "hf:NAME"), or an array.
        metrics: ids, "fid", "sfid", "is", "precision", "recall", "kid", …; None for all that extractor and reference
            allow. With several extractors, each gets those that it can give.
        extractor: one or several, by name or as objects: "inception", "dinov2", "clip", "shapes", …
        held_out: real images that the reference does not hold, as `reference`; adds FDr: how many times farther the
            samples are than they.
        inception: the path of FID's Inception weights.
        half: float16 distances for precision and recall, as ADM's.
        batch_size: images that an extractor sees at a time.
        device: where it computes.
        seed: of random subsets, groups and directions.
        progress: called after each batch, with the images that this process is done with, and all its own.

    Raises:
        ValueError: images of another form or size, statistics of another extractor, features that are not finite, or a
            metric that cannot be computed from what was given.
    """
    images, sampling = open_samples(samples)
    real_images = open_reference(reference, images.side)
    file = _statistics_in(reference)
    if file is not None and file.side not in (None, images.side):
        raise ValueError(f"{reference} holds statistics of images of {shown_size(file.side)}, and the samples are "
                         f"{shown_size(images.side)}.")  # fmt: skip
    given = [extractor] if isinstance(extractor, str) or callable(extractor) else list(extractor)
    networks = [get_extractor(one, device, inception) if isinstance(one, str) else one for one in given]
    names = [network.name for network in networks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"The extractor {twice[0]} is given twice.")
    if not networks:
        raise ValueError("Give an extractor.")
    real_count = 0 if real_images is None else len(real_images)
    wanted = [_choose(network, metrics, real_count, file) for network in networks]
    if missing := [name for name in metrics or () if name != "fdr" and not any(name in names for names in wanted)]:
        raise ValueError(_why_not(missing[0], networks, real_count, file, reference))
    apart = open_reference(held_out, images.side) if held_out is not None else None
    if held_out is not None and apart is None:
        raise ValueError(f"FDr needs held-out images, and {held_out} holds statistics alone.")
    if "fdr" in (metrics or ()) and apart is None:
        raise ValueError("FDr is a distance in units of that of held-out real images; give them as held_out.")
    if apart is not None:  # FDr is a multiple of the distance
        wanted = [[name for name in METRICS if name in names or name == "fid"] for names in wanted]
    if apart is not None and real_images is not None and apart.digest() == real_images.digest():
        raise ValueError("The held-out images are those of the reference; FDr needs others.")
    seen = []
    for network, names in zip(networks, wanted, strict=True):
        fake = collect(images, network, _outputs(names), None, batch_size, progress)
        real = _collect_reference(real_images, network, names, file, batch_size, progress)
        held = collect(apart, network, ["features"], 0, batch_size, progress) if apart is not None else None
        seen.append((network, names, real, fake, held))
    if (worker := Worker.from_environment()).index > 0:
        return Evaluation([])
    if worker.count > 1:  # a launcher gives each process one thread, and the others are done
        torch.set_num_threads(os.cpu_count() or 1)
    return Evaluation(
        _measure(seen, Options(half, seed)),
        samples={**_identity(images), **({"sampling": sampling} if sampling else {})},
        reference=_reference_facts(reference, real_images, file),
        extractors={network.name: network.fingerprint for network in networks},
        options={
            "float16_distances": half,
            "seed": seed,
            **({} if apart is None else {"held_out": _identity(apart)}),
        },
        versions={"dit-hub": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
                  "diffusers": diffusers.__version__, "numpy": np.__version__},
    )  # fmt: skip


def reference_statistics(
    reference: Any,
    side: tuple[int, int],
    extractor: Extractor,
    batch_size: int = 64,
    progress: Progress = lambda done, count: None,
) -> StatisticsFile:
    """The statistics of real images, for `save_statistics`; images of any number are read once, as a stream.

    Args:
        reference: as for `evaluate`.
        side: (height, width) to which images in folders are cropped.
        extractor: whose features count.
    """
    images = open_reference(reference, side)
    if images is None:
        raise ValueError(f"{reference} holds statistics already.")
    outputs = [output for output in _STATISTICS_OF if output in extractor.outputs]
    seen = collect(images, extractor, outputs, 0, batch_size, progress)
    return StatisticsFile(seen.statistics, extractor.name, extractor.fingerprint, images.side)


# --- Features --------------------------------------------------------------------------------------------------------


def collect(
    images: Images,
    extractor: Extractor,
    outputs: Iterable[str],
    keep: int | None,
    batch_size: int = 64,
    progress: Progress = lambda done, count: None,
) -> Collected:
    """What an extractor sees of images: its outputs for some of them, and their statistics over all.

    Args:
        images: to read, a part in each process.
        extractor: to see them.
        outputs: those that are needed.
        keep: number of images, evenly spaced, whose outputs are kept; None for all.
        batch_size: images at a time.
        progress: called after each batch.

    Returns:
        What all processes have seen, in the first one; in the others nothing.

    Raises:
        ValueError: an output that is not finite.
    """
    outputs, count, worker = list(outputs), len(images), Worker.from_environment()
    bounds = np.linspace(0, count, worker.count + 1).round().astype(int)
    start, stop = int(bounds[worker.index]), int(bounds[worker.index + 1])
    kept = np.arange(count) if keep is None else np.unique(np.linspace(0, count - 1, keep).round().astype(int))
    rows: dict[str, list[np.ndarray]] = {output: [] for output in outputs}
    moments: dict[str, Moments] = {}
    for batch in images.batches(start, stop, batch_size):
        seen = extractor(batch)
        here = kept[(kept >= start) & (kept < start + len(batch))] - start
        for output in outputs:
            values = as_array(seen[output], offset=start)
            rows[output].append(values[here].astype(np.float32))
            if keep is not None and output in _STATISTICS_OF:  # else they follow from the rows
                moments.setdefault(output, Moments(values.shape[1])).add(values)
        start += len(batch)
        progress(start - int(bounds[worker.index]), stop - int(bounds[worker.index]))
    mine = ({output: np.concatenate(parts) for output, parts in rows.items() if parts}, moments)
    return _merged(_gathered(worker, mine), images, keep is None)


def _gathered(worker: Worker, mine: Any) -> list[Any]:
    """What each process has, in the first one; nothing in the others."""
    if worker.count == 1:
        return [mine]
    everyone: list[Any] = [None] * worker.count
    dist.gather_object(mine, everyone if worker.index == 0 else None, group=_processors())
    return everyone if worker.index == 0 else []


@functools.cache
def _processors() -> Any:
    """All processes, as a group that speaks without GPUs; in it whoever is done waits for the slowest."""
    if dist.is_initialized():
        return dist.new_group(backend="gloo", timeout=_PATIENCE)
    dist.init_process_group("gloo", timeout=_PATIENCE)
    return None


def _merged(parts: list[tuple[dict[str, np.ndarray], dict[str, Moments]]], images: Images, complete: bool) -> Collected:
    """What the processes have seen together."""
    parts = [part for part in parts if part[0]]
    if not parts:
        return Collected()
    rows = {output: np.concatenate([part[0][output] for part in parts]) for output in parts[0][0]}
    if complete:
        moments = {
            output: Moments(rows[output].shape[1]).add(rows[output]) for output in rows if output in _STATISTICS_OF
        }
    else:
        moments = parts[0][1]
        for _, others in parts[1:]:
            for output, other in others.items():
                moments[output].merge(other)
    statistics = {output: one.statistics for output, one in moments.items()}
    return Collected(rows, statistics, len(images), images.labels)


def _collect_reference(
    images: Images | None,
    extractor: Extractor,
    names: Sequence[str],
    file: StatisticsFile | None,
    batch_size: int,
    progress: Progress,
) -> Collected:
    """The reference as an extractor sees it; statistics of a file take the place of its images', as in ADM's."""
    known = _fitting(file, extractor)
    needed = [name for name in names if METRICS[name].of_reference != "nothing"]
    unseen = [name for name in needed
              if METRICS[name].of_reference == "images" or METRICS[name].output not in known]  # fmt: skip
    seen = Collected()
    if unseen:
        assert images is not None
        keep = REFERENCE_IMAGES if any(METRICS[name].of_reference == "images" for name in unseen) else 0
        seen = collect(images, extractor, _outputs(unseen), min(keep, len(images)), batch_size, progress)
    return Collected(seen.rows, {**seen.statistics, **known}, seen.count)


def _measure(
    seen: Sequence[tuple[Extractor, list[str], Collected, Collected, Collected | None]], options: Options
) -> list[Result]:
    """The metrics of each extractor, from what it saw of the reference, the samples and held-out images."""
    results: list[Result] = []
    ratios: list[Estimate] = []
    for extractor, names, real, fake, held in seen:
        estimates = compute(names, real, fake, options)
        if held is not None:
            unit = frechet_distance(real.statistics["features"], held.statistics["features"])
            if not unit > 0:
                raise ValueError("The held-out images are at no distance from the reference; FDr needs others.")
            ratios.append(Estimate(estimates["fid"].value / unit, estimates["fid"].error / unit))
            estimates["fdr"] = ratios[-1]
        results += [_result(name, estimate, extractor, fake.count) for name, estimate in estimates.items()]
    if len(ratios) > 1:
        # All see the same samples, so that their errors do not cancel.
        mean = Estimate(float(np.mean([ratio.value for ratio in ratios])),
                        float(np.mean([ratio.error for ratio in ratios])))  # fmt: skip
        names = "+".join(extractor.name for extractor, *_ in seen)
        results.append(_plain(f"fdr{len(ratios)}", f"FDr{len(ratios)}", mean, names, True))
    return results


# --- Choices ---------------------------------------------------------------------------------------------------------


def _choose(
    extractor: Extractor, asked: Sequence[str] | None, real_count: int, file: StatisticsFile | None
) -> list[str]:
    """The ids of the metrics to compute with an extractor, in the order of the table."""
    for name in asked or ():
        if name not in METRICS and name != "fdr":
            raise ValueError(f"There is no metric {name!r}; the nearest names: {nearest(name, [*METRICS, 'fdr'])}.")
    if asked is None:  # CMMD is defined on CLIP, and is of no use elsewhere
        asked = [name for name in METRICS if (name == "cmmd") == (extractor.name == "clip")]
    return [name for name in METRICS if name in asked and not _problem(name, extractor, real_count, file)]


def _problem(name: str, extractor: Extractor, real_count: int, file: StatisticsFile | None) -> str:
    """Why a metric cannot be computed; empty where it can."""
    metric = METRICS[name]
    if metric.output not in extractor.outputs:
        return f"the extractor {extractor.name} gives no {metric.output}"
    if metric.of_reference == "images" and 0 < real_count <= DENSITY_NEIGHBOURS:
        return f"{real_count} real images are too few"
    if metric.of_reference == "nothing" or real_count:
        return ""
    if metric.of_reference == "images":
        return "it needs the images of the reference, which holds statistics alone"
    if metric.output not in _fitting(file, extractor):
        theirs = (file.extractor if file else None) or "inception"
        if theirs == extractor.name and file and file.fingerprint not in (None, extractor.fingerprint):
            return f"the reference's statistics are of other weights of {theirs}"
        return f"the reference's statistics are those of {theirs}"
    return ""


def _why_not(
    name: str, extractors: Sequence[Extractor], real_count: int, file: StatisticsFile | None, reference: Any
) -> str:
    return f"{METRICS[name].label} cannot be computed: {_problem(name, extractors[0], real_count, file)} ({reference})."


def _fitting(file: StatisticsFile | None, extractor: Extractor) -> dict[str, Statistics]:
    """The statistics of a file that are of this extractor; ADM's archives, which do not say, are of Inception's."""
    if file is None or (file.extractor or "inception") != extractor.name:
        return {}
    return file.statistics if file.fingerprint in (None, extractor.fingerprint) else {}


def _statistics_in(reference: Any) -> StatisticsFile | None:
    if isinstance(reference, np.ndarray) or Path(reference).suffix.lower() != ".npz" or not Path(reference).is_file():
        return None
    return load_statistics(reference)


def _outputs(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(["features", *(METRICS[name].output for name in names)]))


# --- Words -----------------------------------------------------------------------------------------------------------

_NAMES = {"dinov2": "DINOv2", "clip": "CLIP", "mae": "MAE", "convnext": "ConvNeXt", "siglip": "SigLIP"}


def _result(name: str, estimate: Estimate, extractor: Extractor, count: int) -> Result:
    shown = _NAMES.get(extractor.name, extractor.name)
    if name == "fdr":
        return _plain(name, f"FDr ({shown})", estimate, extractor.name, True)
    label = METRICS[name].label
    if extractor.name == "inception":
        size = f"{count // 1000}K" if count % 1000 == 0 else str(count)
        label += f"-{size}" if name in ("fid", "sfid") else ""
    elif label.startswith("FID"):
        label = label.replace("FID", f"FD-{shown}", 1)
    elif name != "cmmd":
        label += f" ({shown})"
    return _plain(name, label, estimate, extractor.name, METRICS[name].lower_is_better)


def _plain(name: str, label: str, estimate: Estimate, extractor: str, lower_is_better: bool) -> Result:
    if not np.isfinite(estimate.value):
        raise ValueError(f"{label} is {estimate.value}: the features or statistics are too large to compare.")
    if not np.isfinite(estimate.error):
        return Result(name, label, estimate.value, None, None, None, extractor, lower_is_better)
    low, high = estimate.interval
    least = METRICS[name].least if name in METRICS else 0.0
    return Result(name, label, estimate.value, estimate.error, max(low, least), high, extractor, lower_is_better)


def _identity(images: Images) -> dict[str, Any]:
    return {"name": images.name, "sha256": images.digest(), "count": len(images)}


def _reference_facts(reference: Any, images: Images | None, file: StatisticsFile | None) -> dict[str, Any]:
    if images is None:
        return {"name": Path(reference).name, "sha256": file_sha256(Path(reference)), "count": None, "statistics": True}
    return {**_identity(images), "statistics": file is not None}
