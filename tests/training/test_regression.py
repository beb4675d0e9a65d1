"""Runs of the synthetic regression: losses and steps against plain formulas, records, resume, divergence."""

import math

import numpy as np
import pytest
import torch
from outcome import outcome, rows

from normlab import models
from normlab.common.errors import UserError
from normlab.data.datasets import load
from normlab.training.run import train_run
from normlab.training.tasks import Classification, Regression, task_of

DESCENT = ("optimizer.momentum=0", "optimizer.weight_decay=0", "schedule=constant", "optimizer.lr=1e-6")
SMALL = ("model=deep_linear", "depth=3", "device=cpu", "threads=1", "epochs=2")
PLAIN = ("norm=none", "norm.conv_bias=false")


def matrices(config) -> list[np.ndarray]:
    network = models.build(config, num_classes=10, image_size=1)
    return [m.weight.detach().double().numpy()[:, :, 0, 0] for m in network.modules() if isinstance(m, torch.nn.Conv2d)]


def samples(config) -> list[tuple[np.ndarray, np.ndarray]]:
    data = load(config, torch.device("cpu"), log=print)
    return [
        tuple(torch.cat(p).flatten(1).double().numpy() for p in zip(*part.batches(), strict=True))
        for part in (data.train, data.test)
    ]


def loss_of(product: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    return float(((x @ product.T - y) ** 2).sum())


def test_a_run_is_full_batch_descent_on_the_summed_squared_error(make) -> None:
    """Two steps by the chain rule in NumPy: dL/dW_i = (W_k...W_i+1)^T · 2 E^T X · (W_i-1...W_1)^T, E = X P^T - Y."""
    config = make(*SMALL, *DESCENT, *PLAIN)
    assert train_run(config)["state"] == "done"
    w, ((x, y), (test_x, test_y)) = matrices(config), samples(config)
    for row in rows(config):
        product = w[2] @ w[1] @ w[0]
        assert row["train_loss"] == pytest.approx(loss_of(product, x, y), rel=1e-5)
        g = 2 * (x @ product.T - y).T @ x
        steps = ((w[2] @ w[1]).T @ g, w[2].T @ g @ w[0].T, g @ (w[1] @ w[0]).T)
        w = [matrix - 1e-6 * step for matrix, step in zip(w, steps, strict=True)]
        assert row["test_loss"] == pytest.approx(loss_of(w[2] @ w[1] @ w[0], test_x, test_y), rel=1e-5)
        assert row["test_loss"] < 2e5


def test_the_training_loss_is_summed_over_the_epochs_batches(make) -> None:
    """At a learning rate that moves nothing, ten batches of an epoch come to what one of all samples does."""
    still = ("optimizer.lr=1e-30", "epochs=1", *PLAIN)
    whole, parts, uneven = (make(*SMALL, *DESCENT, *still, f"batch={batch}") for batch in (1000, 100, 300))
    for config in (whole, parts, uneven):
        train_run(config)
    assert rows(parts)[0]["train_loss"] == pytest.approx(rows(whole)[0]["train_loss"], rel=1e-5)
    assert rows(uneven)[0]["train_loss"] == pytest.approx(rows(whole)[0]["train_loss"], rel=1e-5)


def test_a_record_has_losses_and_no_accuracies(make) -> None:
    config = make(*SMALL, *DESCENT, "norm=bn")
    status = train_run(config)
    assert [set(row) for row in rows(config)] == [{"epoch", "step", "train_loss", "test_loss", "lr"}] * 2
    assert status["test_loss"] == rows(config)[-1]["test_loss"]
    assert "test_accuracy" not in status
    assert status["parameters"] == 3 * (100 + 20)


def test_a_resumed_run_ends_as_an_uninterrupted_one(make, steps) -> None:
    whole, parts = (make(*SMALL, *DESCENT, "norm=bn", "batch=250", f"study={study}") for study in ("whole", "parts"))
    train_run(whole)
    steps.taken = 0
    steps.interrupt(parts, after=6)
    train_run(parts)
    assert steps.taken == 8
    assert outcome(parts) == outcome(whole)


def test_a_rate_that_is_too_large_is_recorded_as_divergence(make) -> None:
    config = make(*SMALL, *DESCENT, *PLAIN, "optimizer.lr=1", "epochs=20")
    status = train_run(config)
    assert status["state"] == "diverged"
    assert 1 < status["diverged_step"] <= 20


def test_half_precision_computes_the_loss_in_float32(make) -> None:
    outputs = torch.full((1000, 10), 300.0, dtype=torch.bfloat16)
    targets = torch.full((1000, 10), 299.5)
    assert Regression().loss(outputs, targets).item() == 2500.0
    config = make(*SMALL, *DESCENT, *PLAIN, "precision=bf16")
    assert train_run(config)["state"] == "done"
    (x, y), _ = samples(config)
    w = matrices(config)
    assert rows(config)[0]["train_loss"] == pytest.approx(loss_of(w[2] @ w[1] @ w[0], x, y), rel=0.01)


def test_a_last_batch_of_one_sample_is_a_sentence(make) -> None:
    with pytest.raises(UserError) as error:
        train_run(make(*SMALL, "norm=bn", "dataset.train_size=1001"))
    lines = str(error.value).splitlines()
    assert lines[0].startswith("A batch of 1 sample, the last of an epoch")
    assert lines[0].endswith("does not fit deep_linear with norm=bn:")
    assert "drop_last=true" in lines[-1]
    assert train_run(make(*SMALL, "norm=bn", "dataset.train_size=1001", "drop_last=true"))["state"] == "done"


def test_the_classification_task_is_cross_entropy_with_counts() -> None:
    """Against the definition, in plain Python."""
    logits, labels = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]]), torch.tensor([2, 1])

    def cross_entropy(row, label) -> float:
        return math.log(sum(map(math.exp, row))) - row[label]

    single = [cross_entropy(row, label) for row, label in zip(logits.tolist(), labels.tolist(), strict=True)]
    task = task_of("classification", 0.0)
    assert isinstance(task, Classification)
    assert task.loss(logits, labels).item() == pytest.approx(sum(single) / 2)
    assert task.test_loss(logits, labels).item() == pytest.approx(sum(single))
    assert int(task.correct(logits, labels)) == 1
    assert task.metrics("val", 6.0, 1, 4) == {"val_loss": 1.5, "val_accuracy": 0.25}
