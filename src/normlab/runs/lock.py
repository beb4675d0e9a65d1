"""Let one process at a time train a run, over processes, hosts and network file systems.

Two things are held together for as long as a process trains a run:

run.lock   a lock of the operating system (flock). The kernel lets go of it when the process dies, however it dies. It
           holds between all processes of a host, and between hosts where the file system passes locks on (NFS with its
           lock manager, Lustre mounted with -o flock); elsewhere it may silently hold within a host only.
run.claim  a file that only one process can create (O_EXCL, which is atomic on NFS, too), with the holder's host and
           process. A thread of the holder touches it every `CLAIM_SECONDS`.

A claim that a dead process left is taken over: on the holder's own host as soon as its process is gone; from another
host, whose processes cannot be seen, when the claim has not been touched for `STALE_SECONDS` by the clock of the file
system, so that the hosts' clocks do not matter. A holder that was silent for so long (a suspended machine, a network
that was cut) finds its claim gone at its next write, and stops without writing: `RunClaim.verify`.
"""

import contextlib
import errno
import fcntl
import functools
import json
import os
import platform
import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from normlab.common.errors import FolderGoneError, RunBusyError, storage_error
from normlab.runs import files, reading
from normlab.runs.states import STALE_SECONDS

LOCK, CLAIM = "run.lock", "run.claim"
CLAIM_SECONDS = 5.0  # between two signs of life of a holder
SILENT_SECONDS = 20.0  # a holder on another host without a sign of life for so long may be dead: wait until it is stale
DELETING_TENTHS = 10  # of a second until whoever deletes a claim may have deleted the folder around it, too
SETTLE_SECONDS = 1.0  # after a takeover from another host: whoever else took it over must have become visible
_MOST_BYTES = 4096  # of a claim; it has 300
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # file systems without flock


_held: set[str] = set()  # tokens of the claims of this process


@dataclass(frozen=True)
class Holder:
    """The process that a claim names.

    Attributes:
        machine: distinguishes machines, their reboots, and containers that do not see each other's processes.
        started: the process's start in clock ticks since boot, because process numbers are used again; "" if unknown.
        job: the SLURM job that it belongs to, "" if none; `restarts`: how often that had been requeued.
        sign_of_life: seconds since the claim was touched, by the file system's clock.
    """

    host: str
    machine: str
    pid: int
    started: str
    job: str
    restarts: int
    token: str
    sign_of_life: float = 0.0

    @classmethod
    def myself(cls) -> Self:
        """Describe this process, with a new token."""
        return cls(
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=_start_of(os.getpid()),
            job=os.environ.get("SLURM_JOB_ID", ""),
            restarts=_restarts(),
            token=secrets.token_hex(8),
        )

    @property
    def here(self) -> bool:
        """Return whether its process would be visible to this one."""
        return self.machine == _machine()

    @property
    def gone(self) -> bool:
        """Return whether its process is dead, or has to count as dead."""
        if self.here:
            left_over = self.pid == os.getpid() and self.token not in _held  # its disk was read-only at the end
            return left_over or not _exists(self.pid, self.started)
        requeued = self.job and self.job == os.environ.get("SLURM_JOB_ID")
        if requeued and self.restarts < _restarts():
            return True  # SLURM starts a job again only when its processes have ended
        return self.sign_of_life > STALE_SECONDS

    @property
    def silent(self) -> bool:
        """On another host, and perhaps dead."""
        return not self.here and not self.gone and self.sign_of_life > SILENT_SECONDS

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (last sign of life {self.sign_of_life:.0f} s ago)"


def holder(folder: Path) -> Holder | None:
    """Return the process, dead or alive, whose claim is in a run's folder; None without a claim."""
    path = folder / CLAIM
    try:
        with reading.opened(path) as file:  # opening makes an NFS client query the server
            text, touched = file.read(_MOST_BYTES), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    except OSError:  # a link, a FIFO, ...: no claim of ours, which goes as a dead process's does
        try:
            text, touched = b"", path.lstat().st_mtime
        except OSError:
            return None
    try:
        found = Holder(**_facts(text))
    except ValueError:  # just being written, or its machine died while it was
        found = Holder("an unknown host", "", 0, "", "", 0, "")
    return replace(found, sign_of_life=max(0.0, (time.time() if found.here else _now(folder)) - touched))


def _facts(text: bytes) -> dict[str, Any]:
    from normlab.runs import schema  # pydantic is slow to import, and most commands meet no claim

    return schema.Claim.model_validate_json(text).model_dump()


class RunClaim:
    """A claim that this process holds, and keeps alive until `release`."""

    def __init__(self, path: Path, holder: Holder) -> None:
        """Write the claim to `path` and keep it alive.

        Raises:
            FileExistsError: if there is a claim already.
            OSError: if it cannot be written.
        """
        self.path, self._token = path, holder.token
        self._released = threading.Event()
        self._file = path.open("x", encoding="utf-8")
        try:
            facts = asdict(holder)
            del facts["sign_of_life"]
            self._file.write(json.dumps(facts))
            self._file.flush()
            os.fsync(self._file.fileno())
            _held.add(self._token)
        except OSError:
            self.release()
            raise
        threading.Thread(target=self._beat, name="claim", daemon=True).start()

    def _beat(self) -> None:
        while not self._released.wait(CLAIM_SECONDS):
            with contextlib.suppress(OSError, ValueError):  # a file server that is away comes back; a released claim
                os.utime(self._file.fileno())

    @property
    def held(self) -> bool:
        """Return whether the file is still the one that this process wrote."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._file.fileno()))
        except (OSError, ValueError):
            return False

    def verify(self) -> None:
        """Check that the claim is still held.

        Raises:
            FolderGoneError: if the run's folder is not there any more.
            RunBusyError: if another process has taken the run over, or somebody deleted the claim.
        """
        if self.held:
            return
        folder, by = self.path.parent, holder(self.path.parent)
        for _ in range(DELETING_TENTHS):
            if by is not None:
                break
            if not folder.exists():
                raise FolderGoneError(folder)
            time.sleep(0.1)
            by = holder(folder)
        if by is None:
            what = f"The claim of this run is gone: {self.path} was deleted, or its folder was and is a new one."
        else:
            what = (
                f"This run has been taken over by {by}: this process gave no sign of life for more than"
                f" {STALE_SECONDS:.0f} s, or its claim was deleted."
            )
        raise RunBusyError(f"{what}\nThis process stops here and leaves the record alone.")

    def release(self) -> None:
        """Remove the claim, if it is still held."""
        self._released.set()
        _held.discard(self._token)
        with contextlib.suppress(OSError):
            if self.held:
                self.path.unlink()
        with contextlib.suppress(OSError):
            self._file.close()


@contextmanager
def held(folder: Path, wait_seconds: float = 0.0) -> Iterator[RunClaim]:
    """Hold the run in `folder` for this process.

    It waits `wait_seconds` for another process of this host to let go, and for one of another host that has been
    silent for a while, until it gives a sign of life or counts as dead.

    Raises:
        RunBusyError: if another process holds it.
        UserError: if the folder cannot be written.
    """
    patience = time.monotonic() + wait_seconds
    try:
        with _kernel_lock(folder / LOCK, patience):
            claim = _take(folder, patience)
            try:
                yield claim
            finally:
                claim.release()
    except _UnwritableError as error:
        raise storage_error(folder, error.reason) from error.reason


class _UnwritableError(Exception):
    """A refusal of the file system, kept apart from an OSError of the code that holds the lock."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _take(folder: Path, patience: float) -> RunClaim:
    """Take the claim, from a dead holder if need be; wait until `patience` (`time.monotonic`) for one of this host."""
    path, myself, elsewhere = folder / CLAIM, Holder.myself(), False
    while True:
        try:
            claim = RunClaim(path, myself)
        except FileExistsError:
            other = holder(folder)
            if other is None:
                continue  # released in between
            if other.here and not other.gone and time.monotonic() < patience:  # a killed process loses its locks first
                time.sleep(0.05)
                continue
            if not other.gone and not other.silent:
                raise RunBusyError(f"This run is already being trained by {other}.") from None
            if other.silent:
                time.sleep(1.0)
                continue
            elsewhere = elsewhere or not other.here
            try:
                path.unlink(missing_ok=True)
            except OSError as error:  # it is a folder
                raise _UnwritableError(error) from error
            continue
        except OSError as error:
            raise _UnwritableError(error) from error
        if elsewhere:  # the kernel's lock may not reach there, and two hosts may have removed the same dead claim
            time.sleep(SETTLE_SECONDS)
            if not claim.held:
                claim.release()
                raise RunBusyError(f"This run is already being trained by {holder(folder) or 'another host'}.")
        return claim


@contextmanager
def _kernel_lock(path: Path, patience: float) -> Iterator[None]:
    """Hold a lock of flock, where the file system has it; wait until `patience` (`time.monotonic`) for it.

    The file is removed at the end: a process that opened it before sees that its name has gone or is another file's,
    and starts over.
    """
    while True:
        try:
            file = files.open_to_append(path)
        except OSError as error:
            raise _UnwritableError(error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.close()
                if time.monotonic() < patience:
                    time.sleep(0.05)
                    continue
                by = holder(path.parent) or "another process"
                raise RunBusyError(f"{path.parent.name} is already being trained by {by}.") from None
            if error.errno not in _NO_LOCKS:
                file.close()
                raise _UnwritableError(error) from error
        with contextlib.suppress(OSError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break
        file.close()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a file system that has become read-only
            path.unlink()
        file.close()


def _restarts() -> int:
    """Return how often SLURM has started this job again; 0 where its variable is no number."""
    text = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else 0


@functools.cache
def _machine() -> str:
    """Identify this boot of this machine, and the part of its processes that is visible from here."""
    words = [socket.gethostname()]
    with contextlib.suppress(OSError):
        words.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        words.append(os.readlink("/proc/self/ns/pid"))  # noqa: PTH115  # no path: "pid:[4026531836]"
    return " ".join(words)


def _start_of(pid: int) -> str:
    try:
        state, *facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else facts[18]  # a zombie is gone


def _exists(pid: int, started: str) -> bool:
    if platform.system() == "Linux":
        return bool(started) and _start_of(pid) == started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _now(folder: Path) -> float:
    """Return the time by the clock of the file system, its server's on a network; by ours if it cannot be written."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
            file.flush()
            os.utime(file.fileno())
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()
