"""What `scripts/gpu_check` profiles: twenty replays of a captured step."""

from types import SimpleNamespace
from typing import Any

import pytest
from pretended import pretended
from torch.autograd import DeviceType

from gpu_checks import replays
from normlab.training.run import train_run


class Profile:
    """In place of PyTorch's: a second of one kernel in twenty replays."""

    def __init__(self, activities: object) -> None:
        self.said: list[str] = []

    def start(self) -> None:
        self.said.append("start")

    def stop(self) -> None:
        self.said.append("stop")

    def key_averages(self) -> list[SimpleNamespace]:
        kernel = {"key": "conv|2d", "count": 40, "self_device_time_total": 1e6, "device_type": DeviceType.CUDA}
        return [SimpleNamespace(**kernel), SimpleNamespace(**kernel | {"device_type": DeviceType.CPU})]


def test_twenty_replays_of_one_epoch_are_profiled(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "profile", Profile)
    with pretended():
        window = replays.Window()
        positions = []

        def step(engine: Any) -> None:
            before = len(window._profile.said)
            window.step(engine)
            if len(window._profile.said) > before:
                positions.append((engine.epoch, engine.position.batch))

        monkeypatch.setattr(replays.engines.Graphed, "step", step)
        few = ("device=cuda", "engine=graph", "batch=4", "dataset.train_size=100", "drop_last=true", "epochs=3")
        train_run(tiny(*few))
    assert window._profile.said == ["start", "stop"]
    ((epoch, first), (same, last)) = positions
    assert (epoch, last - first) == (same, replays.REPLAYS)
    assert window.done
    assert window.seconds > 0
    kernels = window.kernels()
    assert kernels == [{"name": "conv|2d", "launches": 2.0, "microseconds": 50_000.0}]
    assert "| `conv/2d` | 2.0 | 50000.0 | 100.0% |" in replays.shown(kernels, 60_000.0)
