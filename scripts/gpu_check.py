"""Everything that only a machine with a GPU can show, in three stages of under ten minutes each.

scripts/gpu_check [FOLDER] [STAGE ...]
scripts/gpu_check bundle [FOLDER]       packages and images for a machine without network: bundle --help

correct (1)  versions; the tests marked gpu; captured and packed runs beside eager ones; the kernels of a replayed step
speed (2)    normlab beside a plain loop, Lightning and torch.compile, at four batch sizes in fp32, tf32 and bf16
sweeps (3)   sixty runs beside plain ones, the same sweep again, its report, then experiments while there is time

Without a stage: all three. What is finished is not done again, so the same command goes on where the last one was cut
off, and tries again what failed. Every part has a time limit, and so has the stage.

FOLDER (default: gpu_check) gets seven files: summary.md, results.json (kept up to date part by part), speed.json, a log
of each stage, and records.zip with the studies, as `report.py pack` made them. FOLDER.work has the runs; it is needed
to go on, and to make records.zip.

WORDS are the sweeps that the last stage goes on with, separated by semicolons, at the largest size that you think fits:
WORDS="experiment=small_batch budget=paper seed=0; norm=bn,none batch=8 epochs=30". What does not fit goes on with the
same command. PYTHON names the interpreter.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from gpu_checks import needs
from gpu_checks.parts import Checked
from gpu_checks.stages import SMALL, STAGES, TINY, Sizes, stage_parts

ROOT = Path(__file__).parents[1]
STAGE_SECONDS = 570
MACHINE = """
import json, torch
from benchmarks.common import machine
memory = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0
print(json.dumps(machine("cuda") | {"memory_bytes": memory, "cuda": torch.version.cuda}))
"""


def main() -> None:
    if sys.argv[1:2] == ["bundle"]:
        from gpu_checks import bundle  # needs a package that a bare machine may lack

        bundle.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        "scripts/gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("words", nargs="*", metavar="FOLDER, STAGE", help=f"a folder, and any of {', '.join(STAGES)}, 1, 2, 3")
    add("--bundle", type=Path, default=ROOT / "gpu_check.bundle", help="what `scripts/gpu_check bundle` made, if there")
    seconds = "of each stage, of which its parts have a share each; default: %(default)s"
    add("--limit", type=float, default=STAGE_SECONDS, metavar="SECONDS", help=seconds)
    add("--again", action="store_true", help="do again what is finished, too")
    add("--tiny", action="store_true", help="tiny networks and sweeps: to try this script, not the GPU")
    chosen = parser.parse_intermixed_args()  # a stage may come behind an option
    numbers = dict(zip("123", STAGES, strict=True))
    named = [numbers.get(word, word) for word in chosen.words]
    folders = [word for word in named if word not in STAGES]
    if len(folders) > 1:
        parser.error(f"{' and '.join(folders)}: one folder at most. Stages: {', '.join(STAGES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the part under way
    sys.exit(check(chosen, Path(*folders or ["gpu_check"]).absolute(), [one for one in STAGES if one in named]))


def check(chosen: argparse.Namespace, folder: Path, named: list[str]) -> int:
    """Carry out stages; return the exit status."""
    begun = time.monotonic()  # what comes before the first stage is counted as a part of it
    work = folder.with_name(f"{folder.name}.work")
    for each in (folder, work):
        each.mkdir(parents=True, exist_ok=True)
    images = unpack(chosen.bundle, work)
    paths = [str(ROOT / "src"), str(ROOT), str(ROOT / "scripts"), str(work / "packages"), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    lacking = needs.lacking(ROOT / "pyproject.toml", work / "packages")
    for sentence in [needs.NEEDED, *lacking]:
        print(sentence, flush=True)
    sizes: Sizes = TINY if chosen.tiny else SMALL
    if chosen.again and "speed" in (named or STAGES):
        (folder / "speed.json").unlink(missing_ok=True)
    checked = Checked(folder, facts={"tiny": chosen.tiny, "lacking": lacking, "machine": machine()})
    for name in named or STAGES:
        any_run = chosen.again
        for part in stage_parts(name, sizes, folder, work, images):
            left = chosen.limit - (time.monotonic() - begun)
            share = part.limit * chosen.limit / STAGE_SECONDS
            # What is kept is for the parts that come after it.
            part = part.within(max(0.0, min(share, left - part.kept)))
            any_run |= checked.carry_out(name, part, again=chosen.again or (part.closes and any_run))
        begun = time.monotonic()
    print(f"Written to {folder}; its summary: {checked.summary}")
    if unfinished := checked.unfinished(named or STAGES):
        print(f"Not finished: {', '.join(unfinished)}. The same command tries these again.", file=sys.stderr)
    return 1 if unfinished else 0


def unpack(found: Path, work: Path) -> Path | None:
    """Install the packages of a bundle beside the runs, and unpack its images; return where images are, if any are."""
    wheels = [*found.glob("wheels/*.whl")]
    if wheels and not (work / "packages").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        options = ["--no-index", "--no-deps", "--find-links", found / "wheels", "--target", work / "packages.new"]
        done = subprocess.run([*pip, *options, *wheels], capture_output=True, text=True)
        if done.returncode:
            why = done.stderr.strip().splitlines()[-1:] or ["pip does not say why"]
            sys.exit(f"The packages in {found} cannot be installed here: {why[0]}")
        (work / "packages.new").rename(work / "packages")
    archive = found / needs.IMAGES
    if archive.is_file() and not (work / "data").is_dir():
        with tarfile.open(archive) as tar:
            tar.extractall(work / "data.new", filter="data")
        (work / "data.new").rename(work / "data")
    return work / "data" if (work / "data").is_dir() else None


def machine() -> dict[str, Any]:
    """Versions and hardware, found by a process of its own; ends this one where there is no GPU."""
    done = subprocess.run([sys.executable, "-c", MACHINE], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{sys.executable} cannot import what is needed: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if not found["gpu"]:
        sys.exit(
            f"PyTorch of {sys.executable} finds no CUDA device here. Name another Python (PYTHON=...), or see:"
            f" {sys.executable} train.py doctor"
        )
    return found


if __name__ == "__main__":
    main()
