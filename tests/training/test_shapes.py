"""Networks are checked against their batches once for each kind in a process."""

import pytest
import small
from conftest import Make

from normlab import models
from normlab.config.schema import RunConfig
from normlab.data.inventory import Inventory
from normlab.training import shapes
from normlab.training.run import train_run


@pytest.fixture
def checked(monkeypatch) -> list[tuple[int, ...]]:
    """The sizes of batch of each check that is made on the meta device."""
    made: list[tuple[int, ...]] = []
    check = shapes._check_batches

    def noted(config: RunConfig, network: object, given: shapes.Shapes) -> None:
        made.append(tuple(given.batches))
        check(config, network, given)

    monkeypatch.setattr(shapes, "_check_batches", noted)
    monkeypatch.setattr(shapes, "_fitting", set())
    return made


def check(config: RunConfig, size: int = 8) -> None:
    network = models.build(config, num_classes=10, image_size=size)
    shapes.check(config, network, shapes.Shapes(3, size, 10, {config.batch: "another batch"}))


def test_runs_alike_are_checked_once(tiny: Make, checked) -> None:
    for settings in ("seed=0",), ("seed=1",), ("optimizer.lr=0.01", "seed=2"), ("epochs=1", "study=other"):
        check(tiny(*settings))
    assert checked == [(16,)]


def test_what_changes_network_or_batches_is_checked_again(tiny: Make, checked) -> None:
    others = [
        ("norm=none",),
        ("norm=gn", "norm.groups=4"),
        ("norm=gn", "norm.groups=2"),
        ("norm=evonorm_b0",),
        ("norm_batch=4",),
        ("model.target=small.SmallResNet", "model.name=small"),
        ("sync_stats=true",),
        ("batch=12",),
    ]
    for settings in (), *others, *others:
        check(tiny(*settings))
    check(tiny(), size=16)
    assert len(checked) == len(others) + 2


def test_a_network_whose_code_was_loaded_again_is_checked_again(tiny: Make, checked, monkeypatch) -> None:
    check(tiny())
    monkeypatch.setattr(small, "SmallNet", type("SmallNet", (small.SmallNet,), {}))
    check(tiny())
    assert len(checked) == 2


def test_a_check_of_a_sweep_serves_its_runs(tiny: Make, checked) -> None:
    config = tiny("epochs=1", "norm=gn", "norm.groups=2")
    shapes.check_sweep([(config, Inventory(train_images=40, test_images=20, classes=10, image_size=8))])
    train_run(config)
    assert checked == [(16, 8)]
