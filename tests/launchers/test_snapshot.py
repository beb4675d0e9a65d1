"""The copy of code that SLURM jobs run from: what is in it, and that a job uses it and no other."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launchers.commands import python
from outcome import folder, status

import normlab
from normlab import runs
from normlab.common import frozen, git, source
from normlab.common.errors import UserError
from normlab.launchers import slurm, slurm_task, snapshot
from normlab.runs import files

NET = """
import importlib, inspect, json
from pathlib import Path
import normlab
from small import SmallNet
from blocks.head import head
late = importlib.import_module("late" + "comer")
importlib.import_module("unre" + "lated")
WIDTH = json.loads(Path(__file__).with_name("arch.json").read_text())["width"]

class Net(SmallNet):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.body[-1].p = 0.0
        self.extra = head(WIDTH)
        about = {"normlab": normlab.__file__, "net": __file__, "late": late.__file__, "weights": len(WEIGHTS)}
        Path("seen.json").write_text(json.dumps(about | {"source": inspect.getsource(Net)}))

WEIGHTS = Path(__file__).with_name("start.bin").read_bytes()
"""
FILES = {
    "net.py": NET,
    "latecomer.py": "",
    "unrelated.py": "",
    "arch.json": '{"width": 3}',
    "blocks/__init__.py": "",
    "blocks/head.py": "from torch import nn\ndef head(width): return nn.Linear(width, 1)",
    "blocks/unseen.py": "",
    "blocks/sizes.yaml": "a: 1",
    "blocks/images.npy": "data",
    "blocks/.hidden/x.py": "",
    "blocks/venv/pyvenv.cfg": "",
    "blocks/venv/x.py": "",
    "blocks/outputs/x.py": "",
    "blocks/photos/labels.json": "",
    "random.py": "of nobody's interest",
}
OWN = {
    *("net.py", "latecomer.py", "arch.json", "start.bin", "small.py"),
    *("blocks/__init__.py", "blocks/head.py", "blocks/unseen.py", "blocks/sizes.yaml"),
}


@pytest.fixture
def config(tiny, tmp_path, monkeypatch):
    """Of a run with a network that is in the current folder, beside other files."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "start.bin").write_bytes(bytes(snapshot.MOST_BYTES_OF_RESOURCE + 1))
    (tmp_path / "blocks" / "linked").symlink_to(tmp_path)
    importlib.invalidate_caches()
    source._own_modules.cache_clear()
    folders = (f"output_dir={tmp_path}/blocks/outputs", f"data_dir={tmp_path}/blocks/photos")
    made = tiny("model.target=net.Net", "model.name=net", "epochs=1")
    yield made.model_copy(update=dict(each.split("=") for each in folders))
    source._own_modules.cache_clear()


def used(tmp_path: Path) -> snapshot.Used:
    """What a check of the network would find beside what its source says."""
    late = source.OwnModule(tmp_path / "latecomer.py", tmp_path, False)
    return snapshot.Used({"latecomer": late}, [tmp_path / "arch.json", tmp_path / "start.bin"])


def take(config, tmp_path: Path) -> Path:
    source._own_modules.cache_clear()
    taken = snapshot.take([config], used(tmp_path), pytest.fail)
    assert taken
    return taken


def own_files(taken: Path) -> set[str]:
    modules = taken / frozen.MODULES
    found = {path.relative_to(modules).as_posix() for path in modules.rglob("*") if not path.is_dir()}
    return {name for name in found if not name.startswith(("normlab/", "hydra_plugins/"))}


def test_a_snapshot_has_the_code_that_runs_import_once_per_version_and_no_data(config, tmp_path) -> None:
    first = take(config, tmp_path)
    assert first.parent == runs.Run(config.as_dict()).folder.parent / "slurm" / "code"
    assert own_files(first) == OWN
    assert (first / "modules/start.bin").readlink() == tmp_path / "start.bin"  # too large for code
    ours = Path(normlab.__file__).parent
    assert {path.relative_to(ours) for path in ours.rglob("*.py")} == {
        path.relative_to(first / "modules/normlab") for path in (first / "modules/normlab").rglob("*.py")
    }
    assert json.loads((first / "manifest.json").read_text())["git"] == git.state()
    assert take(config, tmp_path) == first
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    (tmp_path / "blocks/unseen.py").write_text("x = 1")
    assert take(config, tmp_path) != first
    assert runs.find(first.parents[2]) == []


def test_nothing_is_written_through_a_link(config, tmp_path) -> None:
    study = config.study_folder
    (study / "slurm").mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (study / "slurm" / "code").symlink_to(elsewhere)
    with pytest.raises(UserError, match="is a link"):
        take(config, tmp_path)
    assert not list(elsewhere.iterdir())


def test_code_that_cannot_be_read_is_named(config, tmp_path) -> None:
    gone = snapshot.Used({"gone": source.OwnModule(tmp_path / "gone.py", tmp_path, False)})
    with pytest.raises(UserError, match=r"gone\.py is a part of the runs' code and cannot be copied"):
        snapshot.take([config], gone, pytest.fail)


def replace(file: Path, make) -> None:
    file.unlink()
    make(file)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda at: replace(at / "modules/net.py", Path.touch), "modules/net.py was changed"),
        (lambda at: replace(at / "modules/small.py", os.mkfifo), "modules/small.py was changed"),
        (lambda at: replace(at / "modules/start.bin", os.mkfifo), "modules/start.bin was changed"),
        (lambda at: replace(at / "manifest.json", Path.touch), "manifest.json was changed"),
        (lambda at: (at / "modules/torch.py").touch(), "modules/torch.py was added"),
        (lambda at: (at / "start.py").unlink(), "start.py was removed"),
    ],
)
def test_a_damaged_snapshot_is_told_and_made_anew_by_the_next_submission(config, tmp_path, damage, fault) -> None:
    taken = take(config, tmp_path)
    assert frozen.fault(taken) == ""
    damage(taken)
    assert fault in frozen.fault(taken)
    assert take(config, tmp_path) == taken
    assert frozen.fault(taken) == ""


def test_a_job_tells_of_a_damaged_snapshot_and_trains_nothing(config, tmp_path) -> None:
    taken = take(config, tmp_path)
    (taken / "modules/late.py").touch()
    done = subprocess.run([sys.executable, taken / "start.py", "no order"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "is damaged: modules/late.py was added. No run was started." in done.stderr
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    ("limit", "value", "kept"),
    [
        *(("MOST_FILES", 2, {"net.py", "small.py"}), ("MOST_ENTRIES", 2, {"net.py", "small.py"})),
        ("MOST_BYTES", 2, set()),
    ],
)
def test_a_package_that_is_too_large_stays_where_it_is_and_a_line_says_so(
    config, monkeypatch, limit, value, kept
) -> None:
    monkeypatch.setattr(snapshot, limit, value)
    told: list[str] = []
    found = snapshot._own([config], snapshot.Used(), told.append)
    assert set(found) == kept
    assert [line.partition(" in /")[0] for line in told] == ["The package blocks", "The code"][: 1 + (not kept)]


@pytest.mark.slow
def test_a_job_runs_the_code_of_its_submission_though_all_was_edited_since(config, tmp_path) -> None:
    taken = take(config, tmp_path)
    before = config.own_code()
    order = tmp_path / "order.json"
    files.write_json(order, {"slots": 1, "tasks": [[{"settings": config.as_dict()}]]})
    for name in ("net.py", "latecomer.py", "blocks/head.py"):
        (tmp_path / name).write_text("raise SystemExit('edited')")
    (tmp_path / "arch.json").write_text("edited")
    elsewhere = tmp_path / "elsewhere"  # what a cluster's set-up may put before all
    elsewhere.mkdir()
    (elsewhere / "net.py").write_text("raise SystemExit('another')")
    of_slurm = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "PYTHONPATH": str(elsewhere)}
    with python(tmp_path, "-u", taken / "start.py", order, **of_slurm) as process:
        out, error = process.communicate(timeout=120)
    assert process.returncode == 0, out + error
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert {Path(seen[name]).is_relative_to(taken) for name in ("net", "normlab", "late")} == {True}
    assert "self.body[-1].p" in seen["source"]
    assert seen["weights"] == snapshot.MOST_BYTES_OF_RESOURCE + 1
    assert status(config)["parameters"] == 24 * 9 + 16 + 8 * 16 * 9 + 32 + 170 + 4  # arch.json as it was
    log = (folder(config) / runs.LOG).read_text()
    assert f"Not in the snapshot of code, so imported as they are now: unrelated ({tmp_path}/unrelated.py)." in log
    made = runs.read_provenance(folder(config))
    assert made["own_code"] == before
    assert made["snapshot"] == taken.name
    assert made["git"] == git.state()
    assert frozen.fault(taken) == ""  # with what Python compiled


@pytest.fixture
def handlers():
    """Signals are as they were after a task that is called in this process."""
    before = {number: signal.getsignal(number) for number in slurm_task.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("order", "task", "message"),
    [
        ({"slots": 1, "tasks": [[]]}, "abc", "SLURM_ARRAY_TASK_ID=abc is none of the 1 tasks"),
        ({"slots": 1, "tasks": [[]]}, "1", "SLURM_ARRAY_TASK_ID=1 is none of the 1 tasks"),
        ({"slots": 1, "tasks": [[{"settings": {"study": 3}}]]}, "0", "task 0 has no settings of runs"),
        ({"slots": 1, "tasks": [[{"settings": {"norm": 3}}]]}, "0", "task 0 has no settings of runs"),
        ({"slots": 1, "tasks": [[{"settings": 3}]]}, "0", "tasks.0.0.settings is not as"),
        ({"slots": "abc", "tasks": []}, "0", "slots is not as"),
        ({"tasks": {"0": []}}, "0", "slots is not as"),
        ({"slots": 1, "tasks": [[[]]]}, "0", "tasks.0.0 is not as"),
        (None, "0", "cannot be read: it is no file"),
    ],
)
def test_an_odd_order_or_task_is_refused_in_a_sentence(
    tmp_path, monkeypatch, capsys, handlers, order, task, message
) -> None:
    place = tmp_path / "order.json"
    if order is None:
        os.mkfifo(place)
    else:
        place.write_text(json.dumps(order))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    assert slurm_task.main(place) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 5


def test_an_order_of_a_thousand_runs_is_read(tmp_path) -> None:
    order = tmp_path / "order.json"
    entry = {"folder": "/a/run", "settings": {f"setting{number}": "x" * 15 for number in range(80)}}
    order.write_text(files.to_json({"slots": 2, "tasks": [[entry]] * 1000}))
    assert order.stat().st_size > 2 << 20
    assert len(slurm.read_order(order).tasks) == 1000


def test_an_order_of_another_run_than_it_names_is_refused(tmp_path, monkeypatch, capsys, handlers, tiny) -> None:
    order = tmp_path / "order.json"
    settings = tiny().as_dict()
    entry = {"folder": str(runs.Run(settings).folder), "settings": settings | {"seed": 1}}
    order.write_text(json.dumps({"slots": 1, "tasks": [[entry]]}))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    assert slurm_task.main(order) == 1
    assert "has the settings of another one" in capsys.readouterr().err


def test_an_order_that_was_edited_since_is_none(tmp_path) -> None:
    content = files.to_json({"slots": 1, "tasks": [[]]}).encode()
    order = tmp_path / f"20260101-000000-abcd-{slurm._digest(content)}.json"
    order.write_bytes(content)
    assert slurm.read_order(order).slots == 1
    order.write_bytes(content.replace(b"1", b"2"))
    with pytest.raises(UserError, match="was changed since it was submitted"):
        slurm.read_order(order)
