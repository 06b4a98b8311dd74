"""Whether the hub is there, what its errors mean, and which names are near. Real commands are in runs/test_wrong_names.py."""

import socket
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from servers import FaultyServer

from bertdist.core import hub as hub_names
from bertdist.core.hub import explain_hub_error, nearest, probe_hub, warn_if_offline


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultyServer]:
    """A hub on loopback that knows nothing, and an empty cache; nothing was asked yet."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_names, "_answers", {})
    monkeypatch.setattr(hub_names.time, "sleep", lambda seconds: None)
    with FaultyServer({}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


def test_a_hub_that_answers_is_asked_once(hub: FaultyServer) -> None:
    probe_hub("nobody/nothing")
    probe_hub("nobody/nothing")
    assert hub_names._answers == {hub.url: ""} and not constants.HF_HUB_OFFLINE, (
        "404 is an answer, too"
    )


def test_a_hub_that_does_not_answer_is_left_alone(
    hub: FaultyServer, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.__exit__()
    probe_hub("google-bert/bert-base-uncased")
    assert constants.HF_HUB_OFFLINE and "refused" in hub_names._answers[hub.url]
    warn_if_offline("google-bert/bert-base-uncased")
    warn_if_offline("google-bert/bert-base-uncased")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"The hub ({hub.url}) cannot be reached (") and line.endswith(
        ": google-bert/bert-base-uncased is what the cache holds."
    )
    hub.__enter__()  # for the fixture's own end


def test_a_hub_that_is_silent_is_asked_once(
    hub: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_names, "PATIENCE_SECONDS", 0.2)
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hub_names.time, "sleep", asked.append)
        probe_hub("nobody/nothing")
        assert (
            "timed out" in hub_names._answers[constants.ENDPOINT]
            and constants.HF_HUB_OFFLINE
            and not asked
        )


def test_folders_and_offline_runs_ask_nobody(
    hub: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe_hub(str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    probe_hub("nobody/nothing")
    assert hub_names._answers == {}


def test_the_nearest_names_are_those_that_can_be_known_here(
    hub: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache" / "models--our-team--legal-bert").mkdir(parents=True)
    (tmp_path / "cache" / "datasets--our-team--contracts").mkdir()
    (tmp_path / "film-bert").mkdir()
    monkeypatch.chdir(tmp_path)
    assert nearest("our-team/leagl-bert") == " Did you mean 'our-team/legal-bert'?"
    assert nearest("our-team/contarcts", "dataset") == " Did you mean 'our-team/contracts'?"
    assert nearest("flim-bert").startswith(" Did you mean 'film-bert'")
    assert "'google-bert/bert-base-uncased'" in nearest("bert-base-uncasde")
    assert nearest("FacebookAI/roberta-base") == "", "the name is right, so it is not the name"
    assert nearest("qqqqqqqq/zzzzzzzz") == ""


def chained(*errors: BaseException) -> BaseException:
    for error, cause in pairwise(errors):
        error.__cause__ = cause
    return errors[0]


def test_offline_is_told_as_what_it_is(hub: FaultyServer, tmp_path: Path) -> None:
    error = chained(OSError("We couldn't connect to 'x'\nmore"), LocalEntryNotFoundError("no"))
    assert (
        explain_hub_error(error, "q/z")
        == f"HF_HUB_OFFLINE is set, and the cache {tmp_path / 'cache'} does not hold it."
    )
    hub_names._answers[hub.url] = "timed out"
    assert explain_hub_error(OfflineModeIsEnabled("no"), "q/z").startswith(
        f"The hub ({hub.url}) cannot be reached (timed out), and the cache "
    )


def test_other_errors_keep_their_words_in_one_line(hub: FaultyServer) -> None:
    assert explain_hub_error(ValueError("first\n second"), "q/z") == "first second"
    assert len(explain_hub_error(ValueError("x" * 1000), "q/z")) == 300
    loop = ValueError("a")
    loop.__context__ = chained(ValueError("b"), loop)
    assert explain_hub_error(loop, "q/z") == "a"
