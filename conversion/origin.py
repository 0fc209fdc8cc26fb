"""The origin of weights, and the licence that comes with them."""

import json
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from yaml import YAMLError

# Beside the weights of a folder that was converted.
ORIGIN_FILE = "origin.json"

UNKNOWN_LICENSE = "unknown"

# The decoder of official sampling, for models of its 4 latent channels.
DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"

# The Hub's name of what the published models were trained on, whose 1000 classes are named in a known order.
IMAGENET = "ILSVRC/imagenet-1k"

DECODER_LICENSES = {DEFAULT_VAE: "mit", "stabilityai/sd-vae-ft-ema": "mit"}


@dataclass(frozen=True)
class Source:
    """A public model, trained on ImageNet.

    Args:
        license: its identifier, as the Hub writes it.
        base_model: the Hub repository that users know it by, if any.
        url: its home.
        authors: the notice that the licence requires.
    """

    license: str
    base_model: str | None
    url: str
    authors: str


_META = "Copyright (c) Meta Platforms, Inc. and affiliates."
_DIT = "https://github.com/facebookresearch/DiT"
_SIT = "https://github.com/willisma/SiT"

# By the file names under which they are distributed.
RELEASED_FILES = {
    "DiT-XL-2-256x256.pt": Source("cc-by-nc-4.0", "facebook/DiT-XL-2-256", _DIT, _META),
    "DiT-XL-2-512x512.pt": Source("cc-by-nc-4.0", "facebook/DiT-XL-2-512", _DIT, _META),
    "SiT-XL-2-256x256.pt": Source("mit", None, _SIT, _META),
}
REPOSITORIES = {source.base_model: source for source in RELEASED_FILES.values() if source.base_model}


@dataclass(frozen=True)
class Origin:
    """The origin of a pipeline's weights; written to `ORIGIN_FILE` and shown on the card.

    Args:
        source: name of the file or repository.
        layout: the layout they were read in: "official", "sit", "diffusers" or "dit-hub".
        weights: their key in a training checkpoint, such as "ema".
        license: an identifier, or "unknown".
        base_model: a Hub repository.
        url: the home of the source.
        authors: the notice that the licence requires.
        dataset: the Hub's name of the data set they were trained on, if known from the name of a published file or
            repository, a card beside them, or the data path of the training script.
        modified: whether the weights have been changed since, for instance by training.
        conversion: layouts and measured errors of the last conversion.
    """

    source: str
    layout: str
    weights: str | None = None
    license: str = UNKNOWN_LICENSE
    base_model: str | None = None
    url: str | None = None
    authors: str | None = None
    dataset: str | None = None
    modified: bool = False
    conversion: dict[str, Any] = field(default_factory=dict)

    @property
    def is_imagenet(self) -> bool:
        """Whether the classes are known to be ImageNet's, in its order."""
        return self.dataset == IMAGENET and not self.modified

    def with_license(self, license: str | None) -> "Origin":
        """The same origin with a licence that the user names.

        Raises:
            ValueError: it is empty, or the source has another, which stays with its weights.
        """
        if license is not None and not license.strip():
            raise ValueError("The licence is empty; name it, such as mit, or leave it out where it is unknown.")
        if license is None or license == self.license:
            return self
        if self.license != UNKNOWN_LICENSE:
            raise ValueError(f"{self.source} is under {self.license}, which stays with its weights; "
                             f"it cannot become {license}.")  # fmt: skip
        return replace(self, license=license)

    def save(self, folder: Path) -> None:
        """Write it into a pipeline folder."""
        (folder / ORIGIN_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")


def read_origin(folder: str | os.PathLike) -> Origin | None:
    """The origin that a folder states, or None.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder) / ORIGIN_FILE
    if not path.is_file():
        return None
    try:
        return Origin(**json.loads(path.read_text()))
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged.") from None


def official_export(path: str | os.PathLike) -> dict[str, Any]:
    """What `dit-hub convert --to official` wrote beside a file: "config", "scheduler", "id2label"; else nothing."""
    beside = read_origin(Path(path).parent)
    return beside.conversion if beside is not None and beside.conversion.get("to") == "official" else {}


def origin_of_file(path: Path, layout: str, weights: str | None, arguments: dict[str, Any]) -> Origin:
    """The origin of a checkpoint file, from its name, its training script's arguments or files beside it."""
    beside = read_origin(path.parent)
    if beside is not None:
        return replace(beside, layout=layout, weights=weights or beside.weights, conversion={})
    known = RELEASED_FILES.get(re.sub(r"\.(safetensors|pth|bin)$", ".pt", path.name))
    origin = _known(path.name, layout, weights, known)
    paths = " ".join(str(value) for name, value in arguments.items() if "data" in name)
    if re.search("(?i)imagenet|ilsvrc", paths):
        origin = replace(origin, dataset=IMAGENET)
    return _with_facts_of_card(origin, path.parent)


def origin_of_repository(name: str, folder: Path, layout: str) -> Origin:
    """The origin of a pipeline folder or Hub repository, from its own statement, its name or its card."""
    said = read_origin(folder)
    if said is not None:
        return replace(said, layout=layout)
    known = published_repository(name)
    origin = _known(known or Path(name).name, layout, None, REPOSITORIES.get(known) if known else None)
    return _with_facts_of_card(origin, folder)


def published_repository(name: str) -> str | None:
    """The repository of `REPOSITORIES` with this name, or in this folder of the Hub's cache; None for others."""
    for repository in REPOSITORIES:
        cached = "models--" + repository.replace("/", "--")
        if name == repository or cached in Path(name).parts:
            return repository
    return None


def _known(source: str, layout: str, weights: str | None, known: Source | None) -> Origin:
    if known is None:
        return Origin(source, layout, weights)
    return Origin(source, layout, weights, known.license, known.base_model, known.url, known.authors, IMAGENET)


def _with_facts_of_card(origin: Origin, folder: Path) -> Origin:
    """The origin with the licence and the data set that a card in the folder names, where they are unknown."""
    card = folder / "README.md"
    if origin.license != UNKNOWN_LICENSE or not card.is_file():
        return origin
    try:
        facts = ModelCard.load(card).data.to_dict()
    except (ValueError, YAMLError):
        return origin
    datasets = facts.get("datasets") or []
    datasets = [datasets] if isinstance(datasets, str) else datasets
    known = any(name in ("imagenet-1k", IMAGENET) for name in datasets)
    return replace(
        origin,
        license=str(facts.get("license") or UNKNOWN_LICENSE),
        dataset=IMAGENET if known else origin.dataset,
    )
