"""What an upload sends to a hub, a server on loopback: which files, how visible, in one commit."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from model_folders import make_run
from servers import Repository, UploadHub

from bertdist import cli
from bertdist.core import hub as hub_names
from bertdist.core.atomic_io import MANIFEST, write_folder
from bertdist.core.config import RunConfig
from bertdist.core.errors import BertdistError
from bertdist.data.preflight import check_upload
from bertdist.reporting.push_config import PushConfig, check_push
from bertdist.reporting.upload import push, push_run

TO = "anna/reviews"
FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[UploadHub]:
    """A hub on loopback, whose token is known here."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(hub_names, "_problems", {})
    with UploadHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        urls = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", urls)
        yield server


@pytest.fixture
def best(tmp_path: Path) -> Path:
    return make_run(tmp_path / "out")


def said_of(best: Path, **settings: Any) -> list[str]:
    """The sentences of a push."""
    said: list[str] = []
    push(PushConfig(**{"model": str(best), "to": TO, **settings}), lambda *x: said.extend(x))
    return said


# ---- What arrives


def test_a_new_private_repository(hub: UploadHub, best: Path) -> None:
    (best / "notes.txt").write_text("mine, not of the model")
    said = said_of(best, license="mit")
    repository = hub.repositories[TO]
    assert repository.private and repository.messages == ["Upload reviews"]
    assert sorted(repository.files) == FILES
    for name in FILES[1:]:
        assert repository.files[name] == (best / name).read_bytes()
    card, local = repository.files["README.md"].decode(), (best / "README.md").read_text()
    assert card != local and 'model="anna/reviews"' in card and "owner/name" not in card
    assert 'model="owner/name"' in local and "license: mit" in local and "license: mit" in card
    assert said[0] == "anna/reviews is a new repository, private:"
    assert said[-1].startswith("Uploaded: 3 files, ") and said[-1].split(" to ")[1].startswith(
        f"{hub.url}/anna/reviews (private), commit "
    )
    assert not any(str(best.parent) in x.decode("latin-1") for x in repository.files.values())


def test_a_dry_run_asks_and_writes_nothing(hub: UploadHub, best: Path) -> None:
    before = sorted(best.rglob("*"))
    said = said_of(best, dry_run=True, public=True)
    assert hub.changes == [] and hub.requests_of("anna/reviews") == ["GET /api/models/anna/reviews"]
    assert sorted(best.rglob("*")) == before
    assert said[0] == "anna/reviews is a new repository, public:"
    assert [line.split()[0] for line in said[1:4]] == ["config.json", "model.safetensors", FILES[0]]
    assert said[-1] == "Nothing was uploaded (--dry_run)."
    said_of(best)  # the control
    assert "POST /api/repos/create" in hub.changes and hub.repositories[TO].private


def test_public_only_if_asked(hub: UploadHub, best: Path) -> None:
    said_of(best, public=True)
    assert not hub.repositories[TO].private
    with pytest.raises(BertdistError, match=r"is public on the hub.*Give --public"):
        said_of(best)
    assert len(hub.repositories[TO].messages) == 1
    hub.repositories[TO].private = True
    assert "stays private" in said_of(best, public=True)[0]


def test_what_is_there_is_replaced_and_named(hub: UploadHub, best: Path) -> None:
    names = ("model-00001-of-00002.safetensors", "pytorch_model.bin", "vocab.txt", "plot.png")
    files = dict.fromkeys((*names, "config.json"), b"old")
    hub.repositories[TO] = Repository(True, files)
    said = said_of(best)
    assert sorted(hub.repositories[TO].files) == sorted([*FILES, "plot.png"])
    assert hub.repositories[TO].files["config.json"] == (best / "config.json").read_bytes()
    text = "\n".join(said)
    assert "replaces the one that is there" in next(x for x in said if "config.json" in x)
    assert f"Removed, as of another model: {', '.join(names[:3])}" in text
    assert "Left as they are: 'plot.png'" in text or "Left as they are: plot.png" in text


def test_a_second_time_there_is_nothing_to_do(hub: UploadHub, best: Path) -> None:
    said_of(best)
    assert said_of(best)[-1] == f"Nothing has changed: {hub.url}/{TO} has these files already."
    assert len(hub.repositories[TO].messages) == 1


def test_a_branch_and_a_message(hub: UploadHub, best: Path) -> None:
    hub.repositories[TO] = Repository(True, {"config.json": b"old"})
    said = said_of(best, revision="v2", commit_message="Second try")
    repository = hub.repositories[TO]
    assert repository.files == {"config.json": b"old"} and repository.messages == ["Second try"]
    assert sorted(repository.branches["v2"]) == sorted([*FILES, ".gitattributes"])
    assert "branch v2 (new)" in said[0]


def test_a_new_branch_keeps_no_weights_of_main(hub: UploadHub, best: Path) -> None:
    old = {"pytorch_model.bin": b"old", "vocab.txt": b"old", "plot.png": b"mine"}
    hub.repositories[TO] = Repository(True, old)
    said = said_of(best, revision="v2")
    repository = hub.repositories[TO]
    assert set(repository.branches["v2"]) - {".gitattributes"} == {*FILES, "plot.png"}
    assert repository.files == old and "branch v2 (new)" in said[0]
    assert any("Removed, as of another model: pytorch_model.bin, vocab.txt" in x for x in said)


def test_a_card_of_a_user_is_uploaded_as_it_is(hub: UploadHub, best: Path) -> None:
    (best / "README.md").write_text("# Mine, used as owner/name\n")
    said = said_of(best)
    assert hub.repositories[TO].files["README.md"] == b"# Mine, used as anna/reviews\n"
    assert "README.md was written or edited by hand: it is uploaded as it is." in said
    assert (best / "README.md").read_text() == "# Mine, used as owner/name\n"


def test_a_report_only_if_asked(hub: UploadHub, best: Path) -> None:
    with pytest.raises(BertdistError, match=r"there is no .*report\.html"):
        said_of(best, include_report=True)
    (best.parent / "report.html").write_text("<p>texts")
    said_of(best)
    assert "report.html" not in hub.repositories[TO].files
    assert "report.html has texts of rows." in said_of(best, include_report=True)
    assert hub.repositories[TO].files["report.html"] == b"<p>texts"


def test_what_was_pushed_is_loaded_by_its_name(
    hub: UploadHub, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = make_run(tmp_path / "out", tiny_model)
    said_of(best)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    from bertdist.predict import Predictor

    ours, theirs = (Predictor(x).probabilities(["a fine film"]) for x in (str(best), TO))
    assert ours.tolist() == theirs.tolist()
    assert list((tmp_path / "cache").glob("models--anna--reviews"))


# ---- What is refused


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("config.json", "config.json has"),
        (MANIFEST, "manifest.json is missing"),
        ("model.safetensors", "model.safetensors has"),
    ],
)
def test_only_a_whole_folder_is_uploaded(
    hub: UploadHub, best: Path, damage: str, message: str
) -> None:
    path = best / damage
    path.unlink() if damage == MANIFEST else path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BertdistError, match=f"{message}.*`hf upload anna/reviews"):
        said_of(best)
    assert hub.requests == []


def test_no_pickle_is_uploaded(hub: UploadHub, tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "training_args.bin").write_bytes(b"\x80")

    write_folder(tmp_path / "best", fill)
    with pytest.raises(BertdistError, match=r"training_args\.bin is no file of a model"):
        said_of(tmp_path / "best")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("part", "status", "message"),
    [
        ("GET /api/models", 401, "The hub does not accept the token"),
        (
            "GET /api/models",
            503,
            "HTTP error 503: run the same command later. The hub says: as the",
        ),
        ("repos/create", 403, "The token may not write to anna/reviews: give it write access at"),
        ("repos/create", 404, "There is no anna/reviews on the hub"),
        ("preupload", 403, "The token may not write to"),
        ("commit/main", 409, "anna/reviews was changed by somebody else meanwhile: run the same"),
        ("commit/main", 429, "HTTP error 429: run the same command later."),
        ("PUT /lfs", 403, "The token may not write to"),
    ],
)
def test_an_error_of_the_hub_is_one_line(
    hub: UploadHub, best: Path, part: str, status: int, message: str
) -> None:
    hub.statuses[part] = status
    with pytest.raises(BertdistError) as error:
        said_of(best)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert TO not in hub.repositories or hub.repositories[TO].messages == []
    said_of(best)  # the same again
    assert sorted(hub.repositories[TO].files) == FILES


def test_a_wrong_token(hub: UploadHub, best: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(BertdistError, match="does not accept the token") as error:
        said_of(best)
    assert "hf_wrong" not in str(error.value)


def test_metadata_that_the_hub_refuses(hub: UploadHub, best: Path) -> None:
    with pytest.raises(BertdistError, match=r'README.md. - "license" must be one of'):
        said_of(best, license="no such")
    (best / "README.md").write_text("---\na: 1\n---\n")
    assert "Warnings while validating metadata in README.md: - no library_name" in said_of(best)


def test_a_hub_that_is_gone(hub: UploadHub, best: Path) -> None:
    hub.__exit__()
    with pytest.raises(BertdistError, match=r"The hub \(http.*\) cannot be reached \(.*refused"):
        said_of(best)


def test_what_is_checked_before(
    hub: UploadHub, best: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PushConfig(model=str(best), to=TO)
    check_push(config)
    monkeypatch.delenv("HF_TOKEN")
    train: Any = type("Config", (), {"run": RunConfig(push_to_hub=TO)})
    with pytest.raises(BertdistError, match=f"--to {TO}: there is no token: run `hf auth login`"):
        check_push(config)
    with pytest.raises(BertdistError, match=f"--push_to_hub {TO}: there is no token"):
        check_upload(train)
    check_push(PushConfig(model=str(best), to=TO, dry_run=True))
    assert "(or one that is not seen without a token)" in said_of(best, dry_run=True)[0]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BertdistError, match="HF_HUB_OFFLINE is set: unset it"):
        check_push(config)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_upload(train)  # rank 0 uploads


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reviews", "owner/name."),
        ("true", "owner/name."),
        ("a/b/c", "owner/name."),
        ("anna/re views", "owner/name."),
        ("https://huggingface.co/anna/reviews", "Did you mean 'anna/reviews'?"),
    ],
)
def test_a_name_of_no_repository(
    name: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    train = ["train", "--model_name_or_path=m", "--train_file=t.csv", f"--push_to_hub={name}"]
    for words in (
        ["push", "--model", str(tmp_path), "--to", name],
        [*train, f"--output_dir={tmp_path}"],
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        error = capsys.readouterr().err
        assert end.value.code == 1 and message in error and error.count("\n") == 1


def test_the_command(
    hub: UploadHub, best: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["push", "--model", str(best.parent), "--to", TO, "--language", "en", "de"])
    assert end.value.code == 0 and "Uploaded: 3 files" in capsys.readouterr().out
    assert "language:\n- en\n- de\n" in hub.repositories[TO].files["README.md"].decode()
    shutil.rmtree(best)
    with pytest.raises(SystemExit) as end:
        cli.main(["push", "--model", str(best), "--to", TO])
    assert end.value.code == 1 and "there is no such folder" in capsys.readouterr().err


# ---- After a run


def test_a_failed_upload_leaves_the_run_a_success(hub: UploadHub, best: Path) -> None:
    run = RunConfig(output_dir=str(best.parent), push_to_hub=TO)
    config: Any = type("Config", (), {"run": run})
    said: list[str] = []
    hub.statuses["commit/main"] = 403
    push_run(config, lambda *x: said.extend(x))
    assert "The run has finished, and its model was not uploaded: The token may not" in said[-2]
    assert said[-1] == f"To upload it: bertdist push --model {best.parent} --to {TO}"
    push_run(config, lambda *x: said.extend(x))
    assert said[-1].startswith("Uploaded: ")


def test_a_hub_that_was_not_reachable_is_tried_again(
    hub: UploadHub, best: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_names, "_problems", {hub.url: "refused"})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as by the probe of a script
    assert said_of(best)[-1].startswith("Uploaded: ")
    assert constants.HF_HUB_OFFLINE
