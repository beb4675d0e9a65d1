"""A study in one file: it is what was packed, and anything else is refused in a sentence before any of it is used."""

import hashlib
import json
import stat
import zipfile
from pathlib import Path

import pytest

from normlab.common.errors import UserError
from normlab.runs import archive, reading

RUN = "bn-b8-s0-0123456789"
ENTRIES = {
    f"{RUN}/config.yaml": b"seed: 0\n",
    f"{RUN}/metrics.jsonl": b'{"epoch": 1, "step": 10}\n' * 20,
    f"{RUN}/probes/ics.jsonl": b"",
    "notes.md": b"We looked.\n",
}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "study.normlab.zip"
    archive.write(path, "study", ENTRIES)
    return path


def write_by_hand(path: Path, held: list[tuple[str | zipfile.ZipInfo, bytes]], **manifest) -> None:
    """Write a file as somebody else might, with a manifest that is right for what it holds unless it is given."""
    names = [entry if isinstance(entry, str) else entry.filename for entry, _ in held]
    head = {
        "format": 1,
        "runs": len({name.split("/")[0] for name in names if "/" in name}),
        "number_of_entries": len(set(names)),
        "entries": {name: hashlib.sha256(content).hexdigest() for name, (_, content) in zip(names, held, strict=True)},
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for entry, content in held:
            file.writestr(entry, content)
        file.writestr("manifest.json", json.dumps(head | manifest))


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error, archive.opened(path):
        pass
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) <= 5
    return str(error.value)


def entry(name: str, mode: int = 0, **attributes) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info


def test_a_packed_study_is_read_as_a_folder_and_the_same_records_give_the_same_bytes(packed, tmp_path) -> None:
    with archive.opened(packed) as study:
        assert [path.name for path in study.iterdir()] == [RUN, "manifest.json", "notes.md"]
        run = study / RUN
        assert [path.name for path in run.iterdir()] == ["config.yaml", "metrics.jsonl", "probes"]
        for name, content in ENTRIES.items():
            assert (study / name).read_bytes() == content
            assert (study / name).exists()
        assert (run / "probes").exists()
        assert (run / "probes" / "ics.jsonl").stem == "ics"
        assert str(run / "config.yaml") == f"{packed}/{RUN}/config.yaml"
        assert not (run / "status.json").exists()
        assert list((study / "nowhere").iterdir()) == []
        for missing in (run / "status.json", run):
            with pytest.raises(FileNotFoundError):
                missing.read_bytes()
    again = tmp_path / "again.normlab.zip"
    archive.write(again, "study", dict(reversed(ENTRIES.items())))
    assert again.read_bytes() == packed.read_bytes()


def test_what_somebody_else_zips_alike_is_read(tmp_path) -> None:
    write_by_hand(tmp_path / "x.zip", list(ENTRIES.items()))
    with archive.opened(tmp_path / "x.zip") as study:
        assert (study / "notes.md").read_bytes() == ENTRIES["notes.md"]


HOSTILE = {
    "a path above": ([("../outside.jsonl", b"")], "'../outside.jsonl' leads out of the file"),
    "a path above within": ([(f"{RUN}/../../config.yaml", b"")], "leads out of the file"),
    "a path above, as on Windows": ([("..\\config.yaml", b"")], "leads out of the file"),
    "an absolute path": ([("/etc/config.yaml", b"")], "leads out of the file"),
    "a drive": ([("C:/config.yaml", b"")], "leads out of the file"),
    "a link": ([(entry(f"{RUN}/status.json", stat.S_IFLNK | 0o777), b"/etc/passwd")], "is a link"),
    "a device": ([(entry(f"{RUN}/status.json", stat.S_IFCHR | 0o666), b"")], "is no file"),
    "a folder": ([(entry(f"{RUN}/", stat.S_IFDIR | 0o755), b"")], "is no file"),
    "code": ([(f"{RUN}/run.py", b"")], "is no record of a run"),
    "a checkpoint": ([(f"{RUN}/checkpoint.pt", b"")], "is no record of a run"),
    "a hidden folder": ([(".git/config.yaml", b"")], "is no record of a run"),
    "a folder too deep": ([(f"{RUN}/probes/more/ics.jsonl", b"")], "is no record of a run"),
    "another control character": ([("bn\u202e/config.yaml", b"")], "is no record of a run"),
    "a large configuration": ([(f"{RUN}/status.json", bytes(range(256)) * 5000)], "is larger than 1048576 bytes"),
    "a control character": ([(f"{RUN}\n/config.yaml", b"")], "is no record of a run"),
    "1,000:1": ([(f"{RUN}/probes/more.jsonl", b" " * 10_000_000)], "is compressed more than 100:1"),
    "bzip2": ([(entry(f"{RUN}/status.json", compress_type=zipfile.ZIP_BZIP2), b"{}")], "in a way that is not read"),
}


@pytest.mark.parametrize(("entries", "why"), HOSTILE.values(), ids=HOSTILE)
def test_what_no_packed_study_holds_is_refused(tmp_path, entries, why) -> None:
    write_by_hand(tmp_path / "x.zip", [*ENTRIES.items(), *entries])
    assert why in refusal(tmp_path / "x.zip")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(tmp_path) -> None:
    write_by_hand(tmp_path / "x.zip", [*ENTRIES.items(), ("notes.md", b"Others.\n")])
    assert "'notes.md' is there twice" in refusal(tmp_path / "x.zip")


DIGESTS = {name: hashlib.sha256(content).hexdigest() for name, content in ENTRIES.items()}
MANIFESTS = {
    "a wrong digest": ({"entries": DIGESTS | {"notes.md": "0" * 64}}, "the digest of notes.md"),
    "no digest": ({"entries": DIGESTS | {"notes.md": None}}, "the digest of notes.md"),
    "an entry that is missing": (
        {"entries": {**DIGESTS, "other/config.yaml": ""}},
        "'other/config.yaml' is missing in the file",
    ),
    "an entry that it does not list": ({"entries": {}}, "is missing in the manifest.json"),
    "other counts": ({"runs": 2}, "the numbers of runs and entries"),
    "no format": ({"format": None}, "its manifest.json is none"),
    "a format before the first": ({"format": 0}, "its manifest.json is none"),
    "no entries": ({"entries": None}, "its manifest.json is none"),
    "a later format": ({"format": 4}, "pip install --upgrade normlab"),
}


@pytest.mark.parametrize(("manifest", "why"), MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_is_not_that_of_the_file_is_refused(tmp_path, manifest, why) -> None:
    write_by_hand(tmp_path / "x.zip", list(ENTRIES.items()), **manifest)
    assert why in refusal(tmp_path / "x.zip")


def test_a_file_without_a_manifest_is_refused(tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("notes.md", b"")
    assert "it has no manifest.json" in refusal(tmp_path / "x.zip")


def flipped(content: bytes) -> bytes:
    at = content.index(b"notes.md") + 11
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def encrypted(content: bytes) -> bytes:
    at = content.index(b"PK\1\2") + 8
    return content[:at] + bytes([content[at] | 1]) + content[at + 1 :]


def with_a_huge_directory(content: bytes) -> bytes:
    return content[:-10] + (1 << 30).to_bytes(4, "little") + content[-6:]


def with_a_compressed_size_that_is_made_up(content: bytes) -> bytes:
    at = content.index(b"PK\1\2") + 20  # of the manifest, whose contents the next entry follows
    return (
        content[:at] + (int.from_bytes(content[at : at + 4], "little") + 1000).to_bytes(4, "little") + content[at + 4 :]
    )


def with_something_before(content: bytes) -> bytes:
    return b"#!/bin/sh\n" + content


def with_a_second_end(content: bytes) -> bytes:
    return content[:-22] + b"PK\6\7" + b"\0" * 16 + content[-22:]


DAMAGED = {
    "empty": (lambda content: b"", "it is no zip file"),
    "something else": (lambda content: b"hello " * 100, "it is no zip file"),
    "truncated": (lambda content: content[:-1], "it is no zip file"),
    "longer": (lambda content: content + b"\0", "it is no zip file"),
    "a bit": (flipped, "cannot be read"),
    "encrypted": (encrypted, "is encrypted"),
    "a huge list": (with_a_huge_directory, "at most 67108864 are read"),
    "a size": (with_a_compressed_size_that_is_made_up, "is not where it has to be"),
    "something before": (with_something_before, "is not where it has to be"),
    "two lists": (with_a_second_end, "not where it has to be"),
}


@pytest.mark.parametrize(("damage", "why"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused(packed, damage, why) -> None:
    packed.write_bytes(damage(packed.read_bytes()))
    assert why in refusal(packed)


@pytest.mark.parametrize(
    ("place", "bound", "why"),
    [
        (archive, "MOST_ENTRIES", "it has 5 entries, and at most 1 are read"),
        (archive, "MOST_BYTES", "bytes, and at most 1 are read"),
        (reading, "MOST_BYTES_OF_FILE", "is larger than 1 bytes"),
    ],
)
def test_more_than_is_read_is_refused_and_not_written(packed, monkeypatch, place, bound, why) -> None:
    monkeypatch.setattr(place, bound, 1)
    assert why in refusal(packed)
    before = packed.read_bytes()
    with pytest.raises(UserError, match="not read"):
        archive.write(packed, "study", {"notes.md": b"others"} | ENTRIES)
    assert packed.read_bytes() == before
    assert [path.name for path in packed.parent.iterdir()] == [packed.name]


def test_a_name_that_no_packed_study_has_is_not_written(tmp_path) -> None:
    with pytest.raises(UserError, match=r"'a\\\\b/config.yaml' cannot be packed: a run's folder has such a name"):
        archive.write(tmp_path / "x.zip", "x", {"a\\b/config.yaml": b""})


def test_equal_rows_are_stored_so_that_they_can_be_read(tmp_path) -> None:
    rows = b'{"step": 1}\n' * 100_000
    archive.write(tmp_path / "x.zip", "x", {f"{RUN}/metrics.jsonl": rows})
    with archive.opened(tmp_path / "x.zip") as study:
        assert (study / RUN / "metrics.jsonl").read_bytes() == rows


@pytest.mark.slow
def test_a_study_of_more_entries_than_an_old_zip_file_can_have_is_read(tmp_path) -> None:
    archive.write(tmp_path / "x.zip", "x", {f"{number}/config.yaml": b"" for number in range(66_000)})
    with archive.opened(tmp_path / "x.zip") as study:
        assert sum(1 for _ in study.iterdir()) == 66_001
