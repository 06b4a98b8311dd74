"""bench.resume reads one window of a stream, wherever the run resumes."""

import re
from pathlib import Path

import pytest

from bench import resume
from bertdist.data.streaming import Stream

ROWS = 512  # four windows of 128, each of four steps


def test_the_page_has_a_line_for_each_way(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resume, "WINDOW", 128)
    monkeypatch.setattr(resume, "TRIALS", 1)
    assert resume.main(["--model", str(tiny_model), "--rows", str(ROWS)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("1%:")[0].strip() for line in lines] == ["rows in memory", "a stream"]
    assert all(
        re.search(r" 1%: \d+\.\d{3} s, 50%: \d+\.\d{3} s, 99%: \d+\.\d{3} s$", line)
        for line in lines
    ), lines


def test_stream_reads_one_window_wherever_it_resumes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows read again are those of one window, at 1% as at 99%."""
    monkeypatch.setattr(resume, "WINDOW", 128)
    monkeypatch.setattr(resume, "TRIALS", 1)
    windows, read = Stream.windows, list[int]()

    def counted(self: Stream, state: dict | None = None) -> object:
        for window in windows(self, state):
            read[-1] += len(window.records)
            yield window

    def timed(first: object) -> float:
        read.append(0)
        first()  # type: ignore[operator]
        return 0.0

    monkeypatch.setattr(resume, "seconds_to_first_step", timed)
    monkeypatch.setattr(Stream, "windows", counted)
    read.append(0)
    resume.measure(str(tiny_model), ROWS, tmp_path)
    whole, *in_memory = read[:4]
    assert whole == ROWS and in_memory == [0, 0, 0], "none of a stream"
    assert len(read) == 7 and all(0 < rows <= 128 for rows in read[4:]), read
    monkeypatch.setattr(
        Stream,
        "windows",
        lambda self, state=None: (
            w for w in list(counted(self)) if state is None or w.state == state
        ),
    )
    read.clear()
    read.append(0)
    resume.measure(str(tiny_model), ROWS, tmp_path)
    assert read[4:] == [ROWS] * 3, "negative control: a stream that is replayed"


def test_minimum_of_several_trials_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 3.0, 10.0, 11.0, 20.0, 25.0, 30.0, 32.0, 40.0, 49.0])
    monkeypatch.setattr(resume.time, "perf_counter", lambda: next(clock))
    assert resume.seconds_to_first_step(lambda: None) == 1.0  # type: ignore[arg-type, return-value]
    assert next(clock, None) is None, "and all trials ran"


def test_rows_are_the_same_in_every_run(tmp_path: Path) -> None:
    for name in ("one", "two"):
        resume.write(tmp_path / name, 50)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert len((tmp_path / "one").read_text().splitlines()) == 50
