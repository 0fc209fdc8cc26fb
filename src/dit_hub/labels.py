"""Classes by id or by name."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .checks import shown, whole_number
from .configuration_dit import nearest

# One class a line, in the order of ILSVRC 2012; the names are those of its WordNet synset.
_IMAGENET_CLASSES = Path(__file__).parent / "assets" / "imagenet_classes.txt"

Labels = int | str | Sequence[int | str] | np.ndarray | Tensor | None


def imagenet_id2label() -> dict[int, str]:
    """Names of ImageNet's 1000 classes by id, all synonyms of WordNet separated by commas."""
    return dict(enumerate(_IMAGENET_CLASSES.read_text().splitlines()))


def label_ids(labels: Labels, id2label: dict[int, str], num_classes: int) -> list[int]:
    """The class ids of labels given by id or by name; a single label counts as a list of one.

    Args:
        labels: ids below `num_classes`, or names; case and the separators of words ("golden_retriever") do not matter.
        id2label: names by id; several names of one class are separated by commas.
        num_classes: number of classes.

    Raises:
        ValueError: an id out of range, an unknown name (the message lists the nearest), an ambiguous one, or any label
            of a model without classes.
    """
    wanted = _listed(labels)
    if wanted and not num_classes:
        raise ValueError("This model has no classes; leave the labels out.")
    by_name: dict[str, list[tuple[int, str]]] = {}
    for index, names in id2label.items():
        for name in dict.fromkeys(name.strip() for name in (*names.split(","), names)):
            by_name.setdefault(_folded(name), []).append((index, name))
    return [
        _by_name(label, by_name, id2label) if isinstance(label, str) else _checked(label, num_classes)
        for label in wanted
    ]


def parse_labels(texts: Iterable[str], id2label: dict[int, str]) -> list[int | str]:
    """Labels as people write them: a number that is the name of no class is an id, anything else a name."""
    known = {name.strip() for names in id2label.values() for name in names.split(",")}
    stripped = [text.strip() for text in texts]
    return [int(text) if text.isdecimal() and text not in known else text for text in stripped]


def _listed(labels: Any) -> list[Any]:
    """The labels of a scalar, a sequence, an array or a tensor."""
    if labels is None:
        return []
    if isinstance(labels, (Tensor, np.ndarray)):
        return labels.flatten().tolist()
    return list(labels) if isinstance(labels, Iterable) and not isinstance(labels, (str, bytes)) else [labels]


def _by_name(label: str, by_name: dict[str, list[tuple[int, str]]], id2label: dict[int, str]) -> int:
    found = by_name.get(_folded(label), [])
    ids = dict.fromkeys(index for index, _ in found)
    exact = dict.fromkeys(index for index, name in found if name == label)  # "a-b" and "a b" may be two classes
    for candidates in (ids, exact):
        if len(candidates) == 1:
            return next(iter(candidates))
    if ids:
        classes = ", ".join(f"{index} ({id2label[index]})" for index in ids)
        raise ValueError(f"The label {label!r} names the classes {classes}; give the id of the one you mean.")
    if not by_name:
        raise ValueError(f"This model's classes have no names, so {label!r} is unknown; give ids.")
    names = [spellings[0][1] for spellings in by_name.values()]
    raise ValueError(f"There is no class named {label!r}. The nearest names: {nearest(label, names)}.")


def _folded(name: str) -> str:
    """A name without what people write differently: its case, and the separators of its words."""
    return re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", name.strip().casefold())


def _checked(label: Any, num_classes: int) -> int:
    try:
        label = whole_number("label", label)
    except ValueError:
        raise ValueError(f"A label is a name or a whole number, not {shown(label)}.") from None
    if not 0 <= label < num_classes:
        raise ValueError(f"The label {label} is out of range: the classes are 0 to {num_classes - 1}.")
    return label


def same_classes(names: Sequence[str], id2label: dict[int, str]) -> list[int | None]:
    """For each class, the id of the class in `id2label` with the same name; None where there is none.

    Args:
        names: of each class; several names of one class are separated by commas, and any of them may match.
        id2label: names by id, as for `label_ids`. Where several classes share a name (ImageNet has two cranes), only
            the one at the same position counts.
    """
    by_name: dict[str, set[int]] = {}
    for index, others in id2label.items():
        for name in (others, *others.split(",")):
            by_name.setdefault(_folded(name), set()).add(index)
    same: list[int | None] = []
    for place, own in enumerate(names):
        found = next((ids for name in (own, *own.split(",")) if (ids := by_name.get(_folded(name)))), set())
        same.append(place if place in found else min(found) if len(found) == 1 else None)
    return same
