"""Several processes that train one run: together they are one process, they resume each other, and they end alike."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import several
import torch
from conftest import composed
from hydra.types import RunMode
from launchers.commands import ROOT, by_two_tasks, python, wait_for_progress
from omegaconf import OmegaConf
from outcome import correct, folder, rows, status
from PIL import Image
from torch import Tensor, nn

from normlab import models, runs
from normlab.common.errors import UserError
from normlab.config.schema import RunConfig
from normlab.data.batches import Split, unit_interval
from normlab.data.datasets import load
from normlab.data.resident import Resident
from normlab.launchers import single
from normlab.training.distributed import checks
from normlab.training.distributed.processes import Processes, find

CPU = torch.device("cpu")
NETWORK = ("model=custom", "model.target=small.SmallResNet", "model.name=small")
RUN = ("batch=32", "eval_batch=16", "device=cpu", "threads=1", "save_weights=true")
DIGITS = ("dataset.train_size=82", "dataset.test_size=21")  # the last batch has 18 images
IMAGES = ("dataset=image_folder", "dataset.path={images}", "dataset.storage=stream", "dataset.workers=0", "batch=6")
REGRESSION = ("model=deep_linear", "depth=2", "dataset=linear_regression", "dataset.features=6")

ARMS = {
    "augmented": "norm=bn sync_stats=true dataset.flip=true dataset.crop_padding=1 label_smoothing=0.1",
    "precise": "norm=bn sync_stats=true eval_stats=precise weight_average=0.9",
    "batch": "norm=bn sync_stats=true eval_stats=batch input_norm=bn",
    "groups": "norm=bn norm_batch=16 drop_last=true",
    "small_groups": "norm=renorm norm_batch=4 drop_last=true",
    "paired": "norm=bn norm_batch=8 sampler=paired sampler.images_per_label=2",
    "gradients": "norm=mabn norm_batch=8 drop_last=true",  # has moving averages of gradients
    "online": "norm=online norm_batch=8 drop_last=true",
    "norms_alone": "norm=bn sync_stats=true train_only=norm init=uniform_gamma",
    "memory": "norm=mbn_style norm_batch=8 drop_last=true",
    "iterations": "norm=cbn norm_batch=8 norm.burn_in=1 drop_last=true",
    "group_norm": "norm=gn",
    "from_data": "norm=wn_mean norm.init=data sync_stats=true",
    "streamed": "norm=bn sync_stats=true dataset.crop_scale=[0.3,1] dataset.flip=true",
    "regression": "norm=bn sync_stats=true dataset.train_size=50 dataset.test_size=21 dataset.split_seed=1",
}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
Configured = Callable[..., RunConfig]


@pytest.fixture
def configured(tmp_path) -> Configured:
    """`configured(arm, who)`: the run of an arm, in a folder of who carries it out."""
    images = tmp_path / "images"

    def make(arm: str, who: str) -> RunConfig:
        data = {"streamed": [word.format(images=images) for word in IMAGES], "regression": [*REGRESSION]}
        network = () if arm == "regression" else NETWORK
        folders = (f"output_dir={tmp_path / who}", f"data_dir={tmp_path}", f"study={arm}")
        epochs = "epochs=1" if who in ("one", "two") else "epochs=2"
        return composed(*network, *RUN, epochs, *data.get(arm, DIGITS), *ARMS[arm].split(), *folders)

    return make


def train_by_two(tmp_path: Path, *plans: dict[str, Any]) -> str:
    """Carry out runs by two processes; return what they printed."""
    file = tmp_path / "plans.json"
    file.write_text(json.dumps([{**plan, "settings": plan["settings"].as_dict()} for plan in plans]))
    with python(tmp_path, *TORCHRUN, several.__file__, file, OMP_NUM_THREADS="1") as process:
        return process.communicate(timeout=300)[1]


def assert_equal(one: RunConfig, two: RunConfig) -> None:
    """Assert that a run of two processes has the record of that of one."""
    weights, others = (torch.load(folder(config) / "weights.pt", weights_only=True) for config in (one, two))
    # The regression's loss is taken in float32.
    rtol, atol = (1e-4, 1e-5) if one.study == "regression" else (1e-9, 1e-12)
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=rtol, atol=atol, msg=f"{one.study}: {name}")
    for row, other in zip(rows(one), rows(two), strict=True):
        assert other == pytest.approx(row, rel=1e-5)
    assert correct(one) == correct(two)
    assert (correct(one) is None) == (one.study == "regression")
    assert all(row["images_per_second"] > 0 for row in runs.read_metrics(folder(two))[0])
    assert {path.name for path in folder(two).iterdir()} == {path.name for path in folder(one).iterdir()}
    assert status(two).keys() == status(one).keys()


@pytest.mark.slow
def test_two_processes_are_one(configured, tmp_path) -> None:
    """Three steps and an evaluation."""
    for number in range(28):
        part = tmp_path / "images" / ("train" if number < 20 else "val") / "ab"[number % 2]
        part.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (12, 12, 3), generator=torch.Generator().manual_seed(number)).byte()
        Image.fromarray(pixels.numpy()).save(part / f"{number}.png")
    printed = train_by_two(tmp_path, *({"settings": configured(arm, "two")} for arm in ARMS))
    for arm in ARMS:
        one, two = configured(arm, "one"), configured(arm, "two")
        several.train_here(one.as_dict())
        assert status(two).get("processes") == 2, printed
        assert_equal(one, two)


@pytest.mark.slow
def test_processes_resume_each_other_and_an_error_of_one_ends_all(configured, tmp_path) -> None:
    """In the middle of an epoch, of six steps in two epochs: two go on where one was interrupted, or one where two."""
    one, by_two, by_one = (configured("augmented", who) for who in ("whole", "by_two", "by_one"))
    failing = configured("group_norm", "failing")
    several.train_here(one.as_dict())
    several.train_here(by_two.as_dict(), stop_at=2)
    printed = train_by_two(
        tmp_path,
        {"settings": by_two},
        {"settings": by_two},  # which is finished
        {"settings": by_one, "stop_at": 4},
        {"settings": failing, "fail_at": 5},
    )
    stopped = status(by_one)
    assert (stopped["state"], stopped["step"]) == ("interrupted", 4), printed
    assert stopped["error"] == "by SIGUSR2"
    several.train_here(by_one.as_dict())
    assert (folder(by_two) / "run.log").read_text().count("going on at epoch") == 1
    for config, processes in ((by_two, 2), (by_one, 1)):
        assert status(config)["processes"] == processes
        assert_equal(one, config)
    assert status(failing)["state"] == "failed"
    assert status(failing)["error"] == "Process 1 of this run failed: TypeError: a bug"
    assert 'raise TypeError("a bug")' in (folder(failing) / "run.log").read_text()


# --- each process's share ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1])
def test_shares_make_up_the_batches(start) -> None:
    def split(rank: int, processes: int) -> Split:
        pixels = torch.arange(22 * 3 * 4).view(22, 3, 2, 2).byte()
        normalization = unit_interval(CPU)
        rows = torch.arange(22)
        return Split(Resident(pixels), rows, rows, normalization, CPU, batch=8, rank=rank, processes=processes)

    def labels(batches) -> list[list[int]]:
        return [labels.tolist() for _, labels in batches]

    whole = labels(split(0, 1).batches(3, start))
    shares = [labels(split(rank, 4).batches(3, start)) for rank in range(4)]
    assert [batch[rank::4] for batch in whole for rank in range(4)] == [
        share for parts in zip(*shares, strict=True) for share in parts
    ]
    evaluated = [labels(split(rank, 4).batches()) for rank in range(4)]
    assert sorted(label for batches in evaluated for batch in batches for label in batch) == list(range(22))
    assert min(map(len, evaluated)) == split(0, 4).shared_batches


# --- what several cannot do ----------------------------------------------------------------------------------------

CANNOT = {
    "norm=affine batch=15": ["batch=15", "Nearest valid: batch=16"],
    "norm=affine probe=[gradients,ics]": ["probe=[gradients,ics]", "probe=[]"],
    "norm=bnp": ["optimizer.precondition=bnp", "one process"],
    "norm=affine device=cuda:1": ["device=cuda:1", "device=cuda:"],
    "norm=bn": ["norm=bn", "sync_stats=true", "norm_batch=8"],
    "norm=bn norm_batch=5": ["norm_batch=5", "Nearest valid: norm_batch=4"],
    "norm=affine input_norm=bn": ["sync_stats=true", "norm_batch=8"],
    "norm=noisy_none": ["norm=noisy_none", "noise"],
    "norm=affine dataset.train_size=33": ["last batch", "1 of 33 images", "drop_last=true"],
}


@pytest.mark.parametrize("settings", CANNOT)
def test_what_would_be_another_run_is_refused_in_a_sentence(tiny, settings) -> None:
    given = tiny(*settings.split())
    network = models.build(given, num_classes=10, image_size=8)
    data = load(given, CPU, log=print)

    def start() -> None:
        checks.check_settings(given, 2)
        checks.prepare_layers(given, network, data, 2)

    with pytest.raises(UserError) as caught:
        start()
    text = str(caught.value)
    for words in CANNOT[settings]:
        assert words in text
    assert len(text.splitlines()) <= 5


def test_a_batch_normalization_of_pytorch_is_named(tiny) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(10)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    given = tiny("norm=affine")
    with pytest.raises(UserError, match="norm is a BatchNorm1d of PyTorch"):
        checks.prepare_layers(given, Own(), load(given, CPU, log=print), 2)


# --- who they are --------------------------------------------------------------------------------------------------

RANK = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
TASK = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "a,b",
}


def test_processes_are_those_of_torchrun_or_slurm() -> None:
    assert find({}) == Processes(0, 1, 0)
    assert find(RANK) == Processes(3, 4, 1, "a", 29500)
    assert find({**RANK, "WORLD_SIZE": "1", "RANK": "0"}) == Processes()
    assert find(TASK) == Processes(3, 4, 1, "a", 26711)
    assert find({**TASK, "MASTER_ADDR": "c", "MASTER_PORT": "99"}) == Processes(3, 4, 1, "c", 99)
    assert find({**TASK, **RANK}) == find(RANK)  # torchrun on every node of a job
    assert find({**TASK, "SLURM_STEP_NUM_TASKS": "1"}) == Processes()
    assert find({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "4711"}) == Processes()  # a batch script


@pytest.mark.parametrize(
    "given", ["RANK=abc", "RANK=4", "RANK=", "WORLD_SIZE=-2", "LOCAL_RANK=1.5", "MASTER_PORT=99999"]
)
def test_a_variable_that_gives_no_place_is_a_sentence(given) -> None:
    name, _, value = given.partition("=")
    with pytest.raises(UserError, match=rf"(?s)variable {given} is not valid: expected a whole number.*unset {name}"):
        find({**RANK, name: value})
    if name == "RANK":
        with pytest.raises(UserError, match="variable SLURM_PROCID="):
            find({**TASK, "SLURM_PROCID": value})


def test_nodes_are_queried_from_scontrol(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="export MASTER_ADDR="):
        find({**TASK, "SLURM_STEP_NODELIST": "node[07-08]"})
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "node[07-08]" ] && echo node07 && echo node08\n')
    scontrol.chmod(0o755)
    assert find({**TASK, "SLURM_STEP_NODELIST": "node[07-08]"}).host == "node07"


# --- the commands --------------------------------------------------------------------------------------------------

COMMAND = (
    *("model=custom", "model.target=slow_net.SlowNet", "model.name=slow", "norm=affine", *DIGITS),
    *("batch=32", "epochs=8", "device=cpu", "threads=1"),
)


@pytest.mark.slow
def test_torchrun_is_interrupted_with_a_checkpoint_and_tasks_of_slurm_go_on(tmp_path) -> None:
    """One process speaks, and all end alike."""
    with python(tmp_path, *TORCHRUN, ROOT / "train.py", *COMMAND, OMP_NUM_THREADS="1", SLOW_SECONDS="0.2") as torchrun:
        run = wait_for_progress(tmp_path)
        torchrun.send_signal(signal.SIGTERM)
        _, error = torchrun.communicate(timeout=60)
    stopped = runs.read_status(run) or {}
    assert (stopped["state"], stopped["error"]) == ("interrupted", "by SIGTERM"), error
    assert error.count("Interrupted. The same command goes on") == 1
    assert (run / "checkpoint.pt").exists()
    exited, _, error = by_two_tasks(tmp_path, *COMMAND)
    assert exited == 0, error
    assert "[1/1]" in error
    assert "going on at epoch" in (run / "run.log").read_text()


@pytest.mark.slow
def test_a_busy_run_is_left_alone_by_all(tmp_path) -> None:
    run = runs.Run(composed(*COMMAND, f"output_dir={tmp_path / 'outputs'}").as_dict())
    run.freeze()
    with run.lock():
        exited, _, error = by_two_tasks(tmp_path, *COMMAND)
    assert exited == 1
    assert "is already being trained by process" in error
    assert run.state == "planned"


def test_a_sweep_under_several_processes_is_refused_by_the_first(monkeypatch, capsys) -> None:
    command = SimpleNamespace(mode=RunMode.MULTIRUN, overrides=SimpleNamespace(hydra=[]))
    monkeypatch.setattr(single.HydraConfig, "get", lambda: command)
    ignored = Mock()
    monkeypatch.setattr(signal, "signal", ignored)
    for rank, words in (("0", "A sweep (-m) under 4 processes"), ("1", "")):
        for name, value in {**TASK, "SLURM_PROCID": rank}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            single.run(OmegaConf.create())
        assert ended.value.code == 1
        assert capsys.readouterr().err[: len(words) or None] == words
    ignored.assert_called_with(signal.SIGTERM, signal.SIG_IGN)
