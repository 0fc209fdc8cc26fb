"""Training from Hugging Face's `datasets`, downloaded and streamed."""

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from dit_hub.training.fingerprint import fingerprint
from dit_hub.training.loader import make_loader, open_dataset
from dit_hub.training.loop import Progress, train
from dit_hub.training.recipe import Recipe
from dit_hub.training.rows import Rows, StreamedRows
from dit_hub.training.setup import check_same_recipe, describe

from .command_line import dit_hub

MODEL = {"sample_size": 8, "patch_size": 4, "in_channels": 3, "hidden_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_classes": 2, "learn_sigma": False}  # fmt: skip

COUNT = 40

# What the Hub's viewer writes into a data set's card, and `datasets` reads.
CARD = """---
dataset_info:
  features:
  - name: photo
    dtype: image
  - name: kind
    dtype:
      class_label:
        names:
          '0': dark
          '1': light
  splits:
  - name: train
    num_examples: {count}
---
"""


def png(number: int) -> bytes:
    """8x12 pixels, wider than high, whose brightness tells the number."""
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), (5 * number,) * 3).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set as it lies on the Hub: parquet files and a card."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s at the end of each pass
    folder = tmp_path / "rows"
    write(folder, [png(number) for number in range(COUNT)])
    return folder


def write(folder: Path, images: list[bytes]) -> None:
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["dark", "light"])})
    rows = {
        "photo": [{"bytes": image, "path": None} for image in images],
        "kind": [number * 2 // len(images) for number in range(len(images))],
    }
    table = datasets.Dataset.from_dict(rows, features=features)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for part in range(2):
        table.shard(2, part, contiguous=True).to_parquet(str(folder / "data" / f"train-{part:05d}-of-00002.parquet"))
    (folder / "README.md").write_text(CARD.format(count=len(images)))


def numbers(data: torch.Tensor) -> list[int]:
    """Which images a batch holds."""
    return ((data[:, 0, 0, 0] + 1) * 127.5 / 5).round().int().tolist()


def test_rows_are_read_with_their_classes(repository: Path) -> None:
    rows = open_dataset(f"hf:{repository}", 8, 1, 0)
    assert isinstance(rows, Rows)
    assert (len(rows), rows.id2label, rows.sample_shape) == (COUNT, {0: "dark", 1: "light"}, (3, 8, 8))
    batch = rows.read([(3, False), (30, True)])
    assert numbers(batch.data) == [3, 30]
    assert batch.labels.tolist() == [0, 1]


def test_a_stream_is_the_same_for_the_same_seed_wherever_it_starts(repository: Path) -> None:
    rows = open_dataset(f"hf:{repository}", 8, 1, 0, streaming=True)
    assert isinstance(rows, StreamedRows)
    recipe = Recipe(model=MODEL, data=f"hf:{repository}", streaming=True, batch_size=12, random_flip=True)

    def batches(first: int, last: int, parts: int = 1, mine: tuple[int, ...] = (0,)) -> list[list[int]]:
        return [numbers(batch.data) for batch in make_loader(rows, recipe, parts, mine, first, last)]

    whole = batches(0, 9)  # three passes of three steps
    assert batches(4, 9) == whole[4:]  # resumed in the middle of a pass
    for epoch in range(3):
        seen = [number for batch in whole[3 * epoch : 3 * epoch + 3] for number in batch]
        assert len(set(seen)) == 36
    assert whole[:3] != whole[3:6]  # each pass has its own order
    assert sorted(whole[0]) != whole[0]


@pytest.mark.parametrize(("parts", "files"), [(2, True), (3, False)])
def test_each_process_streams_a_part_of_its_own(repository: Path, parts: int, files: bool) -> None:
    """The two files go to two processes; of three, each takes every third row."""
    rows = open_dataset(f"hf:{repository}", 8, 1, 0, streaming=True)
    recipe = Recipe(model=MODEL, data=f"hf:{repository}", streaming=True, batch_size=12)

    def batches(rank: int, first: int, last: int) -> list[list[int]]:
        mine = (2 * rank, 2 * rank + 1)  # accumulated in two parts
        return [numbers(batch.data) for batch in make_loader(rows, recipe, 2 * parts, mine, first, last)]

    whole = [batches(rank, 0, 6) for rank in range(parts)]  # two passes of three steps
    for rank in range(parts):
        assert [len(batch) for batch in whole[rank]] == [12 // parts // 2] * 12
        assert batches(rank, 2, 6) == whole[rank][4:]  # resumed in the middle of a pass
        assert batches(rank, 4, 6) == whole[rank][8:]
        assert whole[rank][:6] != whole[rank][6:]  # each pass has its own order
    for epoch in range(2):
        shown = [{n for batch in own[6 * epoch : 6 * epoch + 6] for n in batch} for own in whole]
        assert sum(map(len, shown)) == len(set.union(*shown)) == 36  # no row twice
        if files:
            assert sorted(max(own) < COUNT // 2 for own in shown) == [False, True]


def test_a_part_that_ends_early_starts_over(repository: Path) -> None:
    """Of 40 rows in two files of 4 and 36, the first process has 4, and takes 18 in a pass."""
    table = datasets.load_dataset("parquet", data_dir=str(repository / "data"), split="train")
    assert isinstance(table, datasets.Dataset)
    for part, where in enumerate((range(4), range(4, COUNT))):
        table.select(where).to_parquet(str(repository / "data" / f"train-{part:05d}-of-00002.parquet"))
    rows = open_dataset(f"hf:{repository}", 8, 1, 0, streaming=True)
    recipe = Recipe(model=MODEL, data=f"hf:{repository}", streaming=True, batch_size=12)

    def seen(rank: int, first: int) -> list[list[int]]:
        return [numbers(batch.data) for batch in make_loader(rows, recipe, 2, (rank,), first, 3)]

    shares = [seen(rank, 0) for rank in (0, 1)]
    assert [seen(rank, 1) for rank in (0, 1)] == [share[1:] for share in shares]  # resumed
    small = min(([n for batch in share for n in batch] for share in shares), key=lambda share: len(set(share)))
    assert set(small) == {0, 1, 2, 3}
    assert len(small) == 18


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_trains_and_resumes_where_it_was_cut(repository: Path, tmp_path: Path, streaming: bool) -> None:
    recipe = Recipe(model=MODEL, data=f"hf:{repository}", streaming=streaming, batch_size=10, epochs=4, save_every=3)
    whole = train(recipe)
    assert whole.pipeline.id2label == {0: "dark", 1: "light"}

    def cut(progress: Progress) -> None:
        if progress.step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, cut, run_folder=tmp_path / "run")
    resumed = train(recipe, run_folder=tmp_path / "run")
    assert resumed.epoch_losses == whole.epoch_losses


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stream_is_resumed_by_as_many_processes(repository: Path, streaming: bool) -> None:
    """Others would have other parts of it, and so see some rows twice and some never."""
    recipe = Recipe(model=MODEL, data=f"hf:{repository}", streaming=streaming, batch_size=8)
    rows = open_dataset(recipe.data, 8, 1, 0, streaming)
    facts = {"recipe": asdict(recipe), "data": describe(rows, 2)}
    check_same_recipe(Path("step-1"), facts, recipe, describe(rows, 2))
    older = {**facts, "data": {name: value for name, value in facts["data"].items() if name != "processes"}}
    check_same_recipe(Path("step-1"), older, recipe, describe(rows, 4))
    if not streaming:
        check_same_recipe(Path("step-1"), facts, recipe, describe(rows, 4))
        return
    with pytest.raises(
        ValueError, match=r"step-1 belongs to a stream shared by 2 processes, and now there are 4; resume with 2"
    ):
        check_same_recipe(Path("step-1"), facts, recipe, describe(rows, 4))


def test_a_damaged_image_is_named_and_left_out(tmp_path: Path, repository: Path) -> None:
    images = [png(number % 50) for number in range(100)]
    images[7] = b"no image"
    write(repository, images)
    rows = open_dataset(f"hf:{repository}", 8, 1, 0)
    batch = rows.read([(6, False), (7, False), (8, False)])
    assert batch.unreadable == ["Row 7"]
    assert numbers(batch.data) == [6, 8]
    streamed = open_dataset(f"hf:{repository}", 8, 1, 0, streaming=True)
    recipe = Recipe(model=MODEL, data=f"hf:{repository}", streaming=True, batch_size=10)
    named = {name for batch in make_loader(streamed, recipe, 1, [0], 0, 30) for name in batch.unreadable}
    assert len(named) == 1  # one image, in each of three passes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "The data set nowhere cannot be loaded"),
        ("columns", "must have one column of images and at most one of class labels (ClassLabel); it has kind"),
        ("count", "does not say how many rows it has, so it cannot be streamed; set streaming=false"),
    ],
)
def test_what_cannot_be_trained_from_is_one_sentence(repository: Path, tmp_path: Path, change: str, words: str) -> None:
    settings: list[Any] = [f"data=hf:{repository}", "streaming=true"]
    if change == "missing":
        settings[0] = "data=hf:nowhere"
    if change == "columns":
        for file in (repository / "data").iterdir():
            datasets.Dataset.from_dict({"kind": [1, 2]}).to_parquet(str(file))
        (repository / "README.md").unlink()
    if change == "count":
        (repository / "README.md").unlink()
        # Without the card, parquet's own metadata still name the columns.
    run = dit_hub("train", "toy", *settings, "--out", "out", cwd=tmp_path)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert words in run.stderr
    assert not (tmp_path / "out").exists()


def test_streaming_is_for_data_sets_of_the_hub() -> None:
    with pytest.raises(ValueError, match="streaming is for data sets of the Hub"):
        Recipe(streaming=True)


def test_a_row_without_an_image_is_left_out(repository: Path) -> None:
    for file in (repository / "data").iterdir():
        file.unlink()
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["dark", "light"])})
    rows = {"photo": [None, {"bytes": png(3), "path": None}], "kind": [0, None]}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(str(repository / "data" / "train-00000-of-00001.parquet"))
    (repository / "README.md").write_text(CARD.format(count=2))
    batch = open_dataset(f"hf:{repository}", 8, 1, 0).read([(0, False), (1, False)])
    assert batch.unreadable == ["Row 0", "Row 1 (without a class)"]


def test_small_images_are_said(repository: Path) -> None:
    assert list(open_dataset(f"hf:{repository}", 8, 1, 0).notes) == []
    assert list(open_dataset(f"hf:{repository}", 16, 1, 0).notes) == [
        f"{COUNT} of {COUNT} images that were checked are smaller than 16x16 and are enlarged."
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_fingerprint_of_rows_is_of_their_content(repository: Path, tmp_path: Path, streaming: bool) -> None:
    def of(folder: Path) -> str:
        return fingerprint(open_dataset(f"hf:{folder}", 8, 1, 0, streaming))

    before = of(repository)
    write(tmp_path / "again", [png(number) for number in range(COUNT)])
    assert of(tmp_path / "again") == before  # another place and time
    write(tmp_path / "other", [png(number if number != 3 else 30) for number in range(COUNT)])
    assert of(tmp_path / "other") != before
