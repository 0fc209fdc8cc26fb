"""The wheel: complete, and importable without the repository."""

import ast
import json
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from dit_hub.extras import require

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("source", "command"),
    [
        (None, 'pip install "dit-hub[train]"'),
        ({"url": "file:///home/me/dit%20hub", "dir_info": {"editable": True}},
         'pip install -e "/home/me/dit hub[train]"'),
        ({"url": "file:///home/me/dit-hub", "dir_info": {}}, 'pip install "/home/me/dit-hub[train]"'),
        ({"url": "https://example.com/dit-hub", "vcs_info": {"vcs": "git", "commit_id": "4c8f"}},
         'pip install "dit-hub[train] @ git+https://example.com/dit-hub@4c8f"'),
        ({"url": "file:///home/me/dist/dit_hub-9-py3-none-any.whl", "archive_info": {"hashes": {}}},
         'pip install "dit-hub[train] @ file:///home/me/dist/dit_hub-9-py3-none-any.whl"'),
    ],
    ids=["index", "editable", "folder", "git", "wheel"],
)  # fmt: skip
def test_what_a_missing_package_asks_for_can_be_installed_from_where_dit_hub_is(
    source: dict[str, Any] | None, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By pip's record of the source (PEP 610): a clone's folder, since no index may have the package."""
    installed = tmp_path / "dit_hub-9.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: dit-hub\nVersion: 9\n")
    if source is not None:
        (installed / "direct_url.json").write_text(json.dumps(source))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError) as refused:
        require("no_such_package", "train")
    assert str(refused.value) == f"This needs no_such_package, which is not installed: {command}."


def test_every_package_that_is_imported_is_declared() -> None:
    """By its own name, not only as a dependency of another package."""
    sources = [
        path for folder in ("src", "conversion", "export", "model_cards") for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    imported = set()
    for node in (node for path in sources for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(str(node.module).split(".")[0])
    packages = metadata.packages_distributions()
    names = {packages[module][0] for module in imported - sys.stdlib_module_names - {"dit_hub"}}
    declared = set(re.findall(r'"([\w-]+)[>=]=', (ROOT / "pyproject.toml").read_text()))
    assert {plain(name) for name in names} - {plain(name) for name in declared} == set()


def plain(package: str) -> str:
    """The one spelling of a package's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Built from a copy of the tracked files, so that leftovers in this checkout have no effect.
    source = tmp_path_factory.mktemp("source")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, capture_output=True, check=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_module_and_the_embedded_model(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = {"src/dit_hub": "dit_hub", "conversion": "dit_hub/conversion"}
    folders |= {"export": "dit_hub/export", "model_cards": "dit_hub/model_cards"}
    for folder, package in folders.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{path.relative_to(ROOT / folder).as_posix()}" in names
    for name in ("py.typed", "model_cards/card.md.j2", "assets/dit-toy-shapes/transformer/model.safetensors"):
        assert f"dit_hub/{name}" in names


def test_every_module_of_the_installed_wheel_imports_and_the_toy_draws(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    script = (
        "import importlib, pathlib, dit_hub\n"
        "root = pathlib.Path(dit_hub.__file__).parent\n"
        f"assert root == pathlib.Path({str(installed / 'dit_hub')!r}), root\n"
        "for path in root.rglob('*.py'):\n"
        "    parts = path.relative_to(root.parent).with_suffix('').parts\n"
        "    importlib.import_module('.'.join(part for part in parts if part != '__init__'))\n"
        "pipe = dit_hub.DiTPipeline.from_pretrained('dit-toy-shapes')\n"
        "print(pipe('red-circle', num_inference_steps=1).images[0].size)\n"
    )
    # PYTHONPATH comes before the editable install.
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": "", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("(16, 16)")
