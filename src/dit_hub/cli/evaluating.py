"""`dit-hub evaluate`."""

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
        Path | None, typer.Option(help="Only write the statistics of the samples, as a reference for later.")
    ] = None,
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
        _save_statistics(samples, extractor, inception, batch_size, device, save_statistics, overwrite)
        return
    if reference is None:
        raise ValueError("Give --reference: the real images to compare with.")
    from ..evaluation.results import RESULTS_FILE

    if out is None and Path(samples).is_dir():
        out = Path(samples) / RESULTS_FILE
    for path in filter(None, (out, card / RESULTS_FILE if card else None)):
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists; choose another name or pass --overwrite.")
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
    from ..sources import CARD_FILE

    worker = Worker.from_environment()
    if card is not None and not (card / "model_index.json").is_file():
        raise ValueError(f"{card} is no folder of a model.")
    with progress_bar("measuring", worker) as (_, report):
        found = evaluation.evaluate(
            samples,
            reference,
            metrics.split(",") if metrics else None,
            extractor.split(","),
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
        print(f"The card is {card / CARD_FILE}")


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
    with progress_bar("measuring", worker) as (_, report):
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
    samples: str, extractor: str, inception: Path | None, batch_size: int, device: str, path: Path, overwrite: bool
) -> None:
    from ..evaluation.evaluate import reference_statistics
    from ..evaluation.extractors import get_extractor
    from ..evaluation.images import open_samples
    from ..evaluation.statistics import save_statistics

    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another name or pass --overwrite.")
    worker, side = Worker.from_environment(), open_samples(samples)[0].side
    with progress_bar("measuring", worker) as (_, report):
        file = reference_statistics(samples, side, get_extractor(extractor, device, inception), batch_size, report)
    if worker.index > 0:
        return
    save_statistics(file, path, overwrite)
    print(f"The statistics are in {path}")
