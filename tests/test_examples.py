"""The examples run, and the documents show what they print."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(name: str, cwd: Path) -> str:
    command = [sys.executable, str(ROOT / "examples" / name)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert list(cwd.iterdir()) == []
    return result.stdout


def table_of(text: str) -> dict[tuple[str, ...], float]:
    rows = [
        line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and "family" not in line
    ]
    return {tuple(row[:-1]): float(row[-1]) for row in rows}


def test_the_table_of_families_is_what_the_example_prints(tmp_path: Path) -> None:
    printed = table_of(run("checkpoint_families.py", tmp_path))
    document = table_of((ROOT / "docs" / "checkpoints.md").read_text())
    assert document.keys() == printed.keys()
    for row, error in printed.items():  # another processor rounds otherwise
        assert error < 1e-6 or row[2].endswith("as it is")
        assert document[row] == error or 0.2 < document[row] / error < 5


def test_two_people_and_a_hub_get_equal_pictures(tmp_path: Path) -> None:
    output = run("push_and_pull.py", tmp_path)
    assert output.endswith("The pictures are equal, byte for byte.\n")
    for command in ("dit-hub push my-dit me/my-dit --private", "dit-hub generate me/my-dit"):
        assert command in output
        assert command in (ROOT / "docs" / "checkpoints.md").read_text()


def test_the_tests_that_the_export_matrix_names_are_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "export.md").read_text()))
    written = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 10
    assert {name for name in named if f"def {name}(" not in written} == set()
