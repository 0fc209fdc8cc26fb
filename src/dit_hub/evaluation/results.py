"""Results of an evaluation: what was measured, on what, against what; `evaluation.json`; comparisons."""

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..files import new_file

RESULTS_FILE = "evaluation.json"

# Of the file; raised where a reader of an older one would go wrong.
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Result:
    """One measured value.

    Args:
        id: of the metric: "fid", "sfid", "is", "precision", …
        metric: its name for readers, with the extractor and, for FID, the number of samples: "FID-50K".
        value: what was measured.
        error: standard error over draws of the samples; None where it is not known.
        low, high: the interval of 95 %.
        extractor: whose features it is computed from.
        lower_is_better: the direction.
    """

    id: str
    metric: str
    value: float
    error: float | None
    low: float | None
    high: float | None
    extractor: str
    lower_is_better: bool


@dataclass
class Evaluation:
    """All that was measured on one set of samples.

    Args:
        results: the values.
        samples: "name", "sha256" and "count" of the images and, from the folder of `dit-hub sample`, how they were
            made ("sampling").
        reference: "name", "sha256" and "count" of the real images, and whether "statistics" came from a file.
        extractors: fingerprint of the weights by name.
        options: choices that change values, such as float16 distances.
        versions: of the packages that computed.
    """

    results: list[Result]
    samples: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    extractors: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Result:
        """The result of a metric's id ("fid"), or of "id@extractor" where there are several."""
        name, _, extractor = key.partition("@")
        for result in self.results:
            if result.id == name and extractor in ("", result.extractor):
                return result
        raise KeyError(f"There is no result {key!r}; there are {', '.join(result.id for result in self.results)}.")

    @property
    def how(self) -> str:
        """How the samples were made, for cards; empty where it is not known."""
        return how_made(self.samples)

    def to_dict(self) -> dict[str, Any]:
        """The contents of evaluation.json. Each result repeats what a card shows beside it."""
        beside = {"dataset_name": self.reference.get("name", "unknown"), "how": self.how, "source": "dit-hub evaluate"}
        facts = {key: value for key, value in asdict(self).items() if key != "results"}
        return {
            "version": SCHEMA_VERSION,
            "results": [{**asdict(result), **beside} for result in self.results],
            **facts,
        }

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Write evaluation.json, whole or not at all."""
        with new_file(path, overwrite) as building:
            building.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")


def how_made(samples: dict[str, Any]) -> str:
    """One line about how samples were made, from an evaluation's `samples`; empty where it is not known."""
    sampling = samples.get("sampling") or {}
    if not sampling:
        return ""
    guidance, scheduler = sampling["guidance"], sampling["scheduler"]["_class_name"].removesuffix("Scheduler")
    low, high = guidance.get("interval", (0, 1))
    parts = [
        f"{samples['count']:,} samples",
        f"{sampling['labels']['policy']} labels" if sampling["labels"] else "",
        f"{sampling['steps']} steps of {scheduler}",
        "no guidance" if guidance["scale"] == 1 else f"guidance {guidance['scale']:g}",
        f"between {low:g} and {high:g} of the timesteps" if (low, high) != (0, 1) and guidance["scale"] != 1 else "",
        f"decoder {sampling['decoder']}" if sampling.get("decoder") else "",
        f"{sampling['precision']['transformer']} {sampling['runtime']}",
        f"seed {sampling['seed']}" if "seed" in sampling else "",
    ]
    return ", ".join(part for part in parts if part)


def load_evaluation(path: str | os.PathLike) -> Evaluation:
    """The evaluation in a file, or in the folder that holds evaluation.json.

    Raises:
        ValueError: there is none, it is damaged, or a newer release wrote it.
    """
    path = Path(path)
    path = path / RESULTS_FILE if path.is_dir() else path
    try:
        facts = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"There is no file {path}; dit-hub evaluate writes it.") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("version"), int):
        raise ValueError(f"{path} is not a result of dit-hub evaluate.")
    if facts["version"] > SCHEMA_VERSION:
        raise ValueError(f"{path} has version {facts['version']}, which a newer dit-hub wrote; this one reads up to "
                         f"{SCHEMA_VERSION}.")  # fmt: skip
    parts = ("samples", "reference", "extractors", "options", "versions")
    if wrong := [name for name in parts if not isinstance(facts.get(name, {}), dict)]:
        raise ValueError(f"{path} is damaged: its {wrong[0]} is no object.")
    names = [field.name for field in fields(Result)]
    try:
        results = [Result(**{name: result[name] for name in names}) for result in facts.pop("results")]
        known = {field.name for field in fields(Evaluation)}
        return Evaluation(results, **{name: value for name, value in facts.items() if name in known})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from None


# --- Comparisons -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A metric of two sets of samples.

    Args:
        first, second: the results.
        p_value: how often two draws from one model would differ as much; None where an error is not known.
    """

    first: Result
    second: Result
    p_value: float | None

    @property
    def verdict(self) -> str:
        """Which one is better, at 5 %."""
        if self.p_value is None:
            return "not known"
        if self.p_value >= 0.05:
            return "no difference shown"
        falls = self.second.value < self.first.value
        return "second is better" if falls == self.first.lower_is_better else "first is better"


def compare(first: Evaluation, second: Evaluation) -> list[Comparison]:
    """Compare what two evaluations both measured, by a normal test of the difference.

    Raises:
        ValueError: they have other references, numbers of samples, options or extractors, so that their values cannot
            be compared, or no metric in common.
    """
    for what, ours, theirs in (
        ("references", first.reference.get("sha256"), second.reference.get("sha256")),
        ("numbers of samples", first.samples.get("count"), second.samples.get("count")),
        ("options", first.options, second.options),
    ):
        if ours != theirs:
            raise ValueError(f"The two evaluations have different {what} ({ours} and {theirs}), so that their values "
                             "cannot be compared.")  # fmt: skip
    for name in first.extractors.keys() & second.extractors.keys():
        if first.extractors[name] != second.extractors[name]:
            raise ValueError(f"The two evaluations have different weights of the extractor {name}.")
    theirs = {(result.id, result.extractor): result for result in second.results}
    pairs = [(ours, theirs.get((ours.id, ours.extractor))) for ours in first.results]
    found = [Comparison(ours, other, _p_value(ours, other)) for ours, other in pairs if other is not None]
    if not found:
        raise ValueError("The two evaluations have no metric in common.")
    return found


def _p_value(first: Result, second: Result) -> float | None:
    """Two-sided, of a difference of independent values with normal errors."""
    if first.error is None or second.error is None:
        return None
    spread = math.hypot(first.error, second.error)
    difference = abs(first.value - second.value)
    return math.erfc(difference / spread / math.sqrt(2)) if spread else float(difference == 0)
