"""The opponents of `scripts/bench speed` do the work that a run does, and no less."""

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Make
from torch import Tensor
from torchvision.transforms import v2

from benchmarks import contenders, speed
from normlab import models, runs
from normlab.config.schema import RunConfig
from normlab.training.optimizers import build_optimizer, learning_rate, set_learning_rate
from normlab.training.run import train_run

ROOT = Path(__file__).parents[2]
HAS_LIGHTNING = importlib.util.find_spec("lightning") is not None
NEEDS_LIGHTNING = "Lightning, an opponent, is an extra: pip install -e .[bench]"
SMALL = ("model=custom", "model.target=small.SmallResNet", "model.name=small", "schedule.per=step")


def losses_of(contender: str, config: RunConfig) -> tuple[list[float], contenders.Trained]:
    if contender == "lightning":
        pytest.importorskip("lightning", reason=NEEDS_LIGHTNING)
    losses: list[float] = []
    images = contenders.images_of(config)
    trained = contenders.OPPONENTS[contender](config, images, 0, lambda loss: losses.append(loss.item()))
    return losses, trained


@pytest.fixture
def whole(make: Make) -> RunConfig:
    """A batch is the whole training set, so that its loss does not depend on the order of images."""
    size = ("dataset.train_size=48", "dataset.test_size=20", "batch=48", "epochs=4", "threads=1", "device=cpu")
    return make(*SMALL, *size, "optimizer.lr=0.1", "optimizer.weight_decay=0.05")


@pytest.fixture
def expected(whole: RunConfig) -> list[float]:
    """The losses of gradient descent with momentum and a cosine, written out."""
    images = contenders.images_of(whole)
    network = models.build(whole, num_classes=10, image_size=8)
    pixels = images.train.float() / 255
    pixels = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), keepdim=True, correction=0)
    velocity = {name: torch.zeros_like(parameter) for name, parameter in network.named_parameters()}
    losses = []
    for step in range(4):
        loss = F.cross_entropy(network(pixels), images.train_labels)
        losses.append(loss.item())
        network.zero_grad()
        loss.backward()
        lr = 1e-8 + (0.1 - 1e-8) * (1 + torch.cos(torch.tensor(step / 4) * torch.pi)) / 2
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                assert parameter.grad is not None
                decay = 0.05 if parameter.ndim > 1 else 0.0  # of convolutions and linear layers
                velocity[name].mul_(0.9).add_(parameter.grad + decay * parameter)
                parameter -= lr * velocity[name]
    return losses


@pytest.mark.parametrize("contender", ["plain", "lightning", "tuned"])
@pytest.mark.filterwarnings("ignore")  # Lightning's, when it is imported
def test_an_opponent_makes_the_steps_of_gradient_descent(
    whole: RunConfig, expected: list[float], contender: str
) -> None:
    losses, trained = losses_of(contender, whole)
    assert losses == pytest.approx(expected, abs=1e-4)
    assert len(trained.epoch_seconds) == 4


def test_so_does_normlab(whole: RunConfig, expected: list[float]) -> None:
    train_run(whole)
    rows, _ = runs.read_metrics(runs.Run(whole.as_dict()).folder)
    assert [row["train_loss"] for row in rows] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("contender", ["plain", "lightning", "tuned"])
@pytest.mark.parametrize(("drop_last", "steps"), [(False, 3), (True, 2)])
@pytest.mark.filterwarnings("ignore")
def test_an_opponent_makes_as_many_steps_as_a_run(make: Make, contender: str, drop_last: bool, steps: int) -> None:
    size = ("dataset.train_size=40", "dataset.test_size=10", "batch=16", "epochs=2", "threads=1", "device=cpu")
    augmentation = ("dataset.crop_padding=1", "dataset.flip=true")
    losses, trained = losses_of(contender, make(*SMALL, *size, *augmentation, f"drop_last={drop_last}"))
    assert len(losses) == 2 * steps
    assert 0 <= trained.test_accuracy <= 1


@pytest.mark.parametrize("norm", speed.NORMS)
def test_an_opponent_has_the_weights_and_the_decay_of_a_run(make: Make, norm: str) -> None:
    config = make(*SMALL, f"norm={norm}")
    network = contenders.network_of(config, contenders.images_of(config))
    ours = models.build(config, num_classes=10, image_size=8)
    assert all(map(torch.equal, network.parameters(), ours.parameters()))
    theirs = contenders.optimizer_of(config, network)
    optimizer = build_optimizer(config.optimizer, network)
    assert decays(theirs) == decays(optimizer)
    assert {group["lr_divisor"] for group in optimizer.param_groups} == {1.0}
    schedule = contenders.schedule_of(config, theirs, 5)
    for step in range(5 * config.epochs):
        set_learning_rate(optimizer, learning_rate(config, step, 5))
        assert theirs.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        theirs.step()
        schedule.step()


def decays(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    return {id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}


def test_the_tuned_loop_shows_every_image_once_in_an_epoch() -> None:
    pixels, labels = torch.arange(40.0).view(40, 1, 1, 1), torch.arange(40)
    parts = list(contenders.shuffled(pixels, labels, 16, drop_last=False, crop_padding=0, flip=False))
    assert [len(targets) for _, targets in parts] == [16, 16, 8]
    assert all(torch.equal(batch.flatten(), targets.float()) for batch, targets in parts)
    assert torch.equal(torch.cat([targets for _, targets in parts]).sort().values, labels)


def test_the_tuned_loop_crops_and_flips_as_torchvision_does() -> None:
    image = torch.arange(1, 49, dtype=torch.uint8).view(1, 3, 4, 4)

    def seen(batch: Tensor) -> dict[tuple[int, ...], float]:
        """How often each version of the image comes."""
        versions, counts = batch.flatten(1).unique(dim=0, return_counts=True)
        return dict(zip(map(tuple, versions.tolist()), (counts / len(batch)).tolist(), strict=True))

    torch.manual_seed(0)
    many = image.expand(20_000, -1, -1, -1)
    theirs = v2.Compose([v2.RandomCrop(4, padding=1), v2.RandomHorizontalFlip()])
    possible = seen(torch.cat([theirs(image) for _ in range(600)]))
    found = seen(contenders.flipped(contenders.cropped(many, 1)))
    assert len(possible) == 9 * 2
    assert found == pytest.approx(dict.fromkeys(possible, 1 / 18), abs=0.01)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dataset", speed.DATASETS)
@pytest.mark.parametrize("batch", [8, 32, 128, 512])
def test_a_measurement_counts_full_batches_and_three_steps_at_least(dataset: str, device: str, batch: int) -> None:
    images, epochs, warm = speed.sizes(device, dataset, batch, speed.counted_images(device, dataset, batch))
    assert images % batch == 0
    assert images <= speed.TRAINING_IMAGES[dataset]
    assert (epochs - warm) * images // batch >= 3
    assert warm * images // batch >= {"cpu": 1, "cuda": 5}[device]


def test_ratios_are_of_one_round_and_above_one_where_normlab_is_faster() -> None:
    rounds = {
        "normlab": [{"seconds": 2.0}, {"seconds": 4.0}],
        "plain": [{"seconds": 4.0}, {"seconds": 12.0}],
        "lightning": [{"seconds": 6.0}, {"seconds": 4.0}],
    }
    ratios = speed.summary(speed.Measured(rounds), "seconds", faster="less")["times_as_fast_as"]
    assert {who: ratio["each"] for who, ratio in ratios.items()} == {
        "plain": [2.0, 3.0],
        "lightning": [3.0, 1.0],
        "faster of plain and lightning": [2.0, 1.0],
    }


@pytest.fixture
def chosen(tmp_path: Path) -> Callable[..., argparse.Namespace]:
    """The options of a command that measures speed."""

    def options(**others: Any) -> argparse.Namespace:
        usual = {
            **{"what": ["speed"], "contender": ["normlab", "plain"], "rounds": 2, "dataset": ["digits"]},
            **{"data_dir": str(tmp_path), "batch": [8, 32], "images": None, "device": "cpu", "workers": 0},
            **{"precision": ["fp32", "tf32"], "settings": [], "json": tmp_path / "speed.json", "markdown": None},
            **{"resume": True, "limit": 60.0},
        }
        return argparse.Namespace(**(usual | others))

    return options


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who was measured, without measuring; after five the time is over."""
    names: list[str] = []

    def speed_of(overrides: list[str], workers: int, warm: int, contender: str) -> dict[str, Any]:
        if len(names) == 5:
            raise speed.LimitError
        batch, precision = (next(one for one in overrides if one.startswith(name)) for name in ("batch", "precision"))
        names.append(f"{contender} {batch} {precision}")
        memory = {"peak_memory_bytes": 1, "peak_device_bytes": None}
        return {"images_per_second": 1.0, "capture_seconds": None, **memory}

    monkeypatch.setattr(speed, "speed_of", speed_of)
    return names


def test_a_command_that_reached_its_limit_goes_on_with_what_is_missing(chosen: Any, measured: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        speed.carry_out(chosen())
    assert ended.value.code == speed.UNFINISHED
    first = [*measured]
    assert len(first) == len(set(first)) == 5  # of the eight of a round: none twice
    measured.clear()
    with pytest.raises(SystemExit):
        speed.carry_out(chosen())
    assert len({*first, *measured[:3]}) == 8
    measured.clear()
    with pytest.raises(SystemExit):
        speed.carry_out(chosen())
    assert len(measured) == 5
    measured.clear()
    speed.carry_out(chosen())
    assert len(measured) == 1
    found = json.loads(chosen().json.read_text())
    assert [len(each) for one in found["speed"] for each in one["rounds"].values()] == [2] * 8


def test_contenders_and_precisions_are_added_to_a_file_and_other_settings_refused(
    chosen: Any, measured: list[str]
) -> None:
    one = {"batch": [8], "rounds": 1}
    speed.carry_out(chosen(**one, precision=["tf32"]))
    speed.carry_out(chosen(**one, precision=["fp32"], contender=["compile"]))
    expected = [("normlab", "tf32"), ("plain", "tf32"), ("compile", "fp32")]
    assert measured == [f"{who} batch=8 precision={precision}" for who, precision in expected]
    found = json.loads(chosen().json.read_text())
    assert found["options"]["contender"] == ["normlab", "plain", "compile"]
    assert found["options"]["precision"] == ["fp32", "tf32"]
    with pytest.raises(SystemExit, match="measured with another settings"):
        speed.carry_out(chosen(**one, settings=["depth=34"]))


def test_who_could_not_be_measured_is_tried_again_by_the_next_command(
    chosen: Any, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"batch": [8], "precision": ["fp32"]}

    def fails(*_: object) -> dict[str, Any]:
        raise speed.UnavailableError("it is away")

    with monkeypatch.context() as patched:
        patched.setattr(speed, "speed_of", fails)
        with pytest.raises(SystemExit, match="it is away"):
            speed.carry_out(chosen(**one))
    assert json.loads(chosen().json.read_text())["speed"][0]["unavailable"] == {
        "normlab": "n/a: it is away",
        "plain": "n/a: it is away",
    }
    speed.carry_out(chosen(**one))
    assert json.loads(chosen().json.read_text())["speed"][0]["unavailable"] == {}
    assert len(measured) == 4


@pytest.mark.slow
def test_the_command_measures_all_and_names_those_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=":")
    tiny = ["--batch", "8", "--images", "24", "--rounds", "1", "--dataset", "digits", "--workers", "0"]
    files = ["--json", str(tmp_path / "all.json"), "--markdown", str(tmp_path / "tables.md")]
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "--what", "speed", *tiny, *files]
    done = subprocess.run([*command, "--settings", *SMALL[:3]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "all.json").read_text())
    (one,) = found["speed"]
    absent = set() if HAS_LIGHTNING else {"lightning"}
    assert set(one["unavailable"]) == absent
    assert set(one["images_per_second"]) == set(speed.USUAL) - absent
    assert set(one["peak_memory_bytes"]) == set(speed.USUAL) - absent
    for contender in set(speed.USUAL) - absent:
        (measured,) = one["rounds"][contender]
        assert measured["steps"] == 2 * 3
        assert measured["images_per_second"] > 0
    tables = (tmp_path / "tables.md").read_text()
    assert tables in done.stdout
    assert ("n/a: Lightning is not installed" in tables) == bool(absent)
