"""Knows one training run: its step, memory, checkpoints, evaluation, log and run folder."""
