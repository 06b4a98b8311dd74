"""Knows nothing of text or models: errors, config, arguments, atomic files, terminal, hub."""
