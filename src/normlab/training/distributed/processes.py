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
        UserError: if the host where the processes meet is not known; if a variable has no such number.
    """
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if all(name in environment for name in torchrun):
        names, host, port = torchrun[:3], environment["MASTER_ADDR"], ""
    elif "SLURM_PROCID" in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        host = environment.get("MASTER_ADDR") or _first_host(environment)
        port = "" if environment.get("MASTER_PORT") else _port(environment)
    else:
        return Processes()
    world = number_in(names[1], environment, range(1, 2**20))
    if world == 1:
        return Processes()
    rank, local_rank = (number_in(name, environment, range(world), "0") for name in (names[0], names[2]))
    where = int(port) if port else number_in("MASTER_PORT", environment, range(1, 2**16))
    return Processes(rank, world, local_rank, host, where)


def number_in(name: str, environment: Mapping[str, str], within: range, default: str = "") -> int:
    """Return the number that an environment variable gives.

    Args:
        within: the numbers that it may be.
        default: where it is not set.

    Raises:
        UserError: if it is none of them.
    """
    text = environment.get(name, default)
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) in within):
        raise UserError(
            f"The environment variable {name}={text} is not valid: expected a whole number from {within[0]} to"
            f" {within[-1]}.\ntorchrun and srun set it for each process. To train in one process: unset {name}"
        )
    return int(text)


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
