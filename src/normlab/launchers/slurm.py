"""The SLURM launcher: what is left of a sweep becomes one array of jobs, submitted through submitit.

An order, outputs/<study>/slurm/<time>.json, holds the full settings of the runs of each task of the array, which
`launchers.slurm_task` carries out. It is on disk before sbatch is called, and its jobs name it in their comment. So
nothing is pickled; a submitter that is killed leaves a whole array or none; and SLURM's queue tells which runs its
jobs hold, whoever submitted them from wherever.
"""

import contextlib
import importlib.util
import io
import os
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, StrictBool, ValidationError, model_validator

from normlab import runs
from normlab.common.errors import UserError
from normlab.common.installation import command_name
from normlab.common.progress import Display, one_line, span
from normlab.common.sentences import sentence, wrong
from normlab.config.schema import Count, Positive, Whole
from normlab.launchers.sweep import Job, Sweep
from normlab.runs import files

AGAIN = 75  # exit status of a task that was told to stop and wants its job to go on later
MARK = "normlab "  # begins the comment of our jobs; the order's path follows
POLL_SECONDS = 2.0  # between two looks at the runs' files
QUEUE_SECONDS = 10.0  # between two questions to SLURM, which asks its users not to be asked too often
GONE_SECONDS = 20.0  # a job that has left the queue may have written what a network file system does not show yet
ANSWER_SECONDS = 60.0  # SLURM's commands wait long for a controller that is down


# The end of a job's script. A task that a signal kills (128 + USR1, USR2 or TERM) was told to stop before it could
# listen. A job that is cancelled, or that SLURM itself puts back, does not come here: its shell ends with it.
_REQUEUE = [
    "status=$?",
    "case $status in",
    f"{AGAIN} | 138 | 140 | 143)",
    "    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID  # SLURM_JOB_ID may mean the whole array",
    '    echo "$(date) job $job goes back into the queue"  # said before: the shell may end with the next line',
    '    for try in 1 2 3 4 5; do scontrol requeue "$job" && break; sleep 5; done ;;',
    "esac",
    "exit $status",
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class Cluster(_Section):
    """Where jobs run: conf/cluster."""

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    setup: list[str]
    options: dict[str, StrictBool | str]
    python: str | None


class Needs(_Section):
    """What a job needs: conf/hydra/launcher/slurm.yaml."""

    time: Count
    grace_seconds: Count
    gpus: Whole
    cpus: Count
    memory_gb: Positive | None
    array_parallelism: Count | None
    runs_per_job: Count
    slots: Count
    nodes: Count
    tasks: Count
    wait: StrictBool
    cluster: Cluster

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.grace_seconds >= 60 * self.time:
            raise wrong(
                f"hydra.launcher.grace_seconds={self.grace_seconds} leaves nothing of hydra.launcher.time={self.time},"
                " which is in minutes.\nUse more time, or less grace."
            )
        if self.nodes * self.tasks > 1 and self.slots > 1:
            raise wrong(
                f"hydra.launcher.slots={self.slots} trains several runs at a time, hydra.launcher.tasks={self.tasks}"
                f" on nodes={self.nodes} one run in several processes.\nUse one of the two."
            )
        return self


def parse(settings: Mapping[str, Any]) -> Needs:
    """Raises:
    UserError: naming the first wrong setting.
    """
    try:
        return Needs.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        place = () if first["loc"][:1] == ("cluster",) else ("hydra", "launcher")
        path = (*place, *(part for part in first["loc"] if part not in ("bool", "str")))  # not the parts of a union
        known = [
            *(f"cluster.{name}" for name in Cluster.model_fields),
            *(f"hydra.launcher.{name}" for name in Needs.model_fields),
        ]
        raise UserError(sentence({**first, "loc": path}, {}, known)) from None


def launch(sweep: Sweep, needs: Needs) -> list[float | None]:
    """Submit what is left of a sweep and is in no job yet; returns every run's result as far as there is one.

    Raises:
        UserError: if it cannot be submitted; after waiting, if any run failed or lost its job.
    """
    sweep.say_what_is_skipped()
    if not sweep.jobs:
        return sweep.results()
    _check_installed()
    queue = queued()
    waiting = [job for job in sweep.jobs if _folder(job) not in queue]
    arrays = {queue[_folder(job)].partition("_")[0] for job in sweep.jobs if job not in waiting}
    if arrays:
        sweep.say(
            f"{len(sweep.jobs) - len(waiting)} of {sweep.number} runs are queued or running already"
            f" (job {', '.join(sorted(arrays))}) and not submitted again."
        )
    if waiting:
        arrays.add(_submit(waiting, needs, sweep.say))
    if needs.wait:
        _wait_for(sweep, arrays)
    return sweep.results()


def ask(*command: str) -> str:
    """What a command of SLURM prints.

    Raises:
        UserError: if there is no such command, or it fails.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=ANSWER_SECONDS).stdout
    except FileNotFoundError:
        raise UserError(
            f"hydra/launcher=slurm needs SLURM, and there is no {command[0]} here.\n"
            "Run it where sbatch works, e.g. on the cluster's login node; hydra/launcher=pool needs no cluster."
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"SLURM does not answer: {command[0]} took more than {ANSWER_SECONDS:.0f} s.") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"SLURM does not answer: {one_line(error.stderr)}\nTry `{shlex.join(command)}`.") from None


def queued() -> dict[str, str]:
    """Which runs are in a job of this user, pending or running: by the run's folder the task, e.g. 17_3.

    Raises:
        UserError: if SLURM does not answer.
    """
    lines = ask("squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%F_%K %k").splitlines()
    orders: dict[str, list[list[dict[str, Any]]]] = {}
    found: dict[str, str] = {}
    for line in lines:
        task, _, comment = line.partition(" ")
        if not comment.startswith(MARK):
            continue
        path = comment.removeprefix(MARK)
        if path not in orders:
            orders[path] = []
            with contextlib.suppress(UserError):  # whoever removed the study has not cancelled its jobs
                orders[path] = files.read_json(Path(path))["tasks"]
        index = int(task.partition("_")[2])
        found |= {run["folder"]: task for share in orders[path][index : index + 1] for run in share}
    return found


def _folder(job: Job) -> str:
    return str(job.run.folder.resolve())


def _check_installed() -> None:
    if importlib.util.find_spec("submitit") is None:
        raise UserError(
            "hydra/launcher=slurm needs submitit, which is not installed.\n"
            'Install it into this environment: pip install "normlab[slurm]"'
        )
    for command in ("sbatch", "srun"):
        ask(command, "--version")


def _submit(jobs: Sequence[Job], needs: Needs, say: Callable[[str], None]) -> str:
    """Submit one array; returns its job id."""
    from submitit.core.utils import FailedJobError
    from submitit.slurm.slurm import SlurmExecutor

    allowed = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"), re.MULTILINE)
    per_job = max(needs.runs_per_job, -(-len(jobs) // int(allowed[1]))) if allowed else needs.runs_per_job
    if per_job > needs.runs_per_job:
        say(f"An array may have {allowed[1] if allowed else '?'} tasks here: {per_job} runs go into each job.")
    shares = [jobs[first : first + per_job] for first in range(0, len(jobs), per_job)]
    folder = jobs[0].config.study_folder / "slurm"
    files.make_folder(folder)
    order = (folder / f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}.json").resolve()
    tasks = [[{"folder": _folder(job), "settings": job.config.as_dict()} for job in share] for share in shares]
    for job in jobs:
        job.run.freeze()
    files.write_json(order, {"command": sys.argv, "submitted": runs.now(), "slots": needs.slots, "tasks": tasks})

    cluster = needs.cluster
    executor = SlurmExecutor(folder, python=cluster.python)
    executor.update_parameters(
        job_name=jobs[0].config.study,
        comment=f"{MARK}{order}",
        time=needs.time,
        signal_delay_s=needs.grace_seconds,
        nodes=needs.nodes,
        ntasks_per_node=needs.tasks,
        cpus_per_task=needs.cpus,
        gpus_per_node=needs.gpus or None,
        **({"mem_gb": needs.memory_gb} if needs.memory_gb else {}),
        array_parallelism=needs.array_parallelism or len(shares),
        partition=cluster.partition,
        account=cluster.account,
        qos=cluster.qos,
        constraint=cluster.constraint,
        setup=cluster.setup or None,
        # A step does not take over the job's cores by itself since SLURM 22.05.
        srun_args=[f"--cpus-per-task={needs.cpus}"],
        additional_parameters={"requeue": True, **{k: v for k, v in cluster.options.items() if v is not False}},
        teardown=_REQUEUE,
        stderr_to_stdout=True,
        wckey=None,  # submitit's own, which a cluster that keeps such keys does not know
    )
    executor.parameters["map_count"] = len(shares)
    command = f"{executor.python} -u -m normlab.launchers.slurm_task {shlex.quote(str(order))}"
    try:
        with _as_outside_of_a_job(), contextlib.redirect_stderr(io.StringIO()):  # told in a sentence instead
            array = executor._submit_command(command).job_id
    except FailedJobError as error:
        order.unlink()
        reason = one_line(str(error).replace("sbatch: error: ", ""))
        raise UserError(
            f"SLURM refuses the jobs: {reason}\nCheck cluster=... (partition, account, qos, options) and"
            " hydra.launcher (time, gpus, cpus, memory_gb); `sinfo` shows what there is."
        ) from None
    number = f"an array of {len(shares)} jobs" if len(shares) > 1 else "one job"
    say(
        f"Submitted: {len(jobs)} runs as job {array}, {number}. What they print: {folder}/{array}_*.out\n"
        f"How far they are: {command_name('report')} status study={jobs[0].config.study}, squeue --array --jobs={array}."
        f" To cancel: scancel {array}"
    )
    return array


@contextmanager
def _as_outside_of_a_job() -> Iterator[None]:
    """Without what a surrounding job left in the environment: its memory per core, say, contradicts ours."""
    inside = {name: os.environ[name] for name in os.environ if re.match("SLURM_(?!CONF)|SLURMD_|SRUN_", name)}
    if "SLURM_JOB_ID" not in inside:
        inside = {}
    for name in inside:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(inside)


def _wait_for(sweep: Sweep, arrays: set[str]) -> None:
    """Show progress until every run is over or has lost its job.

    Raises:
        UserError: at the end, if any run failed or has none.
    """
    cancel = f"scancel {' '.join(sorted(arrays))}"
    failed: dict[Path, str] = {}
    with Display({job.run.name: job.work for job in sweep.jobs}, quiet=sweep.quiet) as display:
        display.say(f"Waiting for {len(sweep.jobs)} runs. Ctrl-C leaves their jobs alone.")
        try:
            for job, status in _ends(sweep.jobs, display):
                display.ended(job.run.name, status)
                if status["state"] not in runs.FINISHED:
                    failed[job.run.folder / runs.LOG] = one_line(status["error"])
        except KeyboardInterrupt:
            display.say(f"The jobs go on. The same command shows them again; to cancel them: {cancel}")
            sys.exit(130)
        display.say(f"{len(sweep.jobs) - len(failed)} of {len(sweep.jobs)} runs finished in {span(display.elapsed)}.")
        if failed:
            display.warn("Not finished:")
        for log, why in failed.items():
            display.warn(f"  {log}: {why}")
    if failed:
        raise UserError(f"{len(failed)} of {sweep.number} runs are not finished. The same command tries them again.")


def _ends(jobs: Sequence[Job], display: Display) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Each run when it is over, with its status; a run whose job has gone without it counts as failed."""
    left = {_folder(job): job for job in jobs}
    before = {folder: _status(job) for folder, job in left.items()}
    seen = dict.fromkeys(left, time.monotonic())  # when its job was last in the queue
    asked, answer = -QUEUE_SECONDS, dict.fromkeys(left, "")
    while left:
        if time.monotonic() - asked >= QUEUE_SECONDS:
            asked = time.monotonic()
            with contextlib.suppress(UserError):  # SLURM may be restarted while jobs go on
                answer = queued()
                seen |= {folder: time.monotonic() for folder in answer}
        for folder, job in list(left.items()):
            status = _status(job)
            fresh = status if status != before[folder] else {}
            gone = folder not in answer and time.monotonic() - seen[folder] > GONE_SECONDS
            if job.run.over or fresh.get("state") in (*runs.FINISHED, "failed"):
                yield job, status
            elif gone:
                why = "its job has left SLURM's queue without finishing it: cancelled, killed or never started"
                yield job, {**status, "state": "failed", "error": why}
            else:
                if fresh.get("state") == "running":
                    display.news(status)
                continue
            del left[folder]
        time.sleep(POLL_SECONDS if left else 0)


def _status(job: Job) -> dict[str, Any]:
    with contextlib.suppress(UserError):
        return runs.read_status(job.run.folder) or {}
    return {}
