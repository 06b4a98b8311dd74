"""bench.label_noise: the labels it makes wrong, and the shares it counts."""

import json
from pathlib import Path

import pytest
from rows import make_rows, write_rows

from bench import label_noise


def made(folder: Path, *words: str) -> list[dict[str, str]]:
    """Rows of noisy.jsonl, of 40 rows of three labels, two of which have one text."""
    rows = [
        {"text": f"{row['text']} {at}", "label": "abc"[at % 3]}
        for at, row in enumerate(make_rows(39))
    ]
    path = write_rows(folder / "rows.tsv", [*rows[:5], rows[0], *rows[5:]])
    args = label_noise.parser().parse_args(["--train_file", str(path), *words])
    label_noise.write_noisy(args, folder / "noisy.jsonl")
    return [json.loads(line) for line in (folder / "noisy.jsonl").read_text().splitlines()]


def test_a_share_of_the_labels_is_made_wrong_and_no_text_comes_twice(tmp_path: Path) -> None:
    rows = made(tmp_path, "--share", "0.2", "--rows", "30")
    assert len(rows) == len({row["text"] for row in rows}) == 30
    assert sum(row["label"] != row["was"] for row in rows) == 6 and {
        row["label"] for row in rows
    } == {"a", "b", "c"}
    assert made(tmp_path, "--share", "0.2", "--rows", "30") == rows
    assert made(tmp_path, "--share", "0.2", "--rows", "30", "--seed", "8") != rows
    assert not any(row["label"] != row["was"] for row in made(tmp_path, "--share", "0"))


def test_the_shares_are_those_of_the_ranking(tmp_path: Path) -> None:
    noisy, ranking = tmp_path / "noisy.jsonl", tmp_path / "ranking.jsonl"
    noisy.write_text(
        "".join(
            json.dumps({"text": "x", "label": "a", "was": "b" if row < 4 else "a"}) + "\n"
            for row in range(40)
        )
    )
    order = [
        0,
        39,
        1,
        38,
        2,
        *range(4, 38),
        3,
    ]  # the first 2 hold one wrong label, the first 4 two, the first 8 three
    ranking.write_text(
        "".join(json.dumps({"row": row, "issue": row in (0, 1, 39)}) + "\n" for row in order)
    )
    assert label_noise.figures(noisy, ranking) == pytest.approx([0.25, 0.5, 0.75, 2 / 3, 0.5])
    ranking.write_text(
        "".join(json.dumps({"row": row, "issue": False}) + "\n" for row in order[1:])
    )
    with pytest.raises(AssertionError, match="every row once"):
        label_noise.figures(noisy, ranking)
