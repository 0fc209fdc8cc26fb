"""A pipeline folder whose code travels with it, for people without dit_hub (`trust_remote_code=True`).

diffusers fetches one file per component, so the modules of this package that a model needs are joined into one file,
and those that the pipeline needs besides into another.
"""

import ast
import json
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

# In the order of their imports. What loads other layouts and pushes stays out: such a folder needs neither.
_MODEL_MODULES = ("checks", "shards", "configuration_dit", "layers", "ecosystem", "modeling_dit")
_PIPELINE_MODULES = (
    *("checks", "configuration_dit", "ecosystem", "guidance", "labels", "schedulers", "solvers", "vaes"),
    "pipeline_dit",
)

_MODEL_FILE = "modeling_dit.py"
_PIPELINE_FILE = "pipeline.py"

# In place of what the pipeline takes from modules that stay out.
_PIPELINE_STANDS = """
from diffusers import DiffusionPipeline as HubPipeline

DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"
"""


def add_code(folder: Path) -> None:
    """Put the code beside the weights of a pipeline folder that dit_hub wrote, and name it in its JSON files."""
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
    """One source of several modules of dit_hub: what they import from outside once, then their bodies."""
    imports: list[str] = []
    bodies = []
    for module in modules:
        source = resources.files("dit_hub").joinpath(f"{module}.py").read_text()
        statements = ast.parse(source).body
        dropped = [statement for statement in statements if _is_dropped(statement)]
        imports += [line for statement in dropped for line in _outside(statement) if line not in imports]
        lines = source.splitlines()
        for statement in dropped:
            for number in range(statement.lineno - 1, statement.end_lineno or statement.lineno):
                lines[number] = ""
        bodies.append(f"# --- {module}.py\n\n" + "\n".join(lines).strip())
    code = "\n\n\n".join(bodies)
    used = [line for line in imports if re.search(rf"\b{line.split()[-1]}\b", code)]
    title = '"""Code of dit-hub (Apache-2.0), joined into one file by `dit-hub convert --self-contained`."""'
    return "\n\n\n".join([title, "\n".join(sorted(used)) + stands, code]) + "\n"


def _is_dropped(statement: ast.stmt) -> bool:
    """Imports go to the top; docstrings of modules and registrations, which auto_map stands for, go."""
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return True
    value = statement.value if isinstance(statement, ast.Expr) else None
    registers = isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "register"
    return registers or isinstance(value, ast.Constant)


def _outside(statement: ast.stmt) -> Iterator[str]:
    """An import as lines of one name each; none for those within dit_hub, whose names are in the same file."""
    if isinstance(statement, ast.Import):
        yield from (ast.unparse(ast.Import([alias])) for alias in statement.names)
    elif isinstance(statement, ast.ImportFrom) and not (
        statement.level or (statement.module or "").startswith("dit_hub")
    ):
        yield from (ast.unparse(ast.ImportFrom(statement.module, [alias], 0)) for alias in statement.names)
