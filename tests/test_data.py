"""Reading what people have: images of every kind, folders of every shape, archives."""

import io
import json
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dit_hub import DiTPipeline
from dit_hub.training.data import Dataset
from dit_hub.training.latents import cache_latents
from dit_hub.training.loader import open_dataset
from dit_hub.training.loop import train
from dit_hub.training.recipe import Recipe

from .command_line import Python, dit_hub
from .together import environment, free_port

FIELDS = {"sample_size": 8, "patch_size": 4, "in_channels": 3, "hidden_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 2, "learn_sigma": False}  # fmt: skip

SIZE = 8
LEFT, RIGHT = (200, 40, 90), (10, 120, 250)


def halves(left: Any = LEFT, right: Any = RIGHT, mode: str = "RGB") -> Image.Image:
    """A square of two halves."""
    image = Image.new(mode, (SIZE, SIZE), left)
    image.paste(right, (SIZE // 2, 0, SIZE, SIZE))
    return image


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(depth: int, kind: int, row: bytes, **chunks: bytes) -> bytes:
    """A PNG file of SIZE equal rows, of a bit depth and a colour type that PIL does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIZE, SIZE, depth, kind, 0, 0, 0))
    extra = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    body = chunk(b"IDAT", zlib.compress((b"\0" + row) * SIZE)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + extra + body


def words(left: int, right: int) -> bytes:
    """A row of 16-bit grey."""
    return struct.pack(">H", left) * (SIZE // 2) + struct.pack(">H", right) * (SIZE // 2)


def palette() -> Image.Image:
    image = Image.new("P", (SIZE, SIZE), 1)
    image.putpalette([255, 0, 255, *LEFT, *RIGHT])
    image.paste(2, (SIZE // 2, 0, SIZE, SIZE))
    return image


def turned(orientation: int, *operations: Image.Transpose) -> bytes:
    """The halves as a camera stores them, which its orientation sets upright."""
    image = halves()
    for operation in operations:
        image = image.transpose(operation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, "png", exif=exif)


def frames() -> list[Image.Image]:
    """The halves, and then something else."""
    return [halves(), Image.new("RGB", (SIZE, SIZE), (0, 255, 0))]


GREY, WHITE = (100,) * 3, (255,) * 3

# What a file holds, and the colours of its halves.
KINDS: dict[str, tuple[str, bytes, tuple, tuple]] = {
    "16 bits": ("png", png(16, 0, words(100 * 257, 30 * 257)), GREY, (30,) * 3),
    "16 bits of TIFF": ("tif", encoded(Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)), "tiff"), GREY, GREY),
    "16 bits of netpbm": ("pgm", b"P5 8 8 65535\n" + words(100 * 257, 30 * 257) * 8, GREY, (30,) * 3),
    "16 bits and one of them clear": (
        "png",
        png(16, 0, words(100 * 257, 30 * 257), tRNS=struct.pack(">H", 30 * 257)),
        GREY,
        WHITE,
    ),
    "32 bits": ("tiff", encoded(Image.fromarray(np.full((8, 8), 100 * 257, np.int32)), "tiff"), GREY, GREY),
    "floats": ("tif", encoded(Image.fromarray(np.full((8, 8), 100 / 255, np.float32)), "tiff"), GREY, GREY),
    "1 bit": ("png", encoded(halves(0, 1, "1"), "png"), (0,) * 3, WHITE),
    "grey and alpha": ("png", encoded(halves((100, 255), (7, 0), "LA"), "png"), GREY, WHITE),
    "alpha": ("webp", encoded(halves((*LEFT, 255), (9, 9, 9, 0), "RGBA"), "webp", lossless=True), LEFT, WHITE),
    "half transparent": ("png", encoded(halves((0, 0, 0, 255), (0, 0, 0, 155), "RGBA"), "png"), (0,) * 3, GREY),
    "a palette": ("png", encoded(palette(), "png"), LEFT, RIGHT),
    "a palette with a clear colour": ("png", encoded(palette(), "png", transparency=2), LEFT, WHITE),
    "a clear colour": ("png", encoded(halves(), "png", transparency=RIGHT), LEFT, WHITE),
    "CMYK": ("tif", encoded(halves((0, 255, 255, 0), (0, 0, 0, 0), "CMYK"), "tiff"), (255, 0, 0), WHITE),
    "a camera held on its side": ("jpg", turned(6, Image.Transpose.ROTATE_90), LEFT, RIGHT),
    "a camera upside down": ("png", turned(3, Image.Transpose.ROTATE_180), LEFT, RIGHT),
    "a mirrored camera": ("png", turned(2, Image.Transpose.FLIP_LEFT_RIGHT), LEFT, RIGHT),
    "an animated GIF": ("gif", encoded(frames()[0], "gif", save_all=True, append_images=frames()[1:]), LEFT, RIGHT),
    "an animated PNG": ("png", encoded(frames()[0], "png", save_all=True, append_images=frames()[1:]), LEFT, RIGHT),
    "a TIFF of pages": ("TIF", encoded(frames()[0], "tiff", save_all=True, append_images=frames()[1:]), LEFT, RIGHT),
    "AVIF": ("avif", encoded(Image.new("RGB", (8, 8), GREY), "avif", quality=100), GREY, GREY),
}


def check(image: torch.Tensor, left: tuple, right: tuple) -> None:
    """Compare with halves, to 2 of 255: GIF's and AVIF's colours are rounded."""
    image = (image + 1) * 127.5
    for side, colour in ((image[:, :, : SIZE // 2], left), (image[:, :, SIZE // 2 :], right)):
        torch.testing.assert_close(side, torch.tensor(colour)[:, None, None].expand_as(side).float(), atol=2, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_read_as_it_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    suffix, content, left, right = KINDS[kind]
    for name in ("a", "b"):
        (tmp_path / "folder" / name).mkdir(parents=True)
        (tmp_path / "folder" / name / f"1.{suffix}").write_bytes(content)
    dataset = open_dataset(str(tmp_path / "folder"), SIZE, 1, 0)
    batch = dataset.read([(0, False), (1, True)])
    assert batch.unreadable == []
    check(batch.data[0], left, right)
    check(batch.data[1], right, left)
    # The same in rows of the Hub.
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_dict({"image": [{"bytes": content, "path": None}]})
    (tmp_path / "rows").mkdir()
    rows.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "rows" / "train.parquet"))
    check(open_dataset(f"hf:{tmp_path / 'rows'}", SIZE, 1, 0).read([(0, False)]).data[0], left, right)


@pytest.mark.parametrize(("value", "kind"), [(1.5, np.float32), (float("nan"), np.float32), (70000, np.int32)])
def test_values_of_no_known_range_are_named_and_left_out(tmp_path: Path, value: float, kind: Any) -> None:
    for number in range(2):
        Image.fromarray(np.full((8, 8), value if number else 0, kind)).save(tmp_path / f"{number}.tif")
    batch = open_dataset(str(tmp_path), SIZE, 1, 0).read([(0, False), (1, False)])
    assert batch.positions == [0]
    assert batch.unreadable[0].startswith(f"{tmp_path / '1.tif'} (its values, ")


def test_damaged_files_of_every_format_are_left_out(tmp_path: Path) -> None:
    """Cut or with bytes overwritten: each is read or named, whatever PIL raises."""
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8))
    formats = {"png": {}, "jpg": {"format": "jpeg"}, "gif": {}, "tif": {"format": "tiff", "compression": "tiff_lzw"},
               "webp": {}, "bmp": {}, "ppm": {}, "avif": {}}  # fmt: skip
    for suffix, options in formats.items():
        whole = encoded(noise, options.pop("format", suffix), **options)
        (tmp_path / f"{suffix}-empty.{suffix}").touch()
        for number in range(12):
            content = bytearray(whole)
            for place in generator.integers(0, min(len(whole), 200), 3):
                content[place] = generator.integers(0, 256)
            (tmp_path / f"{suffix}-{number}-spoilt.{suffix}").write_bytes(content)
            cut = whole[: int(generator.integers(1, len(whole)))]
            (tmp_path / f"{suffix}-{number}-cut.{suffix}").write_bytes(cut)
    dataset = open_dataset(str(tmp_path), SIZE, 1, 0)
    assert len(dataset) == len(formats) * 25
    batch = dataset.read([(position, False) for position in range(len(dataset))])
    assert len(batch.unreadable) + len(batch.data) == len(dataset)
    assert sum("empty" in name for name in batch.unreadable) == len(formats)


# --- Folders ---------------------------------------------------------------------------------------------------------


def fill(folder: Path, *files: str) -> Path:
    """Files with an image of the size that their own places give, or empty where they are no images."""
    for number, file in enumerate(files):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".png", ".jpeg", ".gif"):
            grey = Image.new("RGB", (SIZE, SIZE), (10 * number,) * 3)
            grey.save(path, format="png")
        else:
            path.write_text("")
    return folder


def numbers(dataset: Dataset) -> list[int]:
    """The places of `fill` that a data set's images come from."""
    batch = dataset.read([(position, False) for position in range(len(dataset))])
    return ((batch.data[:, 0, 0, 0] + 1) * 12.75).round().int().tolist()


def notes(dataset: Any) -> list[str]:
    return list(dataset.notes)


def test_what_is_no_image_is_counted_in_one_sentence(tmp_path: Path) -> None:
    folder = fill(tmp_path / "pets", "cats/1.png", "cats/2.PNG", "cats/deep/er/3.JPEG", "dogs/4.gif", "dogs/5.heic",
                  "cats/6.heic", "dogs/deep/7.txt", "README.md", "cats/no-suffix",
                  "cats/.8.png", "cats/.thumbnails/9.png", ".git/10.png", ".DS_Store")  # fmt: skip
    (folder / "cats" / "folder.png").mkdir()
    dataset = open_dataset(str(folder), SIZE, 1, 0)
    assert dataset.id2label == {0: "cats", 1: "dogs"}
    assert numbers(dataset) == [0, 1, 2, 3]
    assert notes(dataset) == [
        f"{folder} has 4 files that are not images and are left out: 2 .heic, 1 .txt, 1 without a suffix."
    ]
    assert "4 images of 2 classes" in dataset.description


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    elsewhere = fill(tmp_path / "elsewhere", "1.png", "in/2.png")
    folder = fill(tmp_path / "pets", "cats/a.png", "dogs/b.png")
    (folder / "cats" / "more").symlink_to(elsewhere)
    (folder / "cats" / "link.png").symlink_to(elsewhere / "1.png")
    (folder / "cats" / "self").symlink_to(folder / "cats")
    (folder / "cats" / "up").symlink_to(folder)
    (folder / "cats" / "knot.png").symlink_to("knot.png")
    (folder / "birds").symlink_to(elsewhere / "in")
    dataset = open_dataset(str(folder), SIZE, 1, 0)
    batch = dataset.read([(position, False) for position in range(len(dataset))])
    assert batch.labels.bincount().tolist() == [1, 4, 1]
    assert batch.unreadable == [str(folder / "cats" / "knot.png")]


def test_classes_are_in_the_order_of_their_names_and_numbers_in_theirs(tmp_path: Path) -> None:
    dataset = open_dataset(str(fill(tmp_path / "n", *(f"{number}/1.png" for number in range(12)))), SIZE, 1, 0)
    assert dataset.id2label == {number: str(number) for number in range(12)}
    assert numbers(dataset) == list(range(12))
    dataset = open_dataset(str(fill(tmp_path / "m", "b10/1.png", "b9/1.png", "é/1.png", "Ä b/1.png")), SIZE, 1, 0)
    assert list(dataset.id2label.values()) == ["b10", "b9", "Ä b", "é"]


def test_images_that_are_enlarged_are_said_once(tmp_path: Path) -> None:
    folder = fill(tmp_path / "pets", *(f"cats/{number}.png" for number in range(20)), "dogs/1.png")
    Image.new("RGB", (40, 30)).save(folder / "dogs" / "2.png")
    assert notes(open_dataset(str(folder), SIZE, 1, 0)) == []
    assert notes(open_dataset(str(folder), 30, 1, 0)) == [
        "21 of 22 images that were checked are smaller than 30x30 and are enlarged."
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("cats/1.png", "empty/", "void/1.txt"),
         "data has class folders without images: empty, void. Remove or fill them."),
        (("1.png", "2.png", "cats/3.png"),
         "data has images of its own (1.png and 1 more) and folders (cats): with classes, "
         "each image goes into the folder of its class; without, all go into data itself."),
        (("train/1.png", "val/2.png"),
         "data has splits (train, val) in place of classes; give one of them, such as data/train."),
        (("1.heic", "2.heic", "3.txt"), "data has no images (.jpg, "),
        ((), "data has no images (.jpg, "),
        (("latents/plan.json", "plan.json"),
         "data holds latents that are not finished; run the same dit-hub latents again, which resumes."),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], message: str
) -> None:
    (tmp_path / "data").mkdir()
    for file in files:
        if file.endswith("/"):
            (tmp_path / "data" / file).mkdir()
        else:
            fill(tmp_path / "data", file)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_dataset("data", SIZE, 1, 0)


def test_a_class_whose_name_is_no_text_is_refused_before_the_work(tmp_path: Path) -> None:
    folder = fill(tmp_path / "pets", "cats/1.png")
    os.makedirs(os.path.join(os.fsencode(folder), b"\xff\xfe"))
    with pytest.raises(ValueError, match=r"names are not UTF-8: '\\udcff\\udcfe'. Rename them"):
        open_dataset(str(folder), SIZE, 1, 0)


def test_images_of_too_many_pixels_are_named_with_the_reason_and_large_ones_read_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)
    for side in (20, 40, 50):
        Image.new("1", (side, side)).save(tmp_path / f"{side}.png")
    batch = open_dataset(str(tmp_path), SIZE, 1, 0).read([(0, False), (1, False), (2, False)])
    assert batch.positions == [0, 1]
    assert batch.unreadable == [f"{tmp_path / '50.png'} (it has more than 2,000 pixels)"]
    assert len(recwarn) == 0


# --- Archives --------------------------------------------------------------------------------------------------------

UINT8 = np.arange(6 * 8 * 8 * 3, dtype=np.uint8).reshape(6, 8, 8, 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": UINT8}, "data.npz has no images; it has x."),
        ({}, "data.npz has no images; it has nothing."),
        ({"images": UINT8 / 255}, "it has float64 (6, 8, 8, 3)"),
        ({"images": UINT8[..., 0]}, "it has uint8 (6, 8, 8)"),
        ({"images": UINT8[:0]}, "it has uint8 (0, 8, 8, 3)"),
        ({"images": np.array([{}], object)}, "data.npz is not an archive of images: Object arrays cannot be loaded"),
        ({"images": UINT8, "labels": np.arange(5)}, "and int64 (5,)"),
        ({"images": UINT8, "labels": np.arange(6) / 2}, "and float64 (6,)"),
        ({"images": UINT8, "labels": np.array([0, 1, -1, 0, 1, 1])}, "data.npz has negative labels."),
        ({"images": UINT8, "labels": np.array([1, 2, 5, 1, 1, 1])}, "no images of the classes 0, 3, 4"),
    ],
)  # fmt: skip
def test_an_archive_that_is_none_says_why(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_dataset(str(tmp_path / "data.npz"), SIZE, 1, 0)


def test_a_text_named_npz_is_one_sentence_without_numpys_advice(tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_text("images")
    with pytest.raises(ValueError, match=r"is not an archive of images: it is not what numpy\.savez writes\.$"):
        open_dataset(str(tmp_path / "data.npz"), SIZE, 1, 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "There is no data 'nowhere'"),
        ("nowhere/", "There is no data 'nowhere/'"),
        ("", "There is no data ''"),
        ("pets.png", "pets.png is a file, but not an .npz archive."),
        ("pets.npy", "pets.npy is a file, but not an .npz archive."),
    ],
)
def test_what_is_no_data_says_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("pets.png", "pets.npy"):
        fill(tmp_path, file)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_dataset(name, SIZE, 1, 0)


# --- Without classes -------------------------------------------------------------------------------------------------


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """A folder of images without classes."""
    return fill(tmp_path / "flat", *(f"{number}.png" for number in range(12)))


@pytest.mark.parametrize("source", ["folder", "archive"])
@pytest.mark.parametrize("model", ["DiT-S/4", FIELDS, {**FIELDS, "num_classes": 0}], ids=["name", "fields", "stated"])
def test_data_without_classes_train_an_unconditional_model(
    tmp_path: Path, flat: Path, monkeypatch: pytest.MonkeyPatch, source: str, model: Any
) -> None:
    data = str(flat)
    if source == "archive":
        data = str(tmp_path / "data.npz")
        np.savez(data, images=np.repeat(UINT8, 2, axis=0))
    if isinstance(model, str):  # a name's sizes, made small
        monkeypatch.setattr("dit_hub.training.recipe.DiTConfig.from_name", small_config)
    result = train(Recipe(model=model, data=data, steps=2, batch_size=6, save_every=1), run_folder=tmp_path / "run")
    assert result.pipeline.transformer.config.num_classes == 0
    result.pipeline.save_pretrained(tmp_path / "out")
    pipeline = DiTPipeline.from_pretrained(tmp_path / "out")
    images = pipeline(num_images_per_label=3, num_inference_steps=2).images
    assert [image.size for image in images] == [(8, 8)] * 3
    with pytest.raises(ValueError, match="unconditional"):
        pipeline(0, num_inference_steps=2)


def small_config(name: str, **fields: Any) -> Any:
    from dit_hub import DiTConfig

    return DiTConfig(**{**FIELDS, **fields, "num_classes": 1000})


def test_the_command_line_trains_and_draws_without_classes(tmp_path: Path, flat: Path) -> None:
    (tmp_path / "mine.yaml").write_text(json.dumps({"model": FIELDS, "data": "flat", "steps": 2, "batch_size": 6}))
    run = dit_hub("train", "mine.yaml", "--out", "out", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert "unconditional" in card
    assert "12 images." in card
    run = dit_hub("generate", "out", "--per-label", 2, "--steps", 2, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (0, "2 images in grid.png\n"), run.stderr


def test_latents_without_classes_train_an_unconditional_model(
    tmp_path: Path, flat: Path, make_vae: Callable[..., Any]
) -> None:
    make_vae().save_pretrained(tmp_path / "vae")
    run = dit_hub("latents", flat, "latents", "--vae", "vae", "--size", "16", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    latents = open_dataset(str(tmp_path / "latents"), 16, 1, 0)
    assert (len(latents), latents.id2label) == (12, {})
    fields = {**FIELDS, "in_channels": 4, "patch_size": 2}
    result = train(Recipe(model=fields, data=str(tmp_path / "latents"), steps=2, batch_size=6))
    assert result.pipeline(output_type="latent", num_inference_steps=2).images.shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ("flat", {"init_from": "dit-toy-shapes"}, "The data have no classes, and dit-toy-shapes has 16"),
        ("flat", {"model": {**FIELDS, "num_classes": 3}}, "The data have 0 classes and the model 3."),
        ("one", {"model": FIELDS}, "only one class"),
    ],
)
def test_classes_that_do_not_fit_are_refused(
    tmp_path: Path, flat: Path, monkeypatch: pytest.MonkeyPatch, data: str, settings: dict[str, Any], message: str
) -> None:
    fill(tmp_path / "one", "cats/1.png", "cats/2.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        train(Recipe(data=data, batch_size=2, **settings))


def test_labelled_data_do_not_fit_an_unconditional_model(tmp_path: Path, flat: Path) -> None:
    train(Recipe(model=FIELDS, data=str(flat), steps=1, batch_size=6)).pipeline.save_pretrained(tmp_path / "plain")
    fill(tmp_path / "pets", "cats/1.png", "dogs/2.png")
    with pytest.raises(ValueError, match=r"The data have 2 classes, and .*plain has none"):
        train(Recipe(init_from=str(tmp_path / "plain"), data=str(tmp_path / "pets"), batch_size=2))


def test_notes_are_said_at_the_start_of_training_and_of_latents(tmp_path: Path, make_vae: Callable[..., Any]) -> None:
    folder = fill(tmp_path / "pets", "cats/1.png", "dogs/2.png", "dogs/3.heic")
    make_vae().save_pretrained(tmp_path / "vae")
    (tmp_path / "mine.yaml").write_text(json.dumps({"model": FIELDS, "data": "pets", "steps": 1, "batch_size": 2}))
    run = dit_hub("train", "mine.yaml", "--out", "out", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    sentence = "has 1 file that is not an image and is left out: 1 .heic."
    assert run.stderr.count(sentence) == 1
    run = dit_hub("latents", folder, "latents", "--vae", "vae", "--size", "16", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(sentence) == 1
    assert run.stdout.count("2 of 2 images that were checked are smaller than 16x16 and are enlarged.") == 1


# --- Latents ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_loses_no_latents_and_the_same_command_resumes(
    tmp_path: Path, flat: Path, make_vae: Callable[..., Any]
) -> None:
    make_vae().save_pretrained(tmp_path / "vae")
    arguments = ("latents", flat, "latents", "--vae", "vae", "--size", "16")
    run = dit_hub(*arguments, cwd=tmp_path, file_limit=2000)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert "shard-00000.safetensors could not be written" in run.stderr
    assert "the same command resumes" in run.stderr
    assert [file.name for file in (tmp_path / "latents").iterdir()] == ["plan.json"]
    run = dit_hub(*arguments, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    # Where the last file is what does not fit.
    limit = (tmp_path / "latents" / "latents.json").stat().st_size - 1
    (tmp_path / "latents" / "latents.json").unlink()
    shard = (tmp_path / "latents" / "shard-00000.safetensors").read_bytes()
    run = dit_hub(*arguments, cwd=tmp_path, file_limit=limit)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert "could not be written" in run.stderr
    assert (tmp_path / "latents" / "shard-00000.safetensors").read_bytes() == shard
    assert not (tmp_path / "latents" / "latents.json").exists()
    assert dit_hub(*arguments, cwd=tmp_path).returncode == 0


def test_a_torn_plan_is_written_again_unless_there_are_shards(
    tmp_path: Path, flat: Path, make_vae: Callable[..., Any]
) -> None:
    dataset, vae = open_dataset(str(flat), 16, 1, 0), make_vae()
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "plan.json").write_text('{"count": 1')
    cache_latents(dataset, vae, tmp_path / "latents")
    (tmp_path / "latents" / "plan.json").write_text('{"count": 1')
    with pytest.raises(ValueError, match=r"plan.json is damaged, .* delete the folder"):
        cache_latents(dataset, vae, tmp_path / "latents")


def test_latents_of_data_that_changed_are_not_gone_on_with(
    tmp_path: Path, flat: Path, make_vae: Callable[..., Any]
) -> None:
    folder, vae = tmp_path / "latents", make_vae()
    cache_latents(open_dataset(str(flat), 16, 1, 0), vae, folder)
    cache_latents(open_dataset(str(flat), 16, 1, 0), vae, folder)  # which are the same
    image = sorted(flat.iterdir())[0]
    with Image.open(image) as before:
        changed = ImageOps.invert(before.convert("RGB"))
    changed.save(image)
    with pytest.raises(ValueError, match="holds latents of other data"):
        cache_latents(open_dataset(str(flat), 16, 1, 0), vae, folder)


def test_latents_go_nowhere_where_something_else_is(tmp_path: Path, flat: Path, make_vae: Callable[..., Any]) -> None:
    dataset, vae = open_dataset(str(flat), 16, 1, 0), make_vae()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file, and latents go to a folder"):
        cache_latents(dataset, vae, tmp_path / "file")
    with pytest.raises(ValueError, match="flat holds other files than latents"):
        cache_latents(dataset, vae, flat)
    assert len(list(flat.iterdir())) == 12


def test_the_vae_says_which_sizes_it_takes(tmp_path: Path, flat: Path, make_vae: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="sides are divisible by 2, not of 15x15"):
        cache_latents(open_dataset(str(flat), 15, 1, 0), make_vae(), tmp_path / "latents")
    assert not (tmp_path / "latents").exists()


def test_the_size_of_an_archive_is_said(tmp_path: Path, make_vae: Callable[..., Any]) -> None:
    np.savez(tmp_path / "data.npz", images=UINT8)
    make_vae().save_pretrained(tmp_path / "vae")
    run = dit_hub("latents", "data.npz", "latents", "--vae", "vae", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "The images of data.npz are 8x8; --size does not change that." in run.stdout


def test_too_many_damaged_images_end_the_encoding_early(
    tmp_path: Path, flat: Path, make_vae: Callable[..., Any]
) -> None:
    for number in range(3):
        (flat / f"{number}.png").write_bytes(b"no image")
    done = []
    with pytest.raises(ValueError, match="2 of 12 images cannot be read"):
        cache_latents(open_dataset(str(flat), 16, 1, 0), make_vae(), tmp_path / "latents", 2, 4,
                      progress=lambda at, count: done.append(at))  # fmt: skip
    assert max(done) <= 4


def test_images_that_are_left_out_are_counted_when_a_cut_run_resumes(
    tmp_path: Path, flat: Path, make_vae: Callable[..., Any]
) -> None:
    (flat / "1.png").rename(flat / "[red]1.png")  # which is no colour
    (flat / "[red]1.png").write_bytes(b"no image")
    make_vae().save_pretrained(tmp_path / "vae")
    arguments = ("latents", flat, "latents", "--vae", "vae", "--size", "16")
    run = dit_hub(*arguments, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert f"{flat / '[red]1.png'} cannot be read and is left out." in run.stdout
    for _ in range(2):
        assert "11 images are encoded in latents" in run.stdout
        (tmp_path / "latents" / "latents.json").unlink()
        run = dit_hub(*arguments, cwd=tmp_path)


def test_two_processes_cache_the_latents_that_one_caches(tmp_path: Path, make_vae: Callable[..., Any]) -> None:
    """The one that ends last finishes the folder, also where the other was killed and came back alone."""
    images = np.random.default_rng(0).integers(0, 256, (2100, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images)
    make_vae().save_pretrained(tmp_path / "vae")
    arguments = ("latents", "data.npz")
    options = ("--vae", "vae", "--size", 8, "--batch-size", 64)
    assert dit_hub(*arguments, "one", *options, cwd=tmp_path).returncode == 0
    started = [
        Python("-m", "dit_hub.cli", *arguments, "two", *options, cwd=tmp_path,
               environment=os.environ | environment(rank, 2, rank, 2, free_port()))
        for rank in range(2)
    ]  # fmt: skip
    runs = [process.wait() for process in started]
    assert [run.returncode for run in runs] == [0, 0], runs
    said = "".join(run.stdout for run in runs)
    assert "2100 images are encoded in two" in said
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {"plan.json", "latents.json", *(f"shard-{index:05d}.safetensors" for index in range(3))}
    assert {path.name for path in (tmp_path / "two").iterdir()} == names
    for name in names:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


@pytest.mark.parametrize("facts", ["{}", "[]", '{"shards": 3}', "missing description", "count"])
def test_damaged_latents_are_one_sentence(tmp_path: Path, flat: Path, make_vae: Callable[..., Any], facts: str) -> None:
    folder = cache_latents(open_dataset(str(flat), 16, 1, 0), make_vae(), tmp_path / "latents")
    known = json.loads((folder / "latents.json").read_text())
    if facts == "missing description":
        facts = json.dumps({name: value for name, value in known.items() if name != "description"})
    if facts == "count":
        facts = json.dumps({**known, "shards": [{**known["shards"][0], "count": "many"}]})
    (folder / "latents.json").write_text(facts)
    with pytest.raises(ValueError, match="is damaged; run dit-hub latents again"):
        open_dataset(str(folder), 16, 1, 0)
