"""Settings of a process for its runs."""

import pytest
import torch

from normlab.training import device, packing
from normlab.training.run import Resources, train_run

GPU = torch.device("cuda:0")


@pytest.fixture
def gpu(monkeypatch) -> None:
    for name in ("set_device", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("benchmark", "benchmark_limit"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))


@pytest.mark.parametrize(
    ("settings", "packed", "timed"),
    [((), False, True), ((), True, False), (("deterministic=true",), False, False)],
)
def test_plans_of_convolutions_are_timed_for_a_run_by_itself_and_only_few(tiny, gpu, settings, packed, timed) -> None:
    """Each thread of a pack would time them anew, and PyTorch would try ten of each."""
    try:
        device.prepare(tiny(*settings), GPU, 1, packed=packed)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.backends.cudnn.benchmark is timed
    assert torch.backends.cudnn.benchmark_limit == 2


def test_a_packed_run_says_that_it_is_packed(tiny, monkeypatch) -> None:
    said, prepare = [], device.prepare
    monkeypatch.setattr(
        device, "prepare", lambda *settings, packed: (said.append(packed), prepare(*settings, packed=packed))
    )
    resources = Resources("cpu", 1)
    train_run(tiny("study=alone"), resources=resources)
    packing.train_packed(
        [tiny()], 1, torch.device("cpu"), lambda config, mine: train_run(config, resources=Resources("cpu", 1, mine))
    )
    assert said == [False, True]


def test_the_command_is_recorded_without_the_folder_of_its_program(monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["/home/jane/normlab/train.py", "-m", "norm=bn"])
    assert device.provenance(torch.device("cpu"))["command"] == ["train.py", "-m", "norm=bn"]
