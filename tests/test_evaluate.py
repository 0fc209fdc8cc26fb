"""Evaluating samples: what is read, what is compared with what, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from diffusers import DDIMScheduler
from torch import Tensor

from dit_hub import DiTPipeline
from dit_hub.evaluation import (
    compare,
    evaluate,
    frechet_distance,
    get_extractor,
    load_evaluation,
    precision_recall,
    reference_statistics,
    save_statistics,
    self_test,
)
from dit_hub.evaluation.evaluate import collect
from dit_hub.evaluation.images import ArchiveImages, ArrayImages, open_reference, open_samples
from dit_hub.evaluation.inception import Inception, load_inception
from dit_hub.files import file_sha256
from dit_hub.manifest import foreign_files, write_manifest
from dit_hub.training.data import digits
from dit_hub.training.shapes import shapes
from together import Together

from .command_line import dit_hub

SAMPLING = {
    "schema_version": 1,
    "finished": True,
    "labels": {"policy": "balanced"},
    "steps": 50,
    "scheduler": {"_class_name": "DDIMScheduler"},
    "guidance": {"scale": 4.0},
    "precision": {"transformer": "float32"},
    "runtime": "DiTTransformer",
    "seed": 0,
    "weights": {},
    "num": 160,
    "runs": [],
}


def images_of(seed: int, per_class: int = 10, noise: float = 0.0) -> np.ndarray:
    """Shapes of a seed, uint8 (N, 16, 16, 3)."""
    data = ((shapes(per_class, seed)[0] + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    return (data + np.random.default_rng(seed).normal(0, noise, data.shape)).round().clip(0, 255).astype(np.uint8)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """A folder as `dit-hub sample` leaves it."""
    folder = tmp_path / "samples"
    folder.mkdir()
    np.savez(folder / "samples.npz", images_of(1), np.arange(160) // 10)
    facts = {**SAMPLING, "sha256": file_sha256(folder / "samples.npz")}
    (folder / "sampling.json").write_text(json.dumps(facts))
    return folder


class Means:
    """An extractor of one's own: the mean colour of each quarter of an image."""

    name, fingerprint, outputs = "means", "1", ("features",)

    def __init__(self, damaged: bool = False):
        self.damaged = damaged

    def __call__(self, images: np.ndarray) -> dict[str, Tensor]:
        quarters = torch.from_numpy(np.array(images)).float().unflatten(1, (2, -1)).unflatten(3, (2, -1))
        features = quarters.mean(dim=(2, 4)).flatten(1)
        return {"features": features / 0 if self.damaged else features}


# --- Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_is_read_as_a_stream(save: Any, tmp_path: Path) -> None:
    images = images_of(0)
    save(tmp_path / "a.npz", images)
    archive = ArchiveImages(tmp_path / "a.npz")
    parts = list(archive.batches(33, 150, 40))
    assert [len(part) for part in parts] == [40, 40, 37]
    np.testing.assert_array_equal(np.concatenate(parts), images[33:150])


def test_training_data_are_a_reference_as_they_were_drawn() -> None:
    reference = open_reference("shapes", (16, 16))
    assert reference is not None
    np.testing.assert_array_equal(next(reference.batches(0, 3200, 3200)), images_of(0, 200))
    grey = open_reference("digits", (8, 8))
    assert grey is not None
    pixels = next(grey.batches(0, 1, 1))[0]
    assert pixels.shape == (8, 8, 3)
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])
    np.testing.assert_allclose(pixels[..., 0], digits().data[0, 0].numpy() * 127.5 + 127.5, atol=0.5)


def test_a_folder_of_samples_says_how_they_were_made(samples: Path) -> None:
    images, facts = open_samples(samples)
    assert (len(images), images.side, facts["steps"]) == (160, (16, 16), 50)
    assert images.labels is not None
    assert images.labels.tolist() == [label for label in range(16) for _ in range(10)]


# --- Metrics of images -----------------------------------------------------------------------------------------------


def test_worse_images_are_further_away() -> None:
    found = [evaluate(images_of(1, noise=noise), "shapes", extractor="shapes") for noise in (0, 25, 60)]
    for name in ("fid", "sfid", "kid", "mind"):
        values = [evaluation[name].value for evaluation in found]
        assert values == sorted(values), name
    for name in ("precision", "density", "coverage"):
        values = [evaluation[name].value for evaluation in found]
        assert values == sorted(values, reverse=True), name
    known = [result for result in found[0].results if result.low is not None and result.high is not None]
    assert len(known) == 9
    assert all((result.low or 0) <= result.value <= (result.high or 0) for result in known)
    assert found[0]["is"].value > 15  # of 16 classes


def test_metrics_are_those_of_the_public_functions() -> None:
    extractor = get_extractor("shapes")
    real, fake = images_of(0, 20), images_of(1, noise=10)
    ours, theirs = (extractor(images)["features"] for images in (real, fake))
    found = evaluate(fake, real, ["fid", "precision", "recall"], "shapes", batch_size=7)
    # Other batches are other products of matrices.
    assert found["fid"].value == pytest.approx(frechet_distance(ours, theirs), rel=1e-4)
    assert (found["precision"].value, found["recall"].value) == pytest.approx(precision_recall(ours, theirs), abs=0.01)
    in_float32 = evaluate(fake, real, ["precision"], "shapes", half=False)
    assert in_float32.options["float16_distances"] is False


def test_an_extractor_of_ones_own_gives_what_it_can() -> None:
    found = evaluate(images_of(1), images_of(0), extractor=Means())
    names = [result.id for result in found.results]
    assert {"fid", "kid", "precision", "recall", "mind"} <= set(names)
    assert not {"sfid", "is", "cmmd"} & set(names)
    assert found["fid"].metric == "FD-means"
    several = evaluate(images_of(1), images_of(0), ["fid", "is"], ["shapes", Means()])
    assert [result.metric for result in several.results] == ["FD-shapes", "Inception Score (shapes)", "FD-means"]
    assert several["fid@means"].value == pytest.approx(found["fid"].value)


def test_an_archive_of_adm_has_statistics_of_more_images_than_it_holds(tmp_path: Path) -> None:
    extractor, many = get_extractor("shapes"), images_of(0, 40)
    statistics = reference_statistics(many, (16, 16), extractor)
    save_statistics(statistics, tmp_path / "statistics.npz")
    with np.load(tmp_path / "statistics.npz") as archive:
        np.savez(tmp_path / "both.npz", arr_0=many[::4], **archive)
    found = evaluate(images_of(1), tmp_path / "both.npz", extractor="shapes")
    assert found["fid"].value == pytest.approx(evaluate(images_of(1), many, ["fid"], "shapes")["fid"].value)
    assert found["sfid"].value == pytest.approx(evaluate(images_of(1), many, ["sfid"], "shapes")["sfid"].value)
    few = evaluate(images_of(1), many[::4], extractor="shapes")
    assert found["precision"].value == few["precision"].value
    assert found["fid"].value != pytest.approx(few["fid"].value)
    alone = evaluate(images_of(1), tmp_path / "statistics.npz", extractor="shapes")
    assert [result.id for result in alone.results] == ["fid", "fid_infinity", "sfid", "is"]
    assert alone["fid"].value == pytest.approx(found["fid"].value)


def test_held_out_images_are_the_unit_of_fdr() -> None:
    real, held_out, fake = images_of(0, 20), images_of(2, 20, noise=5), images_of(1, noise=20)
    found = evaluate(fake, real, ["fid"], ["shapes", "digits"], held_out=held_out)
    unit = evaluate(held_out, real, ["fid"], ["shapes", "digits"])
    ratios = [found[f"fid@{name}"].value / unit[f"fid@{name}"].value for name in ("shapes", "digits")]
    assert [found[f"fdr@{name}"].value for name in ("shapes", "digits")] == pytest.approx(ratios, rel=1e-4)
    assert [result.id for result in found.results] == ["fid", "fdr", "fid", "fdr", "fdr2"]
    assert found["fdr2"].value == pytest.approx(sum(ratios) / 2, rel=1e-4)


def test_of_a_large_reference_some_images_are_kept_and_all_counted() -> None:
    images, extractor = images_of(0), get_extractor("shapes")
    whole = collect(ArrayImages(images), extractor, ["features", "spatial"], None, 64)
    some = collect(ArrayImages(images), extractor, ["features", "spatial"], 10, 64)
    assert len(some.rows["features"]) == 10
    np.testing.assert_allclose(some.rows["features"][[0, -1]], whole.rows["features"][[0, -1]])
    for output in ("features", "spatial"):
        np.testing.assert_allclose(some.statistics[output].covariance, whole.statistics[output].covariance, atol=1e-9)
        assert some.statistics[output].count == 160


def evaluate_into(path: Path) -> None:
    found = evaluate(images_of(1, noise=10), "shapes", extractor="shapes")
    path.with_name(f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found.to_dict()))


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    together = Together(evaluate_into, tmp_path / "x")
    assert [together.wait(rank) for rank in range(2)] == [(0, ""), (0, "")]
    one = evaluate(images_of(1, noise=10), "shapes", extractor="shapes")
    both = load_evaluation(tmp_path / "0.json")
    for ours, theirs in zip(one.results, both.results, strict=True):
        assert theirs.value == pytest.approx(ours.value, rel=1e-4, abs=1e-3), ours.metric
    assert load_evaluation(tmp_path / "1.json").results == []


# --- Extractors ------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("name", "config", "kind"),
    [
        ("dinov2", transformers.Dinov2Config(**SMALL, image_size=28, patch_size=14), transformers.Dinov2Model),
        ("clip", transformers.CLIPVisionConfig(**SMALL, image_size=336, patch_size=14, projection_dim=8),
         transformers.CLIPVisionModelWithProjection),
        ("mae", transformers.ViTMAEConfig(**SMALL, decoder_hidden_size=16, decoder_num_hidden_layers=1,
                                          decoder_intermediate_size=16, decoder_num_attention_heads=2),
         transformers.ViTMAEForPreTraining),
        ("convnext", transformers.ConvNextV2Config(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1]),
         transformers.ConvNextV2ForImageClassification),
        ("siglip", transformers.SiglipVisionConfig(**SMALL, image_size=256, patch_size=16),
         transformers.SiglipVisionModel),
    ],
)  # fmt: skip
def test_networks_of_transformers_are_extractors(name: str, config: Any, kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = kind(config).eval()
    network.save_pretrained(tmp_path / "network")
    extractor = get_extractor(f"{name}={tmp_path / 'network'}")
    images = images_of(0, 1)[:4]
    features = extractor(images)["features"]
    assert features.shape == (4, 8 if name == "clip" else 16)
    torch.testing.assert_close(extractor(images)["features"], features)  # nothing of it is drawn
    assert get_extractor(f"{name}={tmp_path / 'network'}").fingerprint == extractor.fingerprint
    other = "dinov2" if name != "dinov2" else "clip"
    with pytest.raises((ValueError, OSError), match=r"it has no|Cannot load|no "):
        get_extractor(f"{other}={tmp_path / 'network'}")
    found = evaluate(images_of(1, 1), images_of(0, 1), extractor=f"{name}={tmp_path / 'network'}")
    assert next(result.id for result in found.results) == ("cmmd" if name == "clip" else "fid")


def test_dinov2_sees_images_as_fd_dinov2_shows_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, image_size=28, patch_size=14)).eval()
    network.save_pretrained(tmp_path)
    from PIL import Image

    image = images_of(0, 1)[0]
    scaled = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    pixels = (scaled - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        expected = network(torch.from_numpy(pixels).float().permute(2, 0, 1)[None]).last_hidden_state[0, 0]
    found = get_extractor(f"dinov2={tmp_path}")(image[None])["features"][0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_inception_gives_what_adm_measures() -> None:
    torch.manual_seed(0)
    network = Inception().eval()
    with torch.no_grad():
        seen = network(torch.randint(0, 256, (2, 3, 64, 64)))
    assert {name: tuple(value.shape) for name, value in seen.items()} == {
        "features": (2, 2048), "spatial": (2, 17 * 17 * 7), "probabilities": (2, 1008)}  # fmt: skip
    torch.testing.assert_close(seen["probabilities"].sum(dim=1), torch.ones(2))


# --- Bad input -------------------------------------------------------------------------------------------------------


def test_other_weights_are_refused(tmp_path: Path) -> None:
    torch.save(Inception().state_dict(), tmp_path / "inception.pth")
    with pytest.raises(ValueError, match="is not FID's Inception network: its SHA-256 begins with"):
        load_inception(tmp_path / "inception.pth")
    with pytest.raises(ValueError, match="There is no file"):
        load_inception(tmp_path / "none.pth")


def saved(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "bad.npz", **arrays)
    return str(folder / "bad.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": images_of(0)}, "they are called arr_0, and it holds images"),
        ({"arr_0": images_of(0).astype(np.float32)}, r"uint8 \(N, H, W, 3\), not float32"),
        ({"arr_0": images_of(0)[..., :1]}, "Repeat grey images as three channels"),
        ({"arr_0": images_of(0)[..., 0]}, "Repeat grey images as three channels"),
        ({"arr_0": images_of(0)[:1]}, "holds 1 image; metrics need two or more"),
        ({"arr_0": images_of(0)[:, :8, :8]}, "reference's images are 16x16, and the samples are 8x8"),
        ({"arr_0": images_of(0)[:3]}, "3 neighbours need more than 3 samples"),
    ],
)
def test_bad_archives_are_one_sentence(arrays: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(saved(tmp_path, **arrays), images_of(0), ["precision"], "shapes")


def test_a_cut_archive_is_one_sentence(tmp_path: Path) -> None:
    path = Path(saved(tmp_path, arr_0=images_of(0)))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="is not an archive of numpy's, or was cut"):
        evaluate(path, images_of(0), extractor="shapes")


def test_statistics_of_another_extractor_are_refused(tmp_path: Path) -> None:
    statistics = reference_statistics(images_of(0), (16, 16), get_extractor("shapes"))
    path = tmp_path / "statistics.npz"
    save_statistics(statistics, path)
    for extractor, metric, message in (
        ("digits", "fid", "the reference's statistics are those of shapes"),
        ("shapes", "precision", "needs the images of the reference, which holds statistics alone"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(images_of(1), path, [metric], extractor)
    statistics.fingerprint = "other"
    save_statistics(statistics, path, overwrite=True)
    with pytest.raises(ValueError, match="statistics are of other weights of shapes"):
        evaluate(images_of(1), path, ["fid"], "shapes")
    with np.load(path) as archive:
        np.savez(path, mu=archive["mu"], sigma=archive["sigma"])  # as ADM's, which are Inception's
    with pytest.raises(ValueError, match="statistics are those of inception"):
        evaluate(images_of(1), path, ["fid"], "shapes")


def test_what_cannot_be_measured_is_one_sentence(samples: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="features of sample 0 are not finite"):
        evaluate(images_of(1), images_of(0), extractor=Means(damaged=True))
    with pytest.raises(ValueError, match="no metric 'fud'; the nearest names: fid"):
        evaluate(images_of(1), images_of(0), ["fud"], "shapes")
    with pytest.raises(ValueError, match="no extractor 'shape'; the nearest names: shapes"):
        evaluate(images_of(1), images_of(0), extractor="shape")
    with pytest.raises(ValueError, match="sFID cannot be computed: the extractor means gives no spatial"):
        evaluate(images_of(1), images_of(0), ["sfid"], Means())
    with pytest.raises(ValueError, match="give them as held_out"):
        evaluate(images_of(1), images_of(0), ["fdr"], "shapes")
    with pytest.raises(ValueError, match=r"has no VIRTUAL_imagenet256_labeled\.npz\. Fetch https://"):
        self_test(tmp_path)
    (samples / "sampling.json").write_text(json.dumps({**SAMPLING, "finished": False}))
    with pytest.raises(ValueError, match="is not finished"):
        evaluate(samples, "shapes", extractor="shapes")


# --- Results ---------------------------------------------------------------------------------------------------------


def test_results_are_kept_and_compared(tmp_path: Path) -> None:
    good, bad, other = (
        evaluate(images_of(seed, 20, noise), "shapes", ["fid", "density"], "shapes")
        for seed, noise in ((1, 0), (1, 30), (2, 0))
    )
    good.save(tmp_path / "good.json")
    assert load_evaluation(tmp_path / "good.json") == good
    verdicts = {pair.first.id: pair.verdict for pair in compare(good, bad)}
    assert verdicts == {"fid": "first is better", "density": "first is better"}
    assert {pair.verdict for pair in compare(bad, good)} == {"second is better"}
    assert {pair.verdict for pair in compare(good, other)} == {"no difference shown"}
    with pytest.raises(ValueError, match="different numbers of samples"):
        compare(good, evaluate(images_of(1, 10), "shapes", ["fid"], "shapes"))
    with pytest.raises(ValueError, match="different references"):
        compare(good, evaluate(images_of(1, 20), images_of(0), ["fid"], "shapes"))
    (tmp_path / "new.json").write_text(json.dumps({**good.to_dict(), "version": 99}))
    with pytest.raises(ValueError, match="a newer dit-hub wrote"):
        load_evaluation(tmp_path / "new.json")


def test_the_command_line_measures_compares_and_fills_a_card(samples: Path, make_model: Any, tmp_path: Path) -> None:
    DiTPipeline(make_model(), DDIMScheduler()).save_pretrained(tmp_path / "model")
    command = ("evaluate", str(samples), "--reference", "shapes", "--extractor", "shapes")
    write_manifest(tmp_path / "model")  # as all commands leave it
    weights = tmp_path / "model" / "transformer" / "model.safetensors"
    drawn = {
        **json.loads((samples / "sampling.json").read_text()),
        "weights": {"transformer/model.safetensors": file_sha256(weights)},
    }
    (samples / "sampling.json").write_text(json.dumps(drawn))
    run = dit_hub(*command, "--card", "model", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "FD-shapes" in run.stdout
    facts = json.loads((samples / "evaluation.json").read_text())
    assert facts["version"] == 1
    assert facts["samples"]["sampling"] == drawn
    assert not list(foreign_files(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| shapes | FD-shapes | " in card
    assert "160 samples, balanced labels, 50 steps of DDIM, guidance 4, float32 DiTTransformer, seed 0" in card
    again = dit_hub(*command, cwd=tmp_path)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "exists; choose another name or pass --overwrite" in again.stderr
    shutil.copytree(samples, tmp_path / "others")
    compared = dit_hub("evaluate", "--compare", str(samples), "others", cwd=tmp_path)
    assert "no difference shown" in " ".join(compared.stdout.split())
    statistics = dit_hub("evaluate", str(samples), "--extractor", "shapes", "--save-statistics", "s.npz", cwd=tmp_path)
    assert statistics.returncode == 0
    assert (tmp_path / "s.npz").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("archive", "Nothing says how samples.npz was made"),
        ("weights", "The samples are not those of model: their transformer/model.safetensors is not there, or another"),
        ("readme", "was written by a person; pass --overwrite"),
        ("folder", "nowhere is no folder of a model"),
    ],
)
def test_a_card_gets_the_results_of_its_own_model_alone(
    change: str, message: str, samples: Path, make_model: Any, tmp_path: Path
) -> None:
    DiTPipeline(make_model(), DDIMScheduler()).save_pretrained(tmp_path / "model")
    sampling = {
        **json.loads((samples / "sampling.json").read_text()),
        "weights": {"transformer/model.safetensors": "other"} if change == "weights" else {},
    }
    (samples / "sampling.json").write_text(json.dumps(sampling))
    np.savez(tmp_path / "samples.npz", images_of(1))
    if change == "readme":
        (tmp_path / "model" / "README.md").write_text("My words.")
    before = {file: file.read_bytes() for file in (tmp_path / "model").rglob("*") if file.is_file()}
    run = dit_hub(
        "evaluate", "samples.npz" if change == "archive" else "samples", "--reference", "shapes", "--extractor",
        "shapes", "--card", "nowhere" if change == "folder" else "model", cwd=tmp_path,
    )  # fmt: skip
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert message in run.stderr
    assert {file: file.read_bytes() for file in (tmp_path / "model").rglob("*") if file.is_file()} == before


def test_statistics_of_real_images_are_written_for_later(tmp_path: Path) -> None:
    run = dit_hub("evaluate", "shapes", "--save-statistics", "s.npz", "--extractor", "shapes", "--size", "16",
                  cwd=tmp_path)  # fmt: skip
    assert run.returncode == 0, run.stderr
    ours = evaluate(images_of(1), tmp_path / "s.npz", ["fid"], "shapes")["fid"].value
    assert ours == pytest.approx(evaluate(images_of(1), "shapes", ["fid"], "shapes")["fid"].value, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Give the samples"),
        (("samples",), "Give --reference"),
        (("nowhere", "--reference", "shapes"), "There is no folder and no file nowhere"),
        (("samples", "--reference", "nothing", "--extractor", "shapes"), "There is no data 'nothing'"),
        (("samples", "--reference", "digits", "--extractor", "shapes"), "reference's images are 8x8"),
        (("samples", "--reference", "shapes", "--batch-size", "0"), "--batch-size must be 1 or more"),
        (("samples", "--reference", "shapes", "--inception", "none.pth"), "There is no file none.pth"),
        (("--compare", "samples", "samples"), "dit-hub evaluate writes it"),
        (("--self-test", "."), "Fetch https://openaipublic"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments: tuple[str, ...], message: str, samples: Path) -> None:
    run = dit_hub("evaluate", *arguments, cwd=samples.parent)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert message in run.stderr


# --- Slips ------------------------------------------------------------------------------------------------------------


def test_the_samples_are_never_overwritten_by_results(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", images_of(1))
    before = (tmp_path / "s.npz").read_bytes()
    common = ("evaluate", "s.npz", "--extractor", "shapes", "--overwrite")
    for arguments, message in (
        (("--reference", "shapes", "--out", "s.npz"), "s.npz must end in .json"),
        (("--reference", "shapes", "--out", "nowhere/x.json"), "There is no folder nowhere"),
        (("--save-statistics", "s.npz"), "s.npz are the images themselves"),
        (("--reference", "shapes", "--metrics", ""), "--metrics names no metric"),
    ):
        run = dit_hub(*common, *arguments, cwd=tmp_path)
        assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
        assert message in run.stderr
    assert (tmp_path / "s.npz").read_bytes() == before


def test_odd_labels_only_tell_classes_apart(tmp_path: Path) -> None:
    labels = np.arange(160) % 2 * np.iinfo(np.int64).max
    np.savez(tmp_path / "s.npz", images_of(1), labels)
    assert evaluate(tmp_path / "s.npz", images_of(0), ["fid"], "shapes")["fid"].error is not None


def test_an_archive_that_its_folder_does_not_describe_is_refused(samples: Path) -> None:
    np.savez(samples / "samples.npz", images_of(5), np.arange(160) // 10)
    with pytest.raises(ValueError, match=r"is not the archive that sampling\.json describes"):
        evaluate(samples, "shapes", extractor="shapes")


def test_held_out_images_must_be_others() -> None:
    with pytest.raises(ValueError, match="The held-out images are those of the reference"):
        evaluate(images_of(1), images_of(0), ["fdr"], "shapes", held_out=images_of(0))


def test_extractors_are_taken_as_they_are_named() -> None:
    with pytest.raises(ValueError, match="extractor shapes is given twice"):
        evaluate(images_of(1), images_of(0), extractor=["shapes", "shapes"])
    with pytest.raises(ValueError, match="takes no weights from elsewhere"):
        get_extractor("shapes=/tmp")


def test_statistics_of_other_sizes_or_of_nothing_are_refused(tmp_path: Path) -> None:
    statistics = reference_statistics(images_of(0), (16, 16), get_extractor("shapes"))
    save_statistics(statistics, tmp_path / "s.npz")
    with pytest.raises(ValueError, match="statistics of images of 16x16, and the samples are 8x8"):
        evaluate(images_of(1)[:, :8, :8], tmp_path / "s.npz", ["fid"], "shapes")
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3), sigma=-np.eye(3))
    with pytest.raises(ValueError, match="sigma is no covariance"):
        evaluate(images_of(1), tmp_path / "bad.npz", ["fid"], "shapes")


def test_few_real_images_leave_metrics_out() -> None:
    found = evaluate(images_of(1), images_of(0)[:5], extractor="shapes")
    assert {result.id for result in found.results} == {"fid", "fid_infinity", "sfid", "is"}
