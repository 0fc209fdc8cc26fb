"""How the modules depend on each other, and what an import costs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dit_hub

REPOSITORY = Path(__file__).parents[1]

# Where the modules of `dit_hub` lie in the repository.
SOURCES = {
    "dit_hub": REPOSITORY / "src" / "dit_hub",
    "dit_hub.conversion": REPOSITORY / "conversion",
    "dit_hub.export": REPOSITORY / "export",
    "dit_hub.model_cards": REPOSITORY / "model_cards",
}

# From the bottom up. A module imports from its own layer and those below.
LAYERS = (
    {"checks", "extras", "files", "manifest", "paper", "runtime", "shards", "sharing"},
    {"configuration_dit"},
    {"table_scheduler", "tables"},
    {"ecosystem", "labels", "layers", "objectives", "schedulers", "solvers", "vaes"},
    {"pretrained"},
    {"modeling_dit"},
    {"adapters", "conversion", "distillation", "flops", "guidance", "parallel", "scaling", "visualize"},
    {"model_cards"},
    {"sources"},
    {"loading", "lora"},
    {"hub"},
    {"pipeline_dit"},
    {"conversion.pipelines", "export", "training"},
    {"evaluation"},
    {"solving"},
    {"serving"},
    {"cli"},
)

# The package's own namespace names and registers classes of every layer.
NAMESPACE = {"__init__", "registration"}

HEAVY_PACKAGES = ("torch", "transformers", "diffusers", "numpy", "huggingface_hub", "PIL", "typer", "rich")


# Modules with a layer of their own, above the rest of their package.
ABOVE_THEIR_PACKAGE = {part for parts in LAYERS for part in parts if "." in part}


def layer_of(part: str) -> int:
    return next(height for height, parts in enumerate(LAYERS) if part in parts)


def part_of(name: str) -> str:
    """The part of dit_hub that a full name belongs to: "dit_hub.conversion.official.to_official" to "conversion"."""
    names = name.split(".")[1:]
    return module if (module := ".".join(names[:2])) in ABOVE_THEIR_PACKAGE else names[0]


def imported_names(source: str, package: str) -> Iterator[str]:
    """Full names of what a module of `package` imports, wherever in its source: "dit_hub.files.new_folder"."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            home = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{home}.{alias.name}" for alias in node.names)


def source_files() -> Iterator[tuple[Path, str]]:
    """Every source file of `dit_hub`, with the package that it lies in."""
    for package, folder in SOURCES.items():
        for file in sorted(folder.rglob("*.py")):
            yield file, ".".join([package, *file.relative_to(folder).parts[:-1]])


def dependencies() -> set[tuple[str, str]]:
    """(importing, imported) pairs of the parts of dit_hub: ("pipeline_dit", "modeling_dit")."""
    pairs = set()
    for file, package in source_files():
        importing = part_of(f"{package}.{file.stem}")
        for name in imported_names(file.read_text(), package):
            if name.startswith("dit_hub."):
                pairs.add((importing, part_of(name)))
    return {(importing, imported) for importing, imported in pairs if importing != imported}


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("from .recipe import Recipe", "dit_hub.training.recipe.Recipe"),
        ("from . import recipe", "dit_hub.training.recipe"),
        ("from ..files import new_folder", "dit_hub.files.new_folder"),
        ("from .. import files", "dit_hub.files"),
        ("from dit_hub.files import new_folder", "dit_hub.files.new_folder"),
        ("import dit_hub.files", "dit_hub.files"),
        ("def f():\n    from ..cli import main", "dit_hub.cli.main"),
        ("if TYPE_CHECKING:\n    from ..cli import main", "dit_hub.cli.main"),
    ],
)
def test_every_form_of_import_is_seen(statement: str, name: str) -> None:
    assert list(imported_names(statement, "dit_hub.training")) == [name]


def test_every_module_has_a_layer() -> None:
    known = set.union(NAMESPACE, *LAYERS)
    assert {part_of(f"{package}.{file.stem}") for file, package in source_files()} <= known


def test_imports_point_downwards() -> None:
    pairs = {(a, b) for a, b in dependencies() if a not in NAMESPACE}
    assert {("pipeline_dit", "hub"), ("conversion.pipelines", "pipeline_dit")} <= pairs
    # Names taken from the package itself would hide the module they come from.
    places = set.union(*LAYERS)
    assert [pair for pair in pairs if pair[1] not in places and pair[1] != "__version__"] == []
    assert [(a, b) for a, b in pairs if b in places and layer_of(a) < layer_of(b)] == []


def test_nothing_imports_the_command_line() -> None:
    assert [importing for importing, imported in dependencies() if imported == "cli"] == []


def test_export_and_conversion_do_not_know_each_other() -> None:
    packages = {"export", "conversion"}
    assert [pair for pair in dependencies() if {part.split(".")[0] for part in pair} == packages] == []


# --- The package's namespace -----------------------------------------------------------------------------------------


def run(script: str) -> None:
    """Run a script in a Python process of its own."""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_importing_the_package_loads_nothing_heavy() -> None:
    run(f"import sys, dit_hub; dir(dit_hub); assert not set(sys.modules) & {set(HEAVY_PACKAGES)}")


@pytest.mark.parametrize(
    "script",
    [
        "from dit_hub import DiTConfig; assert DiTConfig().hidden_size == 1152",
        "from dit_hub import DiTTransformer; assert DiTTransformer.__name__ == 'DiTTransformer'",
        "from dit_hub import DiTPipeline; assert DiTPipeline.__module__.startswith('dit_hub')",
        "from dit_hub.serving.engine import Engine; import transformers, dit_hub; "
        "assert transformers.AutoModel._model_mapping[dit_hub.DiTConfig] is dit_hub.DiTTransformer",
    ],
)
def test_every_public_name_can_be_the_first(script: str) -> None:
    run(script)


AUTO_MODEL = """
config = AutoConfig.for_model("diffusion_transformer", sample_size=4, hidden_size=16, num_hidden_layers=1)
assert type(config) is dit_hub.DiTConfig
assert type(AutoModel.from_config(config)) is dit_hub.DiTTransformer
"""


@pytest.mark.parametrize(
    "imports",
    ["import dit_hub; from transformers import AutoConfig, AutoModel",
     "from transformers import AutoConfig, AutoModel; import dit_hub"],
)  # fmt: skip
def test_auto_classes_know_the_model_whichever_is_imported_first(imports: str) -> None:
    run(imports + AUTO_MODEL)


def test_public_names_are_listed_and_others_are_errors() -> None:
    assert {"DiTConfig", "DiTTransformer", "DiTPipeline", "__version__"} <= set(dir(dit_hub))
    with pytest.raises(AttributeError, match="module 'dit_hub' has no attribute 'DiTPipelin'"):
        _ = dit_hub.DiTPipelin  # pyright: ignore[reportAttributeAccessIssue]
