"""The cores of this machine that are ours, and what they compute fast."""

import os
import re
from functools import cache
from pathlib import Path

BF16 = ("amx_bf16", "avx512_bf16")  # instructions, the fastest first
# By them a run in bf16 is about so many times as fast as one in fp32, on images of so many pixels and more
# (docs/performance.md).
BF16_SPEED, BF16_FROM = 1.5, 32


def cores() -> int:
    """Return the CPU cores that this process may use by its affinity, its container's quota and its SLURM job."""
    from joblib import cpu_count  # knows affinity and quotas; takes a moment to import

    usable = int(cpu_count())
    granted = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(usable, int(granted)) if granted.isdigit() and int(granted) else usable


@cache
def bf16_instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the fastest instructions of this processor that multiply in bf16; "" if none are known (only on Linux)."""
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return next((name for name in BF16 if flags and name in flags[1].split()), "")
