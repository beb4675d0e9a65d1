"""`python train.py doctor`: check whether a run can train on this machine, and show how to mend what it lacks."""

import contextlib
import ctypes
import fcntl
import importlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Literal, NoReturn, Self

import psutil
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.table import Table
from rich.text import Text

from normlab import __version__
from normlab.common.console import Console
from normlab.common.cpu import BF16_FROM, BF16_SPEED, bf16_instructions, cores
from normlab.common.download import unreachable
from normlab.common.errors import UserError, first_line, storage_error
from normlab.config import schema
from normlab.config.command_line import CommandLine
from normlab.config.hydra import exit_with_error, settings_of
from normlab.config.schema import BuiltinDataset, ImageDataset, RegressionDataset, RunConfig
from normlab.data import inventory
from normlab.launchers import preflight

GIB = 2**30
LITTLE_DISK = 2 * GIB  # a run's record is kilobytes, its checkpoints are as large as its network, twice
LITTLE_SHARED = GIB  # containers often have 64 MB
NVIDIA_IN_KERNEL = Path("/proc/driver/nvidia")
ANSWER_SECONDS = 10.0  # for SLURM's controller
NETWORK = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "afs", "panfs", "9p", "fuse.")
_COLORS = {"ok": "green", "note": "yellow", "problem": "red"}

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        subject: what was checked, in a word.
        text: the result.
        level: a run with these settings would stop on a "problem".
        fix: what to do where `level` is not ok.
    """

    subject: str
    text: str
    level: Level = "ok"
    fix: str = ""

    @classmethod
    def of_error(cls, subject: str, error: UserError) -> Self:
        """Make a problem of an error, whose first line says what is wrong and whose others how to mend it."""
        text, _, fix = str(error).partition("\n")
        return cls(subject, text, "problem", fix)


def run(composed: DictConfig) -> NoReturn:
    """Check this machine and end the process, with status 0 if a run with these settings can train here, else 1."""
    try:
        config = schema.parse(settings_of(composed))
        is_ready = examine(config, HydraConfig.get().runtime.choices["hydra/launcher"])
    except Exception as error:  # past Hydra, which would add a line of its own
        exit_with_error(error, CommandLine("train", "doctor", settings=sys.argv[1:]))
    sys.exit(not is_ready)


def examine(config: RunConfig, launcher: str, console: Console | None = None) -> bool:
    """Print the findings; return whether a run with these settings can train here."""
    console = console or Console()
    grid = Table.grid(padding=(0, 2, 0, 0))
    for wrap in (False, False, True):
        grid.add_column(no_wrap=not wrap, overflow="fold")
    found = list(findings(config, launcher))
    for finding in found:
        text = Text(finding.text)
        if finding.fix:
            text.append(f"\n-> {finding.fix}", "bold")
        grid.add_row(Text(finding.level, _COLORS[finding.level]), finding.subject, text)
    console.print(grid)
    problems, notes = (sum(finding.level == level for finding in found) for level in ("problem", "note"))
    counts = f"{problems} problem{'s' * (problems != 1)}, {notes} note{'s' * (notes != 1)}: "
    console.print(f"\n{counts}" + ("mend the problems before training." if problems else "ready to train."))
    return not problems


def findings(config: RunConfig, launcher: str) -> Iterator[Finding]:
    """Yield the result of every check."""
    yield from versions()
    yield processor()
    yield from gpus(config.device)
    yield from data_sets(config)
    yield folder("output_dir", Path(config.output_dir))
    yield folder("data_dir", Path(config.data_dir))
    yield temporary_folder()
    yield from shared_memory()
    yield from slurm(launcher)
    yield from logger(config)


# --- Versions ---------------------------------------------------------------------------------------


def versions() -> Iterator[Finding]:
    """Check that torch and torchvision can be imported."""
    installed = [f"Python {platform.python_version()}", f"normlab {__version__}"]
    for package in ("torch", "torchvision", "hydra-core"):
        try:
            installed.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            installed.append(f"{package} not installed")
    yield Finding("versions", ", ".join(installed))
    torch, torchvision = _failure("torch"), _failure("torchvision")
    if torch:
        yield Finding("torch", f"cannot be imported: {torch}", "problem", "pip install --force-reinstall torch")
    elif torchvision:
        yield Finding(
            "torchvision",
            f"does not fit this torch: {torchvision}",
            "problem",
            "Both have to come from one index: pip install --force-reinstall torch torchvision",
        )


def _failure(package: str) -> str | None:
    """Import a package; return the error on one line, None without one."""
    try:
        with warnings.catch_warnings(action="ignore"):
            importlib.import_module(package)
    except Exception as error:  # a library that does not fit raises whatever its loading meets
        return f"{type(error).__name__}: {first_line(error)}"
    return None


# --- Devices ----------------------------------------------------------------------------------------


def processor() -> Finding:
    """Return the cores and the memory that a run may use."""
    usable, there = cores(), os.cpu_count() or 1
    text = f"{usable} {f'of {there} ' if usable < there else ''}core{'s' * (there > 1)}"
    if instructions := bf16_instructions():
        text += f" with {instructions} (precision=bf16: {BF16_SPEED:g} times as fast from {BF16_FROM} pixels on, about)"
    memory, limit = psutil.virtual_memory(), memory_limit()
    if limit is not None and limit < memory.total:
        whole = _gib(memory.total)
        return Finding(
            "CPU", f"{text}, {_gib(limit)} memory, by a limit of this container or job (the machine has {whole})"
        )
    return Finding("CPU", f"{text}, {_gib(memory.available)} of {_gib(memory.total)} memory free")


def memory_limit(root: Path = Path("/sys/fs/cgroup"), mine: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return the bytes that the control groups around this process, of either version, leave to it; None: no limit."""
    limits = []
    with contextlib.suppress(OSError):  # not Linux
        for line in mine.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            top, name = root / controllers, "memory.limit_in_bytes" if controllers else "memory.max"
            inside = top / path.lstrip("/")
            for group in (inside, *inside.parents) if controllers in ("", "memory") else ():
                with contextlib.suppress(OSError, ValueError):  # ValueError: "max", which is no limit
                    limits.append(int((group / name).read_text()))
    return min(limits, default=None)


def gpus(device: str) -> Iterator[Finding]:
    """Try each GPU, or find out why there is none; yield nothing where torch cannot be imported."""
    if _failure("torch"):
        return
    import torch

    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        yield _without_gpu(device.startswith("cuda"), first_line(complaints[0].message) if complaints else "")
        return
    there = torch.cuda.device_count()
    for index in range(there):
        yield _gpu(index, needed=device != "cpu")
    if int(device.partition(":")[2] or 0) >= there:
        yield Finding("GPU", f"device={device}: there is no such GPU", "problem", f"Use device=cuda:{there - 1}.")


def _without_gpu(wanted: bool, complaint: str) -> Finding:
    import torch

    from normlab.training.device import left_idle

    driver, seen = _driver(), preflight.gpu_count()
    if seen and torch.version.cuda is None:
        text = f"the driver shows {seen}, but this torch ({torch.__version__}) is built for CPUs"
        fix = "Install another: pip install --force-reinstall torch torchvision"
    elif seen:
        text = f"torch, built for CUDA {torch.version.cuda}, cannot use the driver, for CUDA {driver}. {complaint}"
        fix = "Update the driver, or install a torch for it: https://pytorch.org/get-started/previous-versions"
    elif driver:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        text = f"the driver (CUDA {driver}) shows none"
        text += f"; CUDA_VISIBLE_DEVICES is {hidden!r}" if hidden is not None else ""
        fix = "Check nvidia-smi and CUDA_VISIBLE_DEVICES; in a SLURM job, ask for a GPU (--gpus=1)."
    elif NVIDIA_IN_KERNEL.exists():
        text = "the kernel has NVIDIA's driver, but there is no libcuda.so.1"
        fix = "Install the driver's libraries; start a container with --gpus all (docker) or --nv (apptainer)."
    elif wanted:
        text, fix = "no NVIDIA driver", "Use device=cpu, or a machine with a GPU."
    else:
        return Finding("GPU", left_idle() or "no NVIDIA driver: runs train on the CPU")
    return Finding("GPU", text, "problem" if wanted else "note", fix)


def _gpu(index: int, needed: bool) -> Finding:
    """Try a GPU's memory, cuDNN and a kernel of torch's own."""
    import torch

    subject, driver = f"GPU {index}", _driver()
    try:
        with warnings.catch_warnings(action="ignore"):
            free, total = torch.cuda.mem_get_info(index)
            images = torch.ones(2, 3, 8, 8, device=f"cuda:{index}")
            torch.nn.functional.conv2d(images, images.flip(3)).sum().item()
            text = f"{torch.cuda.get_device_name(index)}, {_gib(free)} of {_gib(total)} memory free"
    except Exception as error:  # whatever CUDA, cuDNN or the allocator raise
        built = f"{torch.__version__}, for CUDA {torch.version.cuda}, driver for {driver}"
        return Finding(
            subject,
            f"cannot be used by torch {built}: {first_line(error)}",
            "problem" if needed else "note",
            "See nvidia-smi for who uses it; a torch that is built for it: https://pytorch.org. Or use device=cpu.",
        )
    if free < total / 4:
        return Finding(subject, text, "note", "Other processes hold the rest: nvidia-smi shows them.")
    return Finding(subject, text + (f", driver for CUDA {driver}" if driver else ""))


def _driver() -> str | None:
    """Return the newest CUDA version that the driver knows, or None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(number)):
        return "of unknown version"
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


# --- Data sets --------------------------------------------------------------------------------------


def data_sets(config: RunConfig) -> Iterator[Finding]:
    """Check the chosen data set as a run would, and those that could be chosen without a path."""
    data_dir, kind = Path(config.data_dir), config.dataset.kind
    chosen = _chosen(config.dataset, data_dir)
    if kind not in inventory.CIFARS or chosen.level == "problem":
        yield chosen
    if kind != "digits":
        yield Finding("dataset=digits", "part of the installation")
    for other in inventory.CIFARS:
        if other != kind or chosen.level == "ok":
            yield cifar(other, data_dir)


def _chosen(dataset: ImageDataset | RegressionDataset, data_dir: Path) -> Finding:
    subject = f"dataset={dataset.kind}"
    try:
        found = inventory.check(dataset, data_dir)
    except UserError as error:
        return Finding.of_error(subject, error)
    if isinstance(dataset, RegressionDataset):
        return Finding(subject, "synthetic, made when it is needed")
    where = "" if isinstance(dataset, BuiltinDataset) else f" in {dataset.path}"
    size = f" of {found.image_size}x{found.image_size} pixels" if found.image_size else ""
    text = f"{found.train_images:,} images{size} to train on, {found.classes} classes{where}"
    return Finding(subject, text, "note", " ".join(found.remarks)) if found.remarks else Finding(subject, text)


def cifar(kind: str, data_dir: Path) -> Finding:
    """Check that CIFAR is in `data_dir` or can be downloaded. `kind`: cifar10 or cifar100."""
    facts = inventory.CIFARS[kind]
    subject = f"dataset={kind}"
    if all((data_dir / facts.folder / name).is_file() for name in facts.files):
        return Finding(subject, f"unpacked in {data_dir}")
    if (data_dir / facts.archive).is_file():
        return Finding(subject, f"its archive is in {data_dir}")
    reason = unreachable(facts.url)
    if not reason:
        return Finding(subject, f"is downloaded to {data_dir} on first use")
    text = f"not in {data_dir}, and cannot be downloaded: {reason}"
    return Finding(subject, text, "note", f"Put {facts.archive} there, or name the folder that has it: data_dir=...")


# --- Folders ----------------------------------------------------------------------------------------


def folder(setting: str, path: Path) -> Finding:
    """Try the folder of a setting, which a run would write to, in the nearest part of it that exists."""
    try:
        there = next(part for part in (path.absolute(), *path.absolute().parents) if part.exists())
        locks = _try_to_write(there)
        free = shutil.disk_usage(there).free
    except OSError as error:
        finding = Finding.of_error(setting, storage_error(path, error))
        return replace(finding, fix=finding.fix.replace("output_dir", setting))
    system = file_system(there)
    kind = f"{system} over the network" if system.startswith(NETWORK) else system
    text = f"{path}{'' if path.exists() else ' (made on first use)'}: writable, {_gib(free)} free, {kind}"
    if not locks:
        fix = "Claims (run.claim) still keep processes apart, by their signs of life. Lustre has locks with -o flock."
        return Finding(setting, f"{text}, no locks (flock)", "note", fix)
    if free < LITTLE_DISK:
        return Finding(setting, text, "note", f"Free some space, or choose another folder: {setting}=...")
    if system == "tmpfs":
        return Finding(setting, text, "note", f"This is memory, lost in a restart. Another folder: {setting}=...")
    return Finding(setting, f"{text}, locks work")


def _try_to_write(path: Path) -> bool:
    """Write, replace and lock in a folder; return whether a lock shuts another one out.

    Raises:
        OSError: if the folder cannot be written, or a file not be replaced in one step.
    """
    with tempfile.TemporaryDirectory(dir=path, prefix=".normlab-doctor-") as trial:
        old, new = Path(trial, "old"), Path(trial, "new")
        old.write_bytes(bytes(4096))
        new.write_bytes(bytes(4096))
        new.replace(old)
        with old.open("a") as first, old.open("a") as second:
            return _locked(first) and not _locked(second)


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def file_system(path: Path) -> str:
    """Return the kind of file system that holds `path`: ext4, nfs4, lustre, ..."""
    around = {path.resolve(), *path.resolve().parents}
    mounts = [mount for mount in psutil.disk_partitions(all=True) if Path(mount.mountpoint) in around]
    deepest = max((len(Path(mount.mountpoint).parts) for mount in mounts), default=0)
    kinds = [str(mount.fstype) for mount in mounts if len(Path(mount.mountpoint).parts) == deepest]
    return kinds[-1] if kinds else "unknown file system"  # the later of two at one place hides the other


def temporary_folder() -> Finding:
    """Try the folder for temporary files: processes that load data talk to each other through sockets in it."""
    try:
        path = Path(tempfile.gettempdir())
        _try_to_write(path)
        return Finding("temporary", f"{path}: writable, {_gib(shutil.disk_usage(path).free)} free, {file_system(path)}")
    except OSError as error:
        text = f"no writable folder for temporary files: {first_line(error)}"
        return Finding("temporary", text, "problem", "Name one: export TMPDIR=/path/to/folder")


def shared_memory(path: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Check the memory in which worker processes put the batches of a streamed data set; yield only if it is scarce."""
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(path).free
        if free < LITTLE_SHARED:
            yield Finding(
                "shared memory",
                f"{path}: {free // 2**20} MiB free, which streaming images with many workers may exceed",
                "note",
                "Start a container with --shm-size=8g or --ipc=host, or use dataset.workers=0.",
            )


# --- SLURM ------------------------------------------------------------------------------------------


def slurm(launcher: str) -> Iterator[Finding]:
    """Check that a cluster can be reached from here: a problem only for those who chose hydra/launcher=slurm."""
    level: Level = "problem" if launcher == "slurm" else "note"
    if not shutil.which("sbatch"):
        if launcher != "slurm":
            yield Finding("SLURM", "none on this machine (no sbatch): sweeps run here")
            return
        fix = "Run this on a node of the cluster, or use hydra/launcher=pool."
        yield Finding("SLURM", "there is no sbatch on this machine", "problem", fix)
        return
    try:
        partitions = _partitions()
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        fix = "`sinfo` has to list partitions: run this on a node of the cluster, or ask its administrators."
        yield Finding("SLURM", f"there is sbatch, but the controller does not answer: {error}", level, fix)
        return
    job = os.environ.get("SLURM_JOB_ID")
    more = f" and {len(partitions) - 4} more" if len(partitions) > 4 else ""
    text = f"partitions {'; '.join(partitions[:4])}{more}" if partitions else "answers, but offers no partition"
    text += f"; this is job {job}" if job else ""
    yield Finding("SLURM", text, *(() if partitions else (level, "Ask the administrators for a partition.")))


def _partitions() -> list[str]:
    """Return each partition with its state, time limit, nodes and devices.

    Raises:
        RuntimeError: with SLURM's own words, if it does not answer.
    """
    format = "%P|%a|%l|%D|%G"
    command = ["sinfo", "--noheader", f"--format={format}"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    if answer.returncode:
        raise RuntimeError((answer.stderr.strip().splitlines() or [f"sinfo ended with status {answer.returncode}"])[-1])
    rows = [line.split("|") for line in answer.stdout.splitlines() if line.count("|") == format.count("|")]
    return [
        f"{name} ({state}, at most {limit}, {nodes} nodes{'' if gres in ('(null)', '') else f' with {gres}'})"
        for name, state, limit, nodes, gres in rows
    ]


def logger(config: RunConfig) -> Iterator[Finding]:
    """Check the packages of a run's logger, if it has one."""
    subject = f"logger={config.logger.name}"
    try:
        preflight.check_logger(config.logger)
    except UserError as error:
        yield Finding.of_error(subject, error)
    else:
        if config.logger.name != "none":
            yield Finding(subject, "its packages are installed")


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
