"""The memory format and the threads of a run: by a rule, the same on every machine, and without a change of results."""

import json

import pytest
import torch
from conftest import Make
from outcome import folder, outcome, rows
from small import SmallResNet
from torch import Tensor, nn

from normlab import models
from normlab.config.schema import RunConfig
from normlab.training import device
from normlab.training.run import Resources, train_run
from normlab.training.setup import choose_memory_format


@pytest.fixture
def tiny(tiny: Make) -> Make:
    """With a network that draws no random numbers."""
    return lambda *settings: tiny("model.target=small.SmallResNet", "model.name=small_resnet", *settings)


def chosen(config: RunConfig, side: int, where: str = "cpu") -> str:
    network = models.build(config, num_classes=10, image_size=side).to(where)
    return choose_memory_format(config, network, torch.zeros(1, 3, side, side, device=where))


def test_on_a_cpu_it_goes_by_the_size_of_the_images_and_not_by_the_arm(tiny) -> None:
    assert chosen(tiny("memory_format=auto"), 15) == "contiguous"
    for words in ((), ("norm=none",), ("seed=3",), ("norm=wn",), ("norm=gn",)):
        assert chosen(tiny("memory_format=auto", *words), 16) == "channels_last"


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_on_a_gpu_it_goes_by_the_precision(tiny, precision) -> None:
    """The meta device stands for one: all but a CPU are taken to be GPUs."""
    expected = "contiguous" if precision == "fp32" else "channels_last"
    assert chosen(tiny("memory_format=auto", f"precision={precision}"), 8, "meta") == expected


@pytest.mark.parametrize("words", [("model.target=small.SmallNet", "model.name=small"), ("norm=noisy_bn",)])
def test_where_random_numbers_are_drawn_in_the_order_of_memory_it_is_contiguous(tiny, words) -> None:
    assert chosen(tiny("memory_format=auto", *words), 16) == "contiguous"


@pytest.mark.parametrize(("wish", "side"), [("contiguous", 32), ("channels_last", 8)])
def test_a_setting_goes_before_the_rule(tiny, wish, side) -> None:
    assert chosen(tiny(f"memory_format={wish}"), side) == wish


def test_without_convolutions_or_with_one_pixel_there_is_but_one(make) -> None:
    config = make("model=deep_linear", "memory_format=channels_last")
    assert chosen(config, 1) == "contiguous"
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    assert choose_memory_format(make("memory_format=channels_last"), flat, torch.zeros(1, 3, 32, 32)) == "contiguous"


class Views(SmallResNet):
    """A network that views its maps, which it takes to be contiguous."""

    def forward(self, images: Tensor) -> Tensor:
        maps = self.blocks(self.relu(self.bn1(self.conv1(images))))
        return self.fc(maps.view(len(maps), -1).view(len(maps), 64, -1).mean(2))


def test_a_network_that_cannot_do_with_channels_last_is_contiguous(tiny) -> None:
    config = tiny("memory_format=auto")
    assert choose_memory_format(config, Views(10), torch.zeros(1, 3, 16, 16)) == "contiguous"
    assert choose_memory_format(config, SmallResNet(10), torch.zeros(1, 3, 16, 16)) == "channels_last"


def recorded(config: RunConfig, fact: str) -> object:
    return json.loads((folder(config) / "provenance.json").read_text())[fact]


def test_the_rule_changes_no_result(tiny) -> None:
    auto, plain = (
        tiny(f"study={one}", "dataset.image_size=16", f"memory_format={one}") for one in ("auto", "contiguous")
    )
    for config in (auto, plain):
        train_run(config)
    for one, other in zip(rows(auto), rows(plain), strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
    assert [recorded(config, "memory_format") for config in (auto, plain)] == ["channels_last", "contiguous"]


@pytest.mark.parametrize(("memory_format", "other"), [("contiguous", "channels_last"), ("channels_last", "contiguous")])
def test_an_interrupted_run_goes_on_in_its_format_to_the_same_bits(tiny, steps, memory_format, other) -> None:
    whole = tiny(f"memory_format={memory_format}", "study=whole")
    train_run(whole)
    steps.interrupt(tiny(f"memory_format={memory_format}"), after=1)
    train_run(tiny(f"memory_format={other}"))
    assert outcome(tiny()) == outcome(whole)


@pytest.mark.slow
def test_a_run_gets_its_share_of_the_threads_and_a_lone_one_all(tiny, monkeypatch) -> None:
    monkeypatch.setattr(device, "DEFAULT_THREADS", 2)
    before = torch.get_num_threads()
    try:
        for study, settings, share, expected in (
            ("lone", "threads=null", None, 2),
            ("shared", "threads=null", 1, 1),
            ("again", "threads=null", None, 2),  # whatever an earlier run of this process had
            ("given", "threads=1", 2, 1),
        ):
            config = tiny(settings, f"study={study}", "epochs=1")
            train_run(config, resources=Resources(threads=share))
            assert recorded(config, "threads") == expected
    finally:
        torch.set_num_threads(before)


def test_freed_memory_is_kept_only_where_the_c_library_can(monkeypatch) -> None:
    class Without:
        pass

    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: Without())
    device._keep_freed_memory()
