"""`dit-hub info`, `convert`, `card` and `push`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..extras import quiet_libraries
from .common import Overwrite, find_config, make_table


def info(
    model: Annotated[str | None, typer.Argument(help="A size (DiT-XL/2), a Hub id, or a folder.")] = None,
    image_size: Annotated[int, typer.Option(help="Side of the image in pixels, for a size given by name.")] = 256,
    all_sizes: Annotated[bool, typer.Option("--all", help="All published sizes, with the paper's figures.")] = False,
) -> None:
    """Show parameters and multiply-accumulates of a model, or of all published sizes."""
    if (model is None) != all_sizes:
        raise ValueError("Give a model, or --all for all published sizes.")
    quiet_libraries()
    from rich.console import Console

    from ..configuration_dit import DiTConfig
    from ..flops import measure

    if all_sizes:
        _print_all_sizes(image_size)
        return
    assert model is not None
    config = find_config(model, image_size)
    size = measure(config)
    table = make_table(model, "", "")
    for name in DiTConfig.__annotations__:
        table.add_row(name, str(getattr(config, name)))
    table.add_section()
    table.add_row("parameters", f"{size.parameters:,}")
    table.add_row("multiply-accumulates", f"{size.gmacs:.4g} G for one image")
    Console().print(table)


def _print_all_sizes(image_size: int) -> None:
    from rich.console import Console

    from ..configuration_dit import DiTConfig
    from ..flops import measure
    from ..paper import paper_models

    columns = ("params (M)", "paper", "GMACs", "paper", "FID (paper)")
    table = make_table(
        f"Published models at {image_size}x{image_size}; the paper's figures are for 256x256", "model", *columns
    )
    for paper in paper_models():
        if paper.image_size != 256:
            continue
        size = measure(DiTConfig.from_name(paper.model, image_size, conditioning=paper.conditioning))
        cells = (f"{size.parameters / 1e6:.1f}", str(paper.million_parameters), f"{size.gmacs:.2f}")
        table.add_row(paper.label, *cells, f"{paper.gmacs:.2f}", f"{paper.fid:.2f}")
    Console().print(table)


def convert(
    source: Annotated[
        str, typer.Argument(help="A checkpoint file, a pipeline folder (ours or diffusers'), or a Hub id.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="Layout: dit-hub, official or diffusers.")] = "dit-hub",
    weights: Annotated[
        str | None, typer.Option(help="Key of a training checkpoint: ema, model, …; default: ema, if there is one.")
    ] = None,
    family: Annotated[str | None, typer.Option(help="dit or sit; default: as the file says.")] = None,
    num_attention_heads: Annotated[
        int | None, typer.Option(help="Attention heads; default: those of the published model of this width.")
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Classes, without the null class; default: as the weights show.")
    ] = None,
    sample_size: Annotated[
        int | None, typer.Option(help="Side of the input in latent pixels; default: as the weights show.")
    ] = None,
    timestep_freq_shift: Annotated[
        float | None, typer.Option(help="For diffusers' layout: 0 for official weights, 1 for diffusers' own.")
    ] = None,
    vae: Annotated[
        str | None, typer.Option(help="Decoder of latents: a folder or Hub id, or none; default: Stable Diffusion's.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the weights, if the source does not name it.")] = None,
    self_contained: Annotated[
        bool, typer.Option("--self-contained", help="Put the code beside the weights, for people without dit-hub.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Convert a checkpoint of any origin to any layout, checked by a forward pass."""
    from ..files import check_free

    check_free(out, overwrite)
    quiet_libraries()
    from rich.console import Console

    from dit_hub.conversion.pipelines import convert as run

    fields = {"num_classes": num_classes, "sample_size": sample_size}
    seen = {"weights": weights, "family": family, "num_attention_heads": num_attention_heads, **fields}
    options: dict[str, Any] = {name: value for name, value in seen.items() if value is not None}
    if vae is not None:
        options["vae"] = None if vae == "none" else vae
    with Console().status("Converting and checking…"):
        result = run(source, out, to, self_contained, license, timestep_freq_shift=timestep_freq_shift,
                     overwrite=overwrite, **options)  # fmt: skip
    _print_conversion(result)
    print(f"Converted to {out} ({to} layout)")


def _print_conversion(result: Any) -> None:
    from rich.console import Console

    origin, config = result.origin, result.config
    table = make_table(f"{origin.source}, {origin.layout} layout", "", "")
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "patch_size", "sample_size", "in_channels",
                 "num_classes", "learn_sigma", "pos_embed", "parameterization", "timestep_freq_shift"):  # fmt: skip
        table.add_row(name, str(getattr(config, name)))
    table.add_section()
    table.add_row("weights", origin.weights or "the whole file")
    table.add_row("license", origin.license)
    for what, error in result.parity.items():
        table.add_row(what, f"{error:.1e}")
    Console().print(table)
    if result.patch:
        print(
            "diffusers' class divides the timestep's frequencies by 127, these weights need 128 (12.8 % of the output "
            f"of a random model). After loading there, run:\n{result.patch}"
        )
    if origin.license == "unknown":
        print("The licence of these weights is unknown; --license names it for the card.")


def card(
    folder: Annotated[str, typer.Argument(help="A pipeline folder, an export, a conversion, or dit-toy-shapes.")],
    repository: Annotated[
        str | None, typer.Option(help="The name that the card's code loads; default: the folder.")
    ] = None,
) -> None:
    """Show the card that `push` would write."""
    quiet_libraries()
    from dit_hub.model_cards import render_card

    from ..sources import local_folder

    path = local_folder(folder)
    if path is None:  # it could be a Hub id
        raise ValueError(f"There is no folder {folder}.")
    print(render_card(path, repository))


def push(
    folder: Annotated[Path, typer.Argument(help="A pipeline folder, an export or a conversion.")],
    repository: Annotated[str, typer.Argument(help="ORGANISATION/NAME on the Hub; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Create a new repository as private.")] = False,
    token: Annotated[
        str | None, typer.Option(help="Token for the Hub; default: HF_TOKEN, or that of your login.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; default: main.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    draw: Annotated[
        bool, typer.Option("--draw", help="Draw the card's samples first, even if that takes long.")
    ] = False,
) -> None:
    """Push a folder with its card to the Hub."""
    quiet_libraries()
    from ..hub import push_folder
    from ..pipeline_dit import DiTPipeline
    from ..visualize import draw_samples

    if (folder / "model_index.json").is_file():
        pipeline = DiTPipeline.from_pretrained(folder)  # also a check that it loads
        if not draw_samples(pipeline, folder, force=draw):
            print("No samples.png for the card: drawing it would take long, or needs a decoder; --draw draws it.")
    url = push_folder(folder, repository, message, private, token, revision=revision)
    print(f"Pushed to {url}")
