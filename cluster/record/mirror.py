"""A folder of the driver whose files are copied to a run directory in an object store."""

from __future__ import annotations

import errno
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_fixed

from cluster.record.storage import Place, read, write_atomically

log = logging.getLogger("metafleet")


COPY_EVERY = 15.0  # seconds


class Mirror:
    """A folder here, `local`, whose files are copied to `home` when they have changed; where home is local they are
    one.

    For what is appended to: metrics.jsonl, TensorBoard's events, pictures. Copying is done by a thread of its own and a
    failure is a warning: the next copy has it all. `check` raises where this process no longer owns the run; nothing is
    copied then.
    """

    def __init__(self, home: Place, check: Callable[[], None] = lambda: None, kept: tuple[str, ...] = ()) -> None:
        """`kept`: files that an earlier attempt left and this one goes on with."""
        self.home, self._check = home, check
        self._seen: dict[str, tuple[int, int]] = {}
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if isinstance(home, Path):
            self.local = home
            return
        self.local = Path(tempfile.mkdtemp(prefix="metafleet-"))
        for name in kept:
            with suppress(FileNotFoundError):
                (self.local / name).write_bytes(read(home / name))
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        self._thread.start()

    def copy(self) -> None:
        """Copy what has changed. Raises OSError for the first file that could not be copied, after trying the
        others.
        """
        failed: OSError | None = None
        for path in sorted(p for p in self.local.rglob("*") if p.is_file() and not p.name.endswith(".partial")):
            stat, name = path.stat(), path.relative_to(self.local).as_posix()
            if self._seen.get(name) == (stat.st_mtime_ns, stat.st_size):
                continue
            self._check()
            try:
                write_atomically(self.home / name, path.read_bytes())
                self._seen[name] = (stat.st_mtime_ns, stat.st_size)
            except OSError as error:
                failed = failed or error
        if failed:
            raise failed

    def close(self) -> None:
        """Copy for the last time, and remove the folder here; it stays, and OSError says where, if the store does not
        take its files.

        Whoever no longer owns the run copies nothing.
        """
        if self._thread is None:
            return
        self._stopped.set()
        self._thread.join()
        try:
            self._copy_last()
        except OSError as error:
            raise OSError(
                error.errno or errno.EIO,
                f"{self.home} does not take this run's last files ({error}); they are in {self.local}",
            ) from error
        except RuntimeError as error:  # fenced
            log.warning("not copied to %s: %s", self.home, error)
        shutil.rmtree(self.local, ignore_errors=True)

    @retry(retry=retry_if_exception_type(OSError), stop=stop_after_attempt(3), wait=wait_fixed(2), reraise=True)
    def _copy_last(self) -> None:
        self.copy()

    def _go_on(self) -> None:
        while not self._stopped.wait(COPY_EVERY):
            try:
                self.copy()
            except (OSError, RuntimeError) as error:
                log.warning("not copied to %s: %s", self.home, error)
