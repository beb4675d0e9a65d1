"""save_weights=true of finished runs: write weights.pt from the checkpoint that a run keeps, or say why not."""

from collections.abc import Callable, Sequence

from normlab import runs
from normlab.common.errors import UserError
from normlab.config.schema import RunConfig
from normlab.runs import State
from normlab.runs.shorter import KEPT

WEIGHTS = "weights.pt"


def lacks_weights(run: runs.Run, config: RunConfig) -> bool:
    """Return whether a finished run is to have its weights and has not; one that diverged has none to keep."""
    return config.save_weights and run.state == State.DONE and not (run.folder / WEIGHTS).exists()


def add_weights(lacking: Sequence[runs.Run], report: Callable[[str], None]) -> None:
    """Write the weights of finished runs that keep a checkpoint, and report how many, and what is left without.

    Raises:
        UserError: if a folder cannot be written.
    """
    written, without = list[str](), list[str]()
    for run in lacking:
        (written if (run.folder / KEPT).exists() and _write(run) else without).append(run.title)
    if written:
        report(f"{WEIGHTS} is written from the kept checkpoint: {_named(written)}.")
    if without:
        report(
            f"There is no {WEIGHTS} of {_named(without)}, which finished without save_weights=true and kept no"
            " checkpoint that can be used.\nTo get it, delete the folder and give the same command again."
        )


def _named(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _write(run: runs.Run) -> bool:
    from normlab.training import checkpoint  # imports torch

    try:
        status = runs.read_status(run.folder) or {}
        weights = checkpoint.evaluated_weights(run.folder / KEPT, run.run_id, status.get("weights_sha256"))
    except (UserError, ValueError):
        return False
    checkpoint.save_weights(run.folder / WEIGHTS, weights)
    return True
