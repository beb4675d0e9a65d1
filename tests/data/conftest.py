"""Small data sets on disk, and the settings that name them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import composed
from PIL import Image

from normlab.config.schema import IID, BuiltinDataset, FolderDataset
from normlab.data.datasets import Data, load

Settings = Callable[..., BuiltinDataset | FolderDataset]


@pytest.fixture
def settings() -> Settings:
    """`settings("digits", val_size=20)`: what conf/dataset would give, with nothing augmented."""

    def make(kind: str, **changes: Any) -> BuiltinDataset | FolderDataset:
        common = {
            "train_size": None,
            "test_size": None,
            "val_size": 0,
            "split_seed": 0,
            "flip": False,
            "crop_padding": 0,
            "crop_size": None,
        }
        values: dict[str, Any] = {"kind": kind, "name": kind, **common}
        if kind in ("image_folder", "imagenet"):
            values |= {"image_size": None, "storage": "auto", "memory_limit_gb": 1.0, "crop_scale": None, "workers": 0}
            values |= {"value_range": None, "test_fraction": None, "skip_unreadable": False}
            return FolderDataset(**(values | changes))
        return BuiltinDataset(**(values | {"image_size": None} | changes))

    return make


@pytest.fixture
def load_it(tmp_path: Path, settings: Settings) -> Callable[..., Data]:
    """`load_it("digits", batch=8, val_size=20)`: loaded on the CPU, data_dir below a temporary folder."""

    def make(kind: str, **changes: Any) -> Data:
        run: dict[str, Any] = {
            "data_dir": str(tmp_path / "data"),
            "seed": 0,
            "batch": 8,
            "epochs": 4,
            "eval_batch": 16,
            "drop_last": False,
            "sampler": IID(name="iid"),
            "eval_stats": "running",
            "input_norm": "dataset",
        }
        run |= {name: changes.pop(name) for name in list(changes) if name in run}
        device = changes.pop("device", torch.device("cpu"))
        run["dataset"] = settings(kind, **changes)
        return load(composed().model_copy(update=run), device, log=lambda line: None)

    return make


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """`image_folder(count=5, sizes=[(8, 8)])`: random PNGs of the given (width, height) in turn, per class."""

    def make(
        name: str = "images",
        count: int = 5,
        sizes: tuple[tuple[int, int], ...] = ((8, 8),),
        classes: tuple[str, ...] = ("cat", "dog"),
        parts: tuple[str, ...] = ("train", "test"),
    ) -> Path:
        draw = np.random.default_rng(0)
        for part in parts:
            for label in classes:
                folder = tmp_path / name / part / label
                folder.mkdir(parents=True)
                for number in range(count):
                    width, height = sizes[number % len(sizes)]
                    pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{number}.png")
        return tmp_path / name

    return make
