"""How many modules and functions one csv row passes, and how many modules an import loads.

    python -m bench.structure

1. `import bertdist.train` in a fresh process: modules of bertdist in sys.modules, packages counted.
2. A run of 3 steps on a csv of 96 rows under sys.setprofile, on the CPU, without loader workers:
   every module and function of bertdist that is called in the run, from `train.run` on (flags are
   parsed and checked before); and those that handle rows, from the file to the loss, without
   settings, processes, logging and saving.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.faults import VOCABULARY, write_model

ROOT = Path(__file__).resolve().parents[1]
# Rows are not handed to these: settings (models/model_config.py is of config.json), processes ...
NO_ROWS = ("core/", "distributed/", "training/", "reporting/", "models/model_config.py")
ROWS = ("training/micro_batches.py",)  # ... except this

PROGRAM = """
import json, sys, threading
from pathlib import Path
import bertdist.train
root, words, output = json.loads(sys.argv[1])
loaded = sorted(name for name in sys.modules if name.split(".")[0] == "bertdist")
called = set()

def profile(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(root) and not code.co_name.startswith("<"):
        called.add((code.co_filename[len(root):], code.co_firstlineno, code.co_name))

sys.argv = ["bertdist.train", *words]
from bertdist.core.args import parse_or_exit, read_config
from bertdist.data.preflight import check_train
config = parse_or_exit(read_config, check_train)
threading.setprofile(profile)
sys.setprofile(profile)
try:
    train = sys.modules["bertdist.train"]
    train.run_cli(train.run, config)
except SystemExit as end:
    assert not end.code, end.code
finally:
    sys.setprofile(None)
Path(output).write_text(json.dumps({"loaded": loaded, "called": sorted(called)}))
"""


def trace(folder: Path) -> Any:
    """`loaded`: modules after the import; `called`: (file, line, function) of the run."""
    write_model(folder / "model")
    chance = random.Random(1)
    rows = [
        f"{' '.join(chance.choices(VOCABULARY, k=chance.randint(2, 20)))},{label}"
        for label in ["no", "yes"] * 48
    ]
    (folder / "train.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    settings: dict[str, Any] = {
        "model_name_or_path": folder / "model",
        "train_file": folder / "train.csv",
        "output_dir": folder / "out",
    }
    settings |= {"max_train_steps": 3, "use_cpu": "true", "dataloader_num_workers": 0}
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    output = folder / "trace.json"
    asked = json.dumps([f"{ROOT / 'bertdist'}{os.sep}", words, str(output)])
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, asked], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


def handles_rows(path: str) -> bool:
    """Whether rows pass this file, by its path below bertdist/."""
    return path in ROWS or not path.startswith(NO_ROWS)


def main() -> None:
    """The command line."""
    with tempfile.TemporaryDirectory(prefix="structure_") as name:
        found = trace(Path(name))
    loaded, called = (
        found["loaded"],
        [(str(path), str(function)) for path, _, function in found["called"]],
    )
    packages = sum(
        (ROOT / name.replace(".", "/")).is_dir() and name != "bertdist" for name in loaded
    )
    modules = f"{len(loaded)} modules, {packages} of them packages (a docstring each)"
    print(f"import bertdist.train: {modules}: {' '.join(map(str, loaded))}")
    for title, calls in (
        ("whole run", called),
        ("from csv row to loss", [call for call in called if handles_rows(call[0])]),
    ):
        files = sorted({path for path, _ in calls})
        print(f"{title}: {len(files)} modules, {len(calls)} functions: {' '.join(files)}")


if __name__ == "__main__":
    main()
