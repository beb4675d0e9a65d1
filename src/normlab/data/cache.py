"""Decoded image folders as one array file below `data_dir`, whose pages processes share."""

import hashlib
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from normlab.common.cpu import cores
from normlab.common.download import with_progress
from normlab.common.errors import UserError
from normlab.data.contents import known_contents_digest
from normlab.data.images import Decoder

Log = Callable[[str], None]

CACHE_FORMAT = 2  # raise it when the same files would decode to other pixels
CHUNK = 512  # images that are decoded between two writes
CHECKSUM_BYTES = hashlib.sha256().digest_size


def decoded(decoder: Decoder, paths: list[str], data_dir: Path, log: Log) -> tuple[NDArray[np.uint8], str]:
    """Return the pixels of `paths`, decoded now or at an earlier time, and their checksum.

    The file is named by all that decides its content: the files' relative paths and bytes, and the decoding. So a copy
    of a folder shares it. A damaged file is decoded again. Of several processes at once, one decodes.

    Returns:
        uint8 (N, 3, S, S), mapped into memory: writing to it changes neither file nor other processes.

    Raises:
        UserError: an image cannot be read, or `data_dir` cannot be written.
    """
    name = f"{decoder.root.resolve().name}-{decoder.size}px-{_key(decoder, paths, data_dir)}.npy"
    file = data_dir / "cache" / name
    if (content := _open(file)) is None:
        with locked(file.with_suffix(".lock"), log):
            if (content := _open(file)) is None:
                if file.exists():
                    log(f"{file} is damaged; the images are decoded again.")
                _write(file, decoder, paths, log)
                content = _open(file)
    if content is None:
        raise UserError(f"{file} was written but does not read back the same.\nCheck the disk of data_dir={data_dir}.")
    return content


@contextmanager
def locked(path: Path, log: Log) -> Iterator[None]:
    """Hold the lock file `path`, so that of several processes one prepares the data and the others wait."""
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        log("Waiting for another process that prepares the same data.")
        lock.acquire()
    except OSError as error:
        raise cannot_write(path.parent, error) from None
    try:
        yield
    finally:
        lock.release()


def cannot_write(folder: Path, error: OSError) -> UserError:
    """Return the error for a data folder that cannot be written."""
    return UserError(
        f"The data cannot be written to {folder}: {error.strerror or error}.\n"
        "Make room there, or name a folder that can be written: data_dir=... (or the variable NORMLAB_DATA)."
    )


def _key(decoder: Decoder, paths: list[str], data_dir: Path) -> str:
    contents = known_contents_digest(decoder.root, paths, data_dir)
    pillow = version("pillow")  # its decoders differ by a level
    decoding = (CACHE_FORMAT, pillow, decoder.size, decoder.short_side, decoder.one_size, decoder.value_range)
    return hashlib.sha256(repr((decoding, contents)).encode()).hexdigest()[:16]


def _open(file: Path) -> tuple[NDArray[np.uint8], str] | None:
    """Map the array of `file` and return it with its checksum; None if there is no such file or it is damaged."""
    try:
        content = np.memmap(file, np.uint8, "r")
    except (OSError, ValueError):  # none, or an empty one
        return None
    checksum = hashlib.sha256(content[:-CHECKSUM_BYTES].data).digest()
    if checksum != content[-CHECKSUM_BYTES:].tobytes():
        return None
    return np.load(file, mmap_mode="c"), checksum.hex()


def _write(file: Path, decoder: Decoder, paths: list[str], log: Log) -> None:
    """Decode into a file of NumPy's format with a checksum of all its bytes at the end."""
    started = time.monotonic()
    temporary = file.with_suffix(".tmp")
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), 3, decoder.size, decoder.size)}
    progress = f"Decoding {decoder.root.name}, once: {{:,}} of {len(paths):,} images".format
    try:
        with (
            temporary.open("w+b") as out,
            ThreadPoolExecutor(cores()) as pool,
            warnings.catch_warnings(action="ignore"),  # Pillow's remarks on odd files that it does read
        ):
            np.lib.format.write_array_header_1_0(out, header)
            out.seek(0)
            checksum = hashlib.sha256(out.read())
            chunks = (paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK))
            for images in with_progress((np.stack(list(pool.map(decoder, chunk))) for chunk in chunks), progress, log):
                checksum.update(images.data)
                out.write(images.data)  # not through a memory map: there a full disk is a crash, not an error
            out.write(checksum.digest())
        if not file.stem.endswith(_key(decoder, paths, file.parent.parent)):
            raise UserError(f"The images in {decoder.root} changed while they were read.\nStart again.")
        temporary.replace(file)
    except OSError as error:
        raise cannot_write(file.parent, error) from None
    finally:
        temporary.unlink(missing_ok=True)
    log(f"Decoded {len(paths):,} images of {decoder.root} in {time.monotonic() - started:.0f} s, kept as {file}.")
