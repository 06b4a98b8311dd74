"""Checks of rows and labels: duplicates, leaks, lengths, texts, label issues; and cleaning."""
