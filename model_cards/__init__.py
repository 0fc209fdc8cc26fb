"""Model cards, rendered from a pipeline folder and the facts beside it."""

from .card import render_card

__all__ = ["render_card"]
