"""Knows Hugging Face encoders, and runs them without padding."""
