"""The examples run, and the documents show what they print."""

import re
import runpy
from pathlib import Path

from dit_hub.training.loop import train
from dit_hub.training.recipe import get_recipe

from .command_line import python

ROOT = Path(__file__).parents[1]


def run(name: str, cwd: Path, *arguments: str) -> str:
    result = python(ROOT / "examples" / name, *arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    assert list(cwd.iterdir()) == []
    return result.stdout


def test_the_table_of_families_is_what_the_example_prints(tmp_path: Path) -> None:
    printed = [line for line in run("checkpoint_families.py", tmp_path).splitlines() if line.startswith("|")]
    document = (ROOT / "docs" / "checkpoints.md").read_text().splitlines()
    assert printed == [line for line in document if line.startswith("|")]
    *same, control = [line.strip("| ").split(" | ")[-1] for line in printed[2:]]
    assert set(same) == {"below 1e-6", "weights equal, bit for bit"}
    assert 0.01 < float(control) < 0.1  # diffusers' class without the patch


def test_two_people_and_a_hub_get_equal_images(tmp_path: Path) -> None:
    output = run("push_and_pull.py", tmp_path)
    assert output.endswith("The images are equal, byte for byte.\n")
    for command in ("dit-hub push my-dit me/my-dit --private", "dit-hub generate me/my-dit"):
        assert command in output
        assert command in (ROOT / "docs" / "checkpoints.md").read_text()


def test_the_tests_that_the_export_matrix_names_are_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "export.md").read_text()))
    written = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 10
    assert {name for name in named if f"def {name}(" not in written} == set()


def test_the_table_of_versions_has_the_rows_of_its_example() -> None:
    rows = runpy.run_path(str(ROOT / "examples" / "onnxruntime_versions.py"))["EXPORTS"]
    document = (ROOT / "docs" / "export.md").read_text().split("| `dit-hub export onnx` |")[1].split("\n\n")[0]
    assert [line.split(" | ")[0].removeprefix("| ") for line in document.splitlines()[2:]] == list(rows)


def test_points_are_learnt_by_both_objectives(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    image = tmp_path / "points.png"
    printed = run("points.py", tmp_path / "here", "--steps", "400", "--out", str(image))
    floor, noise, flow = (float(line.split()[-1]) for line in printed.splitlines()[:3])
    assert floor < 0.05
    assert max(noise, flow) < 0.2  # 0.29 for points of the right mean and deviation and no form
    assert image.stat().st_size > 10_000


def test_every_image_of_the_embedded_model_is_clean(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    printed = run("toy_classes.py", tmp_path / "here", "--out", str(tmp_path / "classes.png"))
    assert "drawn: 160 of 160 of their class, 160 nearer than 0.01 to a real one" in printed
    assert (tmp_path / "classes.png").stat().st_size > 10_000


def test_the_unet_study_compares_networks_of_one_size(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    image = tmp_path / "study.png"
    printed = run("unet_study.py", tmp_path / "here", "--quick", "--out", str(image))
    unet, dit = (int(re.findall(rf"{name} +│ +([\d,]+)", printed)[0].replace(",", "")) for name in ("U-Net", "DiT"))
    assert abs(unet / dit - 1) < 0.01
    assert float(re.findall(r"names ([\d.]+)% of fresh real shapes", printed)[0]) > 99
    assert image.is_file()


def test_students_are_trained_measured_and_drawn_beside_their_teacher(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    small = {"steps": 1, "batch_size": 16, "save_every": 0, "sample_every": 0, "tracker": "none"}
    train(get_recipe("digits").with_settings(small)).pipeline.save_pretrained(tmp_path / "teacher")
    folders = (
        str(tmp_path / "teacher"),
        "--students",
        str(tmp_path / "students"),
        "--out",
        str(tmp_path / "drawn.png"),
    )
    printed = run("distillation.py", tmp_path / "here", *folders, "--quick")
    rows = [line.split(" | ")[:2] for line in printed.splitlines() if line.startswith("| ")][1:]
    assert rows[-4:] == [["| progressive, 1", "1"], ["| consistency, 4", "4"], ["| consistency, 2", "2"],
                         ["| consistency, 1", "1"]]  # fmt: skip
    assert ["| teacher, 4 DDIM", "8"] in rows
    assert (tmp_path / "drawn.png").stat().st_size > 5_000
    document = (ROOT / "docs" / "distillation.md").read_text()
    commands = [line for line in printed.splitlines() if line.startswith("dit-hub train distill")]
    assert len(commands) == 6
    for command in commands:
        generic = command.replace(str(tmp_path / "teacher"), "outputs/digits")
        assert generic.replace(str(tmp_path / "students"), "outputs/distilled") in document


def test_solvers_fall_with_their_order(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    image = tmp_path / "solvers.png"
    printed = run("solver_orders.py", tmp_path / "here", "--starts", "200", "--exact-steps", "400", "--out", str(image))
    table = [line.split("|")[1:-1] for line in printed.split("\n\n")[0].splitlines()]
    names, _, *rows = [[cell.strip() for cell in cells] for cells in table]
    errors = {name: {row[0]: row[index] for row in rows} for index, name in enumerate(names)}
    assert float(errors["DPM-Solver++ 2M"]["50"]) < 0.4 * float(errors["DDIM"]["50"])
    assert float(errors["searched"]["5"]) < float(errors["DPM-Solver++ 2M"]["5"])
    assert image.stat().st_size > 10_000
    document = (ROOT / "docs" / "solvers.md").read_text()
    assert printed.splitlines()[0] in document  # the same columns


def test_a_servers_metrics_are_drawn(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    image = tmp_path / "metrics.png"
    printed = run("serving_metrics.py", tmp_path / "here", "--seconds", "3", "--rate", "20", "--out", str(image))
    assert int(printed.split()[0]) > 5
    assert image.stat().st_size > 10_000
