"""What the benchmarks share: settings, the line about the machine, medians."""

import statistics
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from normlab import config
from normlab.cli import settings_of
from normlab.training import device

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def configure(folder: str, *overrides: str) -> config.RunConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        settings = ["device=cpu", f"output_dir={folder}", f"data_dir={folder}", *overrides]
        return config.parse(settings_of(compose("config", settings)))


def print_machine(what: str) -> None:
    found = device.provenance(CPU, "")
    versions = found["versions"]
    print(
        f"{found['device']}, {found['threads']} threads, Python {versions['python']}, torch {versions['torch']},"
        f" torchvision {versions['torchvision']}; {what}\n"
    )


def print_ratios(columns: str, ratios: dict[str, list[float]]) -> None:
    print(f"| {columns}: median | min to max |")
    print("|---|---|---|")
    for name, times in ratios.items():
        print(f"| `{name}` | {statistics.median(times):.2f} | {min(times):.2f} to {max(times):.2f} |")
