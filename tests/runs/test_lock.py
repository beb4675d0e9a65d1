"""Locks over processes, hosts and file systems. Another host is a claim that says so; its death, one left untouched."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from normlab.common.errors import FolderGoneError, RunBusyError
from normlab.runs import lock


def claim_of_another(folder: Path, silent_seconds: float = 0.0, **facts: object) -> None:
    """What a process elsewhere has left."""
    holder = {"host": "elsewhere", "machine": "elsewhere 1", "pid": os.getpid(), "started": "1", "token": "x"}
    (folder / lock.CLAIM).write_text(json.dumps({**holder, "job": "", "restarts": 0, **facts}))
    then = time.time() - silent_seconds
    os.utime(folder / lock.CLAIM, (then, then))


def hold(folder: Path) -> "subprocess.Popen[str]":
    """Another process of this host that holds the run."""
    code = (
        "import pathlib, sys, time; from normlab.runs import lock\n"
        "with lock.held(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system whose locks mean nothing: every process gets them at once."""
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: None)


def test_while_held_the_claim_names_this_process_and_afterwards_nothing_is_left(tmp_path) -> None:
    with lock.held(tmp_path):
        found = lock.holder(tmp_path)
        assert found is not None
        assert (found.pid, found.here, found.gone) == (os.getpid(), True, False)
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_refused_and_learns_who_holds_the_run(tmp_path) -> None:
    with hold(tmp_path) as other:
        sentence = f"already being trained by process {other.pid} on "
        with pytest.raises(RunBusyError, match=sentence), lock.held(tmp_path):
            pass
        other.kill()


def test_a_killed_holder_is_gone_at_once(tmp_path) -> None:
    with hold(tmp_path) as other:
        other.kill()
        other.wait()
        left = lock.holder(tmp_path)
        assert left is not None
        assert left.gone
        with lock.held(tmp_path):
            mine = lock.holder(tmp_path)
            assert mine is not None
            assert mine.pid == os.getpid()


def test_a_claim_whose_process_is_about_to_end_is_waited_for(tmp_path, without_flock) -> None:
    with hold(tmp_path) as other:  # a killed process has lost its locks a moment before it is gone
        threading.Timer(0.3, other.kill).start()
        with lock.held(tmp_path, wait_seconds=60):
            assert other.wait() == -signal.SIGKILL


def test_where_the_file_system_has_no_locks_the_claim_alone_keeps_others_out(tmp_path, without_flock) -> None:
    with hold(tmp_path) as other:
        with pytest.raises(RunBusyError, match=str(other.pid)), lock.held(tmp_path):
            pass
        other.kill()
        other.wait()
        with lock.held(tmp_path):
            pass


def test_a_used_process_number_is_not_the_process_that_had_it(tmp_path) -> None:
    mine = lock.Holder.myself()
    claim_of_another(tmp_path, machine=mine.machine, pid=os.getpid(), started="1")
    found = lock.holder(tmp_path)
    assert found is not None
    assert found.gone


def test_a_living_holder_on_another_host_keeps_the_run(tmp_path) -> None:
    claim_of_another(tmp_path)
    with pytest.raises(RunBusyError, match=f"process {os.getpid()} on elsewhere"), lock.held(tmp_path):
        pass
    assert (tmp_path / lock.CLAIM).exists()


def test_a_holder_on_another_host_is_dead_after_a_long_silence(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)
    claim_of_another(tmp_path, silent_seconds=lock.STALE_SECONDS + 1)
    with lock.held(tmp_path):
        found = lock.holder(tmp_path)
        assert found is not None
        assert found.here
    assert list(tmp_path.iterdir()) == []


def test_a_holder_that_has_been_silent_for_a_while_is_waited_for(tmp_path, monkeypatch) -> None:
    """Dead: the run is taken over when that is certain. Alive: busy, as soon as it gives a sign."""
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)
    claim_of_another(tmp_path, silent_seconds=lock.STALE_SECONDS - 1.5)
    with lock.held(tmp_path):
        pass
    claim_of_another(tmp_path, silent_seconds=lock.SILENT_SECONDS + 1)
    monkeypatch.setattr(lock.time, "sleep", lambda _: os.utime(tmp_path / lock.CLAIM))
    with pytest.raises(RunBusyError, match="elsewhere"), lock.held(tmp_path):
        pass


def test_a_slurm_job_that_was_requeued_does_not_wait_for_its_former_self(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)
    claim_of_another(tmp_path, job="7", restarts=0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(RunBusyError), lock.held(tmp_path):
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with lock.held(tmp_path):
        pass


def test_of_two_hosts_that_take_over_at_once_one_gets_it(tmp_path, monkeypatch) -> None:
    """The other one had seen the same dead claim, and removes ours in its place."""
    claim_of_another(tmp_path, silent_seconds=lock.STALE_SECONDS + 1)

    def other_host(_: float) -> None:
        (tmp_path / lock.CLAIM).unlink()
        claim_of_another(tmp_path)

    monkeypatch.setattr(lock.time, "sleep", other_host)
    with pytest.raises(RunBusyError, match="elsewhere"), lock.held(tmp_path):
        pass
    found = lock.holder(tmp_path)
    assert found is not None
    assert found.host == "elsewhere"


def test_a_holder_that_was_taken_over_notices(tmp_path) -> None:
    with lock.held(tmp_path) as claim:
        claim.verify()
        (tmp_path / lock.CLAIM).unlink()
        claim_of_another(tmp_path)
        with pytest.raises(RunBusyError, match=r"taken over by process \d+ on elsewhere"):
            claim.verify()
    assert (tmp_path / lock.CLAIM).exists()  # another's is not ours to remove


def test_a_holder_whose_claim_was_deleted_says_so(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    with lock.held(tmp_path / "run") as claim:
        (tmp_path / "run" / lock.CLAIM).unlink()
        with pytest.raises(RunBusyError, match=r"(?s)run\.claim was deleted.*leaves the record alone"):
            claim.verify()
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(FolderGoneError, match="run was deleted or moved while its run was trained"):
            claim.verify()


def test_a_holder_keeps_its_claim_fresh(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lock, "CLAIM_SECONDS", 0.05)
    with lock.held(tmp_path):
        then = time.time() - 1000
        os.utime(tmp_path / lock.CLAIM, (then, then))
        time.sleep(0.5)
        found = lock.holder(tmp_path)
        assert found is not None
        assert found.sign_of_life < 100


def test_a_claim_that_cannot_be_read_is_somebodys_until_it_is_old(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)
    (tmp_path / lock.CLAIM).write_text("{")
    with pytest.raises(RunBusyError, match="unknown host"), lock.held(tmp_path):
        pass
    then = time.time() - lock.STALE_SECONDS - 1
    os.utime(tmp_path / lock.CLAIM, (then, then))
    with lock.held(tmp_path):
        pass


def test_among_many_processes_one_at_a_time_holds_a_run(tmp_path) -> None:
    """Each adds one to a number without any care of its own; the lock file comes and goes under their hands."""
    (tmp_path / "number").write_text("0")
    code = (
        "import pathlib, sys, time; from normlab.common.errors import RunBusyError; from normlab.runs import lock\n"
        "folder, done = pathlib.Path(sys.argv[1]), 0\n"
        "while done < 30:\n"
        "    try:\n"
        "        with lock.held(folder):\n"
        "            n = int((folder / 'number').read_text()); time.sleep(0.001)\n"
        "            (folder / 'number').write_text(str(n + 1)); done += 1\n"
        "    except RunBusyError: time.sleep(0.002)\n"
    )
    others = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [other.wait(timeout=120) for other in others] == [0] * 4
    assert (tmp_path / "number").read_text() == "120"
