"""Whether a record is what one run wrote: every change of every file is told, and no interruption is taken for one."""

import itertools
import json

import pytest

from normlab import runs
from normlab.common.errors import UserError
from normlab.report.study import load
from normlab.runs import files
from normlab.runs.correct import as_json

FILES = ("config.yaml", "status.json", "metrics.jsonl", "provenance.json", "correct.json", "probes/ics.jsonl")


def recorded(config, state: str = "done") -> runs.Run:
    run, loss = runs.Run(config.as_dict()), 1.0 + config.seed
    run.freeze()
    with run.lock():
        run.write_status("running")
        run.keep_rows_until(0, 0)
        run.write_provenance({"device": "a processor"})
        for epoch in (1, 2):
            run.append_metrics({"epoch": epoch, "step": 2 * epoch, "test_accuracy": 0.25 * epoch, "test_loss": loss})
        run.append_probe("ics", [{"step": 0, "layer": "fc", "l2": loss}])
        run.write_correct(as_json("0" * 64, ("cat", "dog"), (3, 5), bytes([(0xF0, 0x0F)[config.seed % 2]])))
        run.write_status(state, epoch=2, epochs=2)
    return run


@pytest.fixture
def two(make) -> list[runs.Run]:
    """Two runs of a cell."""
    return [recorded(make("epochs=2", f"seed={seed}")) for seed in (0, 1)]


def states(run: runs.Run) -> tuple[list[str], str]:
    study = load(run.folder.parent)
    return list(study.runs["state"]), " ".join(study.warnings)


def test_an_untouched_record_is_believed(two) -> None:
    assert states(two[0]) == (["done", "done"], "")
    assert load(two[0].folder.parent).unchecked == []
    assert [runs.check(run.folder) for run in two] == ["", ""]
    assert [run.state for run in two] == ["done", "done"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("state", ["done", "interrupted"])
def test_every_flipped_byte_is_told(make, file, state) -> None:
    run = recorded(make("epochs=2"), state)
    path = run.folder / file
    whole = path.read_bytes()
    for place, bit in zip(range(0, len(whole), 1 + len(whole) // 40), itertools.cycle((1, 4, 32)), strict=False):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        said = runs.check(run.folder)
        assert said.startswith(str(path)), (place, bit, said)


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_run_and_one_that_is_missing_are_told(two, file) -> None:
    first, second = (run.folder / file for run in two)
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    assert states(two[0])[0].count("unreadable") == (file != "provenance.json")  # equal, and so no other's
    assert str(first) in states(two[0])[1] or file == "provenance.json"
    first.unlink()
    found, said = states(two[0])
    assert (found.count("unreadable"), found.count("done")) == (1, 1)
    assert file in said
    first.write_bytes(kept)
    assert states(two[0]) == (["done", "done"], "")


def test_a_file_that_the_run_did_not_write_is_told(two) -> None:
    (two[0].folder / "probes" / "affine.jsonl").write_text('{"step": 0, "layer": "fc"}\n')
    assert "probes/affine.jsonl is no file that the run wrote" in states(two[0])[1]


def test_a_run_that_was_given_its_rows_by_somebody_is_told_in_any_state(make, two) -> None:
    run = runs.Run(make("epochs=2", "seed=3").as_dict())
    run.freeze()
    run.write_status("interrupted")
    (run.folder / "metrics.jsonl").write_bytes((two[0].folder / "metrics.jsonl").read_bytes())
    assert "is no file that the run wrote" in runs.check(run.folder)


@pytest.mark.parametrize(
    ("file", "old", "new"), [("config.yaml", "batch: 128", "batch: 64"), ("status.json", "done", "failed")]
)
def test_of_a_record_of_an_earlier_format_the_name_of_the_folder_still_tells(make, file, old, new) -> None:
    run = recorded(make("epochs=2"))
    status = json.loads((run.folder / "status.json").read_text())
    for name in ("files", "checksum"):
        del status[name]
    files.write_json(run.folder / "status.json", status)
    study = load(run.folder.parent)
    assert (study.warnings, len(study.unchecked), study.states()["done"]) == ([], 1, 1)
    path = run.folder / "config.yaml"
    path.write_text(path.read_text().replace("batch: 128", "batch: 64"))
    assert "config.yaml describes another run than the name of its folder says" in states(run)[1]


def test_rows_that_came_after_the_last_status_are_read_and_nothing_is_said(make, monkeypatch) -> None:
    """A process that was killed between a row and its next status."""
    run = recorded(make("epochs=3"), "running")
    with run.lock():
        run.append_metrics({"epoch": 3, "step": 6, "test_accuracy": 0.75, "test_loss": 1.0})
        run.append_probe("affine", [{"step": 5, "layer": "fc"}])
    assert runs.check(run.folder) == ""
    again = runs.Run(run.config)
    with again.lock():
        again.write_status("running")
        assert again.keep_rows_until(6, 6) == []
        again.write_status("done", epoch=3, epochs=3)
    assert states(run) == (["done"], "")
    assert load(run.folder.parent).evaluations["epoch"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("writes", range(1, 9))
def test_a_process_killed_at_any_write_leaves_a_record_that_nothing_is_wrong_with(make, monkeypatch, writes) -> None:
    run, left = recorded(make("epochs=3"), "running"), itertools.count(writes, -1)

    class Killed(BaseException):
        pass

    def killed(*args, write, **options):
        if next(left) <= 0:
            raise Killed
        return write(*args, **options)

    for module, name in ((files, "write_atomically"), (files, "open_to_append")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, original=original, **o: killed(*a, write=original, **o))
    again = runs.Run(run.config)
    try:
        with again.lock():
            again.write_status("running")
            again.keep_rows_until(2, 0)
            again.write_provenance({"device": "another processor"})
            again.append_metrics({"epoch": 2, "step": 4, "test_accuracy": 0.75, "test_loss": 1.0})
            again.append_probe("affine", [{"step": 5, "layer": "fc"}])
            again.write_status("running")
    except Killed:
        pass
    assert runs.check(run.folder) == ""


@pytest.mark.parametrize("file", FILES)
def test_a_finished_run_that_was_changed_is_carried_out_again(make, file) -> None:
    run = recorded(make("epochs=2"))
    path = run.folder / file
    path.write_bytes(
        path.read_bytes()
        .replace(b"1.0", b"2.0")
        .replace(b"a proc", b"b proc")
        .replace(b'h": 2', b'h": 1')
        .replace(b"cat", b"kat")
    )
    if file == "config.yaml":
        path.write_text(path.read_text() + "# edited\n")
    assert (run.state, run.over) == ("failed", False)
    run.freeze()
    with run.lock():
        run.write_status("running")
        said = run.keep_rows_until(0, 0)
        assert file in ("config.yaml", "status.json") or str(path) in said[0]
    assert runs.check(run.folder) == ""


def test_a_copy_of_a_run_under_another_name_is_told(two) -> None:
    copy = two[0].folder.with_name("a-copy")
    two[0].folder.rename(copy)
    with pytest.raises(UserError, match="lies in the folder of another"):
        runs.read_record(copy)


def test_a_zero_below_zero_is_zero(make) -> None:
    config = make().as_dict()
    zero, below = ({**config, "optimizer": {**config["optimizer"], "weight_decay": value}} for value in (0.0, -0.0))
    assert runs.run_id(zero) == runs.run_id(below)


def test_an_edit_of_how_a_run_is_carried_out_is_replaced(make) -> None:
    run = recorded(make("epochs=2"), "interrupted")
    path = run.folder / "config.yaml"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"quiet: false", b"quiet: true"))
    assert path.read_bytes() != whole
    run.freeze()
    assert path.read_bytes() == whole
