"""The SLURM launcher: submit what is left of a sweep as one array of jobs.

An order, outputs/<study>/slurm/<time>-<digest>.json, holds the full settings of the runs of each task of the array,
which `launchers.slurm_task` trains. It is on disk before sbatch is called, and its jobs name it
in their comment. So a submitter that is killed leaves a whole array or none, and SLURM's queue shows which runs its
jobs hold, whoever submitted them from wherever. The jobs run from a copy of the code (`launchers.snapshot`).
"""

import contextlib
import hashlib
import math
import os
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, StrictBool, ValidationError, model_validator

from normlab import runs
from normlab.common import frozen
from normlab.common.errors import UserError, count
from normlab.common.installation import command_name, study_words
from normlab.common.progress import Display, one_line
from normlab.common.sentences import sentence, wrong
from normlab.common.terminal import say
from normlab.config.schema import Count, Positive, Whole
from normlab.launchers import snapshot
from normlab.launchers.pool import check_elsewhere, check_in_worker, print_once
from normlab.launchers.sweep import Job, Sweep, list_failures
from normlab.runs import State, files, reading, schema

REQUEUE_STATUS = 75  # exit status of a task that was stopped and wants its job to go on later
COMMENT = "normlab "  # begins the comment of our jobs; the order's path follows
POLL_SECONDS = 2.0  # between two looks at the runs' files
QUEUE_SECONDS = 10.0  # between two queries of SLURM's queue, which is to be queried rarely
GONE_SECONDS = 20.0  # a job that has left the queue may have written files that a network file system does not show yet
ANSWER_SECONDS = 60.0  # SLURM's commands wait long for a controller that is down
_DIGEST_IN_NAME = re.compile(r"-([0-9a-f]{16})$")  # of an order
MOST_BYTES = 256 << 20  # of an order: a run has 4 kB of settings, an array a few thousand runs


# At its end: a task that a signal kills (128 + USR1, USR2 or TERM) was to stop before it could handle signals. A job
# that is cancelled, or that SLURM itself puts back, does not come there: its shell ends with it.
_SCRIPT = """\
#!/bin/bash
{options}

{setup}
srun --unbuffered --output={output} --cpus-per-task={cpus} {python} -u {program} {order}

status=$?
case $status in
{requeue} | 138 | 140 | 143)
    job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID  # SLURM_JOB_ID may mean the whole array
    echo "$(date) job $job goes back into the queue"  # first: the shell may end with the next line
    for try in 1 2 3 4 5; do scontrol requeue "$job" && break; sleep 5; done ;;
esac
exit $status
"""


class Cluster(BaseModel, extra="forbid", frozen=True, coerce_numbers_to_str=True):
    """The site that jobs run at: conf/cluster."""

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    setup: list[str]
    options: dict[str, StrictBool | str]
    python: str | None


class Needs(BaseModel, extra="forbid", frozen=True):
    """The resources of a job: conf/hydra/launcher/slurm.yaml."""

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
    freeze_code: StrictBool
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


class Entry(BaseModel):
    """A run in an order: its folder, from the root, what it is called in its sweep, and its settings."""

    folder: str = ""
    name: str = Field("", max_length=schema.LONGEST_NAME)
    settings: dict[str, Any]


class Order(BaseModel):
    """The runs of each task of an array, and how many of a task are trained at a time."""

    slots: Count
    tasks: list[list[Entry]]


def read_order(path: Path) -> Order:
    """Read the order of an array.

    Raises:
        UserError: if it cannot be read, or is none.
    """
    try:
        content = reading.read(path, MOST_BYTES)
    except OSError as error:
        raise UserError(f"The list of a job's runs, {path}, cannot be read: {error.strerror}.") from None
    digest = _DIGEST_IN_NAME.search(path.stem)  # not of those before version 0.4
    if digest and _digest(content) != digest[1]:
        raise UserError(
            f"The list of a job's runs, {path}, was changed since it was submitted. No run of it is started."
        )
    try:
        return Order.model_validate(reading.json_object(path, content), strict=True)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"{path} is no list of a job's runs: {place} is not as hydra/launcher=slurm writes it."
        ) from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def parse(settings: Mapping[str, Any]) -> Needs:
    """Check the launcher's settings.

    Raises:
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
    """Submit what is left of a sweep and is in no job yet; return every run's result as far as there is one.

    Raises:
        UserError: if it cannot be submitted; after waiting, if any run failed or lost its job.
    """
    sweep.report_known()
    if not sweep.jobs:
        return sweep.results()
    _query("sbatch", "--version")
    queue = _queued()
    unsubmitted = [job for job in sweep.jobs if _folder(job) not in queue]
    arrays = {queue[_folder(job)].partition("_")[0] for job in sweep.jobs if job not in unsubmitted}
    if arrays:
        sweep.report(
            f"{len(sweep.jobs) - len(unsubmitted)} of {len(sweep)} runs are queued or running already"
            f" (job {', '.join(sorted(arrays))}) and not submitted again;"
            " they run the code of their submission."
        )
    if unsubmitted:
        arrays.add(_submit(unsubmitted, needs, _code_of(unsubmitted, needs), sweep.report))
    if needs.wait:
        _wait_for(sweep, arrays)
    return sweep.results()


def _code_of(jobs: Sequence[Job], needs: Needs) -> Path | None:
    """Check the networks of runs; return the snapshot of their code, None if jobs are to import it as it is then.

    Raises:
        UserError: for a network that does not take its batches; if the snapshot cannot be written.
    """
    if not needs.freeze_code:
        print_once(jobs, check_in_worker(jobs, check_elsewhere) or ())
        return None
    used = check_in_worker(jobs, snapshot.check_networks) or snapshot.Used()
    print_once(jobs, used.said)
    return snapshot.take([job.config for job in jobs], used, lambda text: say(text, file=sys.stderr, flush=True))


def _call(command: Sequence[str], **how: Any) -> "subprocess.CompletedProcess[str]":
    # A comment of a job may be any bytes.
    return subprocess.run(command, capture_output=True, text=True, errors="replace", **how)


def _query(*command: str) -> str:
    """Return the output of a command of SLURM.

    Raises:
        UserError: if there is no such command, or it fails.
    """
    try:
        return _call(command, timeout=ANSWER_SECONDS, check=True).stdout
    except FileNotFoundError:
        raise UserError(
            f"hydra/launcher=slurm needs SLURM, and there is no {command[0]} here.\n"
            "Run it where sbatch works, e.g. on the cluster's login node; hydra/launcher=pool needs no cluster."
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"SLURM does not answer: {command[0]} took more than {ANSWER_SECONDS:.0f} s.") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"SLURM does not answer: {one_line(error.stderr)}\nTry `{shlex.join(command)}`.") from None


def _queued() -> dict[str, str]:
    """Return the runs in pending or running jobs of this user: by the run's folder the task, e.g. 17_3.

    Raises:
        UserError: if SLURM does not answer.
    """
    lines = _query("squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%F_%K %k").splitlines()
    orders: dict[str, list[list[Entry]]] = {}
    queue: dict[str, str] = {}
    for line in lines:
        task, _, comment = line.partition(" ")
        if not comment.startswith(COMMENT):
            continue
        index, path = task.partition("_")[2], comment.removeprefix(COMMENT)
        if not index.isdecimal() or not path.startswith("/"):  # another program's
            continue
        if path not in orders:
            orders[path] = []
            with contextlib.suppress(UserError):  # whoever removed the study has not cancelled its jobs
                orders[path] = read_order(Path(path)).tasks
        queue |= {run.folder: task for job_runs in orders[path][int(index) : int(index) + 1] for run in job_runs}
    return queue


def _folder(job: Job) -> str:
    return str(job.run.folder.resolve())


def _submit(jobs: Sequence[Job], needs: Needs, code: Path | None, report: Callable[[str], None]) -> str:
    """Submit one array, whose jobs run from the snapshot `code`; return its job id.

    Raises:
        UserError: if SLURM refuses it.
    """
    allowed = re.search(r"^MaxArraySize\s*=\s*(\d+)", _query("scontrol", "show", "config"), re.MULTILINE)
    per_job = max(needs.runs_per_job, -(-len(jobs) // max(1, int(allowed[1])))) if allowed else needs.runs_per_job
    if allowed and per_job > needs.runs_per_job:
        report(f"An array may have {allowed[1]} tasks here: {per_job} runs go into each job.")
    entries = [{"folder": _folder(job), "name": job.run.title, "settings": job.config.as_dict()} for job in jobs]
    tasks = [entries[first : first + per_job] for first in range(0, len(jobs), per_job)]
    study, output_dir = jobs[0].config.study, jobs[0].config.output_dir
    folder = snapshot.make_folder(jobs[0].config.study_folder, "slurm")
    for job in jobs:
        job.run.freeze()
    about = {"command": sys.argv, "submitted": runs.now(), "code": code.name if code else None}
    content = files.to_json({**about, "slots": needs.slots, "tasks": tasks}, indent=1).encode()
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}-{_digest(content)}.json"
    order = (folder / name).resolve()
    files.write_atomically(order, lambda file: file.write(content))
    script = job_script(needs, study, order, len(tasks), code)
    command = ["sbatch", "--parsable"]
    submitted = _call(command, input=script, env=_environment())
    if submitted.returncode:
        order.unlink()
        raise UserError(
            f"SLURM refuses the jobs: {one_line(submitted.stderr.replace('sbatch: error: ', ''))}\n"
            "Check cluster=... (partition, account, qos, options) and"
            " hydra.launcher (time, gpus, cpus, memory_gb); `sinfo` shows what there is."
        )
    array = submitted.stdout.strip().partition(";")[0]
    files.write_atomically(folder / f"{array}_submission.sh", lambda file: file.write(script.encode()))
    number = f"an array of {len(tasks)} jobs" if len(tasks) > 1 else "one job"
    report(
        f"Submitted: {count(len(jobs), 'run')} as job {array}, {number}. What they print: {folder}/{array}_*.out\n"
        f"How far they are: {command_name('report')} status {study_words(study, output_dir)},"
        f" squeue --array --jobs={array}. To cancel: scancel {array}"
    )
    return array


def job_script(needs: Needs, study: str, order: Path, tasks: int, code: Path | None = None) -> str:
    """Return the script of an array of `tasks` jobs; the cluster's own options go first, false leaves one out.

    Args:
        needs: of each job.
        study: the array's name.
        order: the file of its runs.
        tasks: the number of jobs.
        code: the snapshot to run from; None: from what is importable when a job starts.
    """
    cluster, output = needs.cluster, f"{order.parent}/%A_%a"
    options = {
        "job-name": study,
        "comment": f"{COMMENT}{order}",
        "output": f"{output}_0_log.out",
        "open-mode": "append",
        "array": f"0-{tasks - 1}%{min(tasks, needs.array_parallelism or tasks)}",
        "requeue": True,
        "signal": f"USR2@{needs.grace_seconds}",
        "time": needs.time,
        "nodes": needs.nodes,
        "ntasks-per-node": needs.tasks,
        "cpus-per-task": needs.cpus,
        "gpus-per-node": needs.gpus or None,
        "mem": f"{math.ceil(1024 * needs.memory_gb)}M" if needs.memory_gb else None,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        **{name.replace("_", "-"): value for name, value in cluster.options.items()},
    }
    return _SCRIPT.format(
        options="\n".join(
            f"#SBATCH --{name}" + ("" if value is True else f"={shlex.quote(str(value))}")
            for name, value in options.items()
            if value is not None and value is not False
        ),
        setup="\n".join(cluster.setup),
        output=shlex.quote(f"{output}_%t_log.out"),
        cpus=needs.cpus,  # a step does not take over the job's cores by itself since SLURM 22.05
        python=cluster.python or shlex.quote(sys.executable),
        program=shlex.quote(str(code / frozen.START)) if code else "-m normlab.launchers.slurm_task",
        order=shlex.quote(str(order)),
        requeue=REQUEUE_STATUS,
    )


def _environment() -> dict[str, str]:
    """Return the environment without the variables of a surrounding job: its memory per core, say, contradicts ours."""
    if "SLURM_JOB_ID" not in os.environ:
        return dict(os.environ)
    return {name: text for name, text in os.environ.items() if not re.match("SLURM_(?!CONF)|SLURMD_|SRUN_", name)}


def _wait_for(sweep: Sweep, arrays: set[str]) -> None:
    """Show progress until every run is over or has lost its job.

    Raises:
        UserError: at the end, if any run failed or has none.
    """
    failed: list[tuple[Job, str]] = []
    names, costs = {job.key: job.run.title for job in sweep.jobs}, {job.key: job.cost for job in sweep.jobs}
    with Display(names, costs, quiet=sweep.quiet) as display:
        display.say(f"Waiting for {count(len(sweep.jobs), 'run')}. Ctrl-C leaves their jobs alone.")
        try:
            for job, status in _ends(sweep.jobs, display):
                display.ended(job.key, status)
                if status["state"] not in runs.FINISHED:
                    failed.append((job, one_line(status["error"])))
        except KeyboardInterrupt:
            cancel = f"scancel {' '.join(sorted(arrays))}"
            display.say(f"The jobs go on. The same command shows them again; to cancel them: {cancel}")
            sys.exit(130)
        list_failures(display, sweep.jobs, "Not finished:", failed)
    if failed:
        raise UserError(f"{len(failed)} of {len(sweep)} runs are not finished. The same command tries them again.")


def _ends(jobs: Sequence[Job], display: Display) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Yield each run when it is over, with its status; a run whose job has gone without it counts as failed."""
    left = {_folder(job): job for job in jobs}
    before = {folder: job.status() for folder, job in left.items()}
    seen = dict.fromkeys(left, time.monotonic())  # when its job was last in the queue
    queried, queue = -QUEUE_SECONDS, dict.fromkeys(left, "")
    while left:
        if time.monotonic() - queried >= QUEUE_SECONDS:
            queried = time.monotonic()
            with contextlib.suppress(UserError):  # SLURM may be restarted while jobs go on
                queue = _queued()
                seen |= dict.fromkeys(queue, time.monotonic())
        for folder, job in list(left.items()):
            status = job.status()
            new = status if status != before[folder] else {}
            gone = folder not in queue and time.monotonic() - seen[folder] > GONE_SECONDS
            if job.run.over or new.get("state") in (*runs.FINISHED, State.FAILED):
                yield job, status
            elif gone:
                why = (
                    "its job has left SLURM's queue without finishing it: cancelled, killed or never started;"
                    f" what it printed is in {job.config.study_folder / 'slurm'}"
                )
                yield job, {**status, "state": State.FAILED, "error": why}
            else:
                if new.get("state") == State.RUNNING:
                    display.news(job.key, status)
                continue
            del left[folder]
        time.sleep(POLL_SECONDS if left else 0)
