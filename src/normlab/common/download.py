"""Downloads: whether a server answers, and progress while one is under way."""

import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import lru_cache
from typing import TypeVar

ANSWER_SECONDS = 2.0  # a mistake is reported within 3 s, so the server of a download has this long to answer
PROGRESS_SECONDS = 5.0  # between two lines about the progress of a preparation
DOWNLOADING = "Downloading"  # begins the lines about one

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
