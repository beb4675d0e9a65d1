"""One run from its configuration to its record: build, resume, train, and say how it ended."""

import contextlib
import copy
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from normlab import models, runs
from normlab.config import RunConfig
from normlab.data.load import Data, load
from normlab.errors import InterruptedRunError, OutOfMemoryError, RunBusyError, UserError
from normlab.norms import find_sites
from normlab.probes import Probes, Subject
from normlab.runs import files
from normlab.training import checkpoint, device
from normlab.training.gradients import build_transform
from normlab.training.interrupt import StopRequest
from normlab.training.loop import DivergedError, Position, train
from normlab.training.optimizers import build_optimizer

_NO_MEMORY = ("not enough memory", "can't allocate memory")  # what PyTorch's allocator of the CPU says
Watch = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Share:
    """What a launcher offers a run of this machine; the run's own settings go first."""

    device: str | None = None
    threads: int | None = None


def carry_out(
    config: RunConfig,
    *,
    stop: StopRequest | None = None,
    share: Share = Share(),
    watch: Watch = lambda status: None,
) -> dict[str, Any]:
    """Train a run, or go on with it; returns its status. `watch` is shown the status about once a second.

    A finished run is left alone. However it ends, the run's folder says so. `stop` may have been entered by
    the caller, so that a request made while torch was being imported counts.

    Raises:
        RunBusyError: if another process is training it.
        UserError: for what the user can mend; any other exception is an error of ours. Both are recorded.
        InterruptedRunError: when asked to stop; the run can go on later.
    """
    run = runs.Run(config.as_dict())
    run.freeze()
    with run.lock(), contextlib.nullcontext(stop) if stop else StopRequest() as stop:
        if run.state in runs.FINISHED:  # by another process, since the caller looked
            return runs.read_status(run.folder) or {}
        log = _logger(run.folder)
        try:
            started = (runs.read_status(run.folder) or {}).get("started") if run.state != "failed" else None
            status = run.write_status("running", started=started or runs.now(), ended=None, error=None)
            watch(status)
            return _train(config, run, stop, share, watch, log)
        except RunBusyError as error:  # taken over: the record is another process's now
            log.warning("%s", error)
            raise
        except InterruptedRunError as error:
            log.info("interrupted by %s", error)
            run.write_status("interrupted", ended=runs.now(), error=f"interrupted by {error}")
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
            for handler in log.handlers:
                handler.close()


def data_of(config: RunConfig, where: torch.device, log: Callable[[str], None]) -> Data:
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
    )


def _train(
    config: RunConfig, run: runs.Run, stop: StopRequest, share: Share, watch: Watch, log: logging.Logger
) -> dict[str, Any]:
    saved = checkpoint.load(run.folder, run.run_id, log.warning)
    where = device.choose(config.device, share.device)
    # Sums over threads depend on their number: a resumed run keeps it, so that it ends as if uninterrupted.
    device.prepare(config, where, config.threads or (saved["threads"] if saved else share.threads))
    data = data_of(config, where, log.info)
    network = models.build(config, num_classes=len(data.classes), image_size=data.image_size)
    _check_shapes(config, network, data)
    network = network.to(where)
    if saved is None and config.starts_from_data:
        calibration = data.calibration(config.calibration_images)
        try:
            models.start(config, network, calibration, num_classes=len(data.classes), image_size=data.image_size)
        except ValueError as error:
            raise UserError(
                f"The start that looks at {len(calibration)} calibration images does not fit {config.model.name} with"
                f" norm={config.norm.name}:\n{str(error).splitlines()[0]}\n"
                "Use another calibration_images (a norm over one value per channel is undefined), a multiple of"
                " norm_batch."
            ) from error
    averaged = None
    if config.weight_average is not None:
        averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.weight_average))
    optimizer = build_optimizer(config.optimizer, network)
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
            optimizer.load_state_dict(saved["optimizer"])
        except (RuntimeError, ValueError) as error:
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
    evaluated = at.epoch * data.train.steps
    for warning in run.keep_rows_until(evaluated, evaluated + at.batch):
        log.warning("%s", warning)
    files.write_json(run.folder / runs.PROVENANCE, device.provenance(where, data.fingerprint))
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
            "peak_memory_bytes": max(peak_before, device.peak_memory_bytes(where)),
            **latest,
        }

    def beat(at: Position) -> None:
        watch(run.write_status("running", durable=False, **facts(at)))

    def save(at: Position) -> None:
        state = {
            "run_id": run.run_id,
            "data_fingerprint": data.fingerprint,
            "network": network.state_dict(),
            "averaged": averaged.state_dict() if averaged else None,
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "probes": probes.state_dict() if probes else {},
            "position": vars(at).copy(),
            "threads": torch.get_num_threads(),
            "peak_memory_bytes": max(peak_before, device.peak_memory_bytes(where)),
        }
        checkpoint.save(run.folder, state)

    def record(row: dict[str, Any]) -> None:
        run.append_metrics(row)
        latest.update({k: row[k] for k in ("train_loss", "test_loss", "test_accuracy") if k in row})
        log.info("%s", files.to_json(row))

    try:
        train(
            config,
            network,
            data,
            optimizer,
            scaler,
            at,
            stop,
            averaged=averaged,
            transform=transform,
            probes=probes,
            beat=beat,
            checkpoint=save,
            record=record,
        )
        end: dict[str, Any] = {"weights_sha256": weights_sha256(network)}
        state = "done"
        if config.save_weights:
            weights = (averaged.module if averaged else network).state_dict()  # those that were evaluated
            files.write_atomically(run.folder / "weights.pt", lambda file: checkpoint.save_tensors(weights, file))
    except DivergedError as error:
        log.info("%s", error)
        state, end = "diverged", {"diverged_step": error.step, "error": str(error)}
    status = run.write_status(state, ended=runs.now(), **facts(at), **end)
    with contextlib.suppress(OSError):  # the result is safe: what is left over only takes space
        checkpoint.remove(run.folder)
    watch(status)
    return status


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
            last = " or drop_last=true" if split is data.train else ""
            sizes.setdefault(min(split.batch, split.images), f"another {mend}")
            sizes.setdefault(split.images % split.batch, f"another {mend}{last}")
    sizes.pop(0, None)
    side = data.image_size
    what, larger = f"images of {side}x{side} pixels", "larger images, "
    if data.task == "regression":
        what, larger = "samples", ""
    probe = copy.deepcopy(network).to("meta").train()
    for size in sorted(sizes, reverse=True):  # what no batch size mends is told of the whole batch
        try:
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


def _logger(folder: Path) -> logging.Logger:
    """A logger of this run alone, into run.log."""
    log = logging.Logger(folder.name, logging.INFO)
    handler = logging.FileHandler(folder / "run.log", encoding="utf-8", delay=True)
    formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(message)s")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk is told elsewhere
    log.addHandler(handler)
    shown = logging.StreamHandler()  # a warning is for whoever watches, too
    shown.addFilter(lambda record: record.levelno == logging.WARNING)
    log.addHandler(shown)
    return log
