"""Results made elsewhere, from a file that a test writes to the report that a user reads."""

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from normlab import report, runs
from normlab.common.errors import UserError
from normlab.report import importing
from normlab.report.analysis.metrics import ACCURACY
from normlab.report.analysis.tables import build_tables
from normlab.report.claims.judge import judge
from normlab.report.importing import import_runs
from normlab.report.study.load import load

OPTIONS = report.options()
WHERE = {"dataset.name": "cifar10", "model.name": "resnet", "depth": 18, "batch": 128, "epochs": 20}
DIGITS = {"dataset.name": "digits", "model.name": "resnet", "depth": 18, "batch": 8, "epochs": 3}
TWO = WHERE | {"epochs": 2}
NAMES = {"arm": "Method", "test_accuracy": "Acc. (%): best", "batch": "size"}
LIGHTNING = {"test_loss": "val_loss", "test_accuracy": "val_acc", "train_loss": "loss"}
TAG = {"test_accuracy": "val/acc"}
WITHOUT_BATCH = {key: value for key, value in WHERE.items() if key != "batch"}
DIGITS_WITHOUT_BATCH = {key: value for key, value in DIGITS.items() if key != "batch"}


@pytest.fixture
def bring(tmp_path, capsys):
    """`bring("arm,...", percent=True)`: import a CSV file of this text into outputs/study; what it prints."""

    def run(text: str | bytes, name: str = "results.csv", study: str = "study", **wanted) -> str:
        source = tmp_path / name
        source.write_bytes(text if isinstance(text, bytes) else text.encode())
        import_runs(study, tmp_path / "outputs", {"source": str(source), **wanted})
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(bring):
    """The same for what is refused: the sentence. Nothing may have been written."""

    def run(text: str | bytes, **wanted) -> str:
        with pytest.raises(UserError) as error:
            bring(text, **{"set": WHERE, **wanted})
        assert len(str(error.value).splitlines()) <= 5
        return str(error.value)

    return run


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def means(study: Path) -> dict[tuple[str, int], float]:
    """The accuracy table's."""
    [accuracy, *_] = build_tables(load(study), ACCURACY, None, (), 0.95)
    rows = accuracy.tidy.dropna(subset=["mean"])
    return dict(zip(zip(rows["arm"], rows["batch"], strict=True), rows["mean"], strict=True))


SHORT = """arm,seed,batch,test_accuracy,train_accuracy
mine,0,32,0.90,0.99
mine,1,32,0.94,0.98
mine,0,64,0.80,
theirs,0,32,0.50,0.6
"""


def test_a_row_per_run_is_in_the_accuracy_table_with_exactly_its_means(bring, study):
    told = bring(SHORT, set=WITHOUT_BATCH)
    assert "4 runs for study study: 4 new, 0 replaced, 0 there already" in told
    assert told.endswith(f"report.py study=study output_dir={study.parent}\n")
    assert means(study) == pytest.approx({("mine", 32): 92.0, ("mine", 64): 80.0, ("theirs", 32): 50.0}, abs=1e-12)


@pytest.mark.slow
def test_imported_arms_stand_in_one_table_with_the_study_s_own(bring, add_run, study):
    for batch, lr in ((8, 0.1), (32, 0.4)):
        for seed in (0, 1):
            add_run("bn", batch, seed, optimizer__lr=lr)
    where = DIGITS_WITHOUT_BATCH
    bring("arm,seed,batch,test_accuracy\nmine,0,8,0.5\nmine,1,8,0.6\nmine,0,32,0.7\n", set=where)
    found = load(study)
    assert found.runs["setting"].unique().tolist() == ["digits, resnet18"]
    assert means(study) == pytest.approx({("bn", 8): 90.0, ("bn", 32): 90.0, ("mine", 8): 55.0, ("mine", 32): 70.0})
    made = of(found, "mine", 8)
    assert len(made) == 2
    assert all("optimizer" not in found.configs[run] for run in made)  # what the source lacks stays unknown
    assert found.provenance[made[0]]["imported"]["source"] == "results.csv"
    page = report.build("study", study.parent, OPTIONS)  # with its figures
    assert "Arm mine: 3 runs were made elsewhere and imported from results.csv" in page.read_text()


def of(study, arm: str, batch: int) -> list[str]:
    """The names of the runs of a cell."""
    return list(study.finished.query("arm == @arm and batch == @batch")["run"])


def test_an_imported_arm_of_a_known_name_is_told_apart_from_the_trained_one(bring, add_run, study):
    trained = add_run("bn", 8, 0)
    before = files_of(trained)
    bring("arm,test_accuracy\nbn,0.3\n", set=DIGITS)
    assert means(study) == pytest.approx({("bn", 8): 90.0, ("bn (imported)", 8): 30.0})
    assert files_of(trained) == before


def test_the_same_source_again_changes_nothing(bring, study):
    bring(SHORT, set=WITHOUT_BATCH)
    before = files_of(study)
    told = bring(SHORT, name="renamed.csv", set=WITHOUT_BATCH)
    assert "0 new, 0 replaced, 4 there already" in told
    assert "Nothing was changed." in told
    assert files_of(study) == before
    assert not [path for path in study.iterdir() if path.name.startswith(".")]


def test_another_value_of_the_same_run_is_refused_and_replaced_only_when_told_to(bring, refused, study):
    bring("arm,seed,test_accuracy\nmine,0,0.5\nmine,1,0.6\n", set=WHERE)
    before = files_of(study)
    changed = "arm,seed,test_accuracy\nmine,0,0.5\nmine,1,0.7\nmine,2,0.8\n"
    message = refused(changed)
    assert "1 of 3 runs of results.csv are in" in message
    assert "replace=true" in message
    assert files_of(study) == before  # the new one is not written either
    assert "1 new, 1 replaced, 1 there already" in bring(changed, set=WHERE, replace=True)
    assert means(study) == pytest.approx({("mine", 128): 100 * (0.5 + 0.7 + 0.8) / 3})


def test_a_damaged_imported_run_is_replaced_only_when_told_to(bring, refused, study):
    text = "arm,test_accuracy\nmine,0.5\n"
    bring(text, set=WHERE)
    (run,) = runs.find(study)
    (run / "metrics.jsonl").write_text("{")
    assert "replace=true" in refused(text)
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    assert "replace=true" in refused(text)
    bring(text, set=WHERE, replace=True)
    assert means(study) == pytest.approx({("mine", 128): 50.0})


def test_a_folder_that_was_not_imported_is_left_alone_even_if_it_has_the_name_of_an_import(bring, refused, study):
    bring("arm,test_accuracy\nmine,0.5\n", set=WHERE)
    (run,) = runs.find(study)
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["norm"]["imported"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    before = files_of(study)
    assert "is no imported run, and is left alone" in refused("arm,test_accuracy\nmine,0.7\n", replace=True)
    assert files_of(study) == before


def test_nothing_is_written_when_the_disk_refuses(bring, refused, study, monkeypatch):
    bring("arm,test_accuracy\nmine,0.5\n", set=WHERE)
    before = files_of(study)
    written = []

    def full(path, *_, **__):
        written.append(path)
        if len(written) > 5:
            raise UserError("Cannot write.\nThe disk is full.")
        path.write_text("{}")

    monkeypatch.setattr("normlab.runs.files.write_json", full)
    rows = "".join(f"mine,{seed},0.5\n" for seed in range(1, 9))
    assert "The disk is full" in refused(f"arm,seed,test_accuracy\n{rows}")
    assert files_of(study) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("at", [1, 2, 4, 5])  # of the moves away and into place
def test_what_was_there_is_there_again_if_a_replacement_stops_halfway(at, error, bring, study, tmp_path, monkeypatch):
    rows = "".join(f"mine,{seed},0.5\n" for seed in range(3))
    bring(f"arm,seed,test_accuracy\n{rows}", set=WHERE)
    before = files_of(study)
    rename, made = Path.rename, []

    def stops(path, target):
        made.append(path)
        if len(made) == at:
            raise error("stopped")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stops)
    with pytest.raises((KeyboardInterrupt, UserError)):
        bring(f"arm,seed,test_accuracy\n{rows.replace('0.5', '0.6')}", set=WHERE, replace=True)
    monkeypatch.undo()
    assert files_of(study) == before


@pytest.mark.parametrize("arm", ["../x", "/etc/passwd", "..", ".hidden", "a b (c) | d", "名前", "x" * 60, "none", "-5"])
def test_any_name_of_an_arm_makes_a_folder_inside_the_study_and_is_shown_as_it_is(arm, bring, study, tmp_path):
    bring(f"arm,test_accuracy\n{arm},0.5\n", set=WHERE)
    (run,) = runs.find(study)
    assert run.parent == study
    assert run.name.isascii()
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.iterdir()} == {"outputs", "results.csv"}
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["study"]
    assert means(study) == pytest.approx({(arm, 128): 50.0})


def test_arms_that_differ_in_what_a_folder_s_name_cannot_say_are_two(bring, study):
    bring("arm,test_accuracy\na/b,0.5\na:b,0.7\n", set=WHERE)
    assert means(study) == pytest.approx({("a/b", 128): 50.0, ("a:b", 128): 70.0})


@pytest.mark.parametrize("arm", ["<script>alert(1)</script>", "x" * 61, r"$\frac", "a\x1b[31m", '"a\nb"'])
def test_a_name_that_a_page_or_figure_would_read_as_code_is_refused(arm, refused):
    assert "results.csv, line 2: arm=" in refused(f"arm,test_accuracy\n{arm},0.5\n")


@pytest.mark.parametrize("study_name", ["../x", "/x", "a//b", ".x", "x\n", None])
def test_a_study_cannot_lie_outside_of_the_outputs(study_name, bring):
    with pytest.raises(UserError, match=r"^study=[^=]* is not valid: (use letters|expected text)"):
        bring("arm,test_accuracy\nmine,0.5\n", study=study_name, set=WHERE)


READ = [  # text, settings, what is printed, and columns of the evaluations
    (
        "arm,seed,epoch,test_accuracy,test_loss\na,0,3,0.3,1\na,0,1,0.1,3\na,1,2,0.6,5\na,1,1,0.5,6\na,0,2,0.2,2\n",
        {"set": TWO | {"epochs": 3}},
        "2 runs",
        {"seed": [0, 0, 0, 1, 1], "test_accuracy": [0.1, 0.2, 0.3, 0.5, 0.6], "test_loss": [3, 2, 1, 6, 5]},
    ),
    (
        "Method;Acc. (%): best;notes;size\nmine;93.25;good;16\n",
        {"columns": NAMES, "ignore": ["notes"], "percent": True, "set": WITHOUT_BATCH},
        "Left out: notes.",
        {"arm": ["mine"], "batch": [16], "test_accuracy": [0.9325]},
    ),
    (  # as Lightning's CSVLogger writes the training, the validation and, last of all, the test
        "epoch,step,loss,val_loss,val_acc,test\n0,49,2.3,,,\n0,59,,1.9,0.4,\n1,99,2.0,,,\n1,119,,1.5,0.6,\n2,120,,,,0.5\n",
        {"columns": LIGHTNING, "first_epoch": 0, "ignore": ["test"], "set": TWO | {"arm": "mine"}},
        "Assumed: seed 0, as results.csv has none.\nLeft out: test, 1 rows that measure nothing else.",
        {"step": [59, 119], "train_loss": [2.3, 2.0], "test_loss": [1.9, 1.5], "test_accuracy": [0.4, 0.6]},
    ),
    (",arm,test_loss\n0,a,0.5\n", {"ignore": [""]}, "Left out: (one without a name).", {"test_loss": [0.5]}),
    (
        "arm,seed,epoch,test_loss,state\na,0,1,1,\na,0,2,0.9,done\na,1,1,nan,\na,2,1,2,\na,2,2,,diverged",
        {"set": TWO},
        "Assumed: runs whose last loss is not finite have diverged: 1 of 3 runs, e.g. a, seed 1.",
        {"seed": [0, 0, 1, 2, 2], "state": [*["done"] * 2, *["diverged"] * 3]},
    ),
    (
        "arm,seed,epoch,test_accuracy\na,0,1,0.5\na,0,2,0.6\na,1,1,0.1\n",
        {"set": TWO},
        "runs that end early were interrupted, and are part of no mean: 1 of 2 runs, e.g. a, seed 1 (before epoch 2).",
        {"epoch": [1, 2, 1], "state": ["done", "done", "interrupted"]},
    ),
    (
        "arm,dataset.name,epochs,epoch,test_accuracy\na,x,2,1,0.5\na,x,2,2,0.6\na,y,1,1,0.1\n",
        {"set": {"model.name": "net", "batch": 8}},
        "2 runs",
        {"epoch": [1, 2, 1], "state": ["done"] * 3},
    ),
    ("arm,epoch,test_loss,state\na,2,9,diverged\na,1,3,done\n", {}, "1 run", {"state": ["diverged"] * 2}),
    ("arm,step,test_loss\na,99,5\na,199,6\n", {"set": TWO, "steps_per_epoch": 100}, "1 run", {"epoch": [1, 2]}),
    ("arm,epoch,test_loss\na,0,5\na,1,6\n", {"set": TWO, "first_epoch": 0}, "1 run", {"epoch": [1, 2]}),
    ("arm,epoch,test_loss\na,0,5\na,1,6\n", {"set": WHERE, "first_epoch": 1}, "1 run", {"epoch": [0, 1]}),
]


@pytest.mark.parametrize(("text", "wanted", "told", "columns"), READ)
def test_a_file_becomes_the_evaluations_of_its_runs(text, wanted, told, columns, bring, study):
    printed = bring(text, **{"set": WHERE, **wanted})
    assert all(line in printed for line in told.splitlines()), printed
    assert load(study).evaluations[list(columns)].to_dict("list") == columns


def test_evaluations_between_epochs_are_of_the_epoch_that_they_are_in(bring, study):
    """Each arm's accuracy is its step / 1000; b stopped at half of its last epoch."""
    rows = [f"{arm},{step},{step / 1000}" for arm, end in (("a", 1000), ("b", 950)) for step in range(50, end + 1, 50)]
    where = {**WHERE, "epochs": 10}
    told = bring("arm,step,test_accuracy\n" + "\n".join(rows), set=where, steps_per_epoch=100)
    found = load(study)
    course = found.evaluations[found.evaluations["arm"] == "a"]
    assert list(course["epoch"]) == list(range(1, 11))
    assert list(course["step"]) == [100 * epoch for epoch in range(1, 11)]
    assert list(course["test_accuracy"]) == pytest.approx([epoch / 10 for epoch in range(1, 11)])
    assert dict(zip(found.runs["arm"], found.runs["state"], strict=True)) == {"a": "done", "b": "interrupted"}
    assert "interrupted, and are part of no mean: 1 of 2 runs, e.g. b, seed 0 (before step 1000)." in told


def test_what_is_assumed_of_many_runs_is_one_sentence_of_its_kind_and_so_is_what_the_report_says(bring, study):
    """Each with an end of its own; half of them have a last loss that is not finite."""
    rows = [f"a{i},{10 + i},1,{0.1 if i % 2 else 'inf'}" for i in range(100)]
    told = bring(
        "arm,epochs,epoch,test_loss\n" + "\n".join(rows), set={k: v for k, v in WHERE.items() if k != "epochs"}
    )
    assert len(told.splitlines()) == 6, told
    assert "50 of 100 runs, e.g. a1, seed 0 (before epoch 11); a3, seed 0 (before epoch 13); a5, seed" in told
    assert "have diverged: 50 of 100 runs, e.g. a0, seed 0; a2, seed 0; a4, seed 0." in told
    [warning] = load(study).warnings
    assert warning.startswith(
        "Arms a0, a1, a2 and 97 more: 100 runs were made elsewhere and imported from results.csv."
    )


def test_settings_that_are_near_each_other_are_of_different_runs(bring, study):
    rows = ["9007199254740992", "9007199254740993", "0.9999999", "0.9999995"]
    told = bring("arm,norm.x,test_loss\n" + "\n".join(f"mine,{x},1" for x in rows), set=WHERE)
    assert "4 runs" in told
    assert sorted(load(study).runs["arm"]) == sorted(f"mine (x={x})" for x in rows)


def test_a_run_that_was_meant_to_be_shorter_is_another_one(bring, study):
    rows = "arm,epoch,test_accuracy\nmine,1,0.5\nmine,2,0.6\n"
    for epochs in (3, 2):
        bring(rows, set={**WHERE, "epochs": epochs})
    assert len(list(runs.find(study))) == 2


def test_an_imported_run_stands_where_the_trained_ones_are_that_have_its_settings(bring, add_run, study):
    add_run("bn", 8, optimizer__lr=0.1)
    add_run("bn", 8, optimizer__lr=0.2)
    bring("arm,test_accuracy,optimizer.lr\nmine,0.5,0.20\n", set=DIGITS)
    assert means(study)[("mine", 8)] == 50.0
    found = load(study).runs
    assert found["setting"].nunique() == 2
    assert set(found[(found["arm"] == "mine") & (found["run"] != "")]["setting"]) == {
        "digits, resnet18, optimizer.lr=0.2"
    }
    bring("arm,test_accuracy,optimizer.lr\nmine,0.4,0.3\n", name="other.csv", set=DIGITS)
    assert {setting.rpartition("=")[2] for setting in load(study).runs["setting"]} == {"0.1", "0.2", "0.3"}


def test_imported_runs_that_differ_in_a_given_setting_are_never_in_one_cell(bring, add_run, study):
    """Whether the trained runs have that setting, lack it, or differ in one that the import does not give."""
    add_run("bn", 8, optimizer__weight_decay=0.1)
    rows = "mine,0.5,0.1,9\nmine,0.6,0.2,9\nmine,0.7,0.1,8\n"
    bring(f"arm,test_accuracy,optimizer.weight_decay,schedule.power\n{rows}", set=DIGITS)
    found = load(study).finished
    assert len(found) == 4
    assert found["setting"].nunique() == 4
    bring("arm,test_accuracy\nother,0.5\n", name="other.csv", set=DIGITS)
    found = load(study).finished.set_index("arm")["setting"]
    assert found["other"] == found["bn"]  # all that it does not give is that of the only trained run
    add_run("bn", 8, optimizer__weight_decay=0.3)
    found = load(study).finished.set_index("arm")["setting"]
    assert found["other"] not in {*found["bn"], *found["mine"]}  # trained runs differ in what it does not give


def test_a_setting_that_is_not_given_is_named_with_an_example_even_if_the_study_s_runs_have_one(bring, add_run, study):
    add_run("bn", 8)
    with pytest.raises(UserError) as error:
        bring("arm,test_accuracy\nmine,0.5\n", set={"model.name": "resnet", "batch": 8})
    assert str(error.value).splitlines() == [
        "results.csv, line 2 lacks dataset.name, depth, epochs.",
        "Give what holds for all rows: 'set={dataset.name: cifar10, depth: 18, epochs: 20}'; what differs: a column of"
        " that name.",
    ]


def test_the_depth_of_a_network_that_has_one_size_need_not_be_given(bring, study):
    bring("arm,test_accuracy,dataset.name,model.name,batch,epochs\nmine,0.5,cifar10,vit,8,3\n")
    found = load(study)
    (made,) = of(found, "mine", 8)
    settings = {key: found.configs[made][key] for key in ("dataset", "model", "depth")}
    assert settings == {"dataset": {"name": "cifar10"}, "model": {"name": "vit"}, "depth": None}


def test_verdicts_use_no_imported_run(bring, add_run, study):
    for norm, accuracy in (("bn", 0.9), ("none", 0.5)):
        for seed in range(4):
            add_run(norm, 8, seed, (0.1, 0.2, accuracy + seed / 100))
    judged = judge(load(study))
    assert judged
    bring(
        "arm,seed,test_accuracy\n" + "".join(f"{arm},{seed},0.{seed}\n" for arm in ("bn", "none") for seed in (1, 9)),
        set=DIGITS,
    )
    again = load(study)
    assert [(j.verdict, j.results) for j in judge(again)] == [(j.verdict, j.results) for j in judged]
    [warning] = again.warnings
    assert warning.startswith("Arms bn (imported), none (imported): 4 runs were made elsewhere and imported from")
    assert "no verdict uses them" in warning


def test_the_folder_of_an_import_is_that_of_any_run_and_names_no_path_of_this_machine(bring, study, tmp_path):
    bring("arm,seed,test_accuracy,wall_seconds\nmine,3,0.5,7.5\n", set=WHERE)
    (run,) = runs.find(study)
    config = runs.read_config(run)
    assert (runs.run_name(config), config["seed"], config["norm"]) == (run.name, 3, {"name": "mine", "imported": True})
    assert sorted(path.name for path in run.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "provenance.json",
        "status.json",
    ]
    assert str(tmp_path) not in "".join(path.read_text() for path in run.iterdir())
    imported = json.loads((run / "provenance.json").read_text())["imported"]
    assert imported["sha256"] == hashlib.sha256((tmp_path / "results.csv").read_bytes()).hexdigest()


ROW = "arm,seed,test_accuracy\nmine,0,0.5\n"
PAIR = "arm,test_accuracy\nm,"
REFUSED = [  # text and what the sentence has
    ("arm,test_accuracy\n", "results.csv has no rows"),
    ("", "results.csv has no rows"),
    ("arm,seed,test_accuracy\nmine,0\n", "results.csv, line 2 has 2 cells, its header 3"),
    ('arm,test_accuracy\n"mine,0.5\n', "results.csv, line 2 cannot be read"),
    ("seed,test_accuracy\n0,0.5\n", "'set={arm: mine}'"),
    ("arm,seed,test_accuracy\n,0,0.5\nmine,1,0.5\n", "line 2 lacks arm"),
    ("arm,seed,test_accuracy\nmine,,0.5\nmine,1,0.5\n", "line 2 has no seed"),
    ("arm,seed\nmine,0\n", "has no measured column"),
    ("arm,seed,test_accuracy\nm,0,\nm,1,0.5\n", "line 2: arm m, seed 0, batch 128"),
    ("arm,epoch,test_accuracy\nm,19,0.5\nm,20,\n", "has no test_accuracy at its last epoch, 20"),
    ("arm,test_accuracy\nmine,0.5%\n", "line 2: test_accuracy=0.5% is not valid: expected a number"),
    ("arm,epoch,test_accuracy\nmine,1.5,0.5\n", "line 2: epoch=1.5 is not valid"),
    (
        "arm,epoch,test_accuracy\nmine,2000000000,0.5\n",
        "epoch=2000000000 is not valid: expected a whole number from 0 to 1000000000",
    ),
    (
        "arm,test_accuracy,wall_seconds\nmine,0.5,2e10\n",
        "wall_seconds=2e10 is not valid: expected a number, 0 to 1e+10",
    ),
    ("arm,seed,test_accuracy\nmine,-1,0.5\n", "line 2: seed=-1 is not valid"),
    ("arm,seed,test_accuracy\nmine,1000000000000000000000000000000,0.5\n", "line 2: seed=1000"),
    ("arm,state,test_accuracy\nmine,broken,0.5\n", "line 2: state=broken is not valid"),
    ("arm,state,test_loss\nmine,done,nan\n", "is done by its state, but its last loss is not finite"),
    ("arm,epoch,test_accuracy\nmine,21,0.5\n", "has an epoch 21, and epochs=20"),
    ("arm,test_accuracy,optimizer.lr\nm,0.5,inf\n", "line 2: optimizer.lr=inf"),
    ("arm,seed,test_accuracy\nmine,0,0.5\nmine,0,0.5\n", "line 3: another row has test_accuracy of the same run"),
    ("arm,epoch,test_loss\nm,1,3\nm,1,3\n", "line 3: another row has test_loss of the same run and epoch"),
    ("arm,epoch,test_loss\nm,1,3\nm,,2\n", "line 3 has neither epoch nor step, and others have one"),
    ("arm,test_acuracy\nmine,0.5\n", "Did you mean columns={test_accuracy: test_acuracy}?"),
    ("arm,,test_accuracy\nmine,1,0.5\n", "give 'ignore=[\"\"]';"),
    ("arm,test_accuracy,wall_seconds\nmine,0.5,-1\n", "line 2: wall_seconds=-1 is not valid"),
    ("arm,norm,test_accuracy\nmine,a,0.5\n", "the column norm is arm, and another column has it, too"),
    ("arm,batch,test_accuracy\nmine,8,0.5\n", "the column batch is batch, and set= has it, too"),
]
REFUSED_WITH = [  # text, settings, and what the sentence has
    (b"arm,test_accuracy\nmine,\xff\n", {}, "results.csv cannot be read: 'utf-8' codec can't decode byte 0xff"),
    (b"arm,test_accuracy\nmi\x00ne,0.5\n", {}, "results.csv, line 2"),
    ("arm,test_accuracy,batch\nmine,0.5,0\n", {"set": {}}, "line 2: batch=0 is not valid"),
    (
        "arm,seed,epoch,test_loss,state\nm,0,2,1,done\nm,1,3,1,\n",
        {"set": WHERE | {"epochs": 3}},
        "is done by its state, but ends before epoch 3",
    ),
    (ROW, {"columns": {"test_accuracy": "test_acuracy"}}, "Did you mean columns={test_accuracy: test_"),
    (ROW, {"columns": {"acc": "test_accuracy"}}, "columns={test_accuracy: acc}"),
    (ROW, {"columns": {"acuracy": "acc"}}, "normlab has no column acuracy.\nDid you mean"),
    (ROW, {"set": {"dataset": "x"}}, "normlab has no column dataset.\nDid you mean dataset.name?"),
    (ROW, {"set": {"norm.imported": False}}, "normlab has no column norm.imported"),
    (ROW, {"set": None}, "lacks dataset.name, model.name, batch, epochs.\nGive what holds for all"),
    (PAIR + "0.9\nm,93\n", {}, "line 3: test_accuracy=93 is not valid with percent=false.\nExpected percent=true for"),
    (PAIR + "93\nm,0.9\n", {"percent": True}, "line 3: test_accuracy=0.9 is not valid with percent=true"),
    (PAIR + "1\nm,1\n", {"percent": True}, "line 2: test_accuracy=1 is not valid with percent=true"),
    (PAIR + "101\nm,90\n", {"percent": True}, "line 2: test_accuracy=101 is not valid with percent=true"),
    (
        PAIR + "-1\nm,90\n",
        {"percent": True},
        "line 2: test_accuracy=-1 is not valid: expected a number, 0 or more",
    ),
    (ROW, {"pattern": "{arm}"}, "pattern= is about the folders of a source"),
]


@pytest.mark.parametrize(("text", "wanted", "message"), [*((text, {}, told) for text, told in REFUSED), *REFUSED_WITH])
def test_what_cannot_be_imported_is_refused_in_a_sentence_and_nothing_is_written(text, wanted, message, refused, study):
    assert message in refused(text, **wanted)
    assert not study.exists()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("source", None), ("percent", "yes"), ("replace", 1), ("columns", ["a"]), ("set", "a"), ("ignore", "notes")),
        *(("first_epoch", 2), ("steps_per_epoch", 0), ("pattern", {"arm": None})),
    ],
)
def test_a_setting_of_the_wrong_kind_is_refused(setting, value):
    with pytest.raises(UserError, match=setting):
        import_runs("study", "outputs", {"source": "results.csv", setting: value})


def test_a_source_that_is_not_there_is_answered_with_the_nearest(tmp_path):
    (tmp_path / "results.csv").write_text(ROW)
    with pytest.raises(UserError, match=r"Did you mean source=.*/results\.csv\?"):
        import_runs("study", tmp_path, {"source": str(tmp_path / "result.csv")})


def test_the_command_imports_a_file(command, tmp_path, study):
    (tmp_path / "results.csv").write_text("method,acc\nmine,93\n")
    where = f"set={{{', '.join(f'{key}: {value}' for key, value in WHERE.items())}}}"
    settings = ["study=study", "columns={arm: method, test_accuracy: acc}", "percent=true", where]
    status, out, error = command("report.py", "import", "source=results.csv", *settings)
    assert (status, error) == (0, "")
    assert "1 new" in out
    assert means(study) == pytest.approx({("mine", 128): 93.0})


# ---- TensorBoard


@pytest.fixture
def events(tmp_path):
    """`events("a/b8_s0", {"val/acc": [(10, 0.5)]})`: a run as TensorBoard's own writer writes it."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    def write(name: str, scalars: dict[str, list[tuple[int, float]]]) -> None:
        writer = EventFileWriter(str(tmp_path / "tb" / name))
        for tag, values in scalars.items():
            for step, value in values:
                summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
                writer.add_event(Event(step=step, wall_time=1.0 + step, summary=summary))
        writer.close()

    return write


@pytest.fixture
def bring_events(tmp_path, capsys):
    def run(**wanted) -> str:
        import_runs("study", tmp_path / "outputs", {"source": str(tmp_path / "tb"), **wanted})
        return capsys.readouterr().out

    return run


def test_what_tensorboard_wrote_comes_back_equal(events, bring_events, study):
    for seed in (0, 1):
        curve = [(10 * epoch, epoch / 8 + seed / 16) for epoch in (1, 2, 3)]  # exact in the 32 bits of its scalars
        loss = [(step, 1 / 2 - value / 4) for step, value in curve]
        events(f"mine/b8_s{seed}", {"val/acc": curve, "val/loss": loss, "lr": [(0, 0.1), (30, 0.0)]})
    told = bring_events(
        columns={"test_accuracy": "val/acc", "test_loss": "val/loss"},
        pattern="{arm}/b{batch}_s{seed}",
        steps_per_epoch=10,
        set=DIGITS_WITHOUT_BATCH,
    )
    assert "Left out: lr." in told
    found = load(study)
    assert set(zip(found.runs["arm"], found.runs["batch"], found.runs["seed"], strict=True)) == {
        ("mine", 8, 0),
        ("mine", 8, 1),
    }
    assert found.evaluations[["seed", "epoch", "step", "test_accuracy", "test_loss"]].to_numpy().tolist() == [
        [seed, epoch, 10 * epoch, epoch / 8 + seed / 16, 1 / 2 - epoch / 32 - seed / 64]
        for seed in (0, 1)
        for epoch in (1, 2, 3)
    ]
    assert means(study) == pytest.approx({("mine", 8): 100 * (3 / 8 + 1 / 32)})


def test_tags_that_are_normlab_s_columns_need_no_names(events, bring_events, study):
    scalars = {"epoch": [(30, 1), (60, 2)], "test_accuracy": [(30, 0.5), (60, 0.75)], "lr": [(30, 0.1), (60, 0.0)]}
    events("some run", scalars)
    told = bring_events(set={**DIGITS, "epochs": 2})
    assert "Assumed: seed 0" in told
    found = load(study)
    assert found.evaluations[["epoch", "step", "test_accuracy"]].to_numpy().tolist() == [[1, 30, 0.5], [2, 60, 0.75]]
    assert list(found.runs["arm"]) == ["some run"]


def test_what_torch_s_summary_writer_wrote_is_read(tmp_path, bring_events, study):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "tb" / "mine")) as writer:
        writer.add_scalar("test_accuracy", 0.75, 40)
    bring_events(set={**DIGITS, "epochs": 2}, steps_per_epoch=20)
    assert load(study).evaluations[["epoch", "step", "test_accuracy"]].to_numpy().tolist() == [[2, 40, 0.75]]


@pytest.mark.parametrize(
    ("columns", "pattern", "messages"),
    [
        ({}, None, ["has no measured tag.\nIts tags: lr, val/acc", "'columns={test_accuracy: \"val/acc\"}'"]),
        ({"test_accuracy": "val/ac"}, None, ["tb has no tag val/ac", "Did you mean columns={test_accuracy: val/acc}"]),
        (TAG, "{arm}_s{seed}", ["The folder mine/b8_s0 does not match the pattern {arm}_s{seed}"]),
        (TAG, "{arn}/{}", ["normlab has no column arn.\nDid you mean arm?"]),
        (TAG, "{arm}/{arm}", ["arm is given twice"]),
        (TAG, "{arm}/b{batch}_s{seed}", ["steps_per_epoch="]),
    ],
)
def test_events_that_cannot_be_imported_are_refused(columns, pattern, messages, events, bring_events, study):
    events("mine/b8_s0", {"val/acc": [(10, 0.5)], "lr": [(10, 0.5)]})
    with pytest.raises(UserError) as error:
        bring_events(set=DIGITS_WITHOUT_BATCH, columns=columns, **({"pattern": pattern} if pattern else {}))
    assert all(message in str(error.value) for message in messages), str(error.value)
    assert not study.exists()


def test_a_folder_without_events_is_refused(tmp_path, bring_events):
    (tmp_path / "tb").mkdir()
    with pytest.raises(UserError, match="There are no event files"):
        bring_events()


def test_a_file_that_only_looks_like_events_is_refused(tmp_path, bring_events):
    (tmp_path / "tb").mkdir()
    (tmp_path / "tb" / "events.out.tfevents.1").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR." * 40)
    with pytest.raises(UserError, match=r"none that can be read|cannot be read"):
        bring_events()


def test_a_file_of_events_that_was_cut_short_gives_what_was_whole(tmp_path, events, bring_events, study):
    events("mine", {"test_accuracy": [(10, 0.5), (20, 0.75)]})
    (file,) = (tmp_path / "tb" / "mine").iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    bring_events(set={**WHERE, "epochs": 2}, steps_per_epoch=10)
    assert load(study).evaluations[["epoch", "test_accuracy"]].to_numpy().tolist() == [[1, 0.5]]
    assert load(study).states()["interrupted"] == 1


def test_without_tensorboard_its_extra_is_named(tmp_path, bring_events, monkeypatch):
    (tmp_path / "tb").mkdir()
    (tmp_path / "tb" / "events.out.tfevents.1").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(UserError, match=r"pip install 'normlab\[tensorboard\]'"):
        bring_events()


@pytest.mark.parametrize("kind", ["pipe", "device", "event"])
def test_a_source_that_is_no_file_is_not_waited_for(kind, tmp_path):
    path = Path("/dev/zero") if kind == "device" else tmp_path / "it.tfevents.1"
    if kind != "device":
        os.mkfifo(path)
    with pytest.raises(UserError, match=r"is not a file|is no file"):
        import_runs("study", tmp_path / "outputs", {"source": str(tmp_path if kind == "event" else path), "set": WHERE})


def test_a_source_may_be_a_link_and_may_not_be_large(tmp_path, refused, monkeypatch):
    (tmp_path / "it.csv").write_text("arm,test_accuracy\nmine,0.5\n")
    (tmp_path / "link.csv").symlink_to(tmp_path / "it.csv")
    import_runs("study", tmp_path / "outputs", {"source": str(tmp_path / "link.csv"), "set": WHERE})
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    with pytest.raises(UserError, match=r"loop\.csv cannot be read"):
        import_runs("study", tmp_path / "outputs", {"source": str(tmp_path / "loop.csv"), "set": WHERE})
    columns = [f"c{i}" for i in range(importing.MOST_COLUMNS)]
    assert "columns; at most" in refused(f"arm,{','.join(columns)}\nmine,{',' * len(columns)}\n", ignore="all")
    monkeypatch.setattr(importing, "MOST_BYTES", 1 << 20)
    assert "larger than 1 MiB" in refused(f"arm,test_accuracy\nmine,0.5\n{' ' * (1 << 20)}")


@pytest.mark.parametrize(
    "odd",
    [
        {"arm": ["a"]},
        {"dataset.name": {"a": 1}},
        {"model.name": None},
        {"optimizer.lr": {"x": 1}},
        {"optimizer.betas": [[1]]},
    ],
)
def test_a_name_is_a_text_and_a_setting_has_none_of_its_own(odd, refused):
    assert "is not valid: expected" in refused("test_accuracy\n0.5\n", set=WHERE | {"arm": "mine"} | odd)
