"""Where runs live: a folder of this machine, or one of an object store by URL (s3://, gs://, abfs://, memory:// …).

Both keep the same promises: a file is replaced whole or not at all, and created by one process only. Object stores know neither
appending nor renaming, so that what grows is written in segments (`Journal`), or to a folder here that is copied (`Mirror`).
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from upath import UPath

log = logging.getLogger("metafleet")

Place: TypeAlias = Path | UPath
"""A folder or file, here or in an object store."""

COPY_EVERY = 15.0  # seconds


def place(name: str | Path | UPath) -> Place:
    """A path as it is; a URL by its file system, whose listings are not to be remembered. Raises ValueError for one that we cannot open."""
    text = str(name)
    if "://" not in text:
        return name if isinstance(name, UPath) else Path(name)
    scheme = text.partition("://")[0]
    if scheme in ("file", "local"):
        return Path(UPath(text).path)
    try:
        return UPath(text, use_listings_cache=False, skip_instance_cache=scheme != "memory")
    except (ImportError, ValueError) as error:
        raise ValueError(f"{text}: no file system for {scheme}:// ({error}); s3, gs, abfs: pip install 'metafleet[{scheme}]'") from error


def is_local(at: Place) -> bool:
    """Whether it is on this machine, where files can be appended to."""
    return isinstance(at, Path)


def make_folder(at: Place) -> None:
    """A folder and those above it; object stores have none. Raises OSError where the store cannot be reached."""
    if isinstance(at, Path):
        at.mkdir(parents=True, exist_ok=True)
        return
    with reaching(at):
        at.exists()


@contextmanager
def reaching(at: Place) -> Iterator[None]:
    """Inside, whatever a store's own library raises (no credentials, no such bucket, no route) becomes an OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{at}: {type(error).__name__}: {error}") from error


def write_atomically(at: Place, content: bytes) -> None:
    """Replace `at` by `content`, whole or not at all, also across a power failure."""
    if not isinstance(at, Path):
        with reaching(at):
            at.fs.pipe_file(at.path, content)
        return
    partial = at.with_name(f".{at.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, at)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(at.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def move(at: Place, to: Place) -> None:
    """Rename a file, or a folder of files; in an object store, the folder's objects one after the other."""
    if isinstance(at, Path) and isinstance(to, Path):
        os.replace(at, to)
    elif isinstance(at, UPath) and isinstance(to, UPath):
        with reaching(at):
            for name in [file.name for file in children(at)]:
                at.fs.mv((at / name).path, (to / name).path)


def create(at: Place, content: bytes) -> None:
    """Write a file that is not there yet. Raises FileExistsError where it is, or where another process was faster."""
    if not isinstance(at, Path):
        with reaching(at):
            at.fs.pipe_file(at.path, content, mode="create")
        return
    with open(at, "xb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def children(folder: Place) -> list[Place]:
    """Files of a folder by name, as they are now; [] where there is none."""
    if not isinstance(folder, Path):
        with reaching(folder):
            folder.fs.invalidate_cache()
            found = folder.fs.ls(folder.path, detail=False) if folder.fs.isdir(folder.path) else []
            return [folder / name for name in sorted(f.rstrip("/").rpartition("/")[2] for f in found) if name]
    return sorted(folder.iterdir()) if folder.is_dir() else []


class Mirror:
    """A folder here, `local`, whose files are copied to `home` when they have changed; where home is local they are one.

    For what is appended to: metrics.jsonl, TensorBoard's events, pictures. Copying is done by a thread of its own and a failure is
    a warning: the next copy has it all. `check` raises where this process no longer owns the run; nothing is copied then.
    """

    def __init__(self, home: Place, check: Callable[[], None] = lambda: None, kept: tuple[str, ...] = ()) -> None:
        """`kept`: files that an earlier attempt left and this one goes on with."""
        self.home, self._check = home, check
        self._seen: dict[str, tuple[int, int]] = {}
        self._stopped, self._thread = threading.Event(), None
        if isinstance(home, Path):
            self.local = home
            return
        self.local = Path(tempfile.mkdtemp(prefix="metafleet-"))
        for name in kept:
            if (home / name).exists():
                (self.local / name).write_bytes((home / name).read_bytes())
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        self._thread.start()

    def copy(self) -> None:
        """Copy what has changed. Raises OSError."""
        for path in sorted(p for p in self.local.rglob("*") if p.is_file() and not p.name.endswith(".partial")):
            stat, name = path.stat(), path.relative_to(self.local).as_posix()
            if self._seen.get(name) != (stat.st_mtime_ns, stat.st_size):
                self._check()
                write_atomically(self.home / name, path.read_bytes())
                self._seen[name] = (stat.st_mtime_ns, stat.st_size)

    def close(self) -> None:
        """Copy for the last time, and remove the folder here."""
        if self._thread is None:
            return
        self._stopped.set()
        self._thread.join()
        self._try()
        shutil.rmtree(self.local, ignore_errors=True)

    def _go_on(self) -> None:
        while not self._stopped.wait(COPY_EVERY):
            self._try()

    def _try(self) -> None:
        try:
            self.copy()
        except (OSError, RuntimeError) as error:
            log.warning("not copied to %s: %s", self.home, error)
