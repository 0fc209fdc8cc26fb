"""What older releases called the fields of a recipe and the facts that lie beside checkpoints and latents."""

from typing import Any

OLD_NAMES = {
    "gradient_accumulation": "gradient_accumulation_steps",
    "learning_rate_schedule": "lr_scheduler",
    "mirror": "random_flip",
    "workers": "num_workers",
    "pictures": "images",  # a checkpoint's data
    "picture_shape": "image_shape",  # the plan of a folder of latents
}


def renamed(facts: dict[str, Any]) -> dict[str, Any]:
    """The same facts under today's names."""
    return {OLD_NAMES.get(name, name): value for name, value in facts.items()}
