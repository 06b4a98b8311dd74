"""bertdist.train as a launcher starts it, at a pace that a test sets while it runs: `python
tests/slowed.py PACE OTHER -- WORDS`.

PACE is a file that says how many seconds a step takes more. OTHER is "" or what rank 1 does
differently: "config" or "data".
"""

import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from bertdist import cli

# The module: `from bertdist import train` is the function.
train: Any = importlib.import_module("bertdist.train")


def main(pace: Path, other: str, words: list[str]) -> None:
    train_step = train.train_step

    def slowed(*args: Any) -> Any:
        time.sleep(float(pace.read_text() or 0))  # empty: it is just being written
        return train_step(*args)

    train.train_step = slowed
    if other and os.environ["RANK"] == "1":
        if other == "config":
            words = [*words, "--learning_rate", "0.5"]
        else:
            os.chdir("other")
    sys.argv = ["bertdist/train.py", *words]
    cli.main(["train", *words])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[4:])
