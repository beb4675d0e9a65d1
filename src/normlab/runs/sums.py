"""Checksums of a run's record: whether its files are what one run wrote.

status.json names each other file of the record with a number of bytes and the CRC-32 of so many bytes from the file's
start; its last line is the CRC-32 of all before it. Each sum begins with the run's id, so that a file of another run
has another one. They find what was damaged, edited or mixed up, not what somebody forges: whoever can write a record
can write its sums.
"""

import re
import zlib
from collections.abc import Mapping
from typing import Any

from normlab.runs import files

Sum = tuple[int, str]  # bytes, and the CRC-32 of these in hexadecimal digits
CHANGED = "is not what the run wrote: changed, damaged, or of another run"
MISSING = "is missing, and the run wrote it"
ADDED = "is no file that the run wrote"
_SEAL = re.compile(rb',\n "checksum": "([0-9a-f]{8})"\n}\n?\Z')
_ID = re.compile(r"-([0-9a-f]{10})$")


def id_of(name: str) -> str:
    """Return the id at the end of the name of a run's folder; "" if it has none."""
    found = _ID.search(name)
    return found[1] if found else ""


def sum_of(content: bytes, run_id: str) -> Sum:
    """Return the sum of a file's contents."""
    return len(content), f"{zlib.crc32(content, zlib.crc32(run_id.encode())):08x}"


def extended(sum: Sum, content: bytes) -> Sum:
    """Return the sum of a file to which `content` was appended."""
    return sum[0] + len(content), f"{zlib.crc32(content, int(sum[1], 16)):08x}"


def nothing(run_id: str) -> Sum:
    """Return the sum of no bytes, which any file begins with."""
    return sum_of(b"", run_id)


def fault(recorded: Sum | None, content: bytes | None, run_id: str, *, whole: bool) -> str:
    """Return what is wrong with a file by its sum; "" if nothing is.

    Args:
        recorded: the file's sum by status.json; None if that does not name the file.
        content: what the file holds; None if there is none.
        run_id: of the run.
        whole: whether the sum is of all of the file: of a run under way, rows may have come since.
    """
    if recorded is None:
        return "" if content is None else ADDED
    if content is None:
        return MISSING if recorded[0] or whole else ""
    length, digits = recorded
    if whole and len(content) != length:
        return CHANGED
    return "" if sum_of(content[:length], run_id) == (length, digits) else CHANGED


def sealed(status: Mapping[str, Any], run_id: str) -> bytes:
    """Return a status as its file has it, with the sum of itself as its last line."""
    head = files.to_json(status, indent=1).removesuffix("\n}").encode()
    return head + f',\n "checksum": "{sum_of(head, run_id)[1]}"\n}}\n'.encode()


def status_fault(content: bytes, status: Mapping[str, Any], run_id: str) -> str:
    """Return what is wrong with a status by its sum and by the id in its folder's name; "" if nothing is."""
    named = status.get("run_id")
    if run_id and named is not None and named != run_id:
        return f"is of the run {named}, and lies in the folder of another"
    if "checksum" not in status and "files" not in status:
        return ""  # of an earlier format
    seal = _SEAL.search(content)
    if seal is None or not named or sum_of(content[: seal.start()], str(named))[1].encode() != seal[1]:
        return CHANGED
    return "" if run_id else f"is of the run {named}, and its folder is not named by it"


def recorded(status: Mapping[str, Any] | None) -> dict[str, Sum] | None:
    """Return the sums of a record's other files by a checked status; None if it has none."""
    found = (status or {}).get("files")
    return None if found is None else {name: (length, digits) for name, (length, digits) in found.items()}
