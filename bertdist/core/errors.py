"""What a user can get wrong, and only that; our own mistakes stay assertions.

BertdistError
  ConfigError       an unknown flag, a value that cannot be, two settings that contradict each other, a wrong launch
  DataError         a missing file or column, an unknown label, bytes that are not text, an empty split
  ModelError        a model folder or name that cannot be loaded, or that does not fit the task
  CheckpointError   nothing whole to resume from, or a checkpoint that belongs to another run
  RankLost          another rank is gone, or all wait for each other
  NonFiniteError    a loss or a gradient that is no number any more

A message is one line a problem: what was found, where (file, line), what was expected, what to do.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class BertdistError(Exception):
    """Printed without a traceback, as `bertdist: <message>`; the exit code is 1."""

    on_all_ranks = (
        False  # True where every rank raises it, so that one of them is enough to print it
    )
    already_printed = False  # True where another rank has printed it already


class ConfigError(BertdistError):
    """The words of the command line, of the config file or of the launch do not make a run."""

    on_all_ranks = True  # all ranks read the same words


class DataError(BertdistError):
    """A source of rows cannot be read as it was described."""


class ModelError(BertdistError):
    """A model or its tokenizer cannot be loaded, or does not fit the task."""


class CheckpointError(BertdistError):
    """A checkpoint is damaged, missing, or belongs to another run."""


class RankLost(BertdistError):
    """Another rank is gone, or does not come to where all the others wait."""


class NonFiniteError(BertdistError):
    """A step's loss or gradient is NaN or infinite, and --on_nan does not let it go."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about `word`: the nearest known word, or, where none is near, the known ones (20 at most)."""
    names = list(dict.fromkeys(known))
    near = get_close_matches(word, names, n=1) or get_close_matches(word.lower(), names, n=1)
    if near:
        return f" Did you mean {near[0]!r}?"
    shown = ", ".join(repr(name) for name in names[:20])
    return f" Known: {shown}{', ...' if len(names) > 20 else ''}." if names else ""
