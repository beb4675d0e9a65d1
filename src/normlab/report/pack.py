"""Pack a study into one file for others to read, with a description that archives of research data understand."""

import itertools
import json
import shlex
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from pydantic import BaseModel, Field, ValidationError
from yaml import YAMLError

from normlab import __version__
from normlab.common.errors import UserError, first_line, listed
from normlab.common.installation import CONF, command_name
from normlab.common.terminal import say
from normlab.report.options import Options
from normlab.report.render.description import question, run_counts
from normlab.report.study.find import find_study
from normlab.report.study.load import Study, load
from normlab.report.study.status import read_packed
from normlab.report.tables import csv_tables, table_options
from normlab.runs import archive, files, find, probe_files, reading
from normlab.runs.provenance import segments
from normlab.runs.record import STATUS

_VERSION = "https://w3id.org/ro/crate/1.1"
_CITATION = "CITATION.cff"

Text = Annotated[str, Field(min_length=1)]
Url = Annotated[str, Field(pattern=r"^https?://\S+$")]
SpdxName = Annotated[str, Field(pattern=r"^[A-Za-z0-9.+-]+$")]


def pack(study: str, output_dir: Path, options: Options, *, replace: bool, quiet: bool = False) -> Path:
    """Write the records of a study and its tables to NAME.normlab.zip beside its folder and return that path.

    Args:
        study: its name, or the path of its folder.
        output_dir: the folder that holds studies.
        options: those of the tables.
        replace: replace a file that has runs which the folder lacks.
        quiet: print the file's path alone.

    Raises:
        UserError: if there is no such study, it lacks what the options name, or the file cannot be written or would
            lose runs.
    """
    name, folder = find_study(study, output_dir)
    if folder.is_file():
        unpack = shlex.join(["unzip", str(folder), "-d", str(output_dir / name)])
        raise UserError(f"{folder} is packed already.\nTo change it, unpack it: {unpack}")
    records = load(folder, name=name)
    if records.placed.empty:
        raise UserError(f"No run of {folder} can be read, so there is nothing to pack: {records.noted()[0].note}")
    path = folder.with_name(f"{folder.name}{archive.SUFFIX}")
    entries = _records(folder)
    if not replace and path.exists():
        _check_replaced(path, {name.split("/")[0] for name in entries})
    source, citation = _citation(folder)
    entries |= _tables(name, entries, options)
    entries[archive.CRATE] = _as_json(crate(records, _last_record(entries), citation))
    archive.write(path, name, entries)
    if quiet:
        say(path)
        return path
    say(f"Packed {run_counts(records)} {path.stat().st_size / 1e3:.0f} kB: {path}")
    if source:
        say(f"Title, authors and license are those of {source}.")
    else:
        say(f"Authors and license are not in it, for which archives ask: there is no {_CITATION} in {folder}.")
    say(f"Anybody reads it as it is: {command_name('report')} {shlex.quote(f'study={path}')}")
    return path


def _records(folder: Path) -> dict[str, bytes]:
    """Return the records of a study's runs and its notes, by their names in the file.

    Raises:
        UserError: if one is no regular file or too large, or is a link, which could lead to any file of this machine.
    """
    found = [folder / archive.NOTES]
    for run in find(folder):
        probes = probe_files(run)
        found += [*(run / name for name in archive.RUN_FILES), *probes]
    entries: dict[str, bytes] = {}
    left = archive.MOST_BYTES
    for path in found:
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise UserError(f"{path} is a link, and only files are packed.\nReplace it by the file that it names.")
        try:
            entries[name] = reading.read(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from None
        left -= len(entries[name])
        if left < 0:
            raise UserError(f"{folder} has more than {archive.MOST_BYTES >> 20} MiB of records; a file holds no more.")
    return entries


def _as_json(value: Mapping[str, Any]) -> bytes:
    return (files.to_json(value, indent=1) + "\n").encode()


def _tables(name: str, entries: Mapping[str, bytes], options: Options) -> dict[str, bytes]:
    """Return the tables of these records, made as whoever reads the file makes them, by their names in the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"records{archive.SUFFIX}")
        archive.write(path, name, entries)
        tables = csv_tables(load(path), options)
    texts = {f"{archive.TABLES}/{table}.csv": text.encode() for table, text in tables.items()}
    return texts | {f"{archive.TABLES}/{archive.OPTIONS}": _as_json(table_options(options))}


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


class Author(BaseModel):
    """An author of a CITATION.cff: a person has family and given names, a group has a name."""

    name: Text | None = None
    given_names: Text | None = Field(None, alias="given-names")
    name_particle: Text | None = Field(None, alias="name-particle")
    family_names: Text | None = Field(None, alias="family-names")
    name_suffix: Text | None = Field(None, alias="name-suffix")
    alias: Text | None = None
    orcid: Annotated[str, Field(pattern=r"^https?://orcid\.org/[0-9X-]{19}$")] | None = None
    website: Url | None = None

    def entity(self, number: int) -> dict[str, Any]:
        """Return the author as RO-Crate has it; `number` is its place among the authors."""
        person = (self.given_names, self.name_particle, self.family_names, self.name_suffix)
        return {
            "@id": self.orcid or f"#author-{number}",
            "@type": "Organization" if self.name else "Person",
            "name": self.name or " ".join(filter(None, person)) or self.alias or "anonymous",
            "url": self.website,
        }


class Citation(BaseModel):
    """What is read of a CITATION.cff."""

    title: Text | None = None
    authors: list[Author] = []
    license: SpdxName | list[SpdxName] = []
    license_url: Url | None = Field(None, alias="license-url")

    def licenses(self) -> list[dict[str, Any]]:
        """Return the licenses as RO-Crate has them."""
        names = [self.license] if isinstance(self.license, str) else self.license
        found = {name: f"https://spdx.org/licenses/{name}" for name in names}
        if not found and self.license_url:
            found = {self.license_url: self.license_url}
        return [{"@id": url, "@type": "CreativeWork", "name": name} for name, url in found.items()]


def _citation(folder: Path) -> tuple[Path | None, Citation]:
    """Return the CITATION.cff of the study's folder, else of the current one, unless that is normlab's own.

    Raises:
        UserError: if it cannot be read.
    """
    own = CONF.parent / _CITATION
    here = Path(_CITATION)
    places = [folder / _CITATION, *([here] if not (own.exists() and here.exists() and here.samefile(own)) else [])]
    path = next((path for path in places if reading.is_there(path)), None)
    if path is None:
        return None, Citation()
    try:
        return path, Citation.model_validate(reading.parse_yaml(reading.read(path).decode(), dates=True) or {})
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
    except OSError as error:
        why = error.strerror or type(error).__name__
    except (ValueError, RecursionError, YAMLError) as error:
        why = first_line(error) or type(error).__name__
    raise UserError(
        f"{path} cannot be read: {why}.\nMend it; its form is that of https://citation-file-format.github.io."
    )


def _last_record(entries: Mapping[str, bytes]) -> str:
    """Return the day of the last record, by which a packed study is dated: the same records give the same file."""
    days = []
    for name in (name for name in entries if name.endswith(f"/{STATUS}")):
        with suppress(ValueError, AttributeError, RecursionError):  # a damaged file is packed all the same
            status = json.loads(entries[name])
            days.append(str(status.get("ended") or status.get("heartbeat") or "")[:10])
    return max(filter(None, days), default=f"{datetime.now(UTC):%Y-%m-%d}")


def crate(study: Study, date: str, citation: Citation) -> dict[str, Any]:
    """Return the description of a study as RO-Crate 1.1 (JSON-LD).

    Args:
        study: the study.
        date: the day of its last record, ISO 8601.
        citation: its title, authors and license.
    """
    entities = [author.entity(number) for number, author in enumerate(citation.authors, start=1)]
    authors = list({entity["@id"]: entity for entity in entities}.values())
    license = citation.licenses()
    software, made = _software(study), _commands(study)
    packed = _action("#pack", f"{command_name('report')} pack study={study.name}", [software[0]])
    notes = {"@id": archive.NOTES, "@type": "File", "name": "Remarks", "encodingFormat": "text/markdown"}
    tables = {"@id": f"{archive.TABLES}/", "@type": "Dataset", "name": "Tables of the report as CSV"}
    parts = [
        {"@id": archive.MANIFEST, "@type": "File", "name": "SHA-256 digests", "encodingFormat": "application/json"},
        *([notes] if study.notes else []),
        tables,
        *({"@id": f"{quote(run)}/", "@type": "Dataset", "name": run} for run in sorted(study.configs)),
    ]
    root = {
        "@id": "./",
        "@type": "Dataset",
        "name": citation.title or f"{study.name}: a normlab study of normalization layers",
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


def _software(study: Study) -> list[dict[str, Any]]:
    """Return this version of normlab, and each version of each package that made the runs."""
    found: dict[tuple[Any, Any], None] = {("normlab", __version__): None}
    for made in itertools.chain.from_iterable(map(segments, study.provenance.values())):
        versions = made.get("versions")
        known = versions.items() if isinstance(versions, dict) else ()
        found |= dict.fromkeys(sorted((name, version) for name, version in known if isinstance(version, str)))
    return [
        {
            "@id": f"#{quote(f'{name}-{version}')}",
            "@type": "SoftwareApplication",
            "name": name,
            "softwareVersion": version,
        }
        for name, version in found
    ]


def _commands(study: Study) -> list[dict[str, Any]]:
    """Return each command that made runs, with the versions that it ran with."""
    found: dict[str, dict[str, None]] = {}
    for made in study.provenance.values():
        command, versions = made.get("command"), made.get("versions")
        if isinstance(command, list) and isinstance(versions, dict):
            software = found.setdefault(shlex.join(map(str, command)), {})
            software |= dict.fromkeys(f"#{quote(f'{name}-{version}')}" for name, version in sorted(versions.items()))
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
