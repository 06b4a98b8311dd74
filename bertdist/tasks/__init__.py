"""Knows labels and scores: single-label, multi-label and regression tasks, metrics."""
