"""Runs on disk as the runner writes them, with the accuracies that a test gives them."""

import json
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

NOW = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)


def _evaluation(epoch: int, accuracy: float | None) -> dict[str, float | None]:
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        "train_accuracy": None if accuracy is None else min(1.0, accuracy + 0.05),
        "test_accuracy": accuracy,
        "test_loss": None if accuracy is None else 1 - accuracy,
        "wall_seconds": 2.0 * epoch,
        "images_per_second": 100.0,
    }


def adder(outputs: Path) -> Callable[..., Path]:
    """What writes one run of the study `outputs`/study; keyword arguments beyond these replace settings.

    `accuracies` are the test accuracies after each epoch; a setting of a group is written `optimizer__lr`.
    """

    def add(
        norm: str = "bn",
        batch: int = 8,
        seed: int = 0,
        accuracies: tuple[float | None, ...] = (0.5, 0.8, 0.9),
        state: str | None = "done",
        study: str = "study",
        status: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Path:
        config: dict[str, Any] = {
            "study": study,
            "seed": seed,
            "norm": {"name": norm, "_target_": f"normlab.norms.{norm}"} | ({"eps": 1e-5} if norm == "bn" else {}),
            "model": {"name": "resnet", "stem": None, "target": None, "kwargs": {}},
            "dataset": {"kind": "digits", "name": "digits", "train_size": None, "path": "/a"},
            "init": {"name": "default"},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "schedule": {"name": "constant"},
            "depth": 18,
            "batch": batch,
            "norm_batch": None,
            "epochs": 3,
            "precision": "fp32",
            "output_dir": "outputs",
        }
        for key, value in settings.items():
            group, _, option = key.rpartition("__")
            (config.setdefault(group, {}) if group else config)[option] = value
        text = yaml.safe_dump(config)
        folder = outputs / study / f"{norm}-b{batch}-s{seed}-{zlib.crc32(text.encode()):x}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(text)
        if state is None:
            return folder
        facts = {"state": state, "heartbeat": NOW.isoformat(), "peak_memory_bytes": 2**20, "parameters": 7}
        (folder / "status.json").write_text(json.dumps(facts | (status or {})))
        rows = [_evaluation(epoch, accuracy) for epoch, accuracy in enumerate(accuracies, start=1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "provenance.json").write_text(json.dumps({"device": "a processor", "versions": {"torch": "2"}}))
        return folder

    return add
