"""Evaluation: sampling for it, metrics as functions of arrays, results with intervals, and the scaling study."""

from .sampling import sample_images

__all__ = ["sample_images"]
