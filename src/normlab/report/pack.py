"""Pack a study into one file for others to read, with a description that archives of research data understand."""

import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from normlab import __version__
from normlab.common.errors import UserError, listed
from normlab.common.installation import command_name
from normlab.report.render.description import question, run_counts
from normlab.report.study.find import find_study
from normlab.report.study.load import Study, load
from normlab.report.study.status import read_packed
from normlab.runs import archive, files, find, probe_files, read_status

_VERSION = "https://w3id.org/ro/crate/1.1"
_CITATION = "CITATION.cff"


def pack(study: str, output_dir: Path, *, replace: bool, quiet: bool = False) -> Path:
    """Write the records of a study to NAME.normlab.zip beside its folder and return that path.

    Args:
        study: its name, or the path of its folder.
        output_dir: the folder that holds studies.
        replace: replace a file that has runs which the folder lacks.
        quiet: print the file's path alone.

    Raises:
        UserError: if there is no such study, or the file cannot be written or would lose runs.
    """
    name, folder = find_study(study, output_dir)
    if folder.is_file():
        raise UserError(f"{folder} is packed already.\nTo change it, unpack it: unzip {folder} -d {output_dir / name}")
    records = load(folder, name=name)
    path = folder.with_name(f"{folder.name}{archive.SUFFIX}")
    entries = _records(folder)
    if not replace and path.exists():
        _check_replaced(path, {run.name for run in find(folder)})
    citation = _citation(folder)
    entries[archive.CRATE] = (files.to_json(crate(records, _last_record(folder), citation), indent=1) + "\n").encode()
    archive.write(path, name, entries)
    if quiet:
        print(path)
        return path
    print(f"Packed {run_counts(records)} {path.stat().st_size / 1e3:.0f} kB: {path}")
    if not citation:
        print(
            f"Authors and license are not in it: there is no {_CITATION} in {folder} nor here. Archives ask for both."
        )
    print(f"Anybody reads it as it is: {command_name('report')} study={path.name}")
    return path


def _records(folder: Path) -> dict[str, bytes]:
    """Return the records of a study's runs and its notes, by their names in the file."""
    found = [folder / archive.NOTES]
    for run in find(folder):
        found += [*(run / name for name in archive.RUN_FILES), *probe_files(run)]
    entries = {}
    for path in found:
        try:
            entries[path.relative_to(folder).as_posix()] = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    return entries


def _check_replaced(path: Path, runs: set[str]) -> None:
    """Refuse to replace a file that holds runs which are not packed now."""
    try:
        lost = sorted({run.name for run in read_packed(path)} - runs)
    except UserError as error:
        raise UserError(f"{error}\nTo replace it: replace=true") from None
    if lost:
        raise UserError(
            f"{path} is there and has {len(lost)} runs that the folder lacks: {listed(lost, 2)}.\n"
            "Move it away, or replace it: replace=true"
        )


def _citation(folder: Path) -> Mapping[str, Any]:
    """Return the CITATION.cff of the study's folder, else of the current one; empty if there is none.

    Raises:
        UserError: if it is damaged.
    """
    path = next((path for path in (folder / _CITATION, Path(_CITATION)) if path.is_file()), None)
    return files.read_yaml(path, files.parse_yaml) if path else {}


def _last_record(folder: Path) -> str:
    """Return the day of the last record, by which a packed study is dated: the same records give the same file."""
    days = []
    for run in find(folder):
        with suppress(UserError):  # its other files are packed all the same
            status = read_status(run) or {}
            days.append(str(status.get("ended") or status.get("heartbeat") or "")[:10])
    return max(filter(None, days), default=f"{datetime.now(UTC):%Y-%m-%d}")


def crate(study: Study, date: str, citation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a study as RO-Crate 1.1 (JSON-LD).

    Args:
        study: the study.
        date: the day of its last record, ISO 8601.
        citation: authors and license as CITATION.cff has them.
    """
    authors = [_author(author, number) for number, author in enumerate(_as_list(citation.get("authors")), start=1)]
    license = [_license(str(name)) for name in _as_list(citation.get("license"))]
    software, made = _software(study), _commands(study)
    packed = _action("#pack", f"{command_name('report')} pack study={study.name}", [software[0]])
    notes = {"@id": archive.NOTES, "@type": "File", "name": "Remarks", "encodingFormat": "text/markdown"}
    parts = [
        {"@id": archive.MANIFEST, "@type": "File", "name": "SHA-256 digests", "encodingFormat": "application/json"},
        *([notes] if study.notes else []),
        *({"@id": f"{quote(run)}/", "@type": "Dataset", "name": run} for run in sorted(study.configs)),
    ]
    root = {
        "@id": "./",
        "@type": "Dataset",
        "name": f"{study.name}: a normlab study of normalization layers",
        "description": f"{question(study)} {run_counts(study)} To read it: normlab-report study=FILE",
        "datePublished": date,
        "author": _references(authors),
        "license": _references(license),
        "hasPart": _references(parts),
        "mentions": _references([packed, *made]),
    }
    head = {"@id": archive.CRATE, "@type": "CreativeWork", "conformsTo": {"@id": _VERSION}, "about": {"@id": "./"}}
    graph: list[dict[str, Any]] = [head, root, *parts, *authors, *license, *software, packed, *made]
    known = [{key: value for key, value in entity.items() if value not in ([], None)} for entity in graph]
    return {"@context": f"{_VERSION}/context", "@graph": known}


def _references(entities: Iterable[Mapping[str, Any]]) -> Any:
    """Return a reference to each entity; to a single one without a list, as RO-Crate recommends."""
    found = [{"@id": entity["@id"]} for entity in entities]
    return found[0] if len(found) == 1 else found


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _author(author: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return an author of a CITATION.cff: a person has family and given names, a group has a name."""
    parts = (author.get(key) for key in ("given-names", "name-particle", "family-names", "name-suffix"))
    return {
        "@id": author.get("orcid") or f"#author-{number}",
        "@type": "Organization" if "name" in author else "Person",
        "name": author.get("name") or " ".join(str(part) for part in parts if part),
        "url": author.get("website"),
    }


def _license(name: str) -> dict[str, Any]:
    return {"@id": f"https://spdx.org/licenses/{name}", "@type": "CreativeWork", "name": name}


def _software(study: Study) -> list[dict[str, Any]]:
    """Return this version of normlab, and each version of each package that made the runs."""
    found: dict[tuple[Any, Any], None] = {("normlab", __version__): None}
    for made in study.provenance.values():
        versions = made.get("versions")
        found |= dict.fromkeys(sorted(versions.items()) if isinstance(versions, dict) else ())
    return [
        {"@id": quote(f"#{name}-{version}"), "@type": "SoftwareApplication", "name": name, "softwareVersion": version}
        for name, version in found
    ]


def _commands(study: Study) -> list[dict[str, Any]]:
    """Return each command that made runs, with the versions that it ran with."""
    found: dict[str, dict[str, None]] = {}
    for made in study.provenance.values():
        command, versions = made.get("command"), made.get("versions")
        if isinstance(command, list) and isinstance(versions, dict):
            software = found.setdefault(shlex.join(map(str, command)), {})
            software |= dict.fromkeys(quote(f"#{name}-{version}") for name, version in sorted(versions.items()))
    return [
        _action(f"#train-{number}", command, [{"@id": each} for each in software])
        for number, (command, software) in enumerate(found.items(), start=1)
    ]


def _action(identifier: str, command: str, software: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "@id": identifier,
        "@type": "CreateAction",
        "name": command,
        "instrument": _references(software),
        "result": {"@id": "./"},
    }
