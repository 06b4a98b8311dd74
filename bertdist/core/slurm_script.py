"""The script of a job: a script of launch/ with other options of sbatch, and its arguments inside.

    options = {**template_options(text), "nodes": "2"}
    job_script(text, options, before=["cd /home/me"], arguments=["--config", "run.yaml"], about=[])

So `sbatch job.slurm` by hand submits the same job again.
"""

import re
import shlex
from collections.abc import Mapping, Sequence

from bertdist.core.errors import ConfigError

_DIRECTIVE = re.compile(r"#SBATCH\s+--([\w-]+)(?:=(.*))?")
_SHORT = {  # of sbatch: what overrides a line of the script
    "N": "nodes",
    "t": "time",
    "p": "partition",
    "A": "account",
    "a": "array",
    "J": "job-name",
    "c": "cpus-per-task",
    "o": "output",
    "n": "ntasks",
    "G": "gpus",
    "q": "qos",
    "d": "dependency",
    "C": "constraint",
    "w": "nodelist",
    "x": "exclude",
    "D": "chdir",
    "e": "error",
}


def template_options(text: str) -> dict[str, str]:
    """The #SBATCH lines of a script; "" for a flag without a value."""
    found = map(_DIRECTIVE.fullmatch, (line.strip() for line in text.splitlines()))
    return {match[1]: match[2] or "" for match in found if match}


def read_options(text: str) -> dict[str, str]:
    """`--qos=high -C a100 --exclusive` -> {"qos": "high", "constraint": "a100", "exclusive": ""}.

    Raises ConfigError.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--sbatch {text!r}: {error}.") from None
    found: dict[str, str] = {}
    name = ""
    for word in words:
        if match := re.fullmatch(r"--([\w-]+)(?:=(.*))?", word, re.DOTALL):
            name = "" if match[2] is not None else match[1]
            found[match[1]] = match[2] or ""
        elif match := re.fullmatch(r"-([A-Za-z])(.*)", word, re.DOTALL):
            long = _SHORT.get(match[1])
            if long is None:
                raise ConfigError(f"--sbatch {text!r}: give -{match[1]} by its long name.")
            name = "" if match[2] else long
            found[long] = match[2]
        elif name:
            found[name], name = word, ""
        else:
            raise ConfigError(f"--sbatch {text!r}: {word!r} follows no option.")
    return found


def job_script(
    text: str,
    options: Mapping[str, str],
    before: Sequence[str],
    arguments: Sequence[str],
    about: Sequence[str],
) -> str:
    """text: of the script in launch/. before: lines of shell. about: lines of comment."""
    lines = text.splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    head = [_directive(name, value) for name, value in options.items()]
    given = f"set -- {shlex.join(arguments)}"
    comments = [f"# {line}" for line in about]
    return "\n".join(["#!/bin/bash", *comments, *head, *before, given, *lines[last + 1 :], ""])


def option_words(options: Mapping[str, str]) -> list[str]:
    """As words of a command line."""
    return [f"--{name}={value}" if value else f"--{name}" for name, value in options.items()]


def _directive(name: str, value: str) -> str:
    # "#" begins a comment where it is not quoted
    plain = re.fullmatch(r"[\w@%+=:,./\[\]-]*", value)
    quoted = value if plain else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
    return f"#SBATCH --{name}={quoted}" if value else f"#SBATCH --{name}"
