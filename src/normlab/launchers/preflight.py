"""Check a run before it starts: quick, and without importing torch."""

import ctypes
import functools
import importlib.util
import sys
import tempfile
from pathlib import Path

from normlab.common.errors import UserError, storage_error
from normlab.config import weights
from normlab.config.schema import (
    ClassIncremental,
    CustomModelConfig,
    LoggerConfig,
    RegressionDataset,
    RunConfig,
    TimmConfig,
)
from normlab.data import inventory
from normlab.runs import archive, files


def check(config: RunConfig, *, here: bool = True) -> inventory.Inventory:
    """Check data, device, imports and folders; return the sizes of the data.

    Args:
        config: the run's settings.
        here: whether the run will be on this machine; if not, its devices are not checked.

    Raises:
        UserError: naming the first thing that would stop the run.
    """
    if here:
        _check_device(config)
    data = inventory.check(config.dataset, Path(config.data_dir))
    if config.batch > data.train_images:
        what = "samples" if isinstance(config.dataset, RegressionDataset) else "images"
        raise UserError(
            f"batch={config.batch} is larger than the data: dataset={config.dataset.name} has"
            f" {data.train_images} {what} to train on.\nNearest valid: batch={data.train_images}."
        )
    if isinstance(config.sampler, ClassIncremental) and data.classes:
        inventory.check_tasks(config.sampler, data.classes)
    _check_importable(config.norm.target, "norm._target_")
    if isinstance(config.model, CustomModelConfig):
        _check_importable(config.model.target, "model.target")
    if isinstance(config.model, TimmConfig) and importlib.util.find_spec("timm") is None:
        raise UserError("model=timm needs timm, which is not installed.\nInstall it: pip install 'normlab[timm]'.")
    if weights.is_file(config.weights):
        weights.check_file(str(config.weights))
    check_logger(config.logger)
    archive.refuse_new_runs(config.study_folder)
    _check_writable(config.study_folder)
    return data


def check_logger(logger: LoggerConfig) -> None:
    """Check that the logger's packages are installed.

    Raises:
        UserError: if they are not.
    """
    packages = {"none": (), "mlflow": ("mlflow", "sqlalchemy")}.get(logger.name, (logger.name,))
    # Of a mere folder, such as wandb makes, the origin is None.
    missing = [name for name in packages if getattr(importlib.util.find_spec(name), "origin", None) is None]
    if missing:
        raise UserError(
            f"logger={logger.name} needs packages that are not installed: {', '.join(missing)}.\n"
            f"Install them: pip install 'normlab[{logger.name}]'. Or leave it out: logger=none."
        )


@functools.cache
def gpu_count() -> int:
    """Return the number of CUDA devices as the driver counts them, CUDA_VISIBLE_DEVICES respected."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


@functools.cache
def gpu_memory_bytes() -> int:
    """Return the memory of the smallest CUDA device; 0 if there is none, or the driver does not tell."""
    sizes = []
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    for index in range(gpu_count()):
        device, size = ctypes.c_int(0), ctypes.c_size_t(0)
        failed = driver.cuDeviceGet(ctypes.byref(device), index) or driver.cuDeviceTotalMem_v2(
            ctypes.byref(size), device
        )
        sizes.append(0 if failed else size.value)
    return min(sizes, default=0)


def _check_device(config: RunConfig) -> None:
    if config.device.startswith("cuda"):
        index = int(config.device.partition(":")[2] or 0)
        if index >= gpu_count():
            raise UserError(
                f"device={config.device}: this machine's driver shows {gpu_count()} CUDA devices.\n"
                "Use device=cpu or device=auto, or check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES."
            )
    elif config.precision == "tf32" and (config.device == "cpu" or gpu_count() == 0):
        raise UserError("precision=tf32 is a format of NVIDIA GPUs, and this run has none.\nUse precision=fp32.")


def _check_importable(dotted: str, setting: str) -> None:
    package = dotted.partition(".")[0]
    if package in sys.modules or (Path.cwd() / package).exists() or (Path.cwd() / f"{package}.py").exists():
        return
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{setting}={dotted}: there is no package {package} in this folder or environment.\n"
            "Give the dotted path of a class or function, e.g. my_package.my_module.MyNet."
        )


@functools.cache
def _check_writable(folder: Path) -> None:
    files.make_folder(folder)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        raise storage_error(folder, error) from error
