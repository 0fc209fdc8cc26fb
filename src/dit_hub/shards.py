"""Sharded checkpoints: the files that their index names."""

import json
from pathlib import Path


def check_shards(index: Path) -> list[Path]:
    """The files that a sharded checkpoint's index names.

    Raises:
        ValueError: the index is damaged, or names a file outside its folder or one that is not there.
    """
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        paths = [index.parent / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index} is no index of a sharded checkpoint.") from None
    for name, path in zip(names, paths, strict=True):
        if Path(name).name != name or name in ("", "..", "."):
            raise ValueError(f"{index} names {name!r}, which is not a file of its folder.")
        if not path.is_file():
            raise ValueError(f"{index} names {name}, which is not there.")
    return paths
