"""Where runs live: a folder of this machine, or one of an object store by URL (s3://, gs://, abfs://, memory:// …).

Both keep the same promises: a file is replaced whole or not at all, and created by one process only. Object stores know
neither appending nor renaming, so that what grows is written in segments (`Journal`), or to a folder here that is
copied (`Mirror`).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from upath import UPath

log = logging.getLogger("metafleet")

Place: TypeAlias = Path | UPath
"""A folder or file, here or in an object store."""


def place(name: str | Path | UPath) -> Place:
    """A path as it is; a URL by its file system, whose listings are not to be remembered. Raises ValueError for one
    that we cannot open.
    """
    text = str(name)
    if "://" not in text:
        return name if isinstance(name, UPath) else Path(name).expanduser()
    scheme, options = text.partition("://")[0], name.storage_options if isinstance(name, UPath) else {}
    if scheme in ("file", "local"):
        return Path(str(UPath(text).path))
    try:
        found: UPath = UPath(
            text, **{**options, "use_listings_cache": False, "skip_instance_cache": scheme != "memory"}
        )
        return found
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{text}: no file system for {scheme}:// ({error}); s3, gs and abfs are extras: pip install '.[s3]'"
        ) from error


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
            _create(at, content)
        return
    with open(at, "xb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def _create(at: UPath, content: bytes) -> None:
    try:
        at.fs.pipe_file(at.path, content, mode="create")
    except OSError as error:
        # A write whose answer was lost is tried again by the store's library, and then finds itself. Some stores say no
        # in other words.
        try:
            there = at.fs.cat_file(at.path)
        except FileNotFoundError:
            raise error from None
        if there != content or not content:
            raise FileExistsError(errno.EEXIST, f"{at} is there already") from error


def read(at: Place) -> bytes:
    """A file's content. Raises FileNotFoundError where there is none."""
    with reaching(at):
        return bytes(at.read_bytes())


def read_all(folder: Place) -> bytes:
    """All files of a folder one after the other, by name; b"" where there is none."""
    files = children(folder)
    if isinstance(folder, Path) or not files:
        return b"".join(file.read_bytes() for file in files)
    with reaching(folder):
        paths = [(folder / file.name).path for file in files]
        found = folder.fs.cat(paths)  # several at a time
        return b"".join(found[folder.fs._strip_protocol(path)] for path in paths) if isinstance(found, dict) else found


def remove(at: Place) -> None:
    """Remove a file, if it is there."""
    with reaching(at):
        at.unlink(missing_ok=True)


def children(folder: Place) -> list[Place]:
    """Files of a folder by name, as they are now; [] where there is none."""
    if isinstance(folder, Path):
        return sorted(folder.iterdir()) if folder.is_dir() else []
    with reaching(folder):
        folder.fs.invalidate_cache()
        try:
            found = folder.fs.ls(folder.path, detail=False)
        except FileNotFoundError:
            return []
        return [folder / name for name in sorted(f.rstrip("/").rpartition("/")[2] for f in found) if name]
