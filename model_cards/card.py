"""The card of a folder, from its configuration and the facts in it."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dit_hub.adapters import CONFIG_FILE
from dit_hub.configuration_dit import DiTConfig
from dit_hub.conversion.diffusers_layout import (
    DIFFUSERS_CLASSES,
    OFFICIAL_NUMERICS_PATCH,
    config_from_diffusers,
    read_config,
)
from dit_hub.conversion.origin import DECODER_LICENSES, DEFAULT_VAE, IMAGENET, UNKNOWN_LICENSE, Origin, read_origin
from dit_hub.flops import measure
from dit_hub.labels import imagenet_id2label

from .students import student_caveat, student_steps

TEMPLATE = Path(__file__).parent / "card.md.j2"

# In every card that this module makes, so that cards that people wrote are recognised and left alone.
MARKER = "<!-- made by `dit-hub card`; edit the facts, not this text -->"

_IMAGENET_LIMITS = (
    "ImageNet's images may be used for research only. The model draws its 1000 classes and nothing else, with the "
    "data set's biases: who and what is shown, where, and how often. Faces, hands and text come out badly."
)
_TOY_LIMITS = (
    "The model knows 16x16 images of these classes and nothing else. It exists to try the software with: "
    "it is small enough to come with the package and to train on a laptop."
)


# Values of a recipe's settings that switch something off, and settings of how a run is kept rather than of its result.
_OFF = ("", 0, None, "no", "none", [])  # 0 is False too
_HOUSEKEEPING = {
    "keep_last",
    "push_to_hub",
    "sample_every",
    "save_every",
    "streaming",
    "tracker",
    "num_workers",
    "workers",
}


def is_own_card(path: str | os.PathLike) -> bool:
    """Whether a README.md was made by `render_card`, not by a person."""
    return MARKER in Path(path).read_text()


def render_card(folder: str | os.PathLike, repository: str | None = None) -> ModelCard:
    """The card of a folder: pipeline, export or conversion.

    It is made from model_index.json and the transformer's config and, if they exist, from `origin.json` (source,
    licence, measured error), `training.json` (recipe and losses), `report.json` (errors of an export), `samples.png`,
    and `evaluation.json`: of `dit-hub evaluate`, or with "results", a list of {"metric": "FID-50K", "value": 2.27,
    "dataset": "ILSVRC/imagenet-1k", "dataset_name": "ImageNet 256x256", "how": "cfg 1.5, 250 DDPM steps", "source":
    "…"}. No value is shown without how its samples were made.

    Args:
        folder: what to describe.
        repository: what the card's code loads; None means the folder's name.

    Raises:
        ValueError: the folder holds no model of a known layout, or damaged facts.
    """
    folder = Path(folder)
    repository = repository or folder.name
    origin = read_origin(folder)
    conversion = origin.conversion if origin else {}
    training = _facts(folder, "training.json")
    results = _results(folder)
    index = _facts(folder, "model_index.json")
    adapters = _facts(folder, CONFIG_FILE)
    layout = conversion.get("to") or ("diffusers" if _is_stock(index) else "adapters" if adapters else "dit-hub")
    config = _config(folder, layout, conversion)
    id2label = _id2label(index or adapters or conversion)
    imagenet = _is_imagenet(config, id2label, origin)
    title = repository.split("/")[-1]
    return ModelCard.from_template(
        _metadata(title, repository, origin, training, results, config, layout, imagenet),
        template_path=str(TEMPLATE),
        marker=MARKER,
        title=title,
        summary=_summary(config, training, imagenet),
        image="samples.png" if (folder / "samples.png").is_file() else None,
        code=_code(
            repository,
            layout,
            config,
            index,
            id2label,
            adapters.get("base_model_name_or_path"),
            student_steps(training),
        ),
        caveat=_caveat(layout, conversion) or student_caveat(training),
        facts=_table(config, id2label, origin, training, layout, _facts(folder, "vae/config.json")),
        origin=_origin_text(origin) if origin else None,
        parity=_parity(folder, conversion),
        results=results,
        intervals=any(result.get("low") is not None for result in results),
        training=training if training.get("recipe") else None,
        settings=_settings(training.get("recipe") or {}),
        losses=_shown_losses(training.get("epoch_losses", [])),
        limits=_limits(config, training, imagenet),
    )


def _is_imagenet(config: DiTConfig, id2label: dict[int, str], origin: Origin | None) -> bool:
    """Whether the classes are ImageNet's, by the origin of the weights or by their names."""
    by_origin = origin is not None and origin.is_imagenet
    return config.num_classes == 1000 and (by_origin or id2label == imagenet_id2label())


def _settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings that tell something of the model: none that is off, or that another setting makes irrelevant."""
    unused = {
        "epochs": recipe.get("steps"),
        "model": recipe.get("init_from"),
        "images_per_class": recipe.get("data", "shapes") != "shapes",
        "gradient_accumulation_steps": recipe.get("gradient_accumulation_steps") == 1,
        "gradient_accumulation": recipe.get("gradient_accumulation") == 1,  # its name in older results
        "merge_adapters": not recipe.get("lora_rank"),
        "guidance_scale": not recipe.get("distill"),
        "student_steps": recipe.get("distill") != "progressive",
        "teacher_steps": recipe.get("distill") not in ("progressive", "consistency"),
        **dict.fromkeys(("beta_start", "beta_end"), recipe.get("objective") == "flow"),
    }
    return {
        name: ", ".join(f"{field} {setting}" for field, setting in value.items()) if isinstance(value, dict) else value
        for name, value in recipe.items()
        if (value not in _OFF or name == "seed") and name not in _HOUSEKEEPING and not unused.get(name)
    }


def _limits(config: DiTConfig, training: dict[str, Any], imagenet: bool) -> str | None:
    if imagenet:
        return _IMAGENET_LIMITS
    if not training.get("data"):
        return None
    if training.get("recipe", {}).get("data", "shapes") == "shapes":
        return _TOY_LIMITS
    what = "these classes" if config.num_classes else "what it was trained on"
    return f"The model draws {what} and nothing else; how well is not measured unless there are results above."


def _facts(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text())
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object.")
    return facts


def _results(folder: Path) -> list[dict[str, Any]]:
    """The results of `evaluation.json`, with optional fields filled in."""
    file, results = folder / "evaluation.json", _facts(folder, "evaluation.json").get("results", [])
    for result in results if isinstance(results, list) else [None]:
        fields = result if isinstance(result, dict) else {}
        if missing := [name for name in ("metric", "value", "dataset_name") if name not in fields]:
            raise ValueError(f"{file}: a result has no {missing[0]}.")
        for name in ("value", "low", "high"):
            value = 0.0 if fields.get(name) is None and name != "value" else fields[name]
            if not isinstance(value, (int, float)) or not abs(value) < 1e300:
                raise ValueError(f"{file}: {fields[name]!r} is no number.")
        if not fields.get("how"):
            raise ValueError(f"{file}: nothing says how the samples of {fields['metric']} were made; say it under "
                             "\"how\", or evaluate a folder of dit-hub sample, which knows.")  # fmt: skip
    return [{"dataset": _hub_name(result["dataset_name"]), "source": "", **result, "shown": _shown(result)}
            for result in results]  # fmt: skip


def _shown(result: dict[str, Any]) -> str:
    """A value as a card shows it; measured ones with their interval, and as many digits as it allows."""
    low, high = result.get("low"), result.get("high")
    if low is None or high is None:
        return str(result["value"]) if "id" not in result else f"{result['value']:.4g}"
    spread = (high - low) / 2
    digits = max(0, 1 - math.floor(math.log10(spread))) if spread > 0 else 4
    return f"{result['value']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _hub_name(dataset: Any) -> str:
    """A name of a data set that the Hub accepts in a card."""
    return re.sub(r"[^A-Za-z0-9._/-]+", "-", str(dataset)).strip("-") or "unknown"


def _id2label(facts: dict[str, Any]) -> dict[int, str]:
    return {int(key): str(name) for key, name in (facts.get("id2label") or {}).items()}


def _is_stock(index: dict[str, Any]) -> bool:
    return (index.get("transformer") or ["", ""])[1] in DIFFUSERS_CLASSES


def _config(folder: Path, layout: str, conversion: dict[str, Any]) -> DiTConfig:
    if layout == "official":  # such a folder has no config.json
        return DiTConfig(**conversion["config"])
    if layout == "adapters":
        return DiTConfig.from_pretrained(folder)
    if not (folder / "transformer").is_dir():
        raise ValueError(f"{folder} has no folder transformer, so there is no model to describe.")
    fields = read_config(folder / "transformer")
    if layout == "diffusers":
        return config_from_diffusers(fields)
    return DiTConfig.from_pretrained(folder / "transformer")


def _metadata(
    title: str,
    repository: str,
    origin: Origin | None,
    training: dict[str, Any],
    results: list[dict[str, Any]],
    config: DiTConfig,
    layout: str,
    imagenet: bool,
) -> ModelCardData:
    license = _license(origin, training)
    evaluated = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=str(result["dataset"]),
            dataset_name=str(result["dataset_name"]),
            metric_type=str(result.get("id") or str(result["metric"]).split("-")[0]).lower(),
            metric_name=str(result["metric"]),
            metric_value=float(result["value"]),
        )
        for result in results
    ]
    conditional = "class-conditional" if config.num_classes else "unconditional"
    tags = ["dit", "sit" if config.parameterization == "sit" else None, conditional]
    base_model = origin.base_model if origin and origin.base_model != repository else None
    return ModelCardData(
        license=license,
        library_name="diffusers" if layout == "diffusers" else "dit_hub",
        pipeline_tag="unconditional-image-generation",  # the Hub has no task for classes
        base_model=base_model,
        datasets=[IMAGENET] if imagenet else None,
        tags=[*filter(None, tags), "imagenet" if imagenet else "diffusion", "arxiv:2212.09748"],
        **({"model_name": title, "eval_results": evaluated} if evaluated else {}),
    )


def _license(origin: Origin | None, training: dict[str, Any]) -> str:
    if origin is not None and origin.license != UNKNOWN_LICENSE:
        return origin.license
    return training.get("license", UNKNOWN_LICENSE)


def _summary(config: DiTConfig, training: dict[str, Any], imagenet: bool) -> str:
    kind = "Scalable Interpolant Transformer (SiT, Ma et al. 2024)" if config.parameterization == "sit" else (
        "Diffusion Transformer (DiT, Peebles & Xie 2023)"
    )  # fmt: skip
    if not config.num_classes:
        subject = "unconditional"
    elif imagenet:
        subject = "for ImageNet's 1000 classes"
    else:
        subject = f"for {config.num_classes} classes"
    return " ".join(filter(None, [f"A {kind}, {subject}.", training.get("data")]))


def _code(
    repository: str,
    layout: str,
    config: DiTConfig,
    index: dict[str, Any],
    id2label: dict[int, str],
    base: str | None,
    steps: int | None,
) -> str:
    """Lines of code that run as they stand; `base` is the model that adapters belong to, `steps` a student's."""
    names = [id2label[label].split(",")[0] for label in sorted(id2label)[:2]] or list(range(min(2, config.num_classes)))
    labels = f"[{', '.join(json.dumps(name) for name in names)}]" if config.num_classes else ""
    library, load, decoder, then = "dit_hub", f'from_pretrained("{repository}"', "", ""
    if layout == "diffusers":
        # diffusers' pipeline takes class 1000 for the null class in every model.
        guidance = "" if config.num_classes == 1000 else ", guidance_scale=1"
        library, labels = "diffusers", str(list(range(min(2, config.num_classes)))) + guidance
    if layout == "official":
        on_hub = repository.count("/") == 1 and not Path(repository).is_dir()
        folder = f"https://huggingface.co/{repository}/resolve/main" if on_hub else repository
        load = f'from_single_file("{folder}/model.pt", num_attention_heads={config.num_attention_heads}'
    elif layout == "adapters":
        method = "from_single_file" if Path(base or "").suffix in (".pt", ".pth", ".safetensors") else "from_pretrained"
        load, then = f'{method}("{base}"', f'pipe.load_adapters("{repository}")\n'
    elif not config.draws_pixels and not (index.get("vae") or [None])[0]:
        decoder = f'vae = AutoencoderKL.from_pretrained("{DEFAULT_VAE}")\n'
        load += ", vae=vae"
    imports = f"from {library} import DiTPipeline"
    if decoder:
        imports = (
            f"from diffusers import AutoencoderKL{', DiTPipeline' if library == 'diffusers' else chr(10) + imports}"
        )
    arguments = ", ".join(filter(None, [labels, f"num_inference_steps={steps}" if steps else ""]))
    draw = f'pipe({arguments}).images[0].save("sample.png")'
    return f"{imports}\n\n{decoder}pipe = DiTPipeline.{load})\n{then}{draw}"


def _caveat(layout: str, conversion: dict[str, Any]) -> str | None:
    if conversion.get("self_contained"):
        return (
            "Without dit-hub installed, diffusers' `DiffusionPipeline.from_pretrained(…, trust_remote_code=True)` runs "
            "the code in this repository, with the same numbers."
        )
    if layout != "diffusers" or conversion.get("config", {}).get("timestep_freq_shift") != 0:
        return None
    return (
        "**These weights follow the official numerics, and diffusers' class differs**: it divides the timestep's "
        "frequencies by 127 instead of 128, which changes the output of a random model by 12.8 %. One line after "
        f"loading corrects it:\n\n```python\n{OFFICIAL_NUMERICS_PATCH}\n```"
    )


def _table(
    config: DiTConfig,
    id2label: dict[int, str],
    origin: Origin | None,
    training: dict[str, Any],
    layout: str,
    vae: dict[str, Any],
) -> list[tuple[str, str]]:
    size = measure(config)
    height, width = config.sample_height_width
    gmacs = f"{size.gmacs:.2f} G" if size.gmacs >= 0.1 else f"{size.gmacs * 1e3:.2f} million"
    classes = ", ".join(id2label.values()) if len(id2label) == config.num_classes <= 100 else str(config.num_classes)
    unknown = "unknown: ask the authors before using these weights"
    license = _license(origin, training)
    rows = [
        ("parameters", f"{size.parameters:,}"),
        ("multiply-accumulates", f'{gmacs} for one image and step (papers say "Gflops")'),
        ("input", f"{width}x{height}, {config.in_channels} channels, patches of {config.patch_size}"),
        ("classes", classes if config.num_classes else "none"),
        ("layers, width, heads", f"{config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads}"),
        ("licence", unknown if license == UNKNOWN_LICENSE else license),
    ]
    if layout != "dit-hub":
        rows.append(("layout", layout))
    if decoder := vae.get("_name_or_path"):
        license = DECODER_LICENSES.get(decoder)
        rows.append(("decoder", f"`{decoder}`, under {license}" if license else f"`{Path(decoder).name}`"))
    return rows


def _origin_text(origin: Origin) -> str:
    source = f"[{origin.source}]({origin.url})" if origin.url else f"`{origin.source}`"
    sentences = [f"The weights come from {source}" + (f", its `{origin.weights}`." if origin.weights else ".")]
    if origin.modified:
        sentences.append("They have been changed since.")
    elif origin.conversion:
        sentences.append(
            f"They were converted from the {origin.conversion['from']} layout to {origin.conversion['to']}; "
            "the values are the same."
        )
    if origin.license == UNKNOWN_LICENSE:
        sentences.append("Their licence is unknown; if they derive from the official weights, it is CC-BY-NC-4.0.")
    else:
        sentences.append(f"They are under `{origin.license}`, and stay so when converted or fine-tuned.")
    if origin.authors:
        sentences.append(origin.authors)
    if origin.license == "cc-by-nc-4.0":
        sentences.append(
            "[CC-BY-NC-4.0](https://creativecommons.org/licenses/by-nc/4.0/legalcode) allows no commercial use, and "
            "comes without warranties."
        )
    return " ".join(sentences)


def _parity(folder: Path, conversion: dict[str, Any]) -> list[tuple[str, float]]:
    rows = [(str(name), float(error)) for name, error in conversion.get("parity", {}).items()]
    exported = _facts(folder, "report.json").get("parity", {})
    return rows + [
        (f"{name}: ONNX Runtime against PyTorch", parity["relative_error"]) for name, parity in exported.items()
    ]


def _shown_losses(losses: list[float]) -> list[tuple[int, float]]:
    numbered = list(enumerate(losses, start=1))
    return [row for row in numbered if row[0] in (1, 4, 8, 16, 30) or row[0] % 100 == 0 or row[0] == len(losses)]
