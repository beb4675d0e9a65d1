"""The states of a run, and the sets of them that commands act on."""

from enum import StrEnum

STALE_SECONDS = 120.0  # without a sign of life for so long, a run counts as abandoned. NFS caches attributes for 60 s


class State(StrEnum):
    """The progress of a run. The values are the words in status.json, in tables and in messages.

    Attributes:
        PLANNED: its folder holds a configuration and no status: it has not started.
        RUNNING: a process trains it.
        INTERRUPTED: it was stopped after a checkpoint, and can go on.
        FAILED: an error ended it.
        DIVERGED: its loss was not finite, which is its result.
        DONE: it was trained to its end.
        LOST: recorded as running, and its process is gone.
        UNREADABLE: its files are damaged.
        MISSING: a cell of a study's grid without a run that has started.
    """

    PLANNED = "planned"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    DIVERGED = "diverged"
    DONE = "done"
    LOST = "lost"
    UNREADABLE = "unreadable"
    MISSING = "missing"


FINISHED = (State.DONE, State.DIVERGED)  # a repeated command skips these runs
RECORDED = (State.RUNNING, State.FAILED, State.INTERRUPTED, *FINISHED)  # status.json holds one of these
UNFINISHED = (State.RUNNING, State.LOST, State.INTERRUPTED, State.PLANNED)  # a sweep takes these runs further


def recorded_state(status: object) -> State | None:
    """Return the state that a status.json records, or None where `status` holds no state that can be recorded."""
    found = status.get("state") if isinstance(status, dict) else None
    return next((state for state in RECORDED if state == found), None)
