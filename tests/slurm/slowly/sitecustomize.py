"""On PYTHONPATH, every optimizer step takes as many seconds more as the file PACE says, so that things
happen in the midst of a job on any machine. Python imports this module when it starts.
"""

import importlib.machinery
import os
import sys
import time
from types import ModuleType
from typing import Any

SLOWED = "bertdist.training.optimizer"  # its apply_update


class Slowing:
    """A finder that changes one module as it is imported."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name != SLOWED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        loader: Any = spec and spec.loader
        execute = loader.exec_module

        def execute_and_slow(module: Any) -> None:
            execute(module)
            apply_update = module.apply_update

            def slowed(*args: Any) -> Any:
                with open(os.environ["PACE"]) as file:
                    time.sleep(float(file.read() or 0))  # empty: it is just being written
                return apply_update(*args)

            module.apply_update = slowed

        loader.exec_module = execute_and_slow
        return spec


if "PACE" in os.environ:
    sys.meta_path.insert(0, Slowing())  # type: ignore[arg-type]
