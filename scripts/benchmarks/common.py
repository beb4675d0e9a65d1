"""What the benchmarks share: settings, the machine, medians, tables."""

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from normlab.common.cpu import cores
from normlab.config import schema as config
from normlab.config.hydra import settings_of
from normlab.training import device

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def configure(folder: str, *overrides: str) -> config.RunConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        settings = ["device=cpu", f"output_dir={folder}", f"data_dir={folder}", *overrides]
        return config.parse(settings_of(compose("config", settings)))


def print_machine(what: str) -> None:
    found = device.provenance(CPU)
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


def described(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "each": values}


def machine(where: str) -> dict[str, Any]:
    """Hardware, versions, commit and date of a measurement on `where`, cpu or cuda."""
    found = device.provenance(CPU)
    git = found["git"] or {}
    try:
        lightning = metadata.version("lightning")
    except metadata.PackageNotFoundError:
        lightning = None
    return {
        "processor": found["device"],
        "cores": cores(),
        "gpu": torch.cuda.get_device_name() if where == "cuda" and torch.cuda.is_available() else None,
        "platform": found["platform"],
        "versions": {**found["versions"], "lightning": lightning},
        "commit": git.get("commit"),
        "changed": bool(git.get("diff")),  # src or conf, since the commit
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine_line(found: dict[str, Any]) -> str:
    versions = {name: found["versions"][name] for name in ("torch", "torchvision", "lightning")}
    names = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    commit = f"{found['commit'][:12]}{' and changes' if found['changed'] else ''}" if found["commit"] else "no commit"
    where = f"{found['gpu']}, {found['processor']}" if found["gpu"] else found["processor"]
    python = f"Python {found['versions']['python']}"
    return f"{where}, {found['cores']} cores, {python}, {names}; {commit}, {found['date'][:10]}"


def spread(found: dict[str, Any] | None, digits: str, unit: float = 1) -> str:
    """A median with its range, in `unit`s; a single value alone."""
    if not found:
        return ""
    median, least, most = (format(found[key] / unit, digits) for key in ("median", "min", "max"))
    return f"{median} ({least} to {most})" if len(found["each"]) > 1 else median


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
