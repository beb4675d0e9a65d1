"""Studies that somebody hostile made, by kind, and every command over them."""

import functools
import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from attacks import bombs, studies
from attacks.watched import Ended, command, watched
from normlab import report, runs
from normlab.common.errors import UserError

SECRET = "the-secret-of-this-machine"
ESCAPES = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
REPORTS = ("report", "status", "claims", "results", "pack", "verify")
VICTIM = ("norm=bn", "seed=0")
TRAIN = (*studies.SMALL, *VICTIM, f"study={studies.STUDY}")


class Scene:
    """A study in outputs/ of a folder, and precious files beside it, which nobody may touch or show."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.outputs, self.precious = folder, folder / "outputs", folder / "precious"
        self.study = self.outputs / studies.STUDY
        self.victim = next(path for path in runs.find(self.study) if "-bn-b8-s0" in path.name)
        self.other = next(path for path in runs.find(self.study) if "-bn-b8-s1" in path.name)

    def text(self, file: str) -> str:
        return (self.victim / file).read_text()

    def write(self, file: str, content: str | bytes) -> None:
        path = self.victim / file
        path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)

    def edit(self, file: str, change: Callable[[Any], Any]) -> None:
        """Change what a JSON or YAML file of the victim holds; each row of one of rows."""
        if file.endswith(".yaml"):
            value = bombs.yaml_of(self.text(file))
            self.write(file, bombs.to_yaml(change(value) or value))
        elif file.endswith(".jsonl"):
            rows = [json.loads(line) for line in self.text(file).splitlines()]
            self.write(file, "".join(json.dumps(change(row) or row) + "\n" for row in rows))
        else:
            value = json.loads(self.text(file))
            self.write(file, json.dumps(change(value) or value))


@dataclass
class Kind:
    """A kind of attack.

    Attributes:
        make: what it does to the scene.
        told: the report has to name the victim.
        reports: the report has to be made (exit status 0).
        commands: of report.py, by default all.
        train: the command that trains, too.
    """

    name: str
    make: Callable[[Scene], object]
    told: bool = False
    reports: bool = True
    commands: Sequence[str] = REPORTS
    imports: bool = False
    train: bool = False
    check: Callable[[Scene], Iterable[str]] | None = None  # in place of all these


def replaced(path: Path, by: Callable[[Path], object]) -> None:
    """Put something else in the place of a file or folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    by(path)


def bind(path: Path) -> None:
    """Make a socket; its path may be longer than one of a socket."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def of_links() -> Iterator[Kind]:
    """Links, pipes, sockets, devices and folders where files are expected."""
    special: dict[str, Callable[[Scene], Callable[[Path], object]]] = {
        "a link to a file of this machine": lambda scene: lambda path: path.symlink_to(scene.precious / "secret.txt"),
        "a link to another run's": lambda scene: lambda path: path.symlink_to(scene.other / path.name),
        "a link to nothing": lambda scene: lambda path: path.symlink_to(scene.precious / "new"),
        "a link to itself": lambda _: lambda path: path.symlink_to(path),
        "a pipe": lambda _: os.mkfifo,
        "a socket": lambda _: bind,
        "a link to /dev/zero": lambda _: lambda path: path.symlink_to("/dev/zero"),
        "a folder": lambda _: Path.mkdir,
    }
    files = ("config.yaml", "status.json", "metrics.jsonl", "probes/ics.jsonl", "provenance.json", "correct.json")
    for what, make in special.items():
        for file in (*files, "run.log", "run.claim", "run.lock"):
            yield Kind(
                f"{file} is {what}",
                lambda scene, file=file, make=make: replaced(scene.victim / file, make(scene)),
                told=file in files and not (file == "probes/ics.jsonl" and what == "a folder"),
                train=True,
            )
        for file in (".index.npz", "notes.md", "CITATION.cff"):
            yield Kind(
                f"{file} is {what}",
                lambda scene, file=file, make=make: replaced(scene.study / file, make(scene)),
            )
        for file in ("index.html", "report.md", "accuracy.csv", "accuracy.sources.json"):
            yield Kind(
                f"report/{file} is {what}",
                lambda scene, file=file, make=make: replaced(scene.study / "report" / file, make(scene)),
                reports=False,
            )
        for file in ("claims.md", "results.md"):
            yield Kind(
                f"outputs/{file} is {what}",
                lambda scene, file=file, make=make: replaced(scene.outputs / file, make(scene)),
            )
    for name in ("report", "probes", "the run's folder", "slurm"):
        yield Kind(
            f"{name} is a link to a folder of this machine",
            lambda scene, name=name: replaced(
                {"probes": scene.victim / "probes", "the run's folder": scene.victim}.get(name, scene.study / name),
                lambda path: path.symlink_to(scene.precious, target_is_directory=True),
            ),
            reports=name != "report",
            told=name == "probes",
        )
    yield Kind("report is a file", lambda s: replaced(s.study / "report", Path.touch), reports=False)
    yield Kind("figures of all studies is a link", lambda s: (s.outputs / "figures").symlink_to(s.precious))
    yield Kind("a link of the study to itself", lambda s: (s.study / "loop").symlink_to(s.study))
    yield Kind("a loop of two links", lambda s: [(s.study / a).symlink_to(s.study / b) for a, b in ("xy", "yx")])
    yield Kind("a link to the folder of studies", lambda s: (s.study / "up").symlink_to(s.outputs))
    yield Kind("a link of outputs to itself", lambda s: (s.outputs / "loop").symlink_to(s.outputs))
    yield Kind("a run as a link to another", lambda s: (s.study / "copy").symlink_to(s.other))
    yield Kind("a study as a link to itself", lambda s: (s.outputs / "me").symlink_to(s.outputs / "me"))
    yield Kind("a folder without rights", lambda s: s.victim.chmod(0))
    yield Kind(
        "the packed file is a link",
        lambda s: replaced(
            s.outputs / f"{studies.STUDY}.normlab.zip", lambda path: path.symlink_to(s.precious / "secret.txt")
        ),
    )


def of_sizes() -> Iterator[Kind]:
    """What is small on disk and large in memory, or deep, or many."""
    config = "config.yaml"
    for name, text in bombs.YAML.items():
        yield Kind(
            f"config.yaml: {name}", lambda s, text=text: s.write(config, s.text(config) + text), told=True, train=True
        )
    for name, make in bombs.INDEX.items():
        yield Kind(f".index.npz: {name}", lambda s, make=make: make(s.study / ".index.npz", s.study))
    for file in (
        "status.json",
        "metrics.jsonl",
        "probes/ics.jsonl",
        "provenance.json",
        "correct.json",
        "run.claim",
        "slurm/order.json",
    ):
        for name, text in bombs.JSON.items():
            told = file in ("status.json", "metrics.jsonl", "probes/ics.jsonl", "provenance.json", "correct.json")
            where = "../" if file.startswith("slurm") else ""
            yield Kind(
                f"{file}: {name}",
                lambda s, f=where + file, text=text: s.write(f, text()),
                told=told,
                train="/" not in file,
            )
    for name, rows in bombs.ROWS.items():
        for file in ("metrics.jsonl", "probes/ics.jsonl"):
            yield Kind(f"{file}: {name}", lambda s, f=file, rows=rows: s.write(f, rows()), told=True)
    yield Kind(
        "5,000 files of probes",
        lambda s: [s.write(f"probes/{i}.jsonl", '{"step": 1, "layer": "x"}\n') for i in range(5000)],
    )
    yield Kind("3,000 runs without anything", lambda s: [empty_run(s, f"run{i}") for i in range(3000)])
    yield Kind("notes of 200 MB", lambda s: s.write("../notes.md", b"x" * 200_000_000))
    yield Kind("a run.log of 200 MB", lambda s: s.write("run.log", b"WARNING x\n" * 20_000_000))
    yield Kind("a sparse file of 1 TB", lambda s: os.truncate(s.victim / "metrics.jsonl", 1 << 40), told=True)
    yield Kind(
        "a sparse status of 1 TB", lambda s: os.truncate(s.victim / "status.json", 1 << 40), told=True, train=True
    )
    yield Kind("a sparse index of 1 TB", lambda s: os.truncate(s.study / ".index.npz", 1 << 40))


def empty_run(scene: Scene, name: str) -> None:
    (scene.study / name).mkdir()
    (scene.study / name / "config.yaml").write_text("{}")


ODD = (*(None, True, -1, 7, 1e308, 10**400, math.inf, math.nan), *("0.99", "text", "", [1, 2], [[]], {"a": 1}, {}))
FIELDS = {
    "metrics.jsonl": "test_accuracy train_loss epoch step wall_seconds lr images_per_second",
    "probes/ics.jsonl": "step layer",
    "status.json": "state error epochs epoch steps wall_seconds heartbeat host pid parameters",
    "provenance.json": "versions git command device imported processes own_code data",
    "config.yaml": (
        "norm norm.name norm.eps model model.name dataset dataset.name probe probe.ics batch seed epochs norm_batch"
        " optimizer optimizer.lr format depth schedule study output_dir init sampler"
    ),
}
MAY_BE_NULL = ("norm_batch", "error", "depth", "data")
RECORDS = tuple(FIELDS)


def of_values() -> Iterator[Kind]:
    """Values of a wrong type, out of range, or of another run."""
    for file, names in FIELDS.items():
        for name in names.split():
            for value in ODD:
                if value is not None or name not in MAY_BE_NULL:
                    change = functools.partial(bombs.put, name=name, value=value)
                    make = functools.partial(Scene.edit, file=file, change=change)
                    yield Kind(f"{file}: {name} = {value!r:.20}", make, told=value != 7, commands=REPORTS[:2])
    for literal in bombs.YAML_VALUES:
        for name in ("batch", "norm.name", "optimizer.lr", "probe"):
            make = functools.partial(of_literal, name=name, literal=literal)
            yield Kind(f"config.yaml: {name} = {literal:.40}", make, told=True, commands=REPORTS[:2])
    for key in ("arm", "run", "state", "seed", "note", ""):
        for file in RECORDS:
            make = functools.partial(Scene.edit, file=file, change=lambda row, key=key: {**row, key: "x"})
            yield Kind(f"{file}: a key named {key!r}", make, told=True, commands=REPORTS[:2])
    for file in RECORDS:
        if file != "provenance.json":  # which runs of one command have in common
            yield Kind(f"{file} of another run", lambda s, f=file: shutil.copy(s.other / f, s.victim / f), told=True)
        flip = functools.partial(of_bytes, file=file, change=bombs.flipped)
        yield Kind(f"{file} with a flipped bit", flip, told=True)
    keys = b"1: 2\nnull: 3\n2020-01-01: 4\n? [1, 2]\n: 5\n"
    add = functools.partial(of_bytes, file="config.yaml", change=lambda content: content + keys)
    yield Kind("config.yaml: keys that are no text", add, told=True)
    edited: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "rows without columns": ("probes/ics.jsonl", lambda row: {"step": row["step"]}),
        "an edited setting": ("config.yaml", lambda config: config["optimizer"].update(lr=0.5)),
        "an edited accuracy": ("metrics.jsonl", lambda row: row.update(test_accuracy=0.99)),
    }
    yield Kind("no checksums, and an edited accuracy", without_sums, told=True)
    for name, (file, change) in edited.items():
        yield Kind(name, functools.partial(Scene.edit, file=file, change=change), told=True)


def without_sums(scene: Scene) -> None:
    scene.edit("status.json", lambda status: [status.pop(key, None) for key in ("files", "checksum")] and status)
    scene.edit("metrics.jsonl", lambda row: row.update(test_accuracy=0.99))


def of_literal(scene: Scene, name: str, literal: str) -> None:
    scene.write("config.yaml", bombs.with_literal(scene.text("config.yaml"), name, literal))


def of_bytes(scene: Scene, file: str, change: Callable[[bytes], bytes]) -> None:
    scene.write(file, change((scene.victim / file).read_bytes()))


TEXTS = {
    "escape sequences": "\x1b[31mred\x1b[0m\x1b]0;title\x07\x9b5m\x1b]8;;http://evil\x1b\\",
    "HTML": "<script>alert(1)</script><img src=x onerror=alert(1)>\"'><b>",
    "Markdown": "[x](javascript:alert(1)) | a | **b** `c` ![i](http://evil/x.png)",
    "a formula": '=HYPERLINK("http://evil")',
    "LaTeX": "$\\input{/etc/passwd}$ \\write18{ls} %",
    "directions and zero widths": "a\u202eb\u2066c\u200b",
    "lines": "one\ntwo\r\nthree\u2028four",
}


def of_texts() -> Iterator[Kind]:
    """Texts that a terminal, a browser, a spreadsheet or LaTeX would carry out."""
    places: dict[str, tuple[str, Callable[[Any, str], object]]] = {
        "the norm's name": ("config.yaml", lambda c, t: c["norm"].update(name=t)),
        "an option of the norm": ("config.yaml", lambda c, t: c["norm"].update(eps=t)),
        "the data set's name": ("config.yaml", lambda c, t: c["dataset"].update(name=t)),
        "the network's name": ("config.yaml", lambda c, t: c["model"].update(name=t)),
        "the optimizer's name": ("config.yaml", lambda c, t: c["optimizer"].update(name=t)),
        "a setting's name": ("config.yaml", lambda c, t: c["optimizer"].update({t: 1})),
        "the budget": ("config.yaml", lambda c, t: c.update(budget=t)),
        "the state": ("status.json", lambda c, t: c.update(state=t)),
        "the error of a failed run": ("status.json", lambda c, t: c.update(state="failed", error=t)),
        "the host": ("status.json", lambda c, t: c.update(state="running", host=t)),
        "the heartbeat": ("status.json", lambda c, t: c.update(state="running", heartbeat=t)),
        "what a run is doing": ("status.json", lambda c, t: c.update(state="running", doing=t)),
        "the device": ("provenance.json", lambda c, t: c.update(device=t)),
        "the commit": ("provenance.json", lambda c, t: c["git"].update(commit=t)),
        "a version": ("provenance.json", lambda c, t: c["versions"].update(torch=t)),
        "a package": ("provenance.json", lambda c, t: c["versions"].update({t: "1"})),
        "the command": ("provenance.json", lambda c, t: c.update(command=[t, t])),
        "a source of imports": (
            "provenance.json",
            lambda c, t: c.update(imported={"source": t, "sha256": t, "time": t}),
        ),
        "a layer": ("probes/ics.jsonl", lambda c, t: c.update(layer=t)),
        "a column": ("metrics.jsonl", lambda c, t: c.update({t: 1.0})),
    }
    for what, text in TEXTS.items():
        for name, (file, change) in places.items():
            yield Kind(
                f"{what} as {name}", lambda s, f=file, c=change, t=text: s.edit(f, lambda value: c(value, t) and None)
            )
        clean = text.replace("/", "_").replace("\0", "")
        yield Kind(f"{what} as a run's folder", lambda s, t=clean: s.victim.rename(s.study / t))
        yield Kind(
            f"{what} as a probe's file",
            lambda s, t=clean: shutil.copy(s.victim / "probes/ics.jsonl", s.victim / f"probes/{t}.jsonl"),
        )
        yield Kind(f"{what} as another study", lambda s, t=clean: shutil.copytree(s.study, s.outputs / t))
        yield Kind(f"{what} in notes", lambda s, t=text: s.write("../notes.md", t))
        yield Kind(f"{what} in run.log", lambda s, t=text: s.write("run.log", f"2026-01-01 WARNING {t}\n"))
        yield Kind(f"{what} in run.claim", lambda s, t=text: hold(s, t))
        yield Kind(
            f"{what} in CITATION.cff",
            lambda s, t=text: s.write(
                "../CITATION.cff", json.dumps({"title": t, "authors": [{"name": t}], "license": t})
            ),
        )
        yield Kind(f"{what} in an import", lambda s, t=text: csv_of(s, t), imports=True)
    for name in (b"\xff\xfe", b"caf\xe9", b"a" * 250, b"-rf", b"=1+1", b".hidden", b"a b", b"*", b"$(ls)", b"~"):
        yield Kind(
            f"a run's folder named {name[:20]!r}",
            lambda s, n=name: s.victim.rename(s.study / os.fsdecode(n)),
        )
        yield Kind(
            f"a study named {name[:20]!r}",
            lambda s, n=name: shutil.copytree(s.study, s.outputs / os.fsdecode(n)),
        )


IMPORT = (
    "import",
    "source=hostile.csv",
    "set={dataset.name: digits, model.name: small, depth: 18, batch: 8, epochs: 2}",
    f"study={studies.STUDY}",
)


def hold(scene: Scene, text: str) -> None:
    """A run that seems to be trained by a process of another machine, whose names are this text."""
    scene.edit("status.json", lambda status: {**status, "state": "running"})
    claim = {"host": text, "machine": text, "pid": 1, "started": text, "job": text, "restarts": 0, "token": text}
    scene.write("run.claim", json.dumps(claim))


def csv_of(scene: Scene, arm: str) -> None:
    quoted = arm.replace('"', '""')
    (scene.folder / "hostile.csv").write_text(f'arm,seed,test_accuracy\n"{quoted}",0,0.5\n', newline="")


def of_imports() -> Iterator[Kind]:
    """Sources of an import that are no files of texts."""

    def source(make: Callable[[Path], object]) -> Callable[[Scene], object]:
        return lambda scene: make(scene.folder / "hostile.csv")

    special: dict[str, Callable[[Path], object]] = {
        "a pipe": os.mkfifo,
        "a socket": bind,
        "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "a link to itself": lambda path: path.symlink_to(path),
        "a folder of a pipe": lambda path: (path.mkdir(), os.mkfifo(path / "events.out.tfevents.1")),
        "a folder of /dev/zero": lambda path: (path.mkdir(), (path / "events.out.tfevents.1").symlink_to("/dev/zero")),
        "a folder of garbage": lambda path: (
            path.mkdir(),
            (path / "events.out.tfevents.1").write_bytes(os.urandom(5000)),
        ),
        "a folder that holds itself": lambda path: (path.mkdir(), (path / "loop").symlink_to(path)),
        "NULs": lambda path: path.write_bytes(bytes(1000)),
        "of 100,000 columns": lambda path: path.write_text(",".join(f"c{i}" for i in range(100_000)) + "\n1\n"),
        "a cell of 50 MB": lambda path: path.write_text("arm,test_accuracy\n" + "x" * 50_000_000 + ",0.5\n"),
        "a number of 5,000 digits": lambda path: path.write_text("arm,seed,test_accuracy\na," + "9" * 5000 + ",0.5\n"),
        "a sparse file of 1 TB": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
        "200,000 rows": lambda path: path.write_text(
            "arm,epoch,test_accuracy\n" + "".join(f"a,{i},0.5\n" for i in range(1, 200_001))
        ),
    }
    for name, make in special.items():
        yield Kind(f"source= is {name}", source(make), commands=(), imports=True, reports=False)


def kinds() -> list[Kind]:
    """Return all kinds that need no process of their own."""
    return [*of_links(), *of_sizes(), *of_values(), *of_texts(), *of_imports()]


class Scripts(HTMLParser):
    """What a page would carry out."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.scripts = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attrs:
            if name.startswith("on") or (value or "").strip().lower().startswith("javascript:"):
                self.found.append(f"{tag} {name}={value!r:.60}")


def carried_out(scene: Scene, names: Sequence[str]) -> dict[str, Ended]:
    """Carry out commands of report.py, all in one process unless it comes to a bad end."""
    ended = watched(lambda: [one_of(scene, name) for name in names])
    if not ended.fault:
        return {name: Ended(*each, 0.0) for name, each in zip(names, ended.value, strict=True)}
    if len(names) == 1:
        return {names[0]: ended}
    found: dict[str, Ended] = {}
    for name in names:
        found |= carried_out(scene, [name])
        if "still at work" in found[name].fault:
            break  # one is enough: the others would take as long
    return found


def one_of(scene: Scene, name: str) -> tuple[bool, str, str, str]:
    """Carry out one command; return whether it says that all is well, its refusal, the traceback and the output."""
    chosen, outputs, value, refusal, fault = report.options(figures=False), scene.outputs, None, "", ""
    calls: dict[str, Callable[[], object]] = {
        "report": lambda: report.build(studies.STUDY, outputs, chosen),
        "status": lambda: report.study_status(studies.STUDY, outputs, watch=False),
        "claims": lambda: report.build_claims(outputs, chosen),
        "results": lambda: report.build_results(outputs, outputs / "results.md", chosen),
        "pack": lambda: report.pack_study(studies.STUDY, outputs, replace=True),
        "verify": lambda: report.verify_study(studies.STUDY, outputs),
    }
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(output):
        try:
            value = calls[name]()
        except UserError as error:
            refusal = str(error)
        except MemoryError:
            raise  # of which the others have to be spared
        except Exception:
            fault = traceback.format_exc()
    return value is True, refusal, fault, output.getvalue()


class Hostile:
    """A scene that is made once, and put back before each kind."""

    def __init__(self, folder: Path, make: Callable[[Path], object] = studies.make) -> None:
        made = folder / "made"
        make(made)
        (made / "precious").mkdir()
        for name in ("secret.txt", "accuracy.md", "accuracy.csv", "old.sources.json", "old.csv", "index.html"):
            (made / "precious" / name).write_text(f"{SECRET} {name}\n")
        self.made, self.folder = made, folder / "scene"
        self.scripts = Scripts((made / "outputs" / studies.STUDY / "report/index.html").read_text()).scripts

    def problems(self, kind: Kind) -> list[str]:
        """Carry a kind out; return what is wrong, a sentence each."""
        if self.folder.exists():
            subprocess.run(["chmod", "-R", "u+rwx", self.folder], check=False, capture_output=True)
            shutil.rmtree(self.folder)
        shutil.copytree(self.made, self.folder)
        scene = Scene(self.folder)
        precious, wrong = studies.Tree(scene.precious), []
        victim = scene.victim.name
        kind.make(scene)
        if kind.imports:
            wrong += [
                f"import: {problem}"
                for problem in self.of_command(kind, "import", command(self.folder, "report.py", *IMPORT))
            ]
        if kind.check:
            return [*kind.check(scene), *(f"{path} outside of the study was changed" for path in precious.changed())]
        for name, ended in carried_out(scene, kind.commands).items():
            wrong += [f"{name}: {problem}" for problem in self.of_command(kind, name, ended)]
            if name == "report" and kind.told and not ended.fault and victim not in ended.output + ended.refusal:
                wrong.append("report: no sentence names the run")
            if name == "verify" and kind.told and ended.value:
                wrong.append("verify: all is said to be well")
        if kind.train:
            ended = command(self.folder, "train.py", *TRAIN, PYTHONPATH=str(studies.ROOT / "tests"))
            wrong += [f"train: {problem}" for problem in self.of_command(kind, "train", ended)]
        wrong += [f"{path} outside of the study was changed" for path in precious.changed()]
        return [*wrong, *self.of_pages(scene)]

    def of_command(self, kind: Kind, name: str, ended: Ended) -> Iterator[str]:
        if ended.fault:
            yield ended.cause
        elif ended.refusal and kind.reports and name in ("report", "status"):
            yield f"refused: {ended.refusal.strip()[-200:]}"
        elif found := ESCAPES.search(ended.output.replace("\r", "")):
            yield f"it prints {found[0]!r}"
        if SECRET in ended.output:
            yield "it prints a file from outside of the study"

    def of_pages(self, scene: Scene) -> Iterator[str]:
        for path in [
            *scene.outputs.rglob("*.html"),
            *scene.outputs.rglob("*.md"),
            *scene.outputs.rglob("report/*.csv"),
        ]:
            if (
                path.is_symlink()
                or not path.is_file()
                or path.name == "notes.md"
                or path.resolve().is_relative_to(scene.precious)
            ):
                continue
            text, name = path.read_text(errors="replace"), path.name
            if SECRET in text:
                yield f"{name} shows a file from outside of the study"
            if name.endswith((".md", ".csv")) and (found := ESCAPES.search(text.replace("\r", ""))):
                yield f"{name} has {found[0]!r}"
            if name.endswith(".html"):
                page = Scripts(text)
                yield from (f"{name} has {each}" for each in page.found)
                if page.scripts > self.scripts:
                    yield f"{name} has {page.scripts} scripts"
                if "\x1b" in text:
                    yield f"{name} has an escape sequence"
            if name.endswith(".md") and "](javascript:" in text.replace("\\]", ""):
                yield f"{name} has a link that runs a script"
            if name.endswith(".csv") and re.search(r"(?m)(^|,)\"?[=@]", text):
                yield f"{name} has a formula"


def hostile(
    folder: Path, only: str | None, say: Callable[[str], None], more: Iterable[Callable[[], Iterator[Kind]]] = ()
) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Carry out all kinds, or those whose name has `only`.

    Returns:
        By family the number of kinds and of those with a fault; what is wrong, a sentence each.
    """
    scene, wrong, counts = Hostile(folder), [], {}
    for family in (of_links, of_sizes, of_values, of_texts, of_imports, *more):
        chosen = [kind for kind in family() if not only or only in kind.name]
        faulty = 0
        for kind in chosen:
            found = [f"{kind.name}: {problem}" for problem in scene.problems(kind)]
            faulty += bool(found)
            wrong += found
            for problem in found:
                say(problem)
        counts[(family.__doc__ or "").strip().rstrip(".")] = len(chosen), faulty
    return counts, wrong
