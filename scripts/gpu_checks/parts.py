"""Commands with a time limit, whose outcomes are on disk as soon as they are known. The standard library alone."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
GRACE_SECONDS = 15  # to write checkpoints in, after the limit
UNFINISHED = 75  # the exit status of a command that keeps to a limit of its own, and is not done
SHORTEST_SECONDS = 5  # a part is not begun with less
TAIL = 12  # lines of a part's output that are kept
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A command of a stage.

    Attributes:
        what: a sentence about it, for the summary.
        limit: seconds, after which it is ended. In a word of `command`, {limit} is that number, less some seconds.
        found: what it writes for the summary, Markdown, or a JSON object with `table`. Of parts with the same file,
            the last one's is shown.
        kept: seconds that are left to the parts after it.
        fills: whether it goes on as long as there is time, so that it need not be done.
        closes: whether it is done again whenever another part of its stage was.
    """

    name: str
    what: str
    limit: float
    command: Sequence[str]
    found: Path | None = None
    kept: float = 0
    fills: bool = False
    closes: bool = False

    def within(self, limit: float) -> "Part":
        return replace(self, limit=limit)


class Checked:
    """The outcomes of a folder's parts: results.json, summary.md, a log of each stage.

    Args:
        folder: theirs; what earlier commands found there is kept.
        facts: of this command.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self.summary, self._results = folder, folder / "summary.md", folder / "results.json"
        before = json.loads(self._results.read_text(encoding="utf-8")) if self._results.is_file() else {}
        if before and before["tiny"] != facts["tiny"]:
            sys.exit(f"{folder} has results {'with' if before['tiny'] else 'without'} --tiny: name another folder.")
        self.stages: dict[str, dict[str, Outcome]] = before.get("stages", {})
        self.found: dict[str, dict[str, dict[str, Any]]] = before.get("found", {})  # by stage and name of the file
        self.facts = facts
        self._write()

    def carry_out(self, stage: str, part: Part, *, again: bool = False) -> bool:
        """Run a part, and note how it ended, unless the same command is finished; return whether it was run."""
        outcomes = self.stages.setdefault(stage, {})
        outcome = outcomes.setdefault(part.name, {"state": "not run", "tries": 0})
        outcome |= {"what": part.what, "fills": part.fills}
        if outcome["state"] == "ok" and not again and outcome.get("command") == [*part.command]:
            print(f"== {stage}, {part.name}: done before", flush=True)
            return False
        if part.limit < SHORTEST_SECONDS:
            outcome |= {"state": "not run", "why": "no time was left"}
            print(f"== {stage}, {part.name}: {outcome['why']}", flush=True)
            self._write()
            return False
        print(f"== {stage}, {part.name}: {part.what} (at most {part.limit:.0f} s)", flush=True)
        # Should this process be killed, "cut off" is what stays.
        outcome |= {"state": "cut off", "tries": outcome["tries"] + 1, "why": "", "limit": round(part.limit)}
        outcome |= {"code": commit(), "command": [*part.command]}
        self._write()
        outcome |= self._run(part, self.folder / f"{stage}.log")
        if part.found and part.found.is_file():
            self.found.setdefault(stage, {})[part.found.stem] = read(part.found)
        print(
            f"   {outcome['state']}, {outcome['seconds']} s{'. ' * bool(outcome['why'])}{outcome['why']}",
            flush=True,
        )
        self._write()
        return True

    def unfinished(self, stages: Sequence[str]) -> list[str]:
        return [
            f"{stage} {name} ({outcome['state']})"
            for stage in stages
            for name, outcome in self.stages.get(stage, {}).items()
            if outcome["state"] != "ok" and not (outcome["fills"] and outcome["state"] == "in part")
        ]

    def _run(self, part: Part, log: Path) -> Outcome:
        if part.found:
            part.found.unlink(missing_ok=True)
        begun = time.monotonic()
        with log.open("a", encoding="utf-8") as written:
            command = [word.replace("{limit}", f"{max(1, part.limit - 5):.0f}") for word in part.command]
            written.write(f"\n== {part.name}: {' '.join(command)}\n")
            written.flush()
            start = written.tell()
            code = run(command, written, part.limit)
        states = {0: "ok", None: "timed out", UNFINISHED: "in part"}
        said = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
        why = "" if code in (0, UNFINISHED) else " ".join(said[-1:])
        state = states.get(code, "failed")
        seconds = round(time.monotonic() - begun, 1)
        return {"state": state, "why": why, "seconds": seconds, "said": said[-TAIL:]}

    def _write(self) -> None:
        results = {**self.facts, "stages": self.stages, "found": self.found}
        for path, text in ((self._results, json.dumps(results, indent=1) + "\n"), (self.summary, self._markdown())):
            temporary = path.with_suffix(".new")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)

    def _markdown(self) -> str:
        found = self.facts["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
        lines = ["# A check on a GPU", ""]
        if self.facts["tiny"]:
            lines += ["**Tiny sizes (--tiny): this shows that the check can be run. Its numbers say nothing.**", ""]
        lines += [
            f"{found['gpu']} ({found['memory_bytes'] / 2**30:.0f} GiB), {found['processor']}, {found['cores']} cores;"
            f" {versions}, CUDA {found['cuda']}; {found['date'][:10]}.",
            *("", *self.facts["lacking"]),
            *("", "| stage | part | | time, limit | tries | what |", "|---|---|---|---|---|---|"),
        ]
        each = [(stage, name, one) for stage, parts in self.stages.items() for name, one in parts.items()]
        for stage, name, one in each:
            time_taken = f"{one['seconds']} s, {one['limit']} s" if "seconds" in one else ""
            why = f": {one['why']}" if one.get("why") else ""
            cells = (stage, name, one["state"] + why.replace("|", "/"), time_taken, str(one["tries"]), one["what"])
            lines.append(f"| {' | '.join(cells)} |")
        for stage, name, one in each:
            if one["state"] in ("failed", "timed out") and one.get("said"):
                lines += ["", f"## {stage}, {name}: the last lines", "", "```", *one["said"], "```"]
        for stage, tables in self.found.items():
            for name, found in tables.items():
                lines += ["", f"## {stage}: {name}", "", str(found.get("table", "")).strip()]
        return "\n".join(lines) + "\n"


def read(found: Path) -> dict[str, Any]:
    text = found.read_text(encoding="utf-8")
    if found.suffix == ".md":
        return {"table": text}
    with contextlib.suppress(ValueError):  # it was being written
        result: dict[str, Any] = json.loads(text)
        return result
    return {}


def run(command: Sequence[str], output: IO[str], limit: float) -> int | None:
    """The exit status of a command, or None if it was ended at its limit; none of its processes is left."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)


def commit() -> str | None:
    """The commit that is checked out, with a plus where files have changed since; None without git."""
    with contextlib.suppress(OSError):
        words = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() or None
    return None
