"""The process's place among those of its run, from the environment of torchrun or SLURM. No torch: slow to import.

torchrun:  RANK, WORLD_SIZE, LOCAL_RANK, and MASTER_ADDR, MASTER_PORT where they meet
srun:      SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID; they meet on the step's first host, at a port that the
           numbers of job and step give (MASTER_ADDR and MASTER_PORT go first)
"""

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from normlab.common.errors import UserError

PORTS = range(20_000, 30_000)  # below the ephemeral ports


@dataclass(frozen=True)
class Processes:
    """`world` processes train a run together; this one is number `rank`, and `local_rank` on its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    host: str = ""
    port: int = 0


def find(environment: Mapping[str, str] = os.environ) -> Processes:
    """Return this process's place: the only one, unless torchrun or `srun` started several.

    A batch script's own process is not a task of a step (srun sets SLURM_STEP_NUM_TASKS, sbatch does not): it is alone.

    Raises:
        UserError: if the host where the processes meet is not known.
    """
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if all(name in environment for name in torchrun):
        rank, world, local_rank, host, port = (environment[name] for name in torchrun)
    elif "SLURM_PROCID" in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        rank, world = environment["SLURM_PROCID"], environment["SLURM_STEP_NUM_TASKS"]
        local_rank = environment.get("SLURM_LOCALID", "0")
        host = environment.get("MASTER_ADDR") or _first_host(environment)
        port = environment.get("MASTER_PORT") or _port(environment)
    else:
        return Processes()
    return Processes(int(rank), int(world), int(local_rank), host, int(port)) if int(world) > 1 else Processes()


def _first_host(environment: Mapping[str, str]) -> str:
    names = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "localhost")
    if "[" not in names:
        return names.partition(",")[0]
    try:
        shown = subprocess.run(["scontrol", "show", "hostnames", names], capture_output=True, text=True, check=True)
        return shown.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise UserError(
            f"SLURM's list of nodes {names} cannot be read: scontrol says {error}.\n"
            "Name the host of the first task: export MASTER_ADDR=..."
        ) from None


def _port(environment: Mapping[str, str]) -> str:
    job, step = (re.sub(r"\D", "", environment.get(name, "")) or "0" for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return str(PORTS[(int(job) + 1000 * int(step)) % len(PORTS)])
