"""The error of an export on this machine, against what PyTorch computed when it was made."""

import os
from pathlib import Path
from typing import Any

from dit_hub.pipeline_dit import DiTPipeline

from .component import RuntimeComponent
from .onnx_export import measure_component
from .ort import ORTSampler
from .reference import Parity, read_bounds
from .tensorrt import TensorRTSampler
from .tensorrt_build import MANIFEST_FILE


def verify_export(folder: str | os.PathLike, max_error: float | None = None) -> dict[str, Parity]:
    """Run the components of an export on its references.

    Args:
        folder: of `export_onnx` or `export_tensorrt`; a page for browsers holds no reference.
        max_error: bound of the relative error; None means those of the export's report.

    Returns:
        The errors of each component.

    Raises:
        ValueError: no export, one that does not run here, or an error above its bound.
    """
    path = Path(folder)
    bounds = read_bounds(path)
    pipeline = DiTPipeline.from_pretrained(path)
    components: dict[str, Any] = {"transformer": pipeline.transformer, "vae": pipeline.vae}
    if (path / "sampler").is_dir():
        in_tensorrt = (path / "sampler" / MANIFEST_FILE).is_file()
        components["sampler"] = (TensorRTSampler if in_tensorrt else ORTSampler).from_pretrained(path / "sampler")
    components = {name: each for name, each in components.items() if isinstance(each, RuntimeComponent)}
    if missing := [name for name in components if name not in bounds]:
        raise ValueError(f"The report of {path} says nothing of its {missing[0]}.")
    return {
        name: measure_component(name, component, bounds[name] if max_error is None else max_error)
        for name, component in components.items()
    }
