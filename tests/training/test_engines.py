"""A captured and replayed step does what an eager one does: on the CPU to the last bit."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training.tape import Tape

from normlab import runs
from normlab.common.errors import InterruptedRunError, UserError
from normlab.config.schema import RunConfig
from normlab.training import engines
from normlab.training.interrupt import StopRequest
from normlab.training.run import train_run

NORMS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "norm").glob("*.yaml"))
MEASURED = ("epoch", "step", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr")
# 90 images in batches of 16: six steps an epoch, the last of ten images; the capture is the fourth of the run.
SMALL = ("dataset.train_size=90", "model.target=small.SmallResNet", "model.name=small_resnet", "optimizer.lr=5e-3")


def record(config: RunConfig) -> tuple[str, list[dict], dict[str, list[dict]]]:
    """A digest of the weights at the end, what was measured at each evaluation, and by probes."""
    run = runs.Run(config.as_dict())
    measured, warnings = runs.read_metrics(run.folder)
    assert not warnings
    digest = (runs.read_status(run.folder) or {})["weights_sha256"]
    return digest, [{key: row[key] for key in MEASURED} for row in measured], runs.read_probes(run.folder)[0]


@pytest.fixture
def replays(monkeypatch) -> list[int]:
    """One entry per replay of this test."""
    made: list[int] = []
    replay = Tape.replay
    monkeypatch.setattr(Tape, "replay", lambda tape: (made.append(1), replay(tape))[1])
    return made


def same(tiny, *settings: str) -> None:
    eager, graph = (tiny(*SMALL, *settings, f"engine={engine}", f"study={engine}") for engine in ("eager", "graph"))
    assert train_run(eager)["run_id"] == train_run(graph)["run_id"]
    if "optimizer=adam" in settings:  # on the device its learning rate is a float32, and Python's a float64
        for one, other in zip(record(eager)[1], record(graph)[1], strict=True):
            assert one == pytest.approx(other, rel=1e-5)
    else:
        assert record(eager) == record(graph)


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_trains_bit_identically_captured(tiny, norm: str, replays) -> None:
    same(tiny, f"norm={norm}")
    assert len(replays) == 2 * 6 - 3 - 1 - 2  # all but the first three, the captured one and the smaller ones


@pytest.mark.parametrize(
    "settings",
    [
        ("norm=renorm", "schedule.warmup_epochs=0.5"),
        ("norm=bn", "norm_batch=4", "optimizer.agc=0.05"),
        ("norm=bnp", "optimizer=gd"),
        ("optimizer=sgd", "optimizer.nesterov=true", "schedule=step", "schedule.milestones=[0.5]"),
        ("optimizer=adam", "schedule=polynomial"),
        ("optimizer=adam", "optimizer.decoupled=true", "optimizer.weight_decay=0.1"),
        ("weight_average=0.9",),
        ("dataset.flip=true", "dataset.crop_padding=1", "label_smoothing=0.1"),
        ("sampler=paired", "sampler.images_per_label=4"),
        ("drop_last=true", "batch=24"),
        ("precision=bf16",),
        ("norm=wn", "init=lsuv", "input_norm=bn"),
        ("probe=[gradients,landscape,ics]", "epochs=3"),
        ("model.target=small.SmallNet", "model.name=small"),  # with dropout
    ],
    ids=" ".join,
)
def test_every_kind_of_step_is_bit_identical_captured(tiny, settings: tuple[str, ...], replays) -> None:
    same(tiny, *settings)
    assert replays


def test_rmsprop_is_captured_where_its_learning_rate_may_be_a_tensor(tiny, replays, monkeypatch) -> None:
    """PyTorch lets it be on a GPU only; its formula is the same there."""
    rmsprop = importlib.import_module("torch.optim.rmsprop")
    monkeypatch.setattr(rmsprop, "_get_capturable_supported_devices", lambda: ["cpu"])
    build = engines.build

    def capturable(config, train, step, *others):
        for group in step.optimizer.param_groups:
            group["capturable"] = group["foreach"] = config.engine == "graph"
        return build(config, train, step, *others)

    monkeypatch.setattr(engines, "build", capturable)
    eager, graph = (tiny(*SMALL, "optimizer=rmsprop", f"engine={e}", f"study={e}") for e in ("eager", "graph"))
    train_run(eager)
    train_run(graph)
    assert replays
    losses = [[row["train_loss"] for row in record(config)[1]] for config in (eager, graph)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # it multiplies by the rate in another place


def test_the_regression_task_is_captured(make, replays) -> None:
    settings = ("model=deep_linear", "depth=3", "dataset=linear_regression", "batch=16", "epochs=2", "threads=1")
    small = (*settings, "dataset.train_size=90", "device=cpu", "optimizer=gd", "optimizer.lr=1e-5")
    eager, graph = (make(*small, f"engine={engine}", f"study={engine}") for engine in ("eager", "graph"))
    train_run(eager)
    train_run(graph)
    read = [runs.read_metrics(runs.Run(config.as_dict()).folder)[0] for config in (eager, graph)]
    assert [row["train_loss"] for row in read[0]] == [row["train_loss"] for row in read[1]]
    assert replays


def train_in_two_parts(config: RunConfig, after: int, monkeypatch) -> None:
    """The first part ends after so many steps, by a request to stop."""
    stop, made = StopRequest(), []
    step = engines.Graphed.step

    def counted(engine: engines.Graphed) -> None:
        made.append(1)
        if len(made) == after:
            stop.requested = "SIGTERM"
        step(engine)

    monkeypatch.setattr(engines.Graphed, "step", counted)
    with pytest.raises(InterruptedRunError):
        train_run(config, stop=stop)
    stop.requested = None
    train_run(config, stop=stop)


@pytest.mark.parametrize("after", [2, 5, 9])
def test_an_interrupted_captured_run_goes_on_to_the_same_end(tiny, after: int, monkeypatch) -> None:
    config = tiny(*SMALL, "engine=graph", "checkpoint_seconds=null")
    undisturbed = tiny(*SMALL, "engine=graph", "study=undisturbed")
    train_run(undisturbed)
    train_in_two_parts(config, after, monkeypatch)
    assert record(config) == record(undisturbed)


@pytest.mark.parametrize(("first", "second"), [("graph", "eager"), ("eager", "graph")])
def test_a_run_goes_on_with_another_engine(tiny, first: str, second: str, monkeypatch) -> None:
    """Its optimizer's options, tensors for learning rates among them, are the new engine's own."""
    undisturbed = tiny(*SMALL, f"engine={second}", "study=undisturbed")
    train_run(undisturbed)
    stop = StopRequest()
    begin = engines.Engine.start_epoch if first == "eager" else engines.Graphed.start_epoch

    def stopped(engine: engines.Engine, epoch: int) -> None:
        begin(engine, epoch)
        stop.requested = "SIGTERM" if epoch == 1 else None

    monkeypatch.setattr(engines.Engine if first == "eager" else engines.Graphed, "start_epoch", stopped)
    with pytest.raises(InterruptedRunError):
        train_run(tiny(*SMALL, f"engine={first}", "checkpoint_seconds=null"), stop=stop)
    monkeypatch.undo()
    stop.requested = None
    config = tiny(*SMALL, f"engine={second}")
    assert train_run(config, stop=stop)["state"] == "done"
    assert record(config) == record(undisturbed)


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


@pytest.mark.parametrize("engine", ["auto", "compile", "eager"])
def test_a_cpu_is_eager_unless_requested(tiny, engine: str, replays) -> None:
    config = tiny(f"engine={engine}")
    assert not engines.may_capture(config, torch.device("cpu"))


def test_without_a_tape_a_cpu_has_no_graphs(tiny) -> None:
    engines.GRAPHS.clear()
    try:
        with pytest.raises(UserError, match=r"engine=graph cannot capture the steps of this run: only a GPU"):
            train_run(tiny("engine=graph"))
    finally:
        engines.GRAPHS["cuda"] = engines.CudaGraph


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
