"""URLs in what others may read: without what gives access."""

import re


def without_secrets(text: str) -> str:
    """URLs in a text without user, password (which may have an @), query and fragment."""
    return re.sub(r"(\w+://)(?:[^/\s]*@)?([^\s?#]*)(?:[?#]\S*)?", r"\1\2", text)
