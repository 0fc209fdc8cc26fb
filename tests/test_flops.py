"""What models cost: counts against the paper, against closed forms, and against PyTorch's profiler."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from allocated import most_allocated
from dit_hub import DiTConfig, DiTTransformer
from dit_hub.flops import PARTS, Count, count, example_inputs, measure
from dit_hub.paper import PaperModel, paper_correlations, paper_models, paper_results, paper_sizes

from .command_line import dit_hub
from .conftest import TINY

CONDITIONINGS = ("adaln_zero", "adaln", "cross_attention", "in_context")


def test_the_papers_tables_are_whole() -> None:
    assert len(paper_sizes()) == 12
    assert len({model.label for model in paper_models()}) == len(paper_models()) == 16
    assert {model.conditioning for model in paper_models()} == set(CONDITIONINGS)
    assert paper_correlations()["fid"] == -0.93
    best = min(paper_results(), key=lambda result: result["fid"])
    assert (best["guidance_scale"], best["fid"], best["inception_score"]) == (1.5, 2.27, 278.24)


@pytest.mark.parametrize("paper", paper_models(), ids=lambda model: model.label)
def test_counts_are_the_papers_within_one_percent(paper: PaperModel) -> None:
    config = DiTConfig.from_name(paper.model, paper.image_size, conditioning=paper.conditioning)
    counted = count(config)
    assert counted.gmacs == pytest.approx(paper.gmacs, rel=0.01)
    assert counted.parameters / 1e6 == pytest.approx(paper.million_parameters, rel=0.01)
    assert counted.tokens == (paper.tokens or (32 // config.patch_size) ** 2)
    assert (counted.parameters, counted.gmacs) == measure(config)


def closed_form(config: DiTConfig) -> dict[str, tuple[int, int]]:
    """Parameters and multiply-accumulates of each part; T tokens, D width, L blocks, p inputs of a patch."""
    (height, width), patch = config.sample_height_width, config.patch_size
    image, d, blocks = height * width // patch**2, config.hidden_size, config.num_hidden_layers
    tokens = image + 2 * (config.conditioning == "in_context")
    inputs, outputs = patch**2 * config.in_channels, patch**2 * config.out_channels
    hidden, rows = int(config.mlp_ratio * d), config.modulation_rows
    classes = config.num_classes + (config.null_class is not None)
    norm = 0 if rows else 2 * d
    attention = (4 * d * d + 4 * d + norm, 4 * tokens * d * d + 2 * tokens**2 * d)
    if config.conditioning == "cross_attention":  # to the two tokens of timestep and class
        attention = (attention[0] + 4 * d * d + 4 * d + norm, attention[1] + 2 * (tokens + 2) * d * d + 4 * tokens * d)
    steps = config.timestep_freq_dim * d + d * d
    final_rows = 2 if rows else 0
    return {
        "embedding": (inputs * d + d + steps + 2 * d + classes * d, image * inputs * d + steps),
        "attention": (blocks * attention[0], blocks * attention[1]),
        "MLP": (blocks * (2 * d * hidden + hidden + d + norm), blocks * 2 * tokens * d * hidden),
        "modulation": ((blocks * rows + final_rows) * (d * d + d), (blocks * rows + final_rows) * d * d),
        "final": (d * outputs + outputs + norm, tokens * d * outputs),
    }


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("fields", [{}, {"sample_size": (8, 16), "mlp_ratio": 2.5, "hidden_size": 48}])
def test_each_part_has_its_closed_form(conditioning: str, fields: dict[str, Any]) -> None:
    config = DiTConfig(**{**TINY, **fields, "conditioning": conditioning})
    counted = count(config)
    assert {name: (part.parameters, part.macs) for name, part in counted.parts.items()} == closed_form(config)


def test_learned_positions_belong_to_the_embedding() -> None:
    config = DiTConfig.from_name("toy")
    assert count(config).parameters == 323_696
    # The table has a row for each token and class; the toy has no null class.
    expected = closed_form(config)["embedding"][0] + 16 * config.hidden_size
    assert count(config).parts["embedding"].parameters == expected


def allocated_at_once(config: DiTConfig) -> int:
    """The most bytes that PyTorch's profiler sees allocated in a forward pass."""
    model = DiTTransformer._from_config(config, attn_implementation="sdpa").eval()
    inputs = example_inputs(config, 1, "cpu")
    with torch.no_grad():
        model(*inputs)  # caches tables
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            output = model(*inputs)
    del output
    return most_allocated(profiler)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_memory_of_a_forward_pass_is_what_pytorch_allocates(conditioning: str) -> None:
    config = DiTConfig.from_name("DiT-S/4", conditioning=conditioning, num_hidden_layers=2)
    counted = count(config)
    assert counted.peak == allocated_at_once(config)
    assert max(part.peak for part in counted.parts.values()) <= counted.peak
    model = DiTTransformer(config)
    assert counted.memory == counted.peak + sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def test_the_command_line_shows_all_models_within_one_percent(tmp_path: Path) -> None:
    run = dit_hub("flops", "--all", "--format", "csv", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    rows = list(csv.DictReader(io.StringIO(run.stdout)))
    wholes = [row for row in rows if row["part"] == "whole"]
    assert len(wholes) == 16
    assert len(rows) == 16 * (len(PARTS) + 1)
    assert all(abs(float(row["gmacs_difference_percent"])) < 1 for row in wholes)
    assert all(abs(float(row["parameters_difference_percent"])) < 1 for row in wholes)
    document = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
    for row in wholes:
        name, millions = row["model"], int(row["parameters"]) / 1e6
        line = next(line for line in document.splitlines() if line.startswith(f"│ {name} "))
        assert [f"{millions:.2f}", f"{float(row['gmacs']):.2f}"] == [line.split()[i] for i in (-12, -6)], line
    large = next(row for row in wholes if row["model"] == "DiT-XL/2 at 512")
    assert (large["paper_gmacs"], large["tokens"]) == ("524.6", "1024")


def test_the_command_line_shows_one_model_by_part(tmp_path: Path) -> None:
    run = dit_hub("flops", "DiT-S/4", cwd=tmp_path)
    parameters = sum(of_part for of_part, _ in closed_form(DiTConfig.from_name("DiT-S/4")).values())
    assert run.returncode == 0, run.stderr
    for words in (*PARTS, "whole", "paper", "difference", f"{parameters:,}"):
        assert words in run.stdout
    data = json.loads(dit_hub("flops", "DiT-S/4", "--image-size", 512, "--format", "json", cwd=tmp_path).stdout)[0]
    assert data["tokens"] == 4 * 64
    assert "paper" not in data
    counted: Count = count(DiTConfig.from_name("DiT-S/4", 512))
    assert (data["parameters"], data["gmacs"]) == (counted.parameters, counted.gmacs)
    assert sum(part["parameters"] for part in data["parts"].values()) == data["parameters"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Give a model, or --all"),
        (("DiT-S/2", "--all"), "Give a model, or --all"),
        (("DiT-S/2", "--format", "xml"), "--format is text, csv or json, not 'xml'"),
        (("DiT-S/2", "--image-size", "250"), "image_size 250 is not divisible by 16"),
        (("DiT-M/2",), "There is no DiT size named 'DiT-M/2'"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    run = dit_hub("flops", *arguments, cwd=tmp_path)
    assert run.returncode == 2
    assert re.fullmatch(rf"error: [^\n]*{re.escape(words)}[^\n]*\n", run.stderr), run.stderr
