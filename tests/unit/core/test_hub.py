"""Whether the hub is there, what its errors mean. Real commands are in runs/test_wrong_names.py."""

import os
import socket
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from servers import FaultyServer

from bertdist.core import hub as hub_names
from bertdist.core.errors import ConfigError
from bertdist.core.hub import (
    explain_hub_error,
    from_cache,
    model_folder,
    offline_where_unreachable,
    probe_hub,
    run_folder_hint,
    warn_if_offline,
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultyServer]:
    """A hub on loopback that knows nothing, and an empty cache; nothing was asked yet."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_names, "_problems", {})
    monkeypatch.setattr(hub_names, "_warned", set())
    monkeypatch.setattr(hub_names, "_offline_fallback", True)  # as in a script
    monkeypatch.setattr(hub_names.time, "sleep", lambda seconds: None)
    with FaultyServer({}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


def test_a_hub_that_answers_is_asked_once(hub: FaultyServer) -> None:
    probe_hub("nobody/nothing")
    probe_hub("nobody/nothing")
    assert hub_names._problems == {hub.url: ""} and not constants.HF_HUB_OFFLINE, (
        "404 is an answer, too"
    )


def test_a_hub_that_does_not_answer_is_left_alone(
    hub: FaultyServer, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.__exit__()
    probe_hub("google-bert/bert-base-uncased")
    assert constants.HF_HUB_OFFLINE and "refused" in hub_names._problems[hub.url]
    warn_if_offline("google-bert/bert-base-uncased")
    warn_if_offline("google-bert/bert-base-uncased")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"The hub ({hub.url}) cannot be reached (") and line.endswith(
        ": google-bert/bert-base-uncased is loaded from the cache."
    )
    hub.__enter__()  # for the fixture's own end


def test_a_program_that_imports_bertdist_is_not_put_into_offline_mode(
    hub: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_names, "_offline_fallback", False)
    hub.__exit__()
    probe_hub("nobody/nothing")
    assert not constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "0"
    error = chained(OSError("no"), ConnectionError("refused"))
    assert "cannot be reached ([Errno 111]" in explain_hub_error(error, "nobody/nothing")
    assert from_cache(), "loaders do not try again and again"
    hub.__enter__()  # also for the fixture's own end
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    hub_names._problems[hub.url] = "refused"
    probe_hub("nobody/nothing")
    assert not from_cache(), "it answers now"


def test_a_hub_that_is_silent_is_asked_once(
    hub: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_names, "TIMEOUT_SECONDS", 0.2)
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hub_names.time, "sleep", asked.append)
        probe_hub("nobody/nothing")
        assert (
            "timed out" in hub_names._problems[constants.ENDPOINT]
            and constants.HF_HUB_OFFLINE
            and not asked
        )


def test_folders_and_offline_runs_ask_nobody(
    hub: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe_hub(str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    probe_hub("nobody/nothing")
    assert hub_names._problems == {}


def chained(*errors: BaseException) -> BaseException:
    for error, cause in pairwise(errors):
        error.__cause__ = cause
    return errors[0]


def test_an_id_that_is_not_valid_is_named(hub: FaultyServer) -> None:
    assert explain_hub_error(HFValidationError("x"), "a/b/c") == (
        "Not a valid Hub id; expected owner/name."
    )
    missing = type("RepositoryNotFoundError", (OSError,), {})("404")
    assert explain_hub_error(missing, "q/z", "dataset").startswith("There is no such data set")


def test_offline_is_told_as_what_it_is(
    hub: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = chained(OSError("We couldn't connect to 'x'\nmore"), LocalEntryNotFoundError("no"))
    assert (
        explain_hub_error(error, "q/z")
        == f"HF_HUB_OFFLINE is set, and it is not in the cache {tmp_path / 'cache'}."
    )
    hub_names._problems[hub.url] = "timed out"
    assert explain_hub_error(OfflineModeIsEnabled("no"), "q/z").startswith(
        f"The hub ({hub.url}) cannot be reached (timed out), and it is not in the cache "
    )


def test_other_errors_keep_their_words_in_one_line(hub: FaultyServer) -> None:
    assert explain_hub_error(ValueError("first\n second"), "q/z") == "first second"
    assert len(explain_hub_error(ValueError("x" * 1000), "q/z")) == 300
    loop = ValueError("a")
    loop.__context__ = chained(ValueError("b"), loop)
    assert explain_hub_error(loop, "q/z") == "a"


def test_a_folder_without_a_model_says_where_the_model_is(tmp_path: Path) -> None:
    step = tmp_path / "out" / "checkpoints" / "step_000004"
    step.mkdir(parents=True)
    assert run_folder_hint(tmp_path) == ""
    for folder in (step, step.parent, tmp_path / "out"):
        found = run_folder_hint(folder)
        assert (
            found == f". {tmp_path / 'out'} is the folder of a run that has written no best/ yet."
        )
    (tmp_path / "out" / "best.damaged").mkdir()
    assert run_folder_hint(step) == (
        f". {tmp_path / 'out'} is the folder of a run without best/; it has best.damaged."
    )
    best = tmp_path / "out" / "best"
    best.mkdir()
    (best / "config.json").write_text("{}")
    assert run_folder_hint(step) == f". The trained model is {best}."


@pytest.mark.parametrize("name", [None, 3, "", ["out"]])
def test_what_is_no_name_of_a_model_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        model_folder(name)
    assert str(caught.value) == (f"The model is {name!r}; expected a folder, or a name on the hub.")
    assert model_folder(Path("out")) == "out"


def test_datasets_reads_its_cache_only_while_the_hub_is_known_not_to_answer(
    hub: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setitem(sys.modules, "datasets.config", settings)

    def offline() -> tuple[bool, bool]:
        with offline_where_unreachable():
            return settings.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE

    assert offline() == (False, False)  # nothing is known of it
    monkeypatch.setitem(hub_names._problems, hub.url, "no route")
    assert offline() == (True, True)
    assert not settings.HF_HUB_OFFLINE and not constants.HF_HUB_OFFLINE  # a caller's stay
