"""Thousands of changes to the files of a study, one at a time, classified by what the report says of each."""

import hashlib
import io
import json
import os
import re
import shutil
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from unittest import mock

from attacks import mutations, seen, studies
from attacks.watched import Ended, command, watched
from normlab import runs
from normlab.config import schema
from normlab.launchers import slurm_task
from normlab.report import load
from normlab.runs.archive import MANIFEST
from normlab.training.run import train_run

OF_RUNS = {  # and how often, in per cent of all
    "config.yaml": 18,
    "status.json": 15,
    "metrics.jsonl": 16,
    "probes/ics.jsonl": 8,
    "provenance.json": 9,
    "correct.json": 4,
    "run.log": 2,
    "run.claim": 3,
    "run.lock": 1,
}
ORDER = "the order of a job"
OF_STUDY = {".index.npz": 3, "notes.md": 1, ORDER: 3, "report/": 2}
PACKED, MEMBER, CHECKPOINT = "the packed file", "a member of it", "checkpoint.pt"
FORGED = "any of a run, with right checksums"
TARGETS = {**OF_RUNS, **OF_STUDY, PACKED: 5, MEMBER: 9, CHECKPOINT: 5, FORGED: 10}
SPEED = ("wall_seconds", "images_per_second")


class Attack(NamedTuple):
    """What is done to which file, and how it is seen."""

    target: str  # of TARGETS
    file: str  # within the folder of studies
    done: str
    content: bytes | None
    names: tuple[str, ...]  # one of which a sentence has to have
    look: Callable[[], Any]
    before: Any
    status: bytes | None = None  # in place of the run's status.json


class Fuzz:
    """A study below `folder`, and what is seen of it while nothing is wrong."""

    def __init__(self, folder: Path, batches: Sequence[int] = (8, 16)) -> None:
        studies.make(folder, batches)
        self.folder, self.outputs = folder, folder / "outputs"
        self.study, self.packed = self.outputs / studies.STUDY, self.outputs / f"{studies.STUDY}.normlab.zip"
        self.tree = studies.Tree(self.outputs)
        self.runs = sorted(self.tree_runs())
        (order,) = (self.study / "slurm").glob("*.json")
        self.order_file = f"slurm/{order.name}"
        self.lost = next(run for run in self.runs if f"{studies.STUDY}/{run}/{CHECKPOINT}" in self.tree.files)
        self.before = {name: self.undisturbed(look) for name, look in self.looks().items()}
        self.tree.restore()

    def tree_runs(self) -> set[str]:
        return {path.name for path in runs.find(self.study)}

    def looks(self) -> dict[str, Callable[[], Any]]:
        return {
            "folder": lambda: seen.look(studies.STUDY, self.outputs),
            "packed": lambda: seen.look(str(self.packed), self.outputs),
            "resume": self.resume,
            "order": self.order,
        }

    def undisturbed(self, look: Callable[[], Any]) -> Any:
        ended = watched(look)
        self.tree.restore()
        if ended.fault or ended.refusal or ended.value.get("status"):
            raise RuntimeError(f"without an attack: {ended.fault or ended.refusal or ended.output}")
        return ended.value

    def resume(self) -> dict[str, Any]:
        """Go on with the run that was killed."""
        path = self.study / self.lost
        train_run(schema.parse(runs.read_config(path)))
        rows, _ = runs.read_metrics(path)
        status, log = runs.read_status(path) or {}, (path / runs.LOG).read_text(errors="replace")
        return {
            "weights": status.get("weights_sha256"),
            "rows": [{key: value for key, value in row.items() if key not in SPEED} for row in rows],
            "said": [line for line in log.splitlines() if "WARNING" in line or "ERROR" in line],
        }

    def order(self) -> dict[str, Any]:
        """Carry out an order of a job up to the training itself."""
        trained: list[Any] = []

        def take(jobs: Any, slots: int) -> tuple[list[Any], list[Any]]:
            trained.extend([job.run.name, slots] for job in jobs)
            return [], []

        job = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "1"}
        with mock.patch.object(slurm_task.pool, "train_jobs", take), mock.patch.dict(os.environ, job):
            status = slurm_task.main(self.study / self.order_file)
        return {"trained": trained, "status": status}

    def attack(self, chance: Random) -> Attack:
        """Choose a file and what to do to it."""
        target = chance.choices([*TARGETS], [*TARGETS.values()])[0]
        if target == MEMBER:
            return self._on_member(chance)
        if target == FORGED:
            return self._forged(chance)
        one, other = chance.sample(self.runs, 2)
        look, names = "folder", (one,)
        if target == CHECKPOINT:
            one, look, names = self.lost, "resume", (target,)
            file = f"{one}/{target}"
        elif target in OF_RUNS:
            file = f"{one}/{target}"
        elif target == "report/":
            file = chance.choice([n for n in self.tree.files if "/report/" in n]).removeprefix(f"{studies.STUDY}/")
            names = (Path(file).name, "report")
        elif target == PACKED:
            file, look, names = "", "packed", (self.packed.name,)
        else:
            file = self.order_file if target == ORDER else target
            look, names = "order" if target == ORDER else "folder", (target,)
        whole = f"{studies.STUDY}/{file}" if file else self.packed.name
        content = self.tree.files.get(whole) or next(
            (text for name, text in self.tree.files.items() if target in name), b"x"
        )
        replaced = self.tree.files.get(f"{studies.STUDY}/{other}/{target}", b"")
        done, changed = mutations.mutate(chance, file, content, replaced)
        if "another run's" in done:
            names = (*names, other)
        return Attack(target, whole, done, changed, names, self.looks()[look], self.before[look])

    def _on_member(self, chance: Random) -> Attack:
        with zipfile.ZipFile(self.packed) as file:
            members = {name: file.read(name) for name in file.namelist()}
        name = chance.choice(sorted(members))
        content, alike = members[name], [each for each in members if each.rpartition("/")[2] == name.rpartition("/")[2]]
        done, changed = mutations.mutate(chance, name, content, members[chance.choice(alike)])
        del members[name]
        if changed is not None:
            members[name] = changed
        whole = repacked(members) if name != MANIFEST else _zipped(members)
        what = f"{name}: {done}"
        look = self.looks()["packed"]
        return Attack(MEMBER, self.packed.name, what, whole, (name.split("/")[0],), look, self.before["packed"])

    def _forged(self, chance: Random) -> Attack:
        one, other = chance.sample([run for run in self.runs if self.before["folder"]["states"][run] == "done"], 2)
        of_run = [
            name for name in self.tree.files if f"/{one}/" in name and name.endswith((".yaml", ".json", ".jsonl"))
        ]
        whole = chance.choice(sorted(of_run))
        file = whole.split("/", 2)[2]
        replaced = self.tree.files.get(whole.replace(one, other), b"")
        done, changed = mutations.mutate(chance, file, self.tree.files[whole], replaced)
        status = sealed(self.tree.files[f"{studies.STUDY}/{one}/status.json"], one, file, changed)
        content = status if file == "status.json" else changed
        return Attack(FORGED, whole, done, content, (one,), self.looks()["folder"], self.before["folder"], status)

    def outcome(self, attack: Attack, chance: Random) -> tuple[str, str]:
        """Carry it out; return the class of what comes of it, and why."""
        path = self.outputs / attack.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if attack.content is not None:
            path.write_bytes(attack.content)
        if attack.status is not None:
            (self.study / attack.names[0] / "status.json").write_bytes(attack.status)
        try:
            found = self._classified(attack, watched(attack.look))
            left = [name for name in self.tree.changed() if name != attack.file and not self._may_change(attack, name)]
            if left and found[0] not in ("traceback", "silently changed"):
                found = "silently changed", f"files that reports only read: {left[:3]}"
            return found if found[0] in ("traceback", "silently changed") else self._commands(attack, chance) or found
        finally:
            self.tree.restore()

    def _classified(self, attack: Attack, ended: Ended) -> tuple[str, str]:
        if ended.fault or "Traceback (most" in ended.output:
            return "traceback", ended._replace(fault=ended.fault or ended.output).cause
        if ended.refusal:
            return "refused", ended.refusal
        if "states" in attack.before:
            found = seen.compared(attack.before, ended.value, attack.names)
            forged = attack.target == FORGED and "absurd" not in found[1] and "nobody touched" not in found[1]
            return ("same", "") if forged and found[0] == "silently changed" else found  # nobody can know better
        told = next((line for line in ended.value.get("said", ()) if attack.names[0] in line), "")
        wrong = [key for key, value in attack.before.items() if key != "said" and ended.value[key] != value]
        if attack.target == ORDER and ended.value["status"]:
            return "refused", ended.output.splitlines()[-1]
        if wrong:
            return "silently changed", f"{wrong[0]}: {attack.before[wrong[0]]} became {ended.value[wrong[0]]}"
        return ("told", told) if told else ("same", "")

    def _may_change(self, attack: Attack, name: str) -> bool:
        """Return whether a look may write this file, or the attack has."""
        parts = ["/report/", "/.index.npz", "report/", *([f"{attack.names[0]}/status.json"] if attack.status else [])]
        return any(part in name for part in parts) or attack.target in (CHECKPOINT, ORDER)

    def _commands(self, attack: Attack, chance: Random) -> tuple[str, str] | None:
        """Now and then the same for a command as a person types it; return a fault."""
        if chance.random() > 0.1 or attack.target in (CHECKPOINT, ORDER):
            return None
        which = str(self.packed) if attack.target in (PACKED, MEMBER) else studies.STUDY
        words = chance.choice(([], ["status"], ["pack", "replace=true"], ["claims"], ["results"], ["verify"]))
        ended = command(self.folder, "report.py", *words, f"study={which}", "figures=false")
        if ended.fault:
            return "traceback", f"report.py {' '.join(words)}: {ended.cause}"
        if words[:1] == ["pack"] and ended.value == 0:
            again = watched(lambda: repr(load(self.packed)))
            if again.refusal:
                return "silently changed", f"what was packed is refused: {again.refusal}"
        return None


def sealed(status: bytes, run: str, file: str, content: bytes | None) -> bytes:
    """Return a status that has the checksums of a changed file (runs/sums.py): CRC-32s that begin with the run's id."""

    def crc(text: bytes) -> str:
        return f"{zlib.crc32(run.rpartition('-')[2].encode() + text):08x}"

    if file == "status.json":
        status = content or b""
    elif content is not None:
        entry = rf'("{re.escape(file)}": \[\s*)\d+(,\s*")[0-9a-f]{{8}}'.encode()
        status = re.sub(entry, rb"\g<1>%d\g<2>%s" % (len(content), crc(content).encode()), status)
    head, found, _ = status.rpartition(b',\n "checksum": ')
    return head + f',\n "checksum": "{crc(head)}"\n}}\n'.encode() if found else status


def _zipped(members: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def repacked(members: dict[str, bytes]) -> bytes:
    """Return a packed study with the manifest of these members."""
    rest = {name: content for name, content in members.items() if name != MANIFEST}
    manifest = json.loads(members[MANIFEST])
    manifest["entries"] = {name: hashlib.sha256(content).hexdigest() for name, content in rest.items()}
    manifest["runs"] = len({name.split("/")[0] for name in rest if "/" in name})
    manifest["number_of_entries"] = len(rest)
    return _zipped({MANIFEST: json.dumps(manifest).encode(), **rest})


def is_fault(attack: Attack, outcome: str) -> bool:
    """Return whether an outcome must not be; a whole study may be refused only where it is one file, or its report
    cannot be written."""
    whole = (PACKED, MEMBER, "report/", ORDER)
    return outcome in ("traceback", "silently changed") or (outcome == "refused" and attack.target not in whole)


def fuzz(folder: Path, seed: int, mutations: int, only: int | None, say: Callable[[str], None]) -> "Counted":
    """Carry out so many attacks, or the `only` one."""
    fuzzed, counted = Fuzz(folder), Counted()
    for number in [only] if only else range(1, mutations + 1):
        chance = Random(f"{seed} {number}")
        attack = fuzzed.attack(chance)
        outcome, why = fuzzed.outcome(attack, chance)
        counted.add(attack, outcome)
        if is_fault(attack, outcome):
            line = f"--seed {seed} --only {number}: {attack.file}: {attack.done}: {outcome}: {why}"
            counted.faults.append(line)
            say(line)
        elif only:
            say(f"{attack.file}: {attack.done}: {outcome}: {why}")
    shutil.rmtree(folder / "outputs")
    return counted


class Counted:
    """Outcomes by file, and the faults among them."""

    def __init__(self) -> None:
        self.by_target: dict[str, Counter[str]] = defaultdict(Counter)
        self.faults: list[str] = []

    def add(self, attack: Attack, outcome: str) -> None:
        self.by_target[attack.target][outcome] += 1

    @property
    def total(self) -> int:
        """The number of attacks."""
        return sum(counts.total() for counts in self.by_target.values())

    def table(self) -> list[str]:
        """Return the outcomes as Markdown."""
        lines = [f"| file | mutations | {' | '.join(seen.CLASSES)} |", "|---" * (2 + len(seen.CLASSES)) + "|"]
        total: Counter[str] = Counter()
        for target in TARGETS:
            total += (counts := self.by_target[target])
            lines.append(f"| {target} | {counts.total()} | {' | '.join(str(counts[each]) for each in seen.CLASSES)} |")
        all_of = " | ".join(str(total[each]) for each in seen.CLASSES)
        return [*lines, f"| **all** | {total.total()} | {all_of} |"]
