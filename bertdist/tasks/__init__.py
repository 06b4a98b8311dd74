"""Labels, losses and scores: single-label, multi-label and regression tasks, metrics."""
