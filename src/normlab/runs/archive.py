"""A study as one file, NAME.normlab.zip: the records of its runs, to hand on and to read in place.

manifest.json            format, numbers of runs and entries, the SHA-256 of each entry
ro-crate-metadata.json   the same study for archives of research data (report/pack.py)
notes.md                 remarks of a person, where the study has some
tables/<table>.csv       the report's tables when it was packed, and options.json, the settings that they were made with
<run>/...                each run's records, as runs/folder.py has them: no checkpoints, no logs

A report makes its tables from the records and never reads those in the file: `report.py verify` compares them.

Such a file may come from anybody. `opened` checks all of it before any of it is read: no entry but these, each once, no
links, sizes and compression within the bounds below, every digest as in the manifest. Nothing is unpacked to the disk.
"""

import hashlib
import io
import json
import os
import re
import shlex
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO, Self

from normlab import __version__
from normlab.common.errors import UserError
from normlab.runs import files, reading

SUFFIX = ".normlab.zip"
FORMAT = 3  # 1 had no tables, 2 no bits of test images
MANIFEST, CRATE, NOTES = "manifest.json", "ro-crate-metadata.json", "notes.md"
TABLES, OPTIONS = "tables", "options.json"
RUN_FILES = ("config.yaml", "status.json", "metrics.jsonl", "provenance.json", "correct.json")

MOST_ENTRIES = 200_000
MOST_BYTES = 2 << 30  # of all entries together, not compressed
MOST_BYTES_OF_DIRECTORY = 64 << 20  # the list of entries, which is read as a whole before they can be counted
MOST_MARKS_OF_ENTRY = 20  # commas and brackets in the manifest; one, unless there are some in a name
MOST_COMPRESSION = 100  # recorded runs reach 8
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)

_NAME = re.compile(
    rf"{re.escape(MANIFEST)}|{re.escape(CRATE)}|{re.escape(NOTES)}"
    rf"|{TABLES}/(?:[a-z0-9_]+\.csv|{re.escape(OPTIONS)})"
    rf"|(?!\.|{TABLES}/)[^/\\\x00-\x1f\x7f]+"
    rf"/(?:{'|'.join(map(re.escape, RUN_FILES))}|probes/(?!\.)[^/\\\x00-\x1f\x7f]+\.jsonl)"
)
_ERRORS = (
    OSError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    struct.error,
)


class PackedPath:
    """A file or folder of a packed study, with the part of Path's interface that reading records takes."""

    def __init__(self, archive: zipfile.ZipFile, children: Mapping[str, list[str]], at: str = "") -> None:
        self._archive, self._children, self._at = archive, children, at

    def __str__(self) -> str:
        return f"{self._archive.filename}/{self._at}".rstrip("/")

    def __truediv__(self, name: str) -> Self:
        return type(self)(self._archive, self._children, f"{self._at}/{name}".lstrip("/"))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._at.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return Path(self.name).stem

    def exists(self) -> bool:
        """Return whether there is such a file or folder."""
        folder, _, name = self._at.rpartition("/")
        return self._at in self._children or name in self._children.get(folder, ())

    def iterdir(self) -> Iterator[Self]:
        """Yield what a folder holds; nothing for a folder that does not exist."""
        return (self / name for name in self._children.get(self._at, ()))

    def read_bytes(self) -> bytes:
        """Return the contents of a file.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        try:
            return self._archive.read(self._at)
        except KeyError:
            raise FileNotFoundError(f"{self} does not exist") from None


@contextmanager
def opened(path: Path) -> Iterator[PackedPath]:
    """Check a packed study as a whole and yield its folder.

    Raises:
        UserError: if it is no such file, a part of it is damaged, it holds what no packed study does, or it was packed
            by a newer version.
    """
    with ExitStack() as stack:
        try:  # it may be a link: the user named it
            file = stack.enter_context(reading.opened(Path(os.path.realpath(path))))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from None
        yield _checked(path, io.BufferedReader(file))  # type: ignore[type-var]  # a raw file, which reading opens


def _checked(path: Path, file: BinaryIO) -> PackedPath:
    try:
        _check_directory(path, file)
        archive = zipfile.ZipFile(file)
        archive.filename = str(path)
        _check_entries(path, archive.infolist())
        _check_places(path, file, archive.infolist())
        _check_digests(path, archive)
    except _ERRORS as error:
        raise refused(path, f"it cannot be read ({error or type(error).__name__})") from None
    return PackedPath(archive, _children(archive.namelist()))


def refused(path: Path, why: str) -> UserError:
    """Return the error for a file that is not read."""
    return UserError(
        f"{path} is not read: {why}.\nIt was damaged or changed after it was packed, or never was a packed study."
        " Get it again from where it came from."
    )


def _check_directory(path: Path, file: BinaryIO) -> None:
    """Bound the size of the list of entries, which `zipfile` reads by the records at the end of the file."""
    end = file.seek(0, 2)
    file.seek(max(0, end - 98))
    tail = file.read().rjust(98, b"\0")
    record64, locator, record = tail[:56], tail[56:76], tail[76:]
    if not record.startswith(b"PK\5\6") or not record.endswith(b"\0\0"):
        raise refused(path, "it is no zip file, or something follows the list of its entries")
    size = int.from_bytes(record[12:16], "little")
    if locator.startswith(b"PK\6\7"):  # of more than 65,535 entries
        if int.from_bytes(locator[8:16], "little") != end - 98:
            raise refused(path, "the end of the list of its entries is not where it has to be")
        size = max(size % 0xFFFFFFFF, int.from_bytes(record64[40:48], "little"))
    if size > MOST_BYTES_OF_DIRECTORY:
        raise refused(path, f"the list of its entries has {size} bytes; at most {MOST_BYTES_OF_DIRECTORY} are read")


def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    """Check names, kinds and sizes as the list of entries has them, to which `zipfile` then holds each entry."""
    names = Counter(entry.filename for entry in entries)
    if len(entries) > MOST_ENTRIES:
        raise refused(path, f"it has {len(entries)} entries, and at most {MOST_ENTRIES} are read")
    for entry in entries:
        why = _fault(entry, names[entry.filename])
        if why:
            raise refused(path, f"the entry {entry.orig_filename!r} {why}")
    total = sum(entry.file_size for entry in entries)
    if total > MOST_BYTES:
        raise refused(path, f"its entries come to {total} bytes, and at most {MOST_BYTES} are read")


def _check_places(path: Path, file: BinaryIO, entries: list[zipfile.ZipInfo]) -> None:
    """Check that the entries lie one after the other from the start, so that their sizes are not made up."""
    end = 0
    for entry in sorted(entries, key=attrgetter("header_offset")):
        file.seek(entry.header_offset + 26)
        lengths = file.read(4)  # of the name and of what else stands before the contents
        if entry.header_offset != end or len(lengths) < 4:
            raise refused(path, f"the entry {entry.filename!r} is not where it has to be")
        end += 30 + sum(struct.unpack("<HH", lengths)) + entry.compress_size


def _most_bytes(name: str) -> int:
    return MOST_BYTES_OF_DIRECTORY if name in (MANIFEST, CRATE) else reading.most_bytes(name)


def _fault(entry: zipfile.ZipInfo, times: int) -> str | None:
    """Return why an entry is refused, or None."""
    kind, most = stat.S_IFMT(entry.external_attr >> 16), _most_bytes(entry.filename)
    checks = {
        "leads out of the file": re.search(r"^[/\\]|^\w:[/\\]|(^|[/\\])\.\.([/\\]|$)", entry.orig_filename),
        "is a link": kind == stat.S_IFLNK,
        "is no file": kind not in (0, stat.S_IFREG),
        "is no record of a run": entry.orig_filename != entry.filename or not _is_record(entry.filename),
        "is there twice": times > 1,
        "is encrypted": entry.flag_bits & 1,
        "is compressed in a way that is not read": entry.compress_type not in _COMPRESSIONS,
        f"is larger than {most} bytes": entry.file_size > most,
        f"is compressed more than {MOST_COMPRESSION}:1": entry.file_size > MOST_COMPRESSION * entry.compress_size,
    }
    return next((why for why, found in checks.items() if found), None)


def _check_digests(path: Path, archive: zipfile.ZipFile) -> None:
    """Compare every entry with the manifest."""
    names = set(archive.namelist())
    if MANIFEST not in names:
        raise refused(path, f"it has no {MANIFEST}")
    content = archive.read(MANIFEST)
    if sum(map(content.count, (b",", b"[", b"{"))) > MOST_MARKS_OF_ENTRY * (len(names) + 10):
        raise refused(path, f"its {MANIFEST} has more values than entries")
    manifest = json.loads(content)
    listed = manifest.get("entries") if isinstance(manifest, dict) else None
    if not isinstance(listed, dict) or type(manifest.get("format")) is not int or manifest["format"] < 1:
        raise refused(path, f"its {MANIFEST} is none")
    if manifest["format"] > FORMAT:
        raise UserError(
            f"{path} is of format {manifest['format']}, and this version of normlab reads up to format {FORMAT}.\n"
            "Use the version that packed it, or a newer one: pip install --upgrade normlab."
        )
    unequal = sorted(names.symmetric_difference({*listed, MANIFEST}))
    if unequal:
        where = MANIFEST if unequal[0] in names else "file"
        raise refused(path, f"{unequal[0]!r} is missing in the {where}")
    if not _counts(names).items() <= manifest.items():
        raise refused(path, f"it does not have the numbers of runs and entries that its {MANIFEST} gives")
    for name, digest in listed.items():
        found = hashlib.sha256()
        with archive.open(name) as entry:
            while chunk := entry.read(1 << 20):
                found.update(chunk)
        if digest != found.hexdigest():
            raise refused(path, f"the digest of {name} is not that of the {MANIFEST}")


def _counts(names: set[str]) -> dict[str, int]:
    entries = names - {MANIFEST}
    folders = {name.split("/")[0] for name in entries if "/" in name}
    return {"runs": len(folders - {TABLES}), "number_of_entries": len(entries)}


def _is_record(name: str) -> bool:
    """Return whether a packed study may have an entry of that name, which can be printed as it is."""
    return bool(_NAME.fullmatch(name)) and name.isprintable()


def refuse_new_runs(study_folder: Path) -> None:
    """Refuse to write runs of a study that is in one file: the folder would hide the file from reports.

    Raises:
        UserError: if there is such a file and no such folder.
    """
    own = study_folder.name.endswith(SUFFIX)
    path = study_folder if own else study_folder.with_name(f"{study_folder.name}{SUFFIX}")
    folder = path.with_name(path.name.removesuffix(SUFFIX))
    if own or (path.is_file() and not folder.exists()):
        unpack = shlex.join(["unzip", str(path), "-d", str(folder)])
        raise UserError(
            f"{path} is a study in one file, which takes no further runs.\n"
            f"Unpack it first: {unpack}\nOr give the new runs a study of their own: study=..."
        )


def _children(names: list[str]) -> dict[str, list[str]]:
    """Return the names in each folder, by its path."""
    children: dict[str, dict[str, None]] = {"": {}}
    for name in names:
        folder = ""
        for part in name.split("/"):
            children.setdefault(folder, {})[part] = None
            folder = f"{folder}/{part}".lstrip("/")
    return {folder: sorted(found) for folder, found in children.items()}


def write(path: Path, study: str, entries: Mapping[str, bytes]) -> None:
    """Write a packed study, checked as `opened` checks it before it replaces what was there.

    The same entries give the same bytes with the same zlib: they are sorted and have no time.

    Args:
        path: the file.
        study: the study's name.
        entries: contents by name, without the manifest.

    Raises:
        UserError: if it cannot be written, or is beyond the bounds of what is read.
    """
    for name in entries:
        if not _is_record(name):
            raise UserError(f"{name!r} cannot be packed: a run's folder has such a name.\nRename it, or move it away.")
    digests = {name: hashlib.sha256(entries[name]).hexdigest() for name in sorted(entries)}
    head = {"format": FORMAT, "study": study, "normlab": __version__, **_counts(set(entries))}
    manifest = files.to_json({**head, "entries": digests}, indent=1) + "\n"

    def fill(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w", compresslevel=9) as archive:
            for name, content in [(MANIFEST, manifest.encode()), *sorted(entries.items())]:
                _add(archive, name, content)
        _checked(path, file)

    files.write_atomically(path, fill)


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    compression = len(content) / len(zlib.compress(content))
    small = compression < MOST_COMPRESSION / 2  # else it would not be read
    archive.writestr(entry, content, zipfile.ZIP_DEFLATED if small else zipfile.ZIP_STORED)
