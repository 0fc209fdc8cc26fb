"""The code that travels with a pipeline folder, for people without dit_hub (`trust_remote_code=True`).

Modules of this package are joined into one file for the model and one for the pipeline, since of a repository's code
diffusers downloads one file for each and no more. transformers' own way, `register_for_auto_class`, copies a module and
all the modules that it imports, so that only `AutoModel` could load it.
"""

import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

# In the order of their imports. What loads other layouts and pushes stays out: such a folder needs neither.
_MODEL_MODULES = (
    *("checks", "shards", "configuration_dit", "layers", "extras", "ecosystem", "pretrained"),
    "modeling_dit",
)
_PIPELINE_MODULES = (
    *("checks", "extras", "configuration_dit", "ecosystem", "guidance", "labels", "tables", "table_scheduler"),
    *("schedulers", "solvers", "vaes", "pipeline_dit"),
)

_MODEL_FILE = "modeling_dit.py"
_PIPELINE_FILE = "pipeline.py"

_TITLE = '"""Code of dit-hub (Apache-2.0), joined into one file by `dit-hub convert --self-contained`."""\n'

# In place of what the pipeline takes from modules that stay out.
_PIPELINE_STANDS = """
from diffusers import DiffusionPipeline as HubPipeline

DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"


class LoraMixin:  # adapters need dit_hub
    pass
"""

# Imports within dit_hub, whose names are in the same file, and registrations with transformers: auto_map replaces them.
_LEFT_OUT = re.compile(r"^(from (\.|dit_hub)\S* import (\([^)]*\)|.*)|Auto\w+\.register\(.*\))\n", re.MULTILINE)


def add_code(folder: Path) -> None:
    """Put the code beside the weights of a pipeline folder that dit_hub wrote, and name it in its JSON files.

    Raises:
        ValueError: the folder's scheduler is dit_hub's own.
    """
    scheduler = json.loads((folder / "model_index.json").read_text())["scheduler"]
    if scheduler[0] == "dit_hub":
        raise ValueError(f"The scheduler of this pipeline is a {scheduler[1]}, which needs dit_hub; a self-contained "
                         "folder takes diffusers' own.")  # fmt: skip
    model = _joined(_MODEL_MODULES)
    (folder / _MODEL_FILE).write_text(model)  # AutoModel looks here, diffusers in the component's folder
    (folder / "transformer" / _MODEL_FILE).write_text(model)
    (folder / _PIPELINE_FILE).write_text(_joined(_PIPELINE_MODULES, _PIPELINE_STANDS))
    model_entry, pipeline_entry = ["modeling_dit", "DiTTransformer"], ["pipeline", "DiTPipeline"]
    _edit(folder / "model_index.json", _class_name=pipeline_entry, transformer=model_entry)
    auto_map = {"AutoConfig": "modeling_dit.DiTConfig", "AutoModel": "modeling_dit.DiTTransformer"}
    _edit(folder / "transformer" / "config.json", auto_map=auto_map)


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2) + "\n")


def _joined(modules: Sequence[str], stands: str = "") -> str:
    """The sources of modules of dit_hub, one after the other, as one source."""
    sources = [resources.files("dit_hub").joinpath(f"{module}.py").read_text() for module in modules]
    parts = [f"# --- {module}.py\n\n{source}" for module, source in zip(modules, sources, strict=True)]
    return _TITLE + stands + "".join(f"\n\n{_LEFT_OUT.sub('', part)}" for part in parts)
