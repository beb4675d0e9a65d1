"""One run from its configuration to its record: build, resume, train, and say how it ended."""

import contextlib
import copy
import hashlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normlab import loggers, models, runs
from normlab.common.errors import InterruptedRunError, OutOfMemoryError, RunBusyError, UserError
from normlab.config.schema import RunConfig
from normlab.data.datasets import Data, Loaded, load
from normlab.norms import Steps, apart, find_sites
from normlab.probes import Probes, Subject
from normlab.runs import files
from normlab.training import checkpoint, choices, device, engines, taps
from normlab.training.average import Average
from normlab.training.distributed import checks as sharing
from normlab.training.distributed.group import ALONE, Alone
from normlab.training.engines import Position
from normlab.training.gradient_transforms import build_transform
from normlab.training.interleaving import Turn
from normlab.training.interrupt import StopRequest
from normlab.training.loop import DivergedError, train
from normlab.training.optimizers import build_optimizer, resume
from normlab.training.step import Step
from normlab.training.tasks import task_of

_NO_MEMORY = ("not enough memory", "can't allocate memory")  # what PyTorch's allocator of the CPU says
Watch = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Share:
    """What a launcher offers a run of this machine; the run's own settings go first.

    `turn`: among several runs of this process, which also share the images that are `loaded`.
    """

    device: str | None = None
    threads: int | None = None
    turn: Turn = field(default_factory=Turn)
    loaded: Loaded | None = None


def carry_out(
    config: RunConfig,
    *,
    stop: StopRequest | None = None,
    share: Share = Share(),
    watch: Watch = lambda status: None,
    team: Alone = ALONE,
) -> dict[str, Any]:
    """Train a run, or go on with it; returns its status. `watch` is shown the status about once a second.

    A finished run is left alone. However it ends, the run's folder says so. `stop` may have been entered by
    the caller, so that a request made while torch was being imported counts. Every process of a `team` calls this
    with the same configuration; the first one holds the run and is shown its status, and all end alike.

    Raises:
        RunBusyError: if another process is training it.
        UserError: for what the user can mend; any other exception is an error of ours. Both are recorded.
        InterruptedRunError: when asked to stop; the run can go on later.
    """
    run = runs.Run(config.as_dict()) if team.leads else _Follower(config.as_dict())
    run.freeze()
    with run.lock(), contextlib.nullcontext(stop) if stop else StopRequest() as stop:
        if team.broadcast(run.run_id) != run.run_id:
            raise UserError("The processes of this run have different settings.\nStart all with the same command.")
        finished = run.state in runs.FINISHED  # by another process, since the caller looked
        status = team.broadcast((runs.read_status(run.folder) or {}) if finished else None)
        if status is not None:
            if team.leads:
                checkpoint.remove(run.folder)  # the process that finished it may have been killed before it did
            return status
        sharing.check(config, team.world)
        log = _logger(run.folder) if team.leads else _silence()
        if team.leads:
            team.if_stuck(partial(_fail, run, log))
        logger = loggers.start_logger(config.logger, run, log.warning) if team.leads else loggers.Logger()
        try:
            started = (runs.read_status(run.folder) or {}).get("started") if run.state != "failed" else None
            status = run.write_status("running", started=started or runs.now(), ended=None, error=None)
            watch(status)
            with team.together(), device.stream_for(config, share.device):
                return _train(config, run, stop, share, watch, log, logger, team)
        except RunBusyError as error:  # taken over: the record is another process's now
            log.warning("%s", error)
            raise
        except InterruptedRunError as error:
            log.info("interrupted by %s", error)
            run.write_status("interrupted", ended=runs.now(), error=f"interrupted by {error}")
            team.meet()  # torchrun ends the others when the first has ended: only once all is written
            raise
        except (Exception, KeyboardInterrupt) as error:
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            log.error("%s", error, exc_info=not isinstance(error, UserError) or error.__cause__ is not None)
            message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in message for sign in _NO_MEMORY):
                error = OutOfMemoryError(
                    f"{run.name} does not fit into the memory of its device.\n"
                    "Use a smaller batch, fewer runs at a time (hydra.launcher.slots=1), or another device."
                )
                message = str(error)
            run.write_status(state, ended=runs.now(), error=message)
            raise error
        finally:
            team.if_stuck(lambda why: None)
            logger.end()
            for handler in log.handlers:
                handler.close()


def _fail(run: runs.Run, log: logging.Logger, why: str) -> None:
    """What a process does of all that `carry_out` does at the end, if its main thread can do nothing any more."""
    log.error("%s", why)
    run.write_status("failed", ended=runs.now(), error=why)
    print(why, file=sys.stderr, flush=True)


class _Follower(runs.Run):
    """A run, to those of its processes that leave its folder to the first."""

    def freeze(self) -> None:
        pass

    @contextlib.contextmanager
    def lock(self, wait_seconds: float = 0) -> Iterator[None]:
        yield

    def write_status(self, state: str, *, durable: bool = True, **facts: Any) -> dict[str, Any]:
        return {}

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        pass

    def keep_rows_until(self, evaluated: int, step: int) -> list[str]:
        return []


def data_of(
    config: RunConfig,
    where: torch.device,
    log: Callable[[str], None],
    team: Alone = ALONE,
    loaded: Loaded | None = None,
) -> Data:
    """The images of a run on its device, in the batches that its settings ask for."""
    return load(
        config.dataset,
        data_dir=Path(config.data_dir),
        seed=config.seed,
        batch=config.batch,
        eval_batch=config.eval_batch,
        drop_last=config.drop_last,
        sampler=config.sampler,
        input_norm=config.input_norm,
        eval_stats=config.eval_stats,
        device=where,
        log=log,
        rank=team.rank,
        processes=team.world,
        loaded=loaded,
    )


def _train(
    config: RunConfig,
    run: runs.Run,
    stop: StopRequest,
    share: Share,
    watch: Watch,
    log: logging.Logger,
    logger: loggers.Logger,
    team: Alone,
) -> dict[str, Any]:
    saved = team.broadcast(_checkpoint(config, run, log) if team.leads else None)
    where = device.choose(config.device, share.device)
    # Sums over threads depend on their number: a resumed run keeps it, so that it ends as if uninterrupted.
    kept = saved["threads"] if saved and saved.get("processes", 1) == team.world else share.threads
    device.prepare(config, where, config.threads or kept)

    def tell(text: str) -> None:  # what takes a while before the first step
        log.info("%s", text)
        watch(run.write_status("running", durable=False, doing=text))

    data = data_of(config, where, tell, team, share.loaded)
    network = models.build(config, num_classes=len(data.classes), image_size=data.image_size)
    sharing.prepare(config, network, data, team.world)
    _check_shapes(config, network, data)
    network = network.to(where)
    if saved is None and config.starts_from_data:
        calibration = data.calibration(config.calibration_images)
        try:
            with apart():
                models.start(config, network, calibration, num_classes=len(data.classes), image_size=data.image_size)
        except ValueError as error:
            raise UserError(
                f"The start that looks at {len(calibration)} calibration images does not fit {config.model.name} with"
                f" norm={config.norm.name}:\n{str(error).splitlines()[0]}\n"
                "Use another calibration_images (a norm over one value per channel is undefined), a multiple of"
                " norm_batch."
            ) from error
    team.equalise(network)
    asked = config.threads or kept
    choice = team.broadcast(
        choices.choose(config, network, data, where, asked, saved, log.info) if team.leads else None
    )
    assert choice
    network = choice.apply(network)
    if where.type == "cpu" and config.engine != "compile":
        taps.trim(network, torch.zeros(1, data.channels, data.image_size, data.image_size))
    device.forget_peak_memory(where)
    averaged = None if config.weight_average is None else Average(network, config.weight_average)
    optimizer = build_optimizer(config.optimizer, network, for_graph=engines.may_capture(config, where))
    transform = build_transform(config.optimizer, network)
    scaler = torch.amp.GradScaler(where.type, enabled=config.precision == "fp16")
    total = config.epochs * data.train.steps
    probes = Probes(config.probe, _subject(config, network, data), total, run.append_probe) if config.probe else None
    at = Position(
        epoch=0,
        batch=0,
        losses=torch.zeros(data.train.steps, device=where),
        hits=torch.zeros(data.train.steps, dtype=torch.int64, device=where),
        wall_seconds=0.0,
        train_seconds=0.0,
        train_images=0,
    )

    if team.broadcast(data.fingerprint) != data.fingerprint:
        raise UserError(
            f"The processes of this run see different images of dataset={config.dataset.name}.\n"
            "Give all its machines the same files."
        )
    peak_before = 0
    if saved:
        if saved["data_fingerprint"] != data.fingerprint:
            raise UserError(
                f"The images of dataset={config.dataset.name} have changed since {run.name} was interrupted.\n"
                f"Bring the old ones back, or delete {run.folder} to start it anew, or give the new ones"
                " another dataset.name."
            )
        try:
            network.load_state_dict(saved["network"])
            if averaged:
                averaged.load_state_dict(saved["averaged"])
            resume(optimizer, saved["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"The network has changed since {run.name} was interrupted: {str(error).splitlines()[0]}\n"
                f"Bring the old one back, or delete {run.folder} to start it anew."
            ) from error
        if probes:
            probes.load_state_dict(saved["probes"])
        peak_before = saved["peak_memory_bytes"]
        scaler.load_state_dict(saved["scaler"])
        at = Position(**saved["position"])
        at.losses, at.hits = at.losses.to(where), at.hits.to(where)
        log.info("going on at epoch %d, batch %d", at.epoch + 1, at.batch)
    step = Step(
        config,
        where,
        task_of(data.task, config.label_smoothing),
        network,
        engines.compiled(config, team.parallel(network)),
        Steps(network),
        optimizer,
        scaler,
        transform,
        averaged,
    )
    engine = engines.build(config, data.train, step, at, team.world, log.warning)
    evaluated = at.epoch * data.train.steps
    for warning in run.keep_rows_until(evaluated, evaluated + at.batch):
        log.warning("%s", warning)
    if team.leads:
        provenance = device.provenance(where, data.fingerprint)
        how = {"processes": team.world, "memory_format": choice.memory_format, "packed": share.turn.packed}
        files.write_json(run.folder / runs.PROVENANCE, provenance | how)
        logger.begin(runs.read_metrics(run.folder)[0])
    latest: dict[str, Any] = {}

    def facts(at: Position) -> dict[str, Any]:
        return {
            "epoch": at.epoch,
            "epochs": config.epochs,
            "step": at.epoch * data.train.steps + at.batch,
            "steps": config.epochs * data.train.steps,
            "wall_seconds": at.wall_seconds,
            "parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
            "classes": len(data.classes),
            "processes": team.world,
            "doing": None,
            "capture_seconds": engine.capture_seconds,
            # Of several runs in one process nobody knows whose memory it was.
            "peak_memory_bytes": None if share.turn.packed else max(peak_before, device.peak_memory_bytes(where)),
            **latest,
        }

    def of_all_processes() -> None:
        nonlocal peak_before
        peak_before = team.largest(max(peak_before, device.peak_memory_bytes(where)))

    def beat(at: Position) -> None:
        watch(run.write_status("running", durable=False, **facts(at)))

    def save(at: Position) -> None:
        of_all_processes()
        if not team.leads:
            return
        state = {
            "run_id": run.run_id,
            "data_fingerprint": data.fingerprint,
            "network": network.state_dict(),
            "averaged": averaged.state_dict() if averaged else None,
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "probes": probes.state_dict() if probes else {},
            "position": vars(at).copy(),
            "threads": choice.threads,
            "memory_format": choice.memory_format,
            "processes": team.world,
            "peak_memory_bytes": peak_before,
        }
        checkpoint.save(run.folder, state)

    def record(row: dict[str, Any]) -> None:
        run.append_metrics(row)
        logger.record(row)
        latest.update({k: row[k] for k in ("train_loss", "test_loss", "test_accuracy") if k in row})
        log.info("%s", files.to_json(row))

    try:
        train(
            config,
            data,
            step,
            engine,
            at,
            stop,
            probes=probes,
            team=team,
            turn=share.turn,
            beat=beat,
            checkpoint=save,
            record=record,
        )
        end: dict[str, Any] = {"weights_sha256": weights_sha256(network)}
        state = "done"
        if config.save_weights and team.leads:
            weights = (averaged.module if averaged else network).state_dict()  # those that were evaluated
            files.write_atomically(run.folder / "weights.pt", lambda file: checkpoint.save_tensors(weights, file))
    except DivergedError as error:
        log.info("%s", error)
        state, end = "diverged", {"diverged_step": error.step, "error": str(error)}
    of_all_processes()
    status = run.write_status(state, ended=runs.now(), **facts(at), **end)
    if team.leads:
        with contextlib.suppress(OSError):  # the result is safe: what is left over only takes space
            checkpoint.remove(run.folder)
    watch(status)
    return team.broadcast(status)  # and so no process leaves before all is written


def _checkpoint(config: RunConfig, run: runs.Run, log: logging.Logger) -> dict[str, Any] | None:
    """What the run goes on from, if the record has every evaluation of the epochs before it."""
    saved = checkpoint.load(run.folder, run.run_id, log.warning)
    if saved:
        found = {row["epoch"] for row in runs.read_metrics(run.folder)[0]}
        if not found.issuperset(range(config.eval_every, saved["position"]["epoch"] + 1, config.eval_every)):
            log.warning("%s lacks evaluations from before the last checkpoint. The run starts again.", run.name)
            return None
    return saved


def _subject(config: RunConfig, network: nn.Module, data: Data) -> Subject:
    """What probes look at, with the sites that the network had before its norms were rewritten."""
    base = models.base(config, num_classes=len(data.classes), image_size=data.image_size)
    prefix = "network." if config.input_norm == "bn" else ""
    return Subject(network, tuple(prefix + site.norm for site in find_sites(base)), prefix)


def _check_shapes(config: RunConfig, network: nn.Module, data: Data) -> None:
    """Run each batch size that will occur through the network on the meta device, where it costs nothing.

    Raises:
        UserError: if the images are too small for the network or too few for a layer's statistics, or the
            network's output is not one number per image and class.
    """
    # Batch sizes, each with what mends it. Those of training go first: they are the ones that always count.
    sizes: dict[int, str] = {}
    for split, mend in ((data.train, "batch"), (data.val, "eval_batch"), (data.test, "eval_batch")):
        if split and (split is data.train or config.eval_stats == "batch"):
            each = 1 if config.sync_stats else split.processes  # the smallest share, where statistics are of shares
            last = " or drop_last=true" if split is data.train else ""
            sizes.setdefault(min(split.batch, split.images) // each, f"another {mend}")
            sizes.setdefault(split.images % split.batch // each, f"another {mend}{last}")
    sizes.pop(0, None)
    side = data.image_size
    what, larger = f"images of {side}x{side} pixels", "larger images, "
    if data.task == "regression":
        what, larger = "samples", ""
    probe = copy.deepcopy(network).to("meta").train()
    for size in sorted(sizes, reverse=True):  # what no batch size mends is told of the whole batch
        try:
            with apart():
                output = probe(torch.empty(size, data.channels, side, side, device="meta"))
        except NotImplementedError:  # some operation of the user's network has no meta form
            return
        except (ValueError, RuntimeError) as error:
            if "device" in str(error):  # a tensor that the user's network keeps to itself
                return
            last = "" if size in (config.batch, config.eval_batch) else ", the last of an epoch or evaluation,"
            raise UserError(
                f"A batch of {size} {what}{last} does not fit {config.model.name} with norm={config.norm.name}:\n"
                f"{str(error).splitlines()[0]}\n"
                f"Use {larger}another norm (one over a single value is undefined) or {sizes[size]}."
            ) from error
        expected = (size, len(data.classes))
        if not isinstance(output, torch.Tensor) or tuple(output.shape) != expected:
            found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise UserError(
                f"{config.model.name} gives {found} for a batch of {size} images.\n"
                f"Expected a tensor {expected}: one number per image and class of {config.dataset.name}."
            )


def weights_sha256(network: nn.Module) -> str:
    """A digest of every parameter and buffer, equal exactly for bit-identical networks."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _silence() -> logging.Logger:
    log = logging.Logger("silent", logging.INFO)
    log.addHandler(logging.NullHandler())
    return log


class _LogFile(logging.FileHandler):
    """A disk that refuses the log refuses the run as well, and there it is told."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            super().emit(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def _logger(folder: Path) -> logging.Logger:
    """A logger of this run alone, into run.log."""
    log = logging.Logger(folder.name, logging.INFO)
    handler = _LogFile(folder / runs.LOG, encoding="utf-8", delay=True)
    formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(message)s")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    log.addHandler(handler)
    shown = logging.StreamHandler()  # a warning is for whoever watches, too
    shown.addFilter(lambda record: record.levelno == logging.WARNING)
    log.addHandler(shown)
    return log
