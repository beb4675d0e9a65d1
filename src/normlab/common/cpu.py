"""How much of this machine is ours."""

import os


def cores() -> int:
    """CPU cores that this process may use: by its affinity, its container's quota and its SLURM job."""
    from joblib import cpu_count  # knows affinity and quotas; takes a moment to import

    granted = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(cpu_count(), int(granted)) if granted.isdigit() and int(granted) else cpu_count()
