"""Train the same sweep eagerly, captured and packed, and captured in several processes, and compare the runs:
python -m gpu_checks.engines FOUND.json FOLDER SETTINGS
"""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, table
from normlab import runs

LAUNCHED = {  # the first is what the others are compared with
    "eager": ["engine=eager", "hydra.launcher.per_gpu=4"],
    "one process": ["engine=auto", "hydra.launcher.per_gpu=1", "hydra.launcher.pack=8"],
    "four processes": ["engine=auto", "hydra.launcher.per_gpu=4", "hydra.launcher.pack=4", "hydra.launcher.mps=false"],
}
COMPARED = ("train_loss", "test_loss")
TOLERANCE = 1e-3  # relative, of the losses of each epoch; deterministic, in fp32


def trained(study: str, folder: Path, words: list[str]) -> dict[str, dict[str, Any]]:
    """The status and the losses of each run, by the name of its folder."""
    command = [sys.executable, "train.py", "-m", "device=cuda", *words, f"output_dir={folder}", f"study={study}"]
    print(" ".join(command), flush=True)
    subprocess.run(command, cwd=ROOT)  # the runs tell how they ended
    found = {}
    for run in runs.find(folder / study):
        rows, _ = runs.read_metrics(run)
        losses = [row.get(name, math.nan) for row in rows for name in COMPARED]
        status = runs.read_status(run) or {"state": "not begun"}
        found[run.name] = {"losses": losses, "refused": refusal(run), **status}
    return found


def refusal(run: Path) -> str:
    """What a run says of graphs that it does not use, or nothing."""
    log = run / runs.LOG
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return next((line.partition("WARNING ")[2] for line in lines if "cannot be captured" in line), "")


def compared(one: dict[str, Any], eager: dict[str, Any]) -> tuple[str, float]:
    """What is wrong with a run, and the largest relative difference of a loss from the eager run's."""
    if one["state"] != eager["state"] or len(one["losses"]) != len(eager["losses"]):
        return f"{one['state']} ({one.get('error') or 'no error'}), eagerly {eager['state']}", math.nan
    pairs = zip(one["losses"], eager["losses"], strict=True)
    differences = [abs(a - b) / max(abs(b), 1e-12) for a, b in pairs]
    largest = math.nan if any(map(math.isnan, differences)) else max(differences, default=math.nan)
    if not largest <= TOLERANCE:
        return f"differs by {largest:.1e}", largest
    return one.get("refused") or ("" if one.get("capture_seconds") else "was not captured"), largest


def main() -> int:
    found, folder, words = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    shutil.rmtree(folder, ignore_errors=True)  # runs of code that has been mended since
    rows, faults, facts = [], [], {}
    eager: dict[str, dict[str, Any]] = {}
    for launched, more in LAUNCHED.items():
        begun = time.monotonic()
        seen = trained(launched.replace(" ", "_"), folder, [*words, *more])
        seconds = time.monotonic() - begun
        eager = eager or seen
        outcomes = {name: compared(seen.get(name, {"state": "missing", "losses": []}), eager[name]) for name in eager}
        if launched == "eager":
            outcomes = {name: ("" if one["state"] == "done" else one["state"], 0.0) for name, one in eager.items()}
        wrong = {name: why for name, (why, _) in outcomes.items() if why}
        faults += [f"{launched}: {name}: {why}" for name, why in wrong.items()]
        same = sum(seen.get(name, {}).get("weights_sha256") == one.get("weights_sha256") for name, one in eager.items())
        largest = max((difference for _, difference in outcomes.values()), default=math.nan)
        rows.append(
            [launched, f"{len(eager) - len(wrong)} of {len(eager)}", f"{largest:.1e}", str(same), f"{seconds:.0f}"]
        )
        facts[launched] = {"seconds": seconds, "wrong": wrong, "largest": largest, "same_weights": same}
        head = ["", "as they should be", "largest difference of a loss", "weights bit for bit", "seconds"]
        lines = [table(head, rows), *(f"- {fault}" for fault in faults)]
        found.write_text(json.dumps({"launched": facts, "runs": len(eager), "table": "\n\n".join(lines)}))
    print("\n".join(faults) or f"All {len(eager)} runs end as they do eagerly.")
    return 1 if faults or not eager else 0


if __name__ == "__main__":
    sys.exit(main())
