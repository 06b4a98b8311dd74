"""Errors, config, arguments, atomic files, terminal and hub; nothing about text or models."""
