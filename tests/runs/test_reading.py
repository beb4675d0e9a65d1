"""Reading a study that may come from anybody: whatever bytes, links, FIFOs and folders lie there, in a sentence."""

import json
import os
import re
import stat
from pathlib import Path

import pytest

from normlab import runs
from normlab.common.errors import UserError
from normlab.report.study import load
from normlab.report.study.status import Survey
from normlab.runs import lock, reading
from normlab.runs.correct import as_json
from normlab.runs.files import write_atomically

ROOT = Path(__file__).parents[2] / "src" / "normlab"
READS = re.compile(r"\.(read_text|read_bytes|open|rglob|glob)\(|\bopen\(|json\.loads?\(|yaml\.\w*load|np\.load\(")
OUTSIDE = {  # which read the package's own files, or what the user names on the command line
    *("runs/reading.py", "runs/archive.py", "runs/lock.py", "runs/files.py", "report/pack.py", "report/importing.py"),
    *(
        "report/study/find.py",
        "report/study/index.py",
        "report/write.py",
        "report/claims/claims.py",
        "report/adding.py",
    ),
    *("report/adding.py", "report/figures/style.py", "report/render/description.py", "report/render/html/contents.py"),
}


def test_files_of_a_study_are_read_in_one_place() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for part in ("runs", "report")
        for path in (ROOT / part).rglob("*.py")
        if READS.search(path.read_text())
    }
    assert found <= OUTSIDE


@pytest.fixture
def run(make) -> runs.Run:
    run = runs.Run(make("epochs=2").as_dict())
    run.freeze()
    run.write_status("running")
    run.write_provenance({"device": "a processor"})
    for epoch in (1, 2):
        run.append_metrics({"epoch": epoch, "step": 2 * epoch, "test_accuracy": 0.5, "test_loss": 1.0})
    run.append_probe("ics", [{"step": 0, "layer": "fc", "l2": 1.0}])
    run.write_correct(as_json("0" * 64, ("cat", "dog"), (3, 5), b"\xf0"))
    run.write_status("done", epoch=2, epochs=2)
    return run


def told(run: runs.Run) -> str:
    """What the report says of a study of this run alone."""
    study = load(run.folder.parent)
    states = set(study.runs["state"])
    assert states <= {"unreadable", "done", "planned", "missing"}
    return "\n".join(study.warnings)


FILES = ("config.yaml", "status.json", "metrics.jsonl", "provenance.json", "correct.json", "probes/ics.jsonl")


def linked(path: Path) -> None:
    elsewhere = path.parents[3] / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def looping(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def endless(path: Path) -> None:
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)  # which takes no room on the disk


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("made", [linked, looping, a_fifo, a_folder, endless])
def test_what_is_no_file_of_a_record_is_told_and_neither_followed_nor_waited_for(run, file, made) -> None:
    made(run.folder / file)
    text = told(run)
    assert str(run.folder / file) in text
    why = {linked: "it is a link", looping: "it is a link", a_folder: "it is a folder", endless: "at most"}
    assert why.get(made, "it is no file") in text


def test_hidden_files_that_a_system_keeps_beside_others_are_no_part_of_a_record(run) -> None:
    (run.folder / "probes" / "._ics.jsonl").write_bytes(b"\0\5\26\7")
    assert not told(run)


def test_measurements_of_a_run_without_a_status_are_told(run) -> None:
    for name in ("status.json", "metrics.jsonl"):
        (run.folder / name).unlink()
    assert "status.json is missing, and rows are there" in told(run)


@pytest.mark.parametrize("claim", [linked, looping, a_fifo, a_folder])
def test_a_claim_that_is_no_file_is_waited_for_by_nobody(run, claim) -> None:
    path = run.folder / lock.CLAIM
    path.write_text("{")
    claim(path)
    found = lock.holder(run.folder)
    assert found is not None
    assert found.host == "an unknown host"
    assert not run.over


def test_a_link_is_no_run_and_a_loop_of_links_hides_no_other(run, tmp_path) -> None:
    study = run.folder.parent
    (study / "bn-elsewhere").symlink_to(run.folder)
    (study / "loop").symlink_to("loop")
    odd = study / os.fsdecode(b"odd-\xff\x1b[31m")
    odd.mkdir()
    (odd / "config.yaml").write_text("")
    found = load(study)
    notes = dict(zip(found.runs["run"], found.runs["note"], strict=True))
    assert found.states() | {"unreadable": 3, "done": 1} == found.states()
    assert "it is a link, and links are not followed" in notes["bn-elsewhere"]
    assert "it is a link, and links are not followed" in notes["loop"]
    assert "its name has characters that cannot be shown" in notes[r"odd-\udcff\x1b[31m"]
    assert all(note.isprintable() for note in notes.values())
    assert [each.state for each in Survey(study).read()].count("unreadable") == 3


def test_folders_of_half_a_record_are_told(run) -> None:
    (run.folder / "status.json").unlink()
    assert "status.json is missing, and rows are there" in told(run)
    other = run.folder.with_name("other")
    other.mkdir()
    (run.folder / "config.yaml").rename(other / "config.yaml")  # a study has a configuration
    assert f"{run.folder / 'config.yaml'} cannot be read: No such file" in " ".join(
        load(run.folder.parent).runs["note"]
    )


DEEP = "[" * 100_000
HOSTILE = {
    "config.yaml": [
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
        "a: &a {k: 1}\nb: {<<: [*a, *a]}\n",
        f"a: {DEEP}",
        "a: 2026-01-01\n",
        "a: !!binary aGk=\n",
        "a: !!set {b, c}\n",
        "1: b\n",
        f"batch: {'9' * 100_000}\n",
        "a: 1" + ":1" * 100_000,
        "a: !!bool what\n",
        "- a\n",
        "\0",
        "norm: 3\n",
        "norm: {name: {a: b}}\nmodel: {name: a}\ndataset: {name: a}\nbatch: 8\nseed: 0\nepochs: 1\n",
        "norm: {name: bn}\nmodel: {name: a}\ndataset: {name: a}\nbatch: 8\nseed: 0\nepochs: 1\nprobe: 3\n",
        "norm: {name: bn}\nmodel: {name: a}\ndataset: {name: a}\nbatch: -8\nseed: 0\nepochs: 1\n",
        "norm: {name: bn}\nmodel: {name: a}\ndataset: {name: a}\nbatch: 8\nseed: 0\nepochs: [1, 2]\n",
    ],
    "status.json": [
        '{"state": "done", "a": ' + DEEP,
        '{"state": "done", "test_accuracy": 7}',
        '{"state": "done", "step": 1' + "0" * 5000 + "}",
        '{"state": ["done"]}',
        '{"state": "done", "wall_seconds": 1e999}',
        '{"state": "done", "wall_seconds": NaN}',
        "[]",
        "\xff\xfe",
    ],
    "provenance.json": ['{"versions": ' + DEEP, '{"git": 7}', '{"versions": {"torch": [1]}}', "[]", '{"earlier": [3]}'],
}


@pytest.mark.parametrize(("file", "content"), [(file, text) for file, texts in HOSTILE.items() for text in texts])
def test_hostile_contents_cost_their_run_in_a_sentence(run, file, content) -> None:
    (run.folder / "status.json").write_text('{"state": "done"}')  # a record without checksums, as of earlier versions
    (run.folder / file).write_bytes(content.encode("latin-1"))
    text = told(run)
    assert f"{run.folder / file}" in text
    assert len(text) < 2000


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"test_accuracy": 7}, "test_accuracy is 7: expected a number from 0 to 1, or null"),
        ({"test_accuracy": True}, "test_accuracy is True"),
        ({"test_accuracy": "0.99"}, "test_accuracy is '0.99'"),
        ({"test_accuracy": [0.5]}, "test_accuracy is [0.5]"),
        ({"test_loss": 10**400}, "test_loss is 1000"),
        ({"test_loss": -1.7e308}, "test_loss is -1.7e+308"),
        ({"step": -1}, "step is -1"),
        ({"step": 1}, "step is 1, after 2"),
        ({"epoch": 10**30}, "epoch is 10000"),
        ({"epoch": True}, "epoch is True"),
        ({"epoch": None}, "epoch is None"),
        ({"wall_seconds": -1.0}, "wall_seconds is -1.0"),
        *(({key: 1}, f"'{key}' is no name of a column") for key in ("run", "setting", "arm", "batch", "seed", "state")),
        ({"a b": 1}, "'a b' is no name of a column"),
    ],
)
def test_a_value_that_no_run_writes_is_left_out_with_its_line(run, row, why) -> None:
    path = run.folder / "metrics.jsonl"
    path.write_text(
        '{"epoch": 1, "step": 2, "test_accuracy": 0.5}\n' + json.dumps({"epoch": 2, "step": 4} | row) + "\n"
    )
    rows, (warning,) = runs.read_metrics(run.folder)
    assert len(rows) == 1
    assert f"metrics.jsonl, line 2 cannot be read and is left out: {why}" in warning


@pytest.mark.parametrize(
    "values",
    [
        {"layer": ["a"]},
        {"layer": "\x1b[31m"},
        {"position": -1},
        {"l2": [[1.0]]},
        {"histogram": [1, 2], "edges": [0.0]},
        {"histogram": [], "edges": []},
        {"histogram": [1], "edges": [0.0, 0.0]},
    ],
)
def test_a_measurement_that_no_probe_writes_is_left_out(run, values) -> None:
    path = run.folder / "probes" / "ics.jsonl"
    path.write_text('{"step": 0, "layer": "fc"}\n' + json.dumps({"step": 1, "layer": "fc"} | values) + "\n")
    rows, (warning,) = runs.read_rows(path)
    assert len(rows) == 1
    assert "probes/ics.jsonl, line 2 cannot be read and is left out: " in warning


@pytest.mark.parametrize("number", ["Infinity", "NaN", "-Infinity", "1e999", "[" * 50_000])
def test_what_is_no_number_is_none_in_a_row(run, number) -> None:
    (run.folder / "metrics.jsonl").write_text(f'{{"epoch": 1, "step": 2, "test_loss": {number}}}\n')
    rows, warnings = runs.read_metrics(run.folder)
    assert (rows, len(warnings)) == ([], 1)


def test_a_file_of_faults_takes_bounded_time_and_room(run) -> None:
    (run.folder / "metrics.jsonl").write_text("x\n" * 300_000)
    rows, warnings = runs.read_metrics(run.folder)
    assert (rows, len(warnings)) == ([], 101)
    (run.folder / "metrics.jsonl").write_text("10\r" * 300_000)  # one line of JSON
    assert len(runs.read_metrics(run.folder)[1]) == 1
    (run.folder / "metrics.jsonl").write_text('{"epoch": 1, "step": 1, "a": [' + "[]," * 2_500_000)
    with pytest.raises(UserError, match="too many lists"):
        runs.read_metrics(run.folder)


@pytest.mark.parametrize("mask", [0o077, 0o002])
def test_a_file_has_the_mode_that_the_umask_says(tmp_path, mask) -> None:
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "file", lambda file: file.write(b""))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("text", ["abc", "", "-1", "9" * 5000, "²"])
def test_a_count_of_restarts_that_is_none_counts_as_none(monkeypatch, text) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", text)
    assert lock.Holder.myself().restarts == 0


def test_a_value_from_disk_is_shown_on_one_line() -> None:
    assert reading.shown("a\x1b[31m\n\udcff") == r"a\x1b[31m\n\udcff"
    assert len(reading.shown("x" * 10**6)) < 400
