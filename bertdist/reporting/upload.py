"""Upload of a trained model to the Hugging Face Hub: `bertdist push`, and --push_to_hub of a run.

    push(PushConfig(model="out/best", to="owner/name"), print_to_stderr)

A repository is private unless --public asks for a public one. Only the files that the manifest of
best/ names are uploaded, which are compared with it first, and the model card: no checkpoint, no
prediction, no text of a row. All files arrive in one commit, or none.
"""

import logging
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
)
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from bertdist.core.atomic_io import (
    MODEL_CARD,
    atomic_write,
    find_damage,
    manifest_sizes,
)
from bertdist.core.config import TrainConfig
from bertdist.core.errors import BertdistError, ConfigError, ModelError, listed
from bertdist.core.hub import TIMEOUT_SECONDS, explain_upload_error, trying_again
from bertdist.core.output_files import REPORT_FILE
from bertdist.core.terminal import byte_size
from bertdist.reporting.model_card import (
    NO_LICENSE,
    USER_FIELDS,
    create_card,
    license_of,
    name_model,
)
from bertdist.reporting.push_config import PushConfig

# Of a model here: weights and tables of a tokenizer, nothing that is executed when it is loaded.
_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja", ".bpe")
# Files of another model in the repository, which a loader would mix with the new ones.
_STALE = re.compile(
    r"(model|pytorch_model|tf_model|flax_model)([-.].*)?\.(safetensors|bin|h5|msgpack|index\.json)"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|generation_config)\.json"
    r"|vocab\.txt|merges\.txt|bpe\.codes|(tokenizer|sentencepiece\.bpe|spiece|spm)\.model"
)


class Content(NamedTuple):
    """What is uploaded."""

    files: dict[str, Path | bytes]  # by their names in the repository
    sizes: dict[str, int]
    card: str  # for best/README.md
    is_edited: bool  # by a user


def collect(config: PushConfig) -> Content:
    """The files of a model. Raises BertdistError for a folder that is not whole."""
    best = Path(config.model)
    where = f"--model {best}"
    if not best.is_dir():
        raise ModelError(f"{where}: there is no such folder.")
    if damage := find_damage(best, required=("config.json",)):
        raise ModelError(
            f"{where}: {damage}. Only the best/ of a run is uploaded, as the run wrote it; "
            f"`hf upload {config.to} {best}` uploads any folder."
        )
    sizes = manifest_sizes(best)
    for name in sizes:
        if not name.endswith(_SUFFIXES):
            raise ModelError(f"{where}: {name} is no file of a model in safetensors and JSON.")
    fields = {name: getattr(config, name) for name in USER_FIELDS}
    if config.language and len(config.language) == 1:
        fields["language"] = config.language[0]
    given = {name: value for name, value in fields.items() if value is not None}
    card, is_edited = create_card(best, given)
    uploaded = name_model(card, config.to).encode()
    files: dict[str, Path | bytes] = {name: best / name for name in sizes}
    files[MODEL_CARD] = uploaded
    sizes[MODEL_CARD] = len(uploaded)
    if config.include_report:
        report = best.parent / REPORT_FILE
        if not report.is_file():
            raise ConfigError(
                f"--include_report: there is no {report}; `bertdist report` makes it."
            )
        files[REPORT_FILE], sizes[REPORT_FILE] = report, report.stat().st_size
    return Content(files, sizes, card, is_edited)


class Repository(NamedTuple):
    """What is on the hub."""

    exists: bool
    is_private: bool = True
    has_revision: bool = True
    files: frozenset[str] = frozenset()
    commit: str | None = None


def push(config: PushConfig, say: Callable[..., None]) -> None:
    """Upload, or with --dry_run say what would be. Raises BertdistError.

    say: takes sentences.
    """
    content = collect(config)
    api = HfApi(endpoint=constants.ENDPOINT)
    with _explained(config, say), trying_again():
        repository = _look_up(api, config)
        _check_visibility(repository, config, say)
        stale = sorted(x for x in repository.files - content.files.keys() if _STALE.fullmatch(x))
        say(*_describe(repository, content, stale, config))
        if config.dry_run:
            say("Nothing was uploaded (--dry_run).")
            return
        path = Path(config.model) / MODEL_CARD
        if not path.is_file() or path.read_bytes() != content.card.encode():
            atomic_write(path, content.card.encode())
        commit = _upload(api, repository, content, stale, config)
    if commit == repository.commit:
        say(f"Nothing has changed: {constants.ENDPOINT}/{config.to} has these files already.")
        return
    files = f"{len(content.files)} files, {byte_size(sum(content.sizes.values()))}"
    visibility = "private" if repository.is_private else "public"
    page = f"{constants.ENDPOINT}/{config.to}"
    say(f"Uploaded: {files}, to {page} ({visibility}), commit {commit[:12]}.")


def _look_up(api: HfApi, config: PushConfig) -> Repository:
    try:
        info = api.model_info(config.to, timeout=TIMEOUT_SECONDS)
        is_private, has_revision = bool(info.private), True
        if config.revision:
            try:
                info = api.model_info(config.to, revision=config.revision, timeout=TIMEOUT_SECONDS)
            except RevisionNotFoundError:
                has_revision = False  # a new branch begins with the files of main
        names = frozenset(x.rfilename for x in info.siblings or ())
        return Repository(True, is_private, has_revision, names, info.sha)
    except RepositoryNotFoundError:
        return Repository(False, not config.public, config.revision is None)


def _check_visibility(repository: Repository, config: PushConfig, say: Callable[..., None]) -> None:
    if repository.exists and not repository.is_private and not config.public:
        raise ConfigError(
            f"{config.to} is public on the hub: everybody could read the model. Give --public to "
            "upload to it, or another name."
        )
    if repository.exists and repository.is_private and config.public:
        say(
            f"{config.to} is private and stays private; its page changes that: "
            f"{constants.ENDPOINT}/{config.to}/settings"
        )


def _describe(
    repository: Repository, content: Content, stale: Sequence[str], config: PushConfig
) -> Iterator[str]:
    """What is about to happen, a sentence or a file per line."""
    visibility = "private" if repository.is_private else "public"
    branch = f", branch {config.revision}" if config.revision else ""
    if not repository.exists:
        guess = "" if get_token() else " (or one that is not seen without a token)"
        yield f"{config.to} is a new repository{guess}, {visibility}{branch}:"
    else:
        branch += " (new)" * (not repository.has_revision)
        yield f"{config.to} is on the hub, {visibility}{branch}:"
    for name, size in content.sizes.items():
        replaces = ", replaces the one that is there" * (name in repository.files)
        yield f"  {name}  {byte_size(size)}{replaces}"
    if stale:
        yield f"  Removed, as of another model: {', '.join(stale)}"
    others = repository.files - content.files.keys() - set(stale) - {".gitattributes"}
    if others:
        yield f"  Left as they are: {listed(sorted(others))}"
    if content.is_edited:
        yield f"{MODEL_CARD} was written or edited by hand: it is uploaded as it is."
    if license_of(content.card) == NO_LICENSE:
        yield "The model card names no license: --license apache-2.0, for example, names one."
    if config.include_report:
        yield f"{REPORT_FILE} has texts of rows."


def _upload(
    api: HfApi,
    repository: Repository,
    content: Content,
    stale: Iterable[str],
    config: PushConfig,
) -> str:
    """Returns the commit."""
    if not repository.exists:
        api.create_repo(config.to, private=not config.public, exist_ok=True)
    if not repository.has_revision:
        api.create_branch(config.to, branch=str(config.revision), exist_ok=True)
    changes: list[Any] = [
        CommitOperationAdd(name, str(file) if isinstance(file, Path) else file)
        for name, file in content.files.items()
    ]
    changes += [CommitOperationDelete(name, is_folder=False) for name in stale]
    message = config.commit_message or f"Upload {config.to.rpartition('/')[2]}"
    info = api.create_commit(config.to, changes, commit_message=message, revision=config.revision)
    return str(info.oid)


@contextmanager
def _explained(config: PushConfig, say: Callable[..., None]) -> Iterator[None]:
    """Errors of the hub as one line, its warnings (of the metadata of a card) as sentences; bars of
    its uploads on a terminal only.
    """
    log = logging.getLogger("huggingface_hub")
    level, had_bars = log.level, not are_progress_bars_disabled()
    log.setLevel(logging.ERROR)  # that nothing has changed
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    except BertdistError:
        raise
    except Exception as error:
        raise BertdistError(explain_upload_error(error, config.to)) from None
    finally:
        log.setLevel(level)
        if had_bars:
            enable_progress_bars()
        for warning in caught:
            if warning.category is UserWarning:
                say(" ".join(str(warning.message).split()))


# ---- After a run


def push_run(config: TrainConfig, say: Callable[..., None]) -> None:
    """--push_to_hub, after a finished run. An error is said, with the command to repeat."""
    to, model = config.run.push_to_hub, str(Path(config.run.output_dir) / "best")
    assert to is not None
    try:
        push(PushConfig(model=model, to=to), say)
    except BertdistError as error:
        say(
            f"The run has finished, and its model was not uploaded: {error}",
            f"To upload it: bertdist push --model {shlex.quote(config.run.output_dir)} --to {to}",
        )
