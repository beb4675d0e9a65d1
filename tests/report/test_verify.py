"""A reviewer's command finds what does not hold of a study, and what holds: one study of two runs, trained once."""

import hashlib
import json
import math
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import config_in
from scipy.stats import t as student

from normlab import report, runs
from normlab.common.errors import UserError
from normlab.report import reruns, verify
from normlab.runs import archive

SMALL = (
    *("model=cifar_resnet", "depth=20", "dataset.train_size=40", "dataset.test_size=20", "batch=20", "epochs=1"),
    *("schedule.warmup_epochs=0", "device=cpu", "threads=1", "study=study"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a study of two seeds, and beside it the same study in one file, made with confidence=0.9."""
    from normlab.training.run import train_run

    folder = tmp_path_factory.mktemp("trained")
    for seed in (0, 1):
        train_run(config_in(folder, *SMALL, f"seed={seed}"))
    report.pack_study("study", folder / "outputs", report.options(confidence=0.9))
    return folder / "outputs" / "study"


@pytest.fixture
def packed(trained, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copy(trained.with_name("study.normlab.zip"), tmp_path))


@pytest.fixture
def folder(trained, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(trained, tmp_path / "outputs" / "study"))


def entries(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist() if name != archive.MANIFEST}


def found(capsys, path: Path, **settings) -> tuple[bool, str]:
    capsys.readouterr()
    holds = report.verify_study(str(path), path.parent, **settings)
    return holds, capsys.readouterr().out


def without_checksums(status: dict) -> dict:
    """A status as versions before 0.4.0 wrote it."""
    return {key: value for key, value in status.items() if key not in ("files", "checksum")}


def run_names(held: dict[str, bytes]) -> list[str]:
    return sorted(name.split("/")[0] for name in held if name.endswith("config.yaml"))


def test_a_study_as_it_was_packed_holds_with_the_options_of_its_tables(packed, capsys):
    assert json.loads(entries(packed)["tables/options.json"])["confidence"] == 0.9
    holds, out = found(capsys, packed)
    assert holds
    assert f"holds  Digests (SHA-256) of all {len(entries(packed))} entries" in out
    assert "holds  Records of 2 runs: names" in out
    assert "holds  Tables made anew with confidence=0.9 are the same to the byte: accuracy, classes, converg" in out
    assert "study: of 3 checks 3 hold, 0 are open, 0 fail." in out


def change_a_cell(held: dict[str, bytes]) -> None:
    header, row, *rest = held["tables/accuracy.csv"].decode().split("\n")
    cells = row.rsplit(",", 7)
    cells[1] = "99.5"  # the mean
    held["tables/accuracy.csv"] = "\n".join([header, ",".join(cells), *rest]).encode()


def change_a_row(held: dict[str, bytes]) -> None:
    name = f"{run_names(held)[0]}/metrics.jsonl"
    held[name] = json.dumps(json.loads(held[name]) | {"test_accuracy": 0.995}).encode() + b"\n"


def change_a_row_without_checksums(held: dict[str, bytes]) -> None:
    change_a_row(held)
    name = f"{run_names(held)[0]}/status.json"
    held[name] = json.dumps(without_checksums(json.loads(held[name]))).encode()


def empty_rows_without_checksums(held: dict[str, bytes]) -> None:
    change_a_row_without_checksums(held)
    held[f"{run_names(held)[0]}/metrics.jsonl"] = b""


def rename_a_state_without_checksums(held: dict[str, bytes]) -> None:
    name = f"{run_names(held)[0]}/status.json"
    status = without_checksums(json.loads(held[name]))
    held[name] = json.dumps(status | {"state": "finished"}).encode()


def swap_settings(held: dict[str, bytes]) -> None:
    one, other = (f"{run}/config.yaml" for run in run_names(held))
    held[one], held[other] = held[other], held[one]


def add_a_table(held: dict[str, bytes]) -> None:
    held["tables/best.csv"] = b"arm,mean\nours,100\n"


def drop_a_row(held: dict[str, bytes]) -> None:
    held["tables/convergence.csv"] = b"\n".join(held["tables/convergence.csv"].splitlines()[:-1]) + b"\n"


def widen_an_option(held: dict[str, bytes]) -> None:
    options = json.loads(held["tables/options.json"])
    held["tables/options.json"] = json.dumps(options | {"figure_style": "/etc/passwd"}).encode()


TAMPERED = {
    "a cell": (change_a_cell, ["fails  Table accuracy row 1 (digits", "column mean: '99.5' there, "]),
    "a row": (change_a_row, ["fails  Records of 1 of 2 runs", "metrics.jsonl is not what the run wrote"]),
    "a row of an earlier version": (
        change_a_row_without_checksums,
        ["fails  Records of 1 of 2 runs", "test_accuracy is 0.995 in its last evaluation and 0."],
    ),
    "rows of an earlier version": (
        empty_rows_without_checksums,
        ["fails  Records of 1 of 2 runs", "done, but its last evaluation cannot be read"],
    ),
    "a state of an earlier version": (rename_a_state_without_checksums, ["fails  Records of 1 of 2 runs"]),
    "two runs": (swap_settings, ["fails  Records of 2 of 2 runs", "config.yaml is of the run "]),
    "a table": (add_a_table, ["fails  Table best is not one that these records give."]),
    "a row of a table": (drop_a_row, ["fails  Table convergence has ", " rows, and "]),
    "an option": (widen_an_option, ["fails  Tables cannot be made anew as they were made: They have "]),
}


@pytest.mark.parametrize(("tamper", "sentences"), TAMPERED.values(), ids=TAMPERED)
def test_what_was_changed_is_found_though_its_digest_was_changed_too(packed, capsys, tamper, sentences):
    held = entries(packed)
    tamper(held)
    archive.write(packed, "study", held)
    holds, out = found(capsys, packed)
    assert not holds
    assert all(sentence in out for sentence in sentences), out


def test_a_change_without_its_digest_is_refused_and_quiet_prints_what_fails_alone(packed, command):
    held = entries(packed)
    with zipfile.ZipFile(packed) as file:
        manifest = file.read(archive.MANIFEST)
    change_a_cell(held)
    with zipfile.ZipFile(packed, "w") as file:
        for name, content in [(archive.MANIFEST, manifest), *held.items()]:
            file.writestr(name, content)
    with pytest.raises(UserError, match=r"the digest of tables/accuracy.csv is not that of the manifest.json"):
        report.verify_study(str(packed), packed.parent)
    archive.write(packed, "study", held)
    status, out, error = command("report.py", "verify", f"study={packed}", "quiet=true")
    assert (status, out) == (1, "")
    assert error.startswith("fails  Table accuracy row 1")
    assert len(error.splitlines()) == 1


def test_tables_beside_a_study_are_read_within_bounds_and_named_on_one_line(folder, capsys):
    for name in ("x\nholds  all", *(f"t{number}" for number in range(30))):
        (folder / "report" / f"{name}.csv").parent.mkdir(exist_ok=True)
        with (folder / "report" / f"{name}.csv").open("wb") as file:
            file.truncate(1 << 30)
    (folder / "report" / "accuracy.csv").write_text("a\n" * 100_000)
    holds, out = found(capsys, folder)
    assert not holds
    assert "accuracy.csv cannot be read: it has 200000 bytes" in out
    (folder / "report" / "accuracy.csv").unlink()
    holds, out = found(capsys, folder)
    assert not holds
    assert [line for line in out.splitlines() if line.startswith("holds")] == [
        "holds  Records of 2 runs: names, settings, status and last evaluation go together."
    ]


def test_numbers_may_differ_by_rounding_and_tables_may_be_missing(packed, capsys):
    held = entries(packed)
    mean = held["tables/cost.csv"].split(b"\n")[1].rsplit(b",", 7)[1]
    for factor, outcome in ((1 + 1e-12, "holds  Table cost made anew is the same up to"), (1 + 1e-6, "fails  Table c")):
        changed = held["tables/cost.csv"].replace(mean, repr(float(mean) * factor).encode())
        assert changed != held["tables/cost.csv"]
        rest = {name: content for name, content in held.items() if name != "tables/convergence.csv"}
        archive.write(packed, "study", rest | {"tables/cost.csv": changed})
        holds, out = found(capsys, packed)
        assert outcome in out
        assert "open   Tables that the records give and that are not there: convergence." in out
        assert holds == outcome.startswith("holds")


def test_a_file_of_the_first_format_is_read_and_has_no_tables(packed, capsys):
    held = {name: content for name, content in entries(packed).items() if not name.startswith("tables/")}
    head = {"format": 1, "study": "study", "runs": 2, "number_of_entries": len(held)}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in held.items()}
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in held.items():
            file.writestr(name, content)
        file.writestr("manifest.json", json.dumps(head | {"entries": digests}))
    holds, out = found(capsys, packed)
    assert holds
    assert "open   The file holds no tables to compare." in out


def test_a_folder_has_the_tables_of_its_report_and_those_that_were_unpacked(folder, packed, capsys):
    with zipfile.ZipFile(packed) as file:
        file.extractall(folder)
    assert "holds  Tables made anew with confidence=0.9 are the same" in found(capsys, folder)[1]
    report.build("study", folder.parent, report.options(figures=False, confidence=0.5))
    holds, out = found(capsys, folder)
    assert holds
    assert "holds  Tables made anew with confidence=0.5 are the same to the byte: accuracy" in out
    table = folder / "report" / "accuracy.csv"
    table.write_text(table.read_text().replace("final", "best"))
    assert "fails  Table accuracy row 1" in found(capsys, folder)[1]


# ---- runs carried out again


@pytest.fixture
def reruns_as(folder, monkeypatch):
    """`reruns_as(change)`: a rerun writes the record that it is of, in which `change(run folder)` changes something."""

    def use(change) -> None:
        def run(command, **_) -> subprocess.CompletedProcess[str]:
            order = Path(command[-1])
            settings = json.loads(order.read_text())["settings"]
            [recorded] = [path for path in folder.glob("cifar*") if f"-s{settings['seed']}-" in path.name]
            again = Path(shutil.copytree(recorded, order.parent / "rerun" / recorded.name))
            change(again)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(reruns.subprocess, "run", run)

    return use


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes) + "\n")
    status = path.with_name("status.json")
    status.write_text(json.dumps(without_checksums(json.loads(status.read_text()))))


def another_seed(run: Path, seed: int) -> Path:
    """A copy of a run that stands for another seed."""
    config = runs.read_config(run) | {"seed": seed}
    other = Path(shutil.copytree(run, run.parent / runs.run_name(config)))
    (other / "config.yaml").write_text(yaml.safe_dump({"format": 3, **config}))
    edit(other / "status.json", run_id=runs.run_id(config))
    return other


def ends_at(run: Path, accuracy: float) -> None:
    edit(run / "metrics.jsonl", test_accuracy=accuracy)
    edit(run / "status.json", test_accuracy=accuracy)


def on_another_cpu(run: Path) -> None:
    edit(run / "provenance.json", device="another CPU")


@pytest.mark.slow
def test_a_run_comes_out_the_same(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(reruns.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    holds, out = found(capsys, folder, rerun=1, rerun_seed=7)
    assert holds
    assert "Carrying out 1 of 2 runs again, which took 0 s: rerun_seed=7" in out
    assert re.search(r"\nholds  cifar_\S+ comes out the same to the bit: 1 evaluation and its weights, times", out)
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize(
    ("file", "changes", "difference"),
    [
        ("metrics.jsonl", {"train_loss": 2.5}, r"metrics, step 2, train_loss: [\d.]+ recorded, 2.5 now"),
        ("status.json", {"weights_sha256": "0" * 64}, "weights_sha256: [0-9a-f]{64} recorded, 0{64} now"),
    ],
)
def test_under_the_same_circumstances_every_bit_counts(folder, reruns_as, capsys, file, changes, difference):
    reruns_as(lambda run: edit(run / file, **changes))
    holds, out = found(capsys, folder, rerun=1)
    assert not holds
    same = "though CPU, versions, threads and code are"
    assert re.search(rf"\nfails  cifar_\S+ does not come out the same, {same}: {difference}\.\n", out), out


def test_the_same_number_chooses_the_same_runs_and_each_is_chosen(folder):
    names = [f"run-{number}" for number in range(10)]
    assert reruns.chosen(names, 3, 5) == reruns.chosen(reversed(names), 3, 5)
    assert {name for choice in range(50) for name in reruns.chosen(names, 1, choice)} == set(names)


def test_elsewhere_a_difference_is_allowed_up_to_that_of_two_draws():
    rng = np.random.default_rng(0)
    for n in (2, 3, 6):
        draws = rng.normal(5, 0.3, (2000, n + 2))
        exceeded = [abs(x - y) > reruns.allowed_difference(seeds, 0.1) for x, y, *seeds in draws]
        assert abs(np.mean(exceeded) - 0.1) < 0.021  # three standard deviations
    expected = student(2).ppf(0.975) * math.sqrt(2) * np.std([1, 2, 4], ddof=1)
    assert reruns.allowed_difference([1, 2, 4], 0.05) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("accuracy", "others", "sentence"),
    [
        (0.42, [0.40, 0.41, 0.42], "holds  {} ends at 42.00 %, its record at 40.00 %; 3 other seeds allow a diff"),
        (0.60, [0.40, 0.41, 0.42], "fails  {} ends at 60.00 %, its record at 40.00 %; 3 other seeds allow a diff"),
        (0.42, [0.40, 0.41], "open   {} ends at 42.00 %, its record at 40.00 %; 2 other seeds allow a difference of"),
        (0.42, [0.40], "open   {} ends at 42.00 %, its record at 40.00 %; 1 other seeds do not tell by how much"),
        (0.40, [], "holds  {} comes out the same to the bit: 1 evaluation and its weights, times left out, al"),
    ],
)
def test_on_another_cpu_the_other_seeds_say_what_is_allowed(
    folder, reruns_as, capsys, monkeypatch, accuracy, others, sentence
):
    first, second = sorted(folder.glob("cifar*"), key=lambda run: "-s1-" in run.name)
    ends_at(first, 0.40)
    for number, value in enumerate(others):  # copies, which other seeds stand for
        ends_at(another_seed(second, number + 2), value)
    shutil.rmtree(second)
    monkeypatch.setattr(reruns, "chosen", lambda names, number, choice: [first.name])

    def change(run: Path) -> None:
        on_another_cpu(run)
        ends_at(run, accuracy)

    reruns_as(change)
    out = found(capsys, folder, rerun=1)[1]
    assert sentence.format(first.name) in out, out


def test_a_run_that_diverged_in_one_of_both_is_told(folder, reruns_as, capsys):
    def change(run: Path) -> None:
        on_another_cpu(run)
        edit(run / "status.json", state="diverged")

    reruns_as(change)
    out = found(capsys, folder, rerun=1)[1]
    assert "is done in its record and diverged now; of 1 other seeds 0 are diverged. Not to the bit, as device" in out


def test_other_images_are_no_fault_of_the_study(folder, reruns_as, capsys):
    reruns_as(lambda run: edit(run / "provenance.json", data_fingerprint="0" * 64))
    holds, out = found(capsys, folder, rerun=1)
    assert holds
    assert "cannot be compared: the images here are not those that it was trained on." in out


@pytest.mark.slow
def test_code_that_a_study_names_runs_only_if_it_is_trusted(tmp_path, capsys, monkeypatch):
    from normlab.training.run import train_run

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    text = "import pathlib, torch.nn as nn\npathlib.Path('ran').touch()\nfrom small import SmallNet as Net\n"
    tests = Path(__file__).parents[1]
    (tmp_path / "theirs.py").write_text(f"import sys\nsys.path.append({str(tests)!r})\n{text}")
    custom = ("model=custom", "model.target=theirs.Net", "model.name=theirs", *SMALL[2:])
    train_run(config_in(tmp_path, *custom))
    (tmp_path / "ran").unlink()
    study = tmp_path / "outputs" / "study"
    holds, out = found(capsys, study, rerun=1)
    assert holds
    assert "open   1 of 1 finished runs are not carried out again" in out
    assert "model.target=theirs.Net" in out
    assert "trust=true" in out
    assert not (tmp_path / "ran").exists()
    out = found(capsys, study, rerun=1, trust=True)[1]
    assert "comes out the same to the bit" in out
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("norm._target_=os.system",), ["norm._target_=os.system"]),
        (("norm._target_=normlab.norms.tracing.trace",), ["norm._target_=normlab.norms.tracing.trace"]),
        (
            ("model=torchvision", "model.name=resnet18", "+model.kwargs.norm_layer=os.system"),
            ["model.kwargs.norm_layer=os.system"],
        ),
        (("model=torchvision", "model.name=resnet18", "+model.kwargs.weights=[[/x]]"), ["model.kwargs.weights=[[/x]]"]),
        (("model.weights=/home/me/secret.pt",), ["model.weights=/home/me/secret.pt"]),
        (("model=torchvision", "model.name=resnet18", "+model.kwargs.dropout=0.5", "model.weights=DEFAULT"), []),
    ],
)
def test_settings_that_name_code_or_files_are_known(make, overrides, named):
    assert reruns.foreign(make(*overrides)) == named


def test_weights_that_a_reviewer_gives_are_for_runs_that_had_some(tiny):
    settings = reruns.Rerun(1, 0, True, {"model.weights": "/here/net.pt"})
    for recorded, config_has in ((None, None), ("/there/net.pt", "/here/net.pt"), ("/there/other.pt", ...)):
        config = tiny(f"model.weights={recorded or 'null'}").as_dict()
        found, why = reruns.as_here(config, settings)
        assert (found.weights if found else ...) == config_has
        assert ("makes other runs of them" in why) == (found is None)


def test_an_interrupted_rerun_leaves_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(reruns.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(reruns.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.verify_study(str(folder), folder.parent, rerun=1)
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"rerun": "3"}, "rerun='3' is not valid: expected a whole number"),
        ({"rerun_seed": -1}, "rerun_seed=-1 is not valid"),
        ({"trust": "yes"}, "trust=yes is not valid: expected true or false"),
        ({"changes": {"epochs": 1}}, "a run is carried out as it was recorded"),
        ({"changes": 7}, "set= is not valid: expected settings"),
    ],
)
def test_settings_of_reruns_are_checked(folder, settings, why):
    with pytest.raises(UserError) as error:
        report.verify_study(str(folder), folder.parent, **settings)
    assert why in str(error.value)


def test_a_table_from_before_intervals_were_cut_is_open_and_no_other_one() -> None:
    anew = "arm,mean,low,high\nbn,98.0,96.0,100.0\nnone,1.0,0.0,2.0\n"
    check = verify._compared("accuracy", anew.replace("100.0", "101.25").replace("0.0,2.0", "-0.5,2.0"), anew)
    assert check.outcome == "open"
    assert "2 ends of intervals beyond what is possible, such as 101.25 for 100.0" in check.text
    for other in ("99.0", "x"):
        assert verify._compared("accuracy", anew.replace("100.0", other), anew).outcome == "fails"
    assert verify._compared("accuracy", anew.replace("96.0", "97.0"), anew).outcome == "fails"
    assert verify._compared("accuracy", anew.replace("98.0", "99.0"), anew).outcome == "fails"
