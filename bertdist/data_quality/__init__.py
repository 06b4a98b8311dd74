"""Knows what to look for in rows and labels: duplicates, leaks, lengths, label issues."""
