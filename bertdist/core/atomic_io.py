"""Files and folders that are complete or absent, whatever interrupts their writing.

    atomic_write(path, to_json(values))   # one file
    write_folder(folder, fill)            # checkpoints and best/: with a manifest
    find_damage(folder)                   # why a checkpoint is damaged, or None

A folder is written beside its final name, gets a manifest of sizes and digests, is flushed and
renamed. xxh3 runs at 9 GB/s (sha256 at 0.2); it detects damage, not forgery.

A folder that is replaced or removed loses the files in its manifest only. Files that a user has
added to it are kept, in `best.kept`; its model card, which may be edited, stays in its place.
"""

import errno
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

import xxhash
from safetensors import SafetensorError

from bertdist.core.errors import CheckpointError
from bertdist.core.terminal import byte_size

CHECKPOINT_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
MANIFEST = "manifest.json"
MODEL_CARD = "README.md"  # of best/; not in the manifest
# Files of others are read: what is larger is damaged, or made to fill the memory.
MAX_JSON_BYTES = 64 << 20
MAX_HEADER_BYTES = 16 << 20  # of a safetensors file: about 150,000 tensors
HIDDEN_SUFFIXES = (".partial", ".replaced", ".old")
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def write_folder(final: Path, fill: Callable[[Path], None], size: int = 0) -> Path | None:
    """Call `fill` with an empty hidden folder beside `final`, add the manifest, flush and rename.

    size: about how many bytes it will have, for the message on a full disk. Replaces `final`, or
    leaves it untouched and raises CheckpointError. Returns the folder that keeps what was in
    `final` and not in its manifest, if there was anything.
    """
    partial, replaced = _hidden(final, "partial"), _hidden(final, "replaced")
    refuse_link(final)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        entries = {
            str(path.relative_to(partial)): {
                "bytes": path.stat().st_size,
                "xxh3_128": _digest(path),
            }
            for path in files
        }
        manifest = partial / MANIFEST
        manifest.write_text(json.dumps({"format": 1, "files": entries}, indent=1))
        mode = manifest.stat().st_mode & 0o777
        for path in files:  # safetensors makes files of mode 0600 whatever the umask
            with suppress(OSError):  # a disk without modes
                path.chmod(mode)
        card, copied = final / MODEL_CARD, []
        if card.is_file() and not card.is_symlink():
            copied = [Path(shutil.copy2(card, partial / MODEL_CARD))]
        for path in [*files, manifest, *copied, partial]:
            flush_to_disk(path)
        _remove_written(replaced, bool(copied))
        if final.exists():
            os.rename(final, replaced)
        try:
            os.rename(partial, final)
        except OSError:
            if replaced.exists():
                os.rename(replaced, final)
            raise
        flush_to_disk(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        needed = f"about {byte_size(size)} needed" * bool(size)
        reason = _reason(error, final, needed)
        raise CheckpointError(
            f"Cannot write {final}: {reason}. What was there before is untouched."
        ) from None
    except BaseException:  # of `fill`
        shutil.rmtree(partial, ignore_errors=True)
        raise
    with suppress(OSError):  # the next call removes it
        return _remove_written(replaced, bool(copied))
    return None


def recover(final: Path) -> None:
    """Undo a `write_folder` that was killed between its two renames. Raises CheckpointError."""
    replaced = _hidden(final, "replaced")
    if replaced.exists() and not final.exists():
        with explain_write_errors(replaced, "remove or rename"):
            os.rename(replaced, final)


def remove_folder(folder: Path) -> Path | None:
    """Remove a folder of `write_folder`; returns the folder that keeps its other files, if any.

    It is hidden first, so half of it is never taken for a checkpoint.
    """
    hidden = _hidden(folder, "old")
    with explain_write_errors(folder, "remove or rename"):
        os.rename(folder, hidden)
    return remove_leftover(hidden)


def remove_leftover(hidden: Path) -> Path | None:
    """Complete a `write_folder` or `remove_folder` that was killed; returns as `remove_folder`.

    hidden: its .partial, .replaced or .old.
    """
    with explain_write_errors(hidden, "remove or rename"):
        if hidden.suffix != ".partial":
            return _remove_written(hidden)
        shutil.rmtree(hidden)
    return None


def refuse_link(path: Path) -> None:
    """Raise CheckpointError for a symbolic link: neither it nor its target may be replaced."""
    if path.is_symlink():
        raise CheckpointError(
            f"{path} is a symbolic link to {os.readlink(path)}, and a run replaces {path.name} as"
            " a whole: remove the link, or use another --output_dir."
        )


def _remove_written(folder: Path, has_card: bool = False) -> Path | None:
    """Remove the files that a hidden folder's manifest names; where others remain, rename it.

    has_card: what replaces the folder has its model card.
    """
    if folder.is_dir() and not folder.is_symlink():
        try:
            written = set(_read_manifest(folder))
        except _UNREADABLE:
            written = set(CHECKPOINT_FILES)
        written |= {MODEL_CARD} if has_card else set()
        for path in sorted(folder.rglob("*"), reverse=True):  # a folder after its files
            if path.is_dir() and not path.is_symlink():
                _remove_if_empty(path)
            elif str(path.relative_to(folder)) in written:
                path.unlink()
        # Last: after an interruption the names of the others are still known.
        (folder / MANIFEST).unlink(missing_ok=True)
        _remove_if_empty(folder)
    if not os.path.lexists(folder):
        return None
    kept = unused_path(folder.with_name(f"{folder.stem[1:]}.kept"))
    os.rename(folder, kept)
    return kept


def find_damage(folder: Path, required: Iterable[str] = CHECKPOINT_FILES) -> str | None:
    """Why a folder is not as its manifest says, or None.

    required: names that must be in it, of files and not of links to files elsewhere.
    """
    if not folder.is_dir():
        return "there is no such folder"
    try:
        expected = _read_manifest(folder)
    except FileNotFoundError:
        return "manifest.json is missing"
    except _UNREADABLE:
        return "manifest.json cannot be read"
    for name in expected:
        if not _is_inside(name):
            return f"manifest.json names {name!r}, which is not in this folder"
    for name in required:
        if name not in expected:
            return f"manifest.json does not name {name}"
        if (folder / name).is_symlink():
            return f"{name} is a symbolic link"
    for name, (size, digest) in expected.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
            if _digest(path) != digest:
                return f"{name} is not what was written (its digest differs)"
        except (OSError, ValueError) as error:
            return f"{name} cannot be read ({getattr(error, 'strerror', None) or error})"
    return None


def _is_inside(name: str) -> bool:
    """Whether a name, such as `tokenizer/vocab.txt`, is of a file below the folder."""
    path = PurePosixPath(name)
    return "\0" not in name and not path.is_absolute() and ".." not in path.parts


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Name -> size and digest. Raises one of _UNREADABLE."""
    files = read_json(folder / MANIFEST)["files"]
    return {name: (int(x["bytes"]), str(x["xxh3_128"])) for name, x in files.items()}


def manifest_sizes(folder: Path) -> dict[str, int]:
    """Name -> bytes of the files of a folder in which `find_damage` finds none."""
    return {name: size for name, (size, _) in _read_manifest(folder).items()}


def weights_digest(folder: Path) -> str:
    """The digests of a folder's .safetensors by its manifest; "" where that cannot be read."""
    try:
        files = _read_manifest(folder)
    except _UNREADABLE:
        return ""
    return " ".join(files[name][1] for name in sorted(files) if name.endswith(".safetensors"))


def file_stats(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> bytes and time of the last change (ns) of the files in a folder, without the model
    card; {} if it is none.
    """
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in _files(folder)}


def file_digests(folder: Path) -> dict[str, str]:
    """Name -> digest of the files in a folder, without the model card; {} if it is none."""
    return {path.name: _digest(path) for path in _files(folder)}


def _files(folder: Path) -> list[Path]:
    files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    return [path for path in files if path.name != MODEL_CARD]


def move_aside(path: Path, suffix: str) -> Path:
    """Rename it to `path.suffix`, or `path.suffix-2`, ...; returns the new name."""
    aside = unused_path(path.with_name(f"{path.name}.{suffix}"))
    with explain_write_errors(path, "remove or rename"):
        os.rename(path, aside)
    return aside


def unused_path(path: Path) -> Path:
    """The path itself, or the first of `path-2`, `path-3`, ... that does not exist."""
    number, unused = 1, path
    while os.path.lexists(unused):
        number += 1
        unused = path.with_name(f"{path.name}-{number}")
    return unused


def atomic_write(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Replace a file: a reader, or a crash, finds the old content or the new one, complete.

    content: the bytes, or parts of them in their order.
    The mode of a file that is there is kept. Where it fails, nothing is left beside the file.
    """
    with atomic_file(path, 0 if not isinstance(content, bytes) else len(content)) as file:
        for part in [content] if isinstance(content, bytes) else content:
            file.write(part)


@contextmanager
def atomic_file(path: Path, size: int = 0) -> Iterator[IO[bytes]]:
    """A file to write, which replaces `path` when all was written, as `atomic_write` does.

    size: of the whole content, for the message on a full disk; 0: not known.
    """
    partial, done = partial_path(path), 0
    try:
        with open(partial, "wb") as file:
            if path.is_file():
                with suppress(OSError):  # a disk without modes
                    os.fchmod(file.fileno(), path.stat().st_mode & 0o7777)
            try:
                yield file
            finally:
                done = size or file.tell()
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        needed = f"{byte_size(done)} {'' if size else 'or more '}needed"
        raise CheckpointError(f"Cannot write {path}: {_reason(error, path, needed)}.") from None


def to_json(value: Any, indent: int | None = None) -> bytes:
    """UTF-8 JSON and a line end; null for NaN and infinite numbers, which JSON does not have.

    A lone surrogate, which UTF-8 does not have, is its JSON escape.
    """
    text = json.dumps(json_safe(value), indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; empty if there is none, or it is damaged."""
    with suppress(OSError, ValueError, RecursionError):
        value = read_json(path)
        return value if isinstance(value, dict) else {}
    return {}


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises OSError, ValueError or RecursionError."""
    if path.exists() and not path.is_file():  # reading a pipe would not end
        raise ValueError("it is no file")
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"it has {size:,} bytes")
    return json.loads(path.read_bytes())


def safetensors_problem(path: Path) -> str | None:
    """Why a safetensors file cannot be one, by the size of its header; None if it may be.

    The header is not parsed: safetensors checks the rest. Raises OSError.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
    header = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if header < 2:  # b"{}"
        return f"{path.name} is no safetensors file: it has no header"
    if header > min(size - 8, MAX_HEADER_BYTES):
        return (
            f"{path.name} is no safetensors file: its header would have {header:,} bytes, "
            f"and the file has {size:,}"
        )
    return None


def json_safe(value: Any) -> Any:
    """The value with None for each NaN or infinite number in it."""
    if isinstance(value, dict):
        return {name: json_safe(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flush_to_disk(path: Path) -> None:
    """fsync a file, or a folder for the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explain_write_errors(path: Path, action: str = "write", size: str = "") -> Iterator[None]:
    """Turn an OSError into a CheckpointError of one line that names the path.

    size: for a full disk, `3.2 MB needed`.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"Cannot {action} {path}: {_reason(error, path, size)}.") from None


def _reason(error: Exception, path: Path, size: str) -> str:
    """Why writing failed; of a full disk, where there is a size, also that and what is free."""
    reason = str(getattr(error, "strerror", None) or error)
    is_full = getattr(error, "errno", None) == errno.ENOSPC
    # safetensors' error has no number
    if size and (is_full or f"(os error {errno.ENOSPC})" in reason):
        with suppress(OSError):
            size += f", {byte_size(shutil.disk_usage(path.parent).free)} free"
        reason = f"{os.strerror(errno.ENOSPC)} ({size})"
    return reason


def partial_path(path: Path) -> Path:
    """What `atomic_write` renames to the file."""
    return _hidden(path, "partial")


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
