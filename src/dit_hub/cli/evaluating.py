"""`dit-hub evaluate`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..extras import quiet_libraries
from ..sharing import Worker
from .common import Overwrite, check_device, make_table, own_device, progress_bar


def evaluate(
    samples: Annotated[
        str | None, typer.Argument(help="A folder of dit-hub sample, or an .npz archive with arr_0, as ADM's.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Real images: an .npz archive (images, statistics or both), shapes, digits, a folder, hf:…"),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="fid,sfid,is,precision,recall,kid,…; default: all that can be computed.")
    ] = None,
    extractor: Annotated[
        str, typer.Option(help="inception, dinov2, clip, mae, convnext, siglip, shapes or digits; several with commas.")
    ] = "inception",
    held_out: Annotated[
        str | None, typer.Option(help="Real images that the reference does not hold; adds FDr, the distance in theirs.")
    ] = None,
    inception: Annotated[
        Path | None, typer.Option(help="FID's Inception weights; default: download them once.")
    ] = None,
    float32: Annotated[
        bool, typer.Option("--float32", help="Distances of precision and recall in float32, not in ADM's float16.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Images that an extractor sees at a time.")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="File for the results; default: evaluation.json in the folder of the samples.")
    ] = None,
    card: Annotated[
        Path | None, typer.Option(help="A model's folder, which gets the results, and a card that shows them.")
    ] = None,
    save_statistics: Annotated[
        Path | None, typer.Option(help="Only write statistics, of samples or of real images, as a reference for later.")
    ] = None,
    size: Annotated[int, typer.Option(help="Side to which real images are cropped, for --save-statistics.")] = 256,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two evaluations: which one is better, and whether by chance.")
    ] = None,
    self_test: Annotated[
        Path | None, typer.Option(help="The folder of ADM's published files; check this evaluator on them.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure how near generated images are to real ones, with intervals.

    Started by `accelerate launch`, each process sees a part of the images.
    """
    quiet_libraries()
    if compare is not None:
        _compare(*compare)
        return
    check_device(device)
    device = own_device(device, Worker.from_environment())
    if batch_size < 1:
        raise ValueError(f"--batch-size must be 1 or more, not {batch_size}.")
    if self_test is not None:
        _self_test(self_test, inception, batch_size, device)
        return
    if samples is None:
        raise ValueError("Give the samples: a folder of dit-hub sample, or an .npz archive.")
    if save_statistics is not None:
        _save_statistics(samples, size, extractor, inception, batch_size, device, save_statistics, overwrite)
        return
    if reference is None:
        raise ValueError("Give --reference: the real images to compare with.")
    from ..evaluation.results import RESULTS_FILE

    if out is None and Path(samples).is_dir():
        out = Path(samples) / RESULTS_FILE
    if metrics is not None and not metrics.strip(" ,"):
        raise ValueError("--metrics names no metric.")
    if card is not None:
        _check_card(card, samples, overwrite)
    for path in filter(None, (out, card / RESULTS_FILE if card else None)):
        _check_new(path, ".json", overwrite)
    _evaluate(samples, reference, metrics, extractor, held_out, inception, not float32, batch_size, device, out, card)


def _evaluate(
    samples: str,
    reference: str,
    metrics: str | None,
    extractor: str,
    held_out: str | None,
    inception: Path | None,
    half: bool,
    batch_size: int,
    device: str,
    out: Path | None,
    card: Path | None,
) -> None:
    from rich.console import Console

    from dit_hub.model_cards import render_card

    from .. import evaluation
    from ..evaluation.results import RESULTS_FILE
    from ..files import new_file
    from ..manifest import note_written
    from ..sources import CARD_FILE

    worker = Worker.from_environment()
    with progress_bar("measuring", worker, resumes=False) as (_, report):
        found = evaluation.evaluate(
            samples,
            reference,
            [name.strip() for name in metrics.split(",")] if metrics else None,
            [name.strip() for name in extractor.split(",")],
            held_out,
            inception,
            half,
            batch_size,
            device,
            progress=report,
        )
    if worker.index > 0:
        return
    table = make_table(f"{found.samples['count']:,} samples against {found.reference['name']}", "metric", "value",
                       "95 % interval")  # fmt: skip
    for result in found.results:
        interval = "" if result.low is None or result.high is None else f"{result.low:.4g} to {result.high:.4g}"
        table.add_row(result.metric, f"{result.value:.5g}", interval)
    Console().print(table)
    if out is not None:
        found.save(out, overwrite=True)
        print(f"The results are in {out}")
    if card is not None:
        found.save(card / RESULTS_FILE, overwrite=True)
        with new_file(card / CARD_FILE, overwrite=True) as path:
            render_card(card).save(path)
        for name in (RESULTS_FILE, CARD_FILE):
            note_written(card / name)
        print(f"The card is {card / CARD_FILE}")


def _check_new(path: Path, suffix: str, overwrite: bool) -> None:
    """Raise ValueError where a file cannot be written, or another kind of file would be lost."""
    if path.suffix != suffix:
        raise ValueError(f"{path} must end in {suffix}.")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{path} is a folder." if path.is_dir() else f"There is no folder {path.parent}.")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another name or pass --overwrite.")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent} cannot be written to.")


def _check_card(card: Path, samples: str, overwrite: bool) -> None:
    """Raise ValueError where results of samples do not belong on the card of a model's folder."""
    from dit_hub.model_cards import is_own_card

    from ..evaluation.images import finished_facts, open_samples
    from ..files import file_sha256
    from ..sources import CARD_FILE

    if not (card / "model_index.json").is_file():
        raise ValueError(f"{card} is no folder of a model.")
    if (card / CARD_FILE).is_file() and not is_own_card(card / CARD_FILE) and not overwrite:
        raise ValueError(f"{card / CARD_FILE} was written by a person; pass --overwrite to replace it.")
    sampling = finished_facts(Path(samples)) if Path(samples).is_dir() else open_samples(samples)[1]
    if not sampling:
        raise ValueError(f"Nothing says how {samples} was made, and a card shows no results without that; evaluate a "
                         "folder of dit-hub sample.")  # fmt: skip
    for name, digest in sampling["weights"].items():
        same = (card / name).is_file() and file_sha256(card / name) == digest
        if name.startswith("transformer") and not same:
            raise ValueError(f"The samples are not those of {card}: their {name} is not there, or another.")


def _compare(first: Path, second: Path) -> None:
    from rich.console import Console

    from ..evaluation.results import compare, load_evaluation

    table = make_table(f"{first} and {second}", "metric", "first", "second", "p", "")
    table.columns[-1].no_wrap = True
    for pair in compare(load_evaluation(first), load_evaluation(second)):
        chance = "" if pair.p_value is None else f"{pair.p_value:.2g}"
        table.add_row(pair.first.metric, _shown(pair.first), _shown(pair.second), chance, pair.verdict)
    Console().print(table)


def _shown(result: Any) -> str:
    return f"{result.value:.4g}" + ("" if result.error is None else f" ± {result.error:.2g}")


def _self_test(folder: Path, inception: Path | None, batch_size: int, device: str) -> None:
    from rich.console import Console

    from ..evaluation.self_test import self_test

    worker = Worker.from_environment()
    with progress_bar("measuring", worker, resumes=False) as (_, report):
        checks = self_test(folder, inception, batch_size, device, report)
    if worker.index > 0:
        return
    table = make_table("ADM's evaluator and this one, on ADM's files", "metric", "published", "measured", "")
    for check in checks:
        table.add_row(check.metric, f"{check.published:.5g}", f"{check.value:.5g}", "ok" if check.passed else "differs")
    Console().print(table)
    if not all(check.passed for check in checks):
        raise ValueError("This evaluator does not give ADM's figures on this machine.")


def _save_statistics(
    images: str,
    size: int,
    extractor: str,
    inception: Path | None,
    batch_size: int,
    device: str,
    path: Path,
    overwrite: bool,
) -> None:
    from ..evaluation.evaluate import reference_statistics
    from ..evaluation.extractors import get_extractor
    from ..evaluation.images import has_own_size, open_samples
    from ..evaluation.statistics import save_statistics

    _check_new(path, ".npz", overwrite)
    if path.exists() and path.samefile(images):
        raise ValueError(f"{path} are the images themselves; choose another name for their statistics.")
    worker, side = Worker.from_environment(), open_samples(images)[0].side if has_own_size(images) else (size, size)
    with progress_bar("measuring", worker, resumes=False) as (_, report):
        file = reference_statistics(images, side, get_extractor(extractor, device, inception), batch_size, report)
    if worker.index > 0:
        return
    save_statistics(file, path, overwrite)
    print(f"The statistics are in {path}")
