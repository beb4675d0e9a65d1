"""Downloads: whether a server answers, a file, and progress while it is under way."""

import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

ANSWER_SECONDS = 2.0  # a mistake is reported within 3 s, so the server of a download has this long to answer
STALL_SECONDS = 60.0  # a download that stands still for so long is given up
PROGRESS_SECONDS = 5.0  # between two lines about the progress of a preparation
DOWNLOADING = "Downloading"  # begins the lines about one
CHUNK = 2**20  # bytes that are read of one at once

Chunk = TypeVar("Chunk", bound=Sized)


@lru_cache(maxsize=8)
def unreachable(url: str) -> str | None:
    """Return why `url` does not answer within `ANSWER_SECONDS`, or None if it does. Proxies are honored."""
    answer: list[str | None] = []

    def request() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=ANSWER_SECONDS):
                answer.append(None)
        except (OSError, ValueError) as error:
            answer.append(str(getattr(error, "reason", error)))

    # A thread, because the timeout of a connection does not bound the look-up of the host's name.
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return answer[0] if answer else f"no answer within {ANSWER_SECONDS:g} s"


def fetch(url: str, file: Path, title: str, log: Callable[[str], None]) -> None:
    """Download a file as a whole or not at all; two processes must not do so at once.

    Raises:
        OSError: of the network or the disk, or the answer is cut short.
    """
    temporary = file.with_name(f"{file.name}.part")
    try:
        with urllib.request.urlopen(url, timeout=STALL_SECONDS) as response, temporary.open("wb") as out:
            size = int(response.headers.get("Content-Length") or 0)
            total = f" of {size / 1e6:.0f}" if size else ""
            chunks = iter(lambda: response.read(CHUNK), b"")
            for chunk in with_progress(chunks, lambda n: f"{DOWNLOADING} {title}: {n / 1e6:.0f}{total} MB", log):
                out.write(chunk)
        if size and temporary.stat().st_size != size:
            raise OSError(f"{temporary.stat().st_size:,} of {size:,} bytes came")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def with_progress(chunks: Iterable[Chunk], text: Callable[[int], str], log: Callable[[str], None]) -> Iterator[Chunk]:
    """Yield `chunks`, and log `text(total length of those that are done)`, at first and then every few seconds."""
    done, last = 0, time.monotonic()
    log(text(done))
    for chunk in chunks:
        yield chunk
        done += len(chunk)
        if time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            log(text(done))
