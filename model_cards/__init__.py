"""Model cards, rendered from a folder and the facts beside its weights."""

from .card import is_own_card, render_card

__all__ = ["is_own_card", "render_card"]
