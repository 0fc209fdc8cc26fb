"""Checks of callers' arguments: each returns a plain type, or raises ValueError in one sentence."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def shown(value: Any) -> str:
    """A value for an error message: on one line, shortened to 80 characters."""
    return textwrap.shorten(repr(value), 80, placeholder=" …")


def listed(names: Sequence[Any], most: int = 10) -> str:
    """Names for an error message: the first few, and how many more there are."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def whole_number(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """An integer of Python, numpy or torch; bools and floats are refused, whole ones too."""
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, int):
        raise ValueError(f"{name} must be a whole number, not {shown(value)}.")
    _check_range(name, plain, least, most)
    return plain


def real_number(name: str, value: Any, least: float | None = None, most: float | None = None) -> float:
    """A finite number of Python, numpy or torch; bools are refused."""
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, (int, float)) or not math.isfinite(plain):
        raise ValueError(f"{name} must be a finite number, not {shown(value)}.")
    _check_range(name, plain, least, most)
    return float(plain)


def _plain(value: Any) -> Any:
    """A scalar of numpy or torch as Python's; any other value as it is."""
    return value.item() if isinstance(value, (np.generic, np.ndarray, Tensor)) and value.ndim == 0 else value


def _check_range(name: str, value: float, least: float | None, most: float | None) -> None:
    if least is not None and value < least:
        raise ValueError(f"{name} must be {least} or more, not {value}.")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, not {value}.")


def rising_pair(name: str, value: Any) -> tuple[float, float]:
    """Two numbers between 0 and 1, the first at most the second."""
    try:
        first, second = (real_number(name, number) for number in value)
    except (TypeError, ValueError):
        first, second = 1.0, 0.0
    if not 0 <= first <= second <= 1:
        raise ValueError(f"{name} must be two rising numbers between 0 and 1, not {shown(value)}.")
    return first, second


def random_source(generator: Any, count: int) -> torch.Generator | list[torch.Generator] | None:
    """One generator, or one for each of `count` images."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    listed = isinstance(generator, (list, tuple))
    if not listed or not all(isinstance(one, torch.Generator) for one in generator):
        raise ValueError("generator must be a torch.Generator, such as torch.Generator().manual_seed(0), or a list of "
                         f"them, not {shown(generator)}.")  # fmt: skip
    if len(generator) != count:
        raise ValueError(f"There are {len(generator)} generators for {count} images; give one, or one for each.")
    return list(generator)


def initial_noise(latents: Any) -> Tensor:
    """Floats of torch or numpy as a tensor of at least one dimension."""
    tensor = torch.from_numpy(latents) if isinstance(latents, np.ndarray) and latents.dtype.kind == "f" else latents
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise ValueError(f"latents must be a tensor of floats, not {shown(latents)}.")
    return torch.atleast_1d(tensor)


def replaced_latents(latents: Tensor, returned: Any) -> Tensor:
    """The latents, or those that a callback returned in their place."""
    if returned is None:
        return latents
    replacement = returned.get("latents", latents) if isinstance(returned, Mapping) else None
    if not isinstance(replacement, Tensor) or replacement.shape != latents.shape:
        raise ValueError('callback_on_step_end must return None, or a dict with "latents" of the shape '
                         f"{tuple(latents.shape)}, not {shown(returned)}.")  # fmt: skip
    return replacement.to(latents)


@contextmanager
def unsound_values(problem: str) -> Iterator[None]:
    """ValueError for what libraries do when a folder's JSON files hold values that they do not expect."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{problem}; are its JSON files sound? {type(error).__name__}: {reason}") from error
