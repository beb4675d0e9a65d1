"""A user's mistakes at the real command line: a sentence, exit status not 0, no traceback, no run started."""

import importlib
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from normlab import __version__
from normlab.common import bugs

ROOT = Path(__file__).parents[2]


def images(folder: Path, split: str, classes: tuple[str, ...], number: int = 4) -> None:
    for name in classes:
        (folder / split / name).mkdir(parents=True)
        for i in range(number):
            Image.new("RGB", (8, 8), (40 * i, 9, 9)).save(folder / split / name / f"{i}.png")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, proxy in (("http_proxy", "127.0.0.1:9"), ("https_proxy", "127.0.0.1:9"), ("no_proxy", "")):
        monkeypatch.setenv(name, f"http://{proxy}" if proxy else "")


@pytest.fixture
def folders(tmp_path) -> Path:
    """Image folders, each wrong in one way."""
    images(tmp_path / "classes_differ", "train", ("cat", "dog"))
    images(tmp_path / "classes_differ", "test", ("cat", "god"))
    (tmp_path / "empty").mkdir()
    return tmp_path


MISTAKES = {
    "norm=bnn": ["norm=bnn", "Did you mean norm=bn?", "affine, bn, bn_frozen, bn_mean"],
    "norm=null": ["norm=null", "norm=none"],
    "model=null": ["model=null", "the name of one of its files"],
    "norm=batch_norm": ["Did you mean norm=bn?"],
    "norm=GroupNorm": ["Did you mean norm=gn?"],
    "model=vgg depth=18": ["depth=18", "11, 13, 16, 19", "nearest: depth=19"],
    "model=deep_linear dataset=digits": ["model=deep_linear", "linear_regression"],
    "model=deep_linear input_norm=bn": ["input_norm=bn", "input_norm=none"],
    "model=deep_linear label_smoothing=0.1": ["label_smoothing=0.1", "label_smoothing=0"],
    "weight_average=0": ["weight_average=0", "above 0"],
    "sampler=paired batch=33": ["batch=33", "Nearest valid: batch=32"],
    "sampler=paired eval_stats=batch eval_batch=51": ["eval_batch=51", "Nearest valid: eval_batch=50"],
    "norm=tbbn": ["norm=tbbn", "sampler=iid has no tasks", "sampler=class_incremental"],
    "sampler=class_incremental norm=tbbn norm_batch=4": ["norm=tbbn", "norm_batch=null"],
    "sampler=class_incremental epochs=5": ["epochs=5", "sampler.tasks=2", "Nearest valid: epochs=4"],
    "sampler=class_incremental sampler.tasks=4": ["sampler.tasks=4", "10 classes", "Nearest valid: sampler.tasks=5"],
    "sampler=class_incremental sampler.memory=8 sampler.memory_batch=4": ["sampler.memory=8", "sampler.memory=10"],
    "sampler=class_incremental batch=32": ["sampler.memory_batch=32", "sampler.memory_batch=8"],
    "sampler=class_incremental sampler.memory=20": ["sampler.memory=20", "Nearest valid: sampler.memory=32"],
    "sampler=class_incremental eval_stats=batch": ["eval_stats=batch", "eval_stats=running"],
    "sampler=class_incremental label_smoothing=0.1": ["label_smoothing=0.1", "label_smoothing=0"],
    "sampler=class_incremental init=lsuv": ["init=lsuv", "init=default"],
    "sampler=class_incremental norm=wn norm.init=data": ["norm.init=data", "norm.init=weights"],
    "sampler=class_incremental schedule.warmup_epochs=2": ["schedule.warmup_epochs=2", "2 for each task"],
    "sampler=class_incremental model=deep_linear dataset=linear_regression": ["a regression has none", "sampler=iid"],
    "sync_stats=true norm_batch=4": ["sync_stats", "norm_batch"],
    "init=xavier": ["init=xavier", "glorot"],
    "nrom=bn": ["nrom", "Did you mean norm"],
    "modle.stem=small": ["modle.stem", "model.stem"],
    "depth=19": ["depth=19", "18, 34, 50, 101, 152", "nearest: depth=18"],
    "batch=0": ["batch=0", "1 or more", "batch=1"],
    "batch=abc": ["batch=abc", "a whole number", "batch=128"],
    "batch=8.5": ["batch=8.5", "a whole number"],
    "batch=100000": ["batch=100000", "larger than the data", "1438", "Nearest valid"],
    "norm_batch=256": ["norm_batch=256", "larger than batch=128", "norm_batch=128"],
    "optimizer.lr=nan": ["optimizer.lr=nan", "finite"],
    "norm=gn +norm.gruops=4": ["norm=gn has no option gruops. Did you mean groups?", "Expected one of: groups, eps."],
    "norm=affine +norm.norm_batch=4": ["norm=affine has no option norm_batch.", "Expected none."],
    "norm=none norm.conv_bias=flase": ["norm.conv_bias=flase", "true or false"],
    "+bacth=8": ["bacth", "Did you mean batch"],
    "optimizer.name=adamw": ["optimizer.name=adamw", "Did you mean optimizer.name=adam?"],
    "optimizer=adam optimizer.betas=[0.9]": ["optimizer.betas=[0.9]"],
    "model=custom model.target=small.SmallNet model.kwargs.width=6": ["+model.kwargs.width"],
    "device=cudda": ["device=cudda", "Did you mean device=cuda?"],
    "device=cuda:99": ["device=cuda:99", "CUDA devices", "device=cpu"],
    "device=mps": ["device=mps is not valid", "others have not been tried", "device=cpu"],
    "device=xpu:0": ["device=xpu:0 is not valid", "device=auto"],
    "device=hip": ["device=hip is not valid", "device=auto"],
    "study=../elsewhere": ["study=../elsewhere", "letters, digits"],
    "dataset=image_folder": ["dataset.path", "needs a value"],
    "dataset=image_folder dataset.path=missing": ["missing", "dataset.path"],
    "dataset=image_folder dataset.path=empty": ["empty", "train"],
    "dataset=image_folder dataset.path=classes_differ": ["god", "dog"],
    "dataset.train_size=100000": ["dataset.train_size=100000", "1438"],
    "dataset=cifar10": ["cifar", "dataset=digits"],
    "model=custom": ["model.target", "needs a value"],
    "model=custom model.target=no_such_package.Net": ["no_such_package"],
    "output_dir=/proc/nowhere": ["/proc/nowhere", "output_dir="],
    "norm=[bn": ["norm=[bn", "key=value"],
    "schedule.warmup_epochs=9": ["schedule.warmup_epochs=9", "epochs=4"],
    "norm bn": ["python train.py norm=bn"],
    "--bogus": ["--bogus: there is no such flag"],
    "-m --cfg job": ["do not go together"],
    "-m norm=glob(x*)": ["nothing matches"],
    "-m norm=bn,none norm.groups=8": ["norm.groups", "norm=gn"],
    "-m hydra/launcher=basic batch=0": ["batch=0 is out of range"],
    "-m seed=range(0,3),5": ["seed=range(0,3),5", "no function beside them"],
    "-m norm=null,bn": ["norm=null", "norm=none"],
    "--config-dir empty norm=gm": ["Did you mean norm=gn?"],
}


QUICK = (
    *("norm=bnn", "norm=null", "nrom=bn", "depth=19", "batch=abc"),
    *("device=cuda:99", "output_dir=/proc/nowhere", "norm=[bn"),
)
ONCE = ("norm bn", "-m --cfg job", "-m hydra/launcher=basic batch=0")  # which say themselves whether they are a sweep


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("mistake", "sweep"),
    [
        *((mistake, ()) for mistake in (*QUICK, *ONCE)),
        *(pytest.param(each, (), marks=pytest.mark.slow) for each in MISTAKES if each not in (*QUICK, *ONCE)),
        *(pytest.param(mistake, ("-m", "seed=0,1"), marks=pytest.mark.slow) for mistake in QUICK),
    ],
)
def test_a_mistake_is_answered_in_at_most_five_lines(command, folders, mistake, sweep) -> None:
    arguments = mistake.split(" ")
    status, out, error = command("train.py", *sweep, *arguments)
    assert status == 1, out + error
    assert "Traceback" not in out + error
    assert 1 <= len(error.strip().splitlines()) <= 5, error
    for word in MISTAKES[mistake]:
        assert word in error, error
    assert not list(folders.glob("outputs/**/config.yaml"))


@pytest.mark.slow
def test_one_wrong_run_of_a_sweep_stops_it_before_the_first(command, tmp_path) -> None:
    status, _, error = command("train.py", "-m", "norm=bn", "batch=8,0")
    assert status == 1
    assert error.startswith("batch=0 is out of range")
    assert not list(tmp_path.glob("outputs/**/config.yaml"))


@pytest.mark.slow
def test_an_unreadable_image_is_named(command, tmp_path) -> None:
    images(tmp_path / "set", "train", ("cat", "dog"))
    images(tmp_path / "set", "test", ("cat", "dog"))
    (tmp_path / "set" / "train" / "dog" / "1.png").write_bytes(b"\x89PNG no image")
    arguments = ("dataset=image_folder", "dataset.path=set", "batch=4", "epochs=1")
    for mode in ((), ("-m",)):
        status, out, error = command("train.py", *mode, *arguments)
        assert status == 1
        assert "dog/1.png" in error
        assert "Traceback" not in out + error


@pytest.mark.slow
def test_a_read_only_folder_is_named(command, tmp_path) -> None:
    (tmp_path / "outputs").write_text("a file where the folder should be")
    for mode in ((), ("-m",)):
        status, out, error = command("train.py", *mode, "batch=64")
        assert status == 1
        assert "outputs" in error
        assert "output_dir=" in error
        assert "Traceback" not in out + error


def test_flags_stand_between_settings(command, tmp_path) -> None:
    (tmp_path / "own" / "norm").mkdir(parents=True)
    (tmp_path / "own" / "norm" / "mine.yaml").write_text("defaults: [gn]\nname: mine\n")
    plan = ("hydra/launcher=plan", "hydra.launcher.calibrate_seconds=0")
    typed = ("study=x", "-m", "norm=bn,mine", "--config-dir", "own", "norm.groups=8", *plan, "output_dir=~/größe/a=b")
    status, out, error = command("train.py", *typed, HOME=str(tmp_path / "home"))
    assert status == 0, error
    assert "norm.groups is not for norm=bn" in out
    assert "2 runs: 2 new" in out
    assert [path.name for path in (tmp_path / "home" / "größe" / "a=b").iterdir()] == ["x"]
    assert not (tmp_path / "~").exists()


BROKEN = {  # by an attribute whose absence breaks it
    ("train.py",): "normlab.config.schema.RunConfig",
    ("train.py", "doctor"): "normlab.config.schema.RunConfig",
    ("train.py", "-m"): "normlab.config.schema.RunConfig",
    ("report.py", "study=x"): "normlab.report.build",
    ("report.py", "status"): "normlab.report.study_status",
}


@pytest.mark.parametrize("words", BROKEN, ids=" ".join)
def test_an_error_of_ours_says_so_and_what_to_send(command, monkeypatch, words) -> None:
    importlib.import_module("normlab.launchers.single")
    monkeypatch.setattr(BROKEN[words], None)
    status, _, error = command(*words)
    assert status == 1
    trace, _, told = error.partition("This is an error of normlab")
    assert trace.startswith("Traceback")
    assert "Error: 'NoneType' object" in trace
    assert all(part in told for part in (f"command: {words[0]}", f"normlab {__version__}", "Python 3.", "torch 2."))


def test_an_error_of_a_users_own_code_is_told_from_ours(tmp_path) -> None:
    (tmp_path / "own_net.py").write_text("def make(call):\n    call()\n")
    make = runpy.run_path(str(tmp_path / "own_net.py"))["make"]
    with pytest.raises(TypeError) as theirs:
        make(1)
    assert bugs.blame(theirs.value).startswith(f"It comes out of {tmp_path / 'own_net.py'}, line 2:")
    with pytest.raises(AttributeError) as ours:
        bugs.blame(None)  # type: ignore[arg-type]
    ours.value.__traceback__ = ours.value.__traceback__.tb_next  # without the line of this test
    assert bugs.blame(ours.value).startswith("This is an error of normlab")


def test_what_is_to_be_sent_to_the_authors_has_the_command(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", "study=x"])
    assert "\n  command: report.py next study=x\n" in bugs.report(ValueError("x"), "next")
    assert "\n  command: report.py study=x\n" in bugs.report(ValueError("x"))


OWN_FILES = {
    "name: [": ["broken.yaml", "cannot be read"],
    "- 1": ["norm=[1] is not valid: expected settings"],
    "5": ["broken.yaml has no settings"],
    "name: \xe9": ["broken.yaml", "UTF-8"],
    "name: a\nname: b": ["broken.yaml", "duplicate key name"],
    "defaults: [broken]": ["include each other in a circle"],
    "eps: ${nope}": ["norm.eps refers to ${nope}"],
}


@pytest.mark.parametrize("text", OWN_FILES)
def test_a_mistake_in_a_file_of_ones_own_is_named(command, tmp_path, text) -> None:
    (tmp_path / "own" / "norm").mkdir(parents=True)
    (tmp_path / "own" / "norm" / "broken.yaml").write_bytes(f"{text}\n".encode("latin-1"))
    status, _, error = command("train.py", "--config-dir", "own", "norm=broken")
    assert status == 1
    assert "Traceback" not in error
    for word in OWN_FILES[text]:
        assert word in error


@pytest.mark.slow
def test_a_pipe_that_closes_and_a_folder_that_is_gone_are_no_errors_of_ours(tmp_path) -> None:
    script, gone = [sys.executable, ROOT / "train.py"], tmp_path / "gone"
    reader, writer = os.pipe()
    os.close(reader)
    packed = f"study={ROOT / 'outputs/reference/digits_every_norm.normlab.zip'}"
    for words in (["train.py", "--help"], ["train.py", "doctor"], ["report.py", "status", packed]):
        command = [sys.executable, ROOT / words[0], *words[1:]]
        piped = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        assert (piped.returncode, piped.stderr) == (1, "")
    assert subprocess.run(command, stdout=writer, stderr=writer, cwd=tmp_path).returncode == 1
    gone.mkdir()
    gone_too = f"rmdir {gone} && exec {shlex.join(map(str, script))}"
    started = subprocess.run(["sh", "-c", gone_too], cwd=gone, capture_output=True, text=True)
    assert started.returncode == 1
    assert started.stderr.startswith("The folder in which this command was started")


def test_the_version_is_normlabs(command) -> None:
    assert command("train.py", "--version")[1].startswith(f"normlab {__version__}, Hydra 1.3")


def test_a_study_that_does_not_exist_is_answered_with_how_to_start_it(command) -> None:
    status, out, error = command("report.py", "study=nothing")
    assert status == 1
    assert "There is no study nothing" in error
    assert "Traceback" not in out + error


@pytest.mark.slow
def test_help_is_the_menu_and_does_not_import_torch(command, tmp_path) -> None:
    status, out, _ = command("train.py", "--help")
    assert status == 0
    menu = "norm: affine, bn, bn_frozen, bn_mean, bn_scaled"
    for word in (menu, "hydra/launcher", "depth: 18", "python train.py -m norm="):
        assert word in out
    code = (
        f"import atexit, runpy, sys; sys.argv = [{str(ROOT / 'train.py')!r}, '--help']\n"
        "atexit.register(lambda: print([m for m in ('torch', 'numpy', 'pandas') if m in sys.modules]))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert finished.stdout.splitlines()[-1] == "[]"


def test_tab_completion_knows_groups_and_options(command) -> None:
    status, out, _ = command("train.py", "--shell-completion", "install=bash")
    assert status == 0
    assert "complete" in out
    _, out, _ = command("train.py", "-sc", "query=bash", COMP_LINE="python train.py norm=b", COMP_POINT="22")
    assert out.split() == [
        *("norm=bn", "norm=bn_frozen", "norm=bn_mean", "norm=bn_scaled", "norm=bn_var"),
        *("norm=bnminus", "norm=bnn_free", "norm=bnp"),
    ]


def test_a_users_own_configuration_folder_is_searched(command, tmp_path) -> None:
    (tmp_path / "own" / "optimizer").mkdir(parents=True)
    (tmp_path / "own" / "optimizer" / "mine.yaml").write_text("defaults: [sgd]\nlr: 0.123\n")
    status, out, error = command("train.py", "--config-dir", "own", "optimizer=mine", "--cfg", "job")
    assert status == 0, error
    assert "lr: 0.123" in out
