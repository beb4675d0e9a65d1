"""The cores of this machine that are ours."""

import os


def cores() -> int:
    """Return the CPU cores that this process may use by its affinity, its container's quota and its SLURM job."""
    from joblib import cpu_count  # knows affinity and quotas; takes a moment to import

    usable = int(cpu_count())
    granted = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(usable, int(granted)) if granted.isdigit() and int(granted) else usable
