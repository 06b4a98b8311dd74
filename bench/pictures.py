"""The pictures of the README and the docs site: a run on a terminal, and its report in a browser.

    python -m bench.pictures                  # both, into docs/pictures/
    python -m bench.pictures --only terminal

A tiny BERT is trained on rows that are made up here, by the real command on a pseudo-terminal; what
it wrote there is drawn by rich. The report is the report.html of that run, opened in a headless
Chromium (playwright; `--browser` names another one).
"""

import argparse
import csv
import io
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "pictures"
COLUMNS = 100
MOODS = {  # label -> words; some words are of both moods
    "positive": "warm funny clever brilliant lively gentle bold moving".split(),
    "negative": "dull slow clumsy noisy stale flat careless dreary".split(),
    "mixed": "uneven odd long loud strange familiar plain curious".split(),
}
OTHERS = "a the film story plot cast music scene ending script and with but is was of it".split()
TRAIN = (
    "bertdist train --model_name_or_path tiny-bert --train_file reviews.csv --validation_split 0.2 "
    "--learning_rate 2e-3 --num_train_epochs 4 --output_dir out"
)


def main() -> None:
    """Write the pictures."""
    arguments = parser().parse_args()
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_rows(work / "reviews.csv")
        save_model(work / "tiny-bert")
        shown = run_on_terminal(TRAIN.split()[1:], work)
        if arguments.only != "report":
            draw_terminal(f"$ {TRAIN}\n{shown}", FOLDER / "terminal.svg")
        if arguments.only != "terminal":
            photograph(work / "out" / "report.html", FOLDER, arguments.browser)


def parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--only", choices=("terminal", "report"))
    flags.add_argument("--browser", help="Chromium to use instead of playwright's own")
    return flags


def write_rows(path: Path, count: int = 600) -> None:
    """Rows by rule: mostly words of the label's mood, one label in twenty wrong."""
    random = np.random.default_rng(3)
    labels = list(MOODS)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(count):
            mood = labels[random.choice(3, p=[0.45, 0.35, 0.2])]
            kinds = random.choice(3, size=random.integers(4, 24), p=[0.2, 0.12, 0.68])
            other = MOODS[labels[random.integers(3)]]
            words = [str(random.choice((MOODS[mood], other, OTHERS)[kind])) for kind in kinds]
            label = labels[random.integers(3)] if random.random() < 0.05 else mood
            writer.writerow([" ".join(words).capitalize() + ".", label])


def save_model(folder: Path) -> None:
    """A random BERT of two layers of 64, and a tokenizer of the words above."""
    import torch
    import transformers
    from transformers import BertConfig, BertModel

    library: Any = transformers

    words = sorted({*OTHERS, *(word for mood in MOODS.values() for word in mood)})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *words]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer = library.BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)})
    tokenizer.model_max_length = 128
    tokenizer.save_pretrained(folder)


def run_on_terminal(arguments: Sequence[str], folder: Path) -> str:
    """Run `python -m bertdist` on a pseudo-terminal; what it shows in the end, with its colours."""
    import fcntl
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 200, COLUMNS, 0, 0))
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "TERM": "xterm-256color",
        "COLORTERM": "truecolor",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "bertdist", *arguments]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    data = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        data += piece
    os.close(ours)
    shown = screen_of(data.decode("utf-8", "replace"))
    if process.wait():
        raise SystemExit(f"The run failed:\n{shown}")
    # where the command bertdist is installed, the run itself says this
    return shown.replace(f"{sys.executable} -m bertdist", "bertdist")


def screen_of(output: str) -> str:
    """What a terminal shows after some output: lines that are written over are gone.

    Knows what rich writes: colours, line ends, erasing a line, moving up.
    """
    lines, row = [""], 0
    for token in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if token == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        elif token.endswith("A") and token.startswith("\x1b["):
            row = max(0, row - int(token[2:-1] or 1))
        elif token in ("\x1b[2K", "\x1b[0K", "\x1b[K"):
            lines[row] = ""
        elif token.startswith("\x1b[") and not token.endswith("m"):
            continue  # the cursor is hidden or shown
        elif token != "\r":
            lines[row] += token
    return "\n".join(lines).rstrip()


def draw_terminal(shown: str, path: Path) -> None:
    """An SVG of lines with colours. No font is loaded from elsewhere."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(shown))
    own_fonts = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    path.write_text(
        console.export_svg(title="bertdist", code_format=own_fonts, unique_id="bertdist")
    )
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


def photograph(page: Path, folder: Path, browser: str | None) -> None:
    """report_light.png and report_dark.png: the top of a page, 1200 pixels wide."""
    from playwright.sync_api import sync_playwright

    path = browser or shutil.which("chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            tab = chromium.new_page(
                viewport={"width": 1200, "height": 900},
                color_scheme=scheme,
            )
            tab.goto(page.as_uri())
            file = folder / f"report_{scheme}.png"
            tab.screenshot(path=file)
            print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1000:.0f} kB")
        chromium.close()


if __name__ == "__main__":
    main()
