"""The real commands, end to end: a sweep of small runs on digits, its repetition, its report."""

from pathlib import Path

import pytest
from conftest import composed
from launchers.commands import SMALL, status_of
from launchers.commands import command as run_command
from PIL import Image

from normlab import runs
from normlab.data.inventory import Inventory
from normlab.launchers.sweep import Job, Sweep
from normlab.runs.shorter import Shorter
from normlab.training.run import train_run

PLAN = "hydra/launcher=plan"
SWEEP = ("train.py", "-m", "norm=bn,affine,bnminus,none", "batch=8,32,128", *SMALL)


@pytest.mark.slow
def test_a_sweep_leaves_records_and_is_skipped_when_it_is_repeated(tmp_path) -> None:
    code, _, error = run_command(tmp_path, *SWEEP, "hydra.launcher.slots=1")
    assert code == 0, error
    assert "12 of 12 runs finished" in error
    assert "[12/12]" in error
    found = runs.find(tmp_path / "outputs" / "default")
    assert len(found) == 12
    for folder in found:
        assert status_of(folder)["state"] == "done"
        rows, warnings = runs.read_metrics(folder)
        assert [row["epoch"] for row in rows] == [1, 2]
        assert not warnings
        record = {"config.yaml", "correct.json", "metrics.jsonl", "provenance.json", "run.log", "status.json"}
        assert {path.name for path in folder.iterdir()} == record
    assert len({status_of(folder)["pid"] for folder in found}) == 1, "a worker does one run after the other"

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("outputs/default/*/*")}
    code, out, error = run_command(tmp_path, *SWEEP)
    assert code == 0, error
    assert "12 of 12 runs are finished and skipped." in out
    code, out, error = run_command(tmp_path, "train.py", "norm=bn", "batch=32", *SMALL)  # the same place
    assert code == 0, error
    assert "is finished" in out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("outputs/default/*/*")} == before


@pytest.mark.slow
def test_hydras_own_launcher_gives_the_same_runs_and_they_have_a_report(tmp_path) -> None:
    norms = ("bn", "none")
    arguments = ("norm=bn,none", "batch=16,32", "hydra/launcher=basic", *SMALL)
    code, _, error = run_command(tmp_path, "train.py", "-m", *arguments)
    assert code == 0, error
    for norm in norms:
        config = composed(f"norm={norm}", "batch=32", *SMALL, f"output_dir={tmp_path / 'here'}")
        twin = tmp_path / "outputs" / "default" / runs.Run(config.as_dict()).name
        assert train_run(config)["weights_sha256"] == status_of(twin)["weights_sha256"]
    code, out, error = run_command(tmp_path, "report.py")
    assert code == 0, error
    assert "4 done" in out
    assert "index.html" in out
    report = tmp_path / "outputs" / "default" / "report"
    accuracy = (report / "accuracy.md").read_text()
    assert all(word in accuracy for word in (*norms, "batch 16", "batch 32", "digits, small"))
    assert (report / "accuracy_against_batch.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_of_one_name_is_carried_out_in_each_folder_that_is_named(tmp_path) -> None:
    code, _, error = run_command(
        tmp_path, "train.py", "-m", "study=one,other", "output_dir=a,b", "hydra.launcher.slots=1", *SMALL
    )
    assert code == 0, error
    assert "4 of 4 runs finished" in error
    folders = [folder for study in ("a/one", "a/other", "b/one", "b/other") for folder in runs.find(tmp_path / study)]
    assert [status_of(folder)["state"] for folder in folders] == ["done"] * 4
    assert len({folder.name for folder in folders}) == 1
    code, out, error = run_command(tmp_path, "train.py", "-m", "study=one,other,third", "output_dir=a", *SMALL, PLAN)
    assert code == 0, error
    assert "3 runs: 1 new, 0 to resume, 0 failed before, 0 running elsewhere, 2 done" in out
    assert "bn seed=0 study=third" in out


@pytest.mark.parametrize(
    ("setting", "first", "second", "choices"),
    [
        ("threads", "1", "2", ()),
        ("dataset.path", "v1/photos", "v2/photos", ()),
        ("data_dir", "x", "y", ()),
        ("quiet", "true", "false", ()),
        ("dataset.path", "v1/photos", "v2/photos", ("hydra/launcher=joblib",)),
        ("threads", "1", "2", ("hydra/launcher=basic",)),
        ("engine", "eager", "auto", ("hydra/launcher=basic", "hydra/sweeper=basic")),
    ],
    ids=str,
)
def test_two_runs_of_one_folder_are_refused(tmp_path, command, setting, first, second, choices) -> None:
    for name in ("v1", "v2"):
        for image in ("train/a/0", "train/b/0", "test/a/0", "test/b/0"):
            path = tmp_path / name / "photos" / f"{image}.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(path)
    more = ("dataset=image_folder",) if "path" in setting else ()
    words = (*choices, *more, f"{setting}={first},{second}", "norm=bn,none", "batch=1")
    code, _, error = command("train.py", "-m", *words)
    assert code == 1
    assert error.startswith("Two runs of this sweep have one folder, outputs/default/")
    assert f": {setting}={first} and {setting}={second}.\n" in error
    assert not (tmp_path / "outputs").exists() or not runs.find(tmp_path / "outputs" / "default")


@pytest.mark.parametrize(
    ("words", "number", "told"),
    [
        (("norm=bn,bn",), 2, "each is carried out once.\n"),
        (("output_dir=a,./a",), 2, "output_dir=a and output_dir=./a are one folder.\n"),
        (("output_dir=a,linked",), 2, "output_dir=a and output_dir=linked are one folder.\n"),
        (("study=s,t", "output_dir=a"), 2, "study=s and study=t are one folder.\n"),
        (("data_dir=a,a/s/..", "norm=bn,bn"), 4, "data_dir=a and data_dir=a/s/.. are one folder.\n"),
    ],
    ids=str,
)
def test_a_run_that_is_given_twice_is_one_and_that_is_told(tmp_path, command, words, number, told) -> None:
    (tmp_path / "a" / "s").mkdir(parents=True)
    (tmp_path / "a" / "t").symlink_to("s")
    (tmp_path / "linked").symlink_to("a")
    code, out, error = command("train.py", "-m", *words, PLAN, "hydra.launcher.calibrate_seconds=0")
    assert code == 0, error
    assert f"The command gives {number} runs, of which 1 is different" in out
    assert told in out
    assert "\n1 run: 1 new" in out


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_network_that_does_not_take_its_batches_stops_any_launcher_before_the_first_run(tmp_path, launcher) -> None:
    words = ("norm=affine,gn", "norm.groups=3", f"hydra/launcher={launcher}", *SMALL)
    code, out, error = run_command(tmp_path, "train.py", "-m", *words)
    assert code == 1
    assert "norm.groups=3 does not divide the 8 channels" in error
    assert "starting" not in out + error


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_run_that_is_given_twice_to_a_launcher_of_hydra_is_carried_out_once(tmp_path, launcher) -> None:
    words = ("-m", "seed=1,1", "output_dir=a,./a", f"hydra/launcher={launcher}", *SMALL)
    code, out, error = run_command(tmp_path, "train.py", *words)
    assert code == 0, error
    assert "The command gives 4 runs, of which 1 is different" in out
    assert error.count("starting") == 1
    assert "is finished" not in out


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["pool", "basic", "joblib"])
def test_relative_folders_are_those_of_where_the_command_began(tmp_path, launcher) -> None:
    (tmp_path / "my_nets.py").write_text("from small import SmallNet as MyNet\n")
    words = ("-m", "norm=bn,none", "hydra.job.chdir=true", f"hydra/launcher={launcher}", "output_dir=here")
    code, out, error = run_command(tmp_path, "train.py", *words, *SMALL, "model.target=my_nets.MyNet")
    assert code == 0, error
    assert out.count("report.py study=default output_dir=here\n") == (0 if launcher == "pool" else 2)
    assert [status_of(folder)["state"] for folder in runs.find(tmp_path / "here" / "default")] == ["done"] * 2
    assert {path.name for path in tmp_path.iterdir()} <= {"here", "my_nets.py", "__pycache__", "data"}


@pytest.mark.parametrize("word", ["hydra.run.dir=a", "-m hydra.sweep.dir=a", "-m hydra.sweep.subdir=a"])
def test_folders_of_hydra_are_refused_in_a_sentence(command, word) -> None:
    code, _, error = command("train.py", *word.split(), "norm=bn")
    assert code == 1
    assert error.startswith(f"{word.split()[-1].partition('=')[0]} is not used")
    assert "output_dir=..." in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (("norm=bn,in", "batch=20"), "does not fit resnet with norm=in"),
        (("norm=none,bn", "batch=32,13"), "A batch of 1 image of 8x8 pixels, the last of an epoch"),
        (
            ("norm=bn,gn", "model=cifar_resnet", "depth=20", "batch=20"),
            "norm.groups=32 does not divide the 16 channels",
        ),
        (
            ("batch=20", "norm=in", "model=custom", "model.target=small.SmallResNet", "dataset.image_size=2"),
            "with norm=in",
        ),
    ],
)
def test_a_network_that_does_not_take_its_batches_is_refused_before_any_run_begins(tmp_path, words, cause) -> None:
    code, _, error = run_command(
        tmp_path, "train.py", "-m", *words, "dataset.train_size=40", "dataset.test_size=10", "device=cpu"
    )
    assert code == 1
    assert cause in error
    assert "starting" not in error
    assert runs.find(tmp_path / "outputs" / "default") == []


def test_what_becomes_of_more_epochs_is_told_once_for_all_runs_alike(make, capsys) -> None:
    def job(seed: int, hindrance: str = "") -> Job:
        config = make(f"seed={seed}", "epochs=8", "schedule=constant")
        shorter = Shorter(Path(f"old{seed}"), "", 4, hindrance and f"{hindrance} old{seed}")
        return Job(config, runs.Run(config.as_dict()), Inventory(8, 8, 8, 10), shorter=shorter)

    jobs = [job(0), job(1), job(2, "it differs from")]
    assert jobs[0].share_left == 0.5
    assert jobs[2].share_left == 1
    Sweep(jobs=jobs, quiet=True).report_known()
    assert not capsys.readouterr().out
    Sweep(jobs=jobs).report_known()
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{jobs[0].run.title} goes on from epoch 4 of old0. The same holds for 1 more of 3 runs."
    assert second == f"{jobs[2].run.title} starts anew: it differs from old2."
