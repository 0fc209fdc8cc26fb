"""Evaluation: sampling for it, metrics as functions of arrays, results with intervals, and the scaling study.

from dit_hub.evaluation import evaluate, frechet_distance

evaluate("samples", "shapes", extractor="shapes")["fid"].value
"""

from .evaluate import evaluate, reference_statistics
from .extractors import get_extractor
from .metrics import (
    density_coverage,
    frechet_distance,
    frechet_extrapolation,
    frechet_ratio,
    gaussian_mmd,
    inception_score,
    kernel_distance,
    monge_distance,
    precision_recall,
)
from .results import Evaluation, Result, compare, load_evaluation
from .sampling import sample_images
from .self_test import self_test
from .statistics import Moments, Statistics, load_statistics, save_statistics

__all__ = [
    "Evaluation",
    "Moments",
    "Result",
    "Statistics",
    "compare",
    "density_coverage",
    "evaluate",
    "frechet_distance",
    "frechet_extrapolation",
    "frechet_ratio",
    "gaussian_mmd",
    "get_extractor",
    "inception_score",
    "kernel_distance",
    "load_evaluation",
    "load_statistics",
    "monge_distance",
    "precision_recall",
    "reference_statistics",
    "sample_images",
    "save_statistics",
    "self_test",
]
