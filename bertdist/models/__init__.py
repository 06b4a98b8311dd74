"""Hugging Face encoders, run without padding: architectures, attention, dropout, compilation."""
