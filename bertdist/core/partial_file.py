"""A file that is written in parts, is whole or absent, and continues after a kill.

    with PartialFile(target, key) as file:   # .out.csv.partial, and .out.csv.partial.json
        state = file.saved                   # of an earlier process with the same key, or None
        file.append(part)
        file.save({"row": 2048})             # from here it continues after a kill
        file.finish()                        # renamed to out.csv

What was appended after the last `save` is cut off by the next process, which appends it again. key:
all that the content depends on; a partial file of another key is begun anew, which `notes` says.
The names are hidden: a pattern of inputs, such as dir/*, does not match them.
"""

import contextlib
import errno
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from bertdist.core.atomic_io import (
    atomic_write,
    explain_write_errors,
    flush_to_disk,
    partial_path,
    read_json_object,
)
from bertdist.core.errors import BertdistError, CheckpointError
from bertdist.core.terminal import byte_size

FORMAT = "bertdist partial file 1"
SAVE_SECONDS = 2.0  # at most so much work is done again


class PartialFile:
    """See above. At most one process writes it at a time."""

    def __init__(self, target: Path, key: dict[str, Any]) -> None:
        """Raises CheckpointError where it cannot be written, or something else has its name."""
        self.target, self._key = target, key
        self.path, self._state_path = partial_paths(target)
        self._whole_path = target.with_name(f".{target.name}.whole")
        self.saved: dict[str, Any] | None = None
        self.notes: list[str] = []
        self._size, self._saved_at, self._is_saved = 0, time.monotonic(), False
        with explain_write_errors(self.path):
            self._file = self._open()

    def __enter__(self) -> "PartialFile":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """The state gets the error that ended it, which the same command would meet again."""
        if self._is_saved and isinstance(error, BertdistError):
            with contextlib.suppress(BertdistError, OSError), self._explained(self.path, 0):
                state = read_json_object(self._state_path)
                state |= {"job": _slurm_job(), "error": str(error)}
                atomic_write(self._state_path, json.dumps(state).encode())
        self.close()

    def _open(self) -> IO[bytes]:
        state = read_json_object(self._state_path)
        is_ours = state.get("format") == FORMAT
        for path in (self.path, self._state_path, self._whole_path):
            if os.path.lexists(path) and not (is_ours and path.is_file()):
                raise CheckpointError(
                    f"{path} exists and is not of an unfinished prediction: rename or remove it."
                )
        before, key = state.get("key", {}), json.loads(json.dumps(self._key))
        if not is_ours:  # before the file that it describes, which is then never taken for another
            self._write_state(0, None)
        file = open(self.path, "r+b" if self.path.exists() else "w+b")  # noqa: SIM115
        try:
            _lock(file, self.path)
            self._size = int(state.get("bytes", 0)) if is_ours and before == key else 0
            if os.fstat(file.fileno()).st_size < self._size:
                self.notes.append(f"{self.path} is shorter than it was: beginning again.")
                self._size = 0
            if self._size:
                self.saved, self._is_saved = state.get("state"), True
            elif is_ours and before != key and int(state.get("bytes", 0)):
                names = [name for name in key if before.get(name) != key[name]]
                self.notes.append(
                    f"{self.path} is of another command ({', '.join(names) or 'settings'} differ): "
                    "beginning again."
                )
            file.truncate(self._size)
            file.seek(self._size)
            if is_ours and not self._size:
                self._write_state(0, None)
        except BaseException:
            file.close()
            raise
        return file

    def append(self, part: bytes) -> None:
        """Write at the end. Raises CheckpointError, such as on a full disk."""
        with self._explained(self.path, self._size + len(part)):
            self._file.write(part)
        self._size += len(part)

    def save(self, state: dict[str, Any], now: bool = True) -> None:
        """Continue from here after a kill. now False: only every SAVE_SECONDS."""
        if not now and time.monotonic() - self._saved_at < SAVE_SECONDS:
            return
        with self._explained(self.path, self._size):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._write_state(self._size, state)
        self._is_saved, self._saved_at = True, time.monotonic()

    def finish(self, convert: Callable[[IO[bytes], IO[bytes]], None] | None = None) -> None:
        """Rename to the target, which is replaced as a whole and keeps its mode.

        convert: (what was appended, file to write) makes the target's content of it.
        """
        with self._explained(self.target, self._size):
            self._file.flush()
            whole = self.path
            if convert is None:
                self._finish_file(self._file)
            else:
                self._file.seek(0)
                whole = self._whole_path
                try:
                    with open(whole, "wb") as file:
                        convert(self._file, file)
                        self._finish_file(file)
                except BaseException:
                    whole.unlink(missing_ok=True)
                    raise
            os.replace(whole, self.target)
            self.discard()
            flush_to_disk(self.target.parent)

    @contextlib.contextmanager
    def _explained(self, path: Path, size: int) -> Iterator[None]:
        """Errors of writing, with its bytes so far, and what to do."""
        try:
            with explain_write_errors(path, size=f"{byte_size(size)} so far"):
                yield
        except CheckpointError as error:
            advice = " The same command continues from here." * self._is_saved
            raise CheckpointError(f"{error}{advice}") from None

    def _finish_file(self, file: IO[bytes]) -> None:
        if self.target.is_file():
            with contextlib.suppress(OSError):  # a disk without modes
                os.fchmod(file.fileno(), self.target.stat().st_mode & 0o7777)
        file.flush()
        os.fsync(file.fileno())

    def close(self) -> None:
        """Keep what was saved, for the next process; leave nothing behind where that is nothing."""
        with contextlib.suppress(OSError):  # a full disk: what was saved is there
            self._file.close()
        if not self._is_saved:
            self.discard()

    def discard(self) -> None:
        """Remove the partial file and its state."""
        leftover = partial_path(self._state_path)  # of a process that was killed
        for path in (self.path, leftover, self._state_path):  # in this order: see `_open`
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _write_state(self, size: int, state: dict[str, Any] | None) -> None:
        content = {"format": FORMAT, "key": self._key, "bytes": size, "state": state}
        content["job"] = _slurm_job()
        atomic_write(self._state_path, json.dumps(content).encode())


class OutputClosed(BertdistError):
    """Who reads the output has closed it: there is nothing left to do, and nothing to say."""


class InPlaceFile:
    """The same interface for standard output and what is no regular file: written in place."""

    saved: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, write: Callable[[bytes], None], name: str, is_spooled: bool) -> None:
        """write: to the end of it. name: for messages. is_spooled: `finish` converts it."""
        self._write, self._name = write, Path(name)
        self._spooled: IO[bytes] | None = None
        if is_spooled:
            self._spooled = tempfile.TemporaryFile()  # noqa: SIM115

    def __enter__(self) -> "InPlaceFile":
        return self

    def __exit__(self, *error: object) -> None:
        if self._spooled is not None:
            self._spooled.close()

    def append(self, part: bytes) -> None:
        """Raises OutputClosed and CheckpointError."""
        if self._spooled is None:
            self._send(part)
        else:
            self._spooled.write(part)

    def _send(self, part: bytes) -> None:
        with explain_write_errors(self._name):
            try:
                self._write(part)
            except BrokenPipeError:
                raise OutputClosed from None

    def save(self, state: dict[str, Any], now: bool = True) -> None:
        """Nothing: it cannot be continued."""

    def finish(self, convert: Callable[[IO[bytes], IO[bytes]], None] | None = None) -> None:
        """See `PartialFile`, of what was spooled."""
        if convert is None or self._spooled is None:
            return
        self._spooled.seek(0)
        with tempfile.TemporaryFile() as whole:
            convert(self._spooled, whole)
            whole.seek(0)
            while part := whole.read(1 << 20):
                self._send(part)


def partial_paths(target: Path) -> tuple[Path, Path]:
    """The partial file of a target, and its state."""
    partial = target.with_name(f".{target.name}.partial")
    return partial, partial.with_name(f"{partial.name}.json")


def _slurm_job() -> str | None:
    """For launch/predict.slurm: which job has saved it."""
    return os.environ.get("SLURM_JOB_ID")


def stamp_of(files: Iterable[str | Path]) -> list[Any]:
    """Path, bytes and time of change of each local file that exists, for a `key`."""
    stamps = []
    for file in files:
        with contextlib.suppress(OSError):
            status = os.stat(file)
            stamps.append([os.path.abspath(file), status.st_size, status.st_mtime_ns])
    return stamps


def _lock(file: IO[bytes], path: Path) -> None:
    """Until it is closed. A disk without locks has none."""
    try:
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            raise CheckpointError(f"{path} is being written by another process.") from None
