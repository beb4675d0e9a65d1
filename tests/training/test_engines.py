"""A captured run of a CPU is resumed, refused and goes on as another; kinds of steps are in pretended_runs.py."""

from pathlib import Path

import pytest
import torch
from outcome import outcome, rows
from torch import Tensor, nn
from training.tape import Tape

from normlab.common.errors import UserError
from normlab.config.schema import RunConfig
from normlab.training import engines, graphs
from normlab.training.run import train_run

NORMS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "norm").glob("*.yaml"))
# 90 images in batches of 16: six steps an epoch, the last of ten images; the capture is the fourth of the run.
SMALL = ("dataset.train_size=90", "model.target=small.SmallResNet", "model.name=small_resnet", "optimizer.lr=5e-3")


@pytest.fixture
def replays(monkeypatch) -> list[int]:
    """One entry per replay of this test."""
    made: list[int] = []
    replay = Tape.replay
    monkeypatch.setattr(Tape, "replay", lambda tape: (made.append(1), replay(tape))[1])
    return made


def train_both(make, *settings: str) -> tuple[RunConfig, RunConfig]:
    """The same run by engine=eager and engine=graph."""
    both = [make(*settings, f"engine={engine}", f"study={engine}") for engine in ("eager", "graph")]
    for config in both:
        assert train_run(config)["state"] == "done"
    return both[0], both[1]


def losses(config: RunConfig) -> list[float]:
    return [row["train_loss"] for row in rows(config)]


def test_the_regression_task_is_captured(make, replays) -> None:
    settings = ("model=deep_linear", "depth=3", "dataset=linear_regression", "batch=16", "epochs=2", "threads=1")
    small = (*settings, "dataset.train_size=90", "device=cpu", "optimizer=gd", "optimizer.lr=1e-5")
    eager, graph = train_both(make, *small)
    assert losses(eager) == losses(graph)
    assert replays


@pytest.mark.parametrize("after", [2, 5, 9])
def test_an_interrupted_captured_run_goes_on_to_the_same_end(tiny, after, steps) -> None:
    config, undisturbed = (tiny(*SMALL, "engine=graph", f"study={study}") for study in ("parts", "whole"))
    train_run(undisturbed)
    steps.interrupt(config, after)
    train_run(config)
    assert outcome(config) == outcome(undisturbed)


@pytest.mark.parametrize(("first", "second"), [("graph", "eager"), ("eager", "graph")])
def test_a_run_goes_on_with_another_engine(tiny, first, second, steps) -> None:
    """Its optimizer's options, tensors for learning rates among them, are the new engine's own."""
    undisturbed, config = tiny(*SMALL, f"engine={second}", "study=undisturbed"), tiny(*SMALL, f"engine={second}")
    train_run(undisturbed)
    steps.interrupt(tiny(*SMALL, f"engine={first}"), after=7)
    train_run(config)
    assert outcome(config) == outcome(undisturbed)


class ReadsItsLoss(nn.Module):
    """A network that decides on the host by a value on the device, as no captured step can."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.relu(self.bn(self.conv(images))).mean((2, 3))
        return self.head(_scaled(features))


@torch.fx.wrap
def _scaled(features: Tensor) -> Tensor:
    if features.device.type != "meta" and features.detach().mean().item() > 1e9:
        return features * 0
    return features


def test_a_step_that_reads_a_value_on_the_host_is_refused_with_the_reason(tiny) -> None:
    network = ("model.target=training.test_engines.ReadsItsLoss", "model.name=reads")
    with pytest.raises(UserError, match=r"engine=graph cannot capture a step of reads with norm=bn: it reads a value"):
        train_run(tiny(*SMALL, *network, "engine=graph"))


class ReadsInEvaluation(ReadsItsLoss):
    def forward(self, images: Tensor) -> Tensor:
        features = self.relu(self.bn(self.conv(images))).mean((2, 3))
        return self.head(features if self.training else _scaled(features))


def test_an_evaluation_that_reads_a_value_on_the_host_is_refused_with_the_reason(tiny) -> None:
    network = ("model.target=training.test_engines.ReadsInEvaluation", "model.name=reads", "epochs=4")
    with pytest.raises(UserError, match=r"engine=graph cannot capture an evaluation of reads with norm=bn: it reads"):
        train_run(tiny(*network, "engine=graph"))


@pytest.mark.parametrize("engine", ["auto", "compile", "eager"])
def test_a_cpu_is_eager_unless_requested(tiny, engine, replays) -> None:
    config = tiny(f"engine={engine}")
    assert not engines.may_capture(config, torch.device("cpu"))


def test_without_a_tape_a_cpu_has_no_graphs(tiny) -> None:
    graphs.GRAPHS.clear()
    try:
        with pytest.raises(UserError, match=r"engine=graph cannot capture the steps of this run: only a GPU"):
            train_run(tiny("engine=graph"))
    finally:
        graphs.GRAPHS["cuda"] = graphs.CudaGraph


def test_a_wrong_engine_is_refused_with_the_nearest(tiny) -> None:
    with pytest.raises(UserError, match="engine=grahp is not valid: expected one of auto, eager, graph, compile"):
        tiny("engine=grahp")


# The tape itself


def test_a_tape_repeats_what_it_was_shown_on_the_values_of_now() -> None:
    x, y, rate = torch.tensor([1.0, 2.0]), torch.zeros(2), 3.0

    def work() -> None:
        view = x[1:]
        y.copy_(x * rate)
        view.add_(y[:1])

    tape = Tape()
    tape.capture(work)
    assert (x.tolist(), y.tolist()) == ([1.0, 5.0], [3.0, 6.0])
    x.fill_(10.0)
    rate = 1000.0  # Python's numbers stay what they were
    tape.replay()
    assert (x.tolist(), y.tolist()) == ([10.0, 40.0], [30.0, 30.0])


def test_a_tape_draws_new_random_numbers() -> None:
    x = torch.zeros(100)
    tape = Tape()
    tape.capture(lambda: x.copy_(torch.rand(100)))
    torch.manual_seed(1)
    tape.replay()
    torch.manual_seed(1)
    assert torch.equal(x, torch.rand(100))


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0]])
def test_a_tape_refuses_what_a_graph_cannot_hold(read) -> None:
    with pytest.raises(RuntimeError, match="reads a value on the host"):
        Tape().capture(lambda: read(torch.ones(3)))
