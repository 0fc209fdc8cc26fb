"""Evaluation: sampling for it, metrics as functions of arrays, results with intervals, and the scaling study."""
