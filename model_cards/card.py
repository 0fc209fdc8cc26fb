"""The card of a model that this package trained."""

import json
import os
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from dit_hub.evaluation.flops import measure
from dit_hub.extras import require
from dit_hub.pipeline_dit import DiTPipeline

TEMPLATE = Path(__file__).parent / "card.md.j2"

_LIMITS = (
    "The model knows 16x16 pictures of these classes and nothing else. It exists to try the software with: "
    "it is small enough to come with the package and to train on a laptop."
)


def render_card(folder: str | os.PathLike) -> ModelCard:
    """The card of a folder that `dit-hub train` wrote, from its training.json, its config and its weights.

    Raises:
        ValueError: the folder holds no training.json.
        ImportError: Jinja2 is missing.
    """
    require("jinja2", "train")
    path = Path(folder) / "training.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no training.json, from which its card is made.")
    training = json.loads(path.read_text())
    pipeline = DiTPipeline.from_pretrained(folder)
    config = pipeline.transformer.config
    size = measure(config)
    losses = list(enumerate(training["epoch_losses"], start=1))
    shown = [row for row in losses if row[0] in (1, 4, 8, 16, 30) or row[0] % 100 == 0 or row[0] == len(losses)]
    data = ModelCardData(
        license="apache-2.0",
        library_name="dit_hub",
        pipeline_tag="unconditional-image-generation",
        tags=["dit", "class-conditional", "arxiv:2212.09748"],
    )
    height, width = config.sample_height_width
    facts = [
        ("parameters", f"{size.parameters:,}"),
        ("multiply-accumulates", f"{size.gmacs * 1e3:.2f} million for one picture and step"),
        ("pictures", f"{width}x{height}, {config.in_channels} channels"),
        ("classes", ", ".join(pipeline.id2label.values())),
        ("layers, width, heads", f"{config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads}"),
        ("licence", "Apache-2.0, weights and data"),
    ]
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=training["name"],
        summary=(
            "A Diffusion Transformer (Peebles & Xie 2023) that draws shapes of one colour. "
            "Its data set is drawn from a seed by `dit_hub.training.shapes`."
        ),
        picture="samples.png",
        facts=facts,
        repository=training["name"],
        labels=list(pipeline.id2label.values()),
        command=training["command"],
        recipe=training["recipe"],
        losses=shown,
        limits=_LIMITS,
    )
