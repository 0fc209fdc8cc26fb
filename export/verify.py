"""The error of an export on this machine, against what PyTorch computed when it was made."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_hub.pipeline_dit import DiTPipeline
from dit_hub.runtime import Provider

from .component import Component
from .ort import ORTSampler
from .reference import Parity, measure_parity, read_bounds, read_reference
from .tensorrt import TensorRTSampler
from .tensorrt_build import MANIFEST_FILE
from .web import FACTS_FILE


def verify_export(
    folder: str | os.PathLike, max_error: float | None = None, providers: Sequence[Provider] | None = None
) -> dict[str, Parity]:
    """Run the components of an export on its references.

    Args:
        folder: of `export_onnx` or `export_tensorrt`; a page for browsers holds no reference.
        max_error: bound of the relative error; None means the bounds in the export's report.
        providers: of ONNX Runtime, see `dit_hub.runtime.RuntimeOptions`.

    Returns:
        The errors of each component.

    Raises:
        ValueError: no export, one that does not run here, or an error above its bound.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{path} is a file; give the folder of the export." if path.exists()
                         else f"There is no folder {path}.")  # fmt: skip
    if (path / FACTS_FILE).is_file():
        raise ValueError(f"{path} is a page for browsers, which holds no reference to compare with.")
    bounds = read_bounds(path)
    pipeline = DiTPipeline.from_pretrained(path, providers=providers)
    components: dict[str, Any] = {"transformer": pipeline.transformer, "vae": pipeline.vae}
    if (path / "sampler").is_dir():
        in_tensorrt = (path / "sampler" / MANIFEST_FILE).is_file()
        sampler = TensorRTSampler if in_tensorrt else ORTSampler
        components["sampler"] = sampler.from_pretrained(path / "sampler", providers)
    components = {name: each for name, each in components.items() if isinstance(each, Component)}
    if missing := [name for name in components if name not in bounds]:
        raise ValueError(f"The report of {path} does not mention its {missing[0]}.")
    parities = {}
    for name, component in components.items():
        bound = bounds[name] if max_error is None else max_error
        cases = read_reference(component.folder)
        parities[name] = measure_parity(name, component.evaluate, cases, bound, component.runtime)
    return parities
