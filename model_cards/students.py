"""How a card says that a model was distilled."""

from typing import Any


def student_steps(training: dict[str, Any]) -> int | None:
    """The steps in which a progressive student draws; None for any other model, which takes several numbers.

    Args:
        training: the content of training.json.
    """
    recipe = training.get("recipe") or {}
    return recipe.get("student_steps") if recipe.get("distill") == "progressive" else None


def student_caveat(training: dict[str, Any]) -> str:
    """How a distilled model is drawn from, in sentences; "" for any other model."""
    recipe, steps = training.get("recipe") or {}, student_steps(training)
    sentences = {
        "progressive": f"The model was distilled to draw in {steps} {'step' if steps == 1 else 'steps'}, and in no "
        "other number of them.",
        "consistency": "The model was distilled to draw in a few steps, from 1 to 8.",
    }
    scale = recipe.get("guidance_scale", 1) if recipe.get("distill") else 1
    built_in = f"Guidance of {scale:g} is built in, so that a step is one pass." if scale != 1 else ""
    return " ".join(filter(None, [sentences.get(recipe.get("distill", "")), built_in]))
