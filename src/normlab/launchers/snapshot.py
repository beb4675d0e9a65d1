"""Copy the code that queued runs will use, so that it may be edited before they start.

A snapshot, outputs/<study>/slurm/code/<digest>/, holds normlab where it runs from a checkout, and the user's own
modules (`common.source`); `common.frozen` says how it is laid out and starts jobs from it. The same code is stored
once. Data is not copied: of the files that a network reads beside its code, small ones are, and to the others there is
a link.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from normlab.common import frozen, git, source
from normlab.common.errors import UserError, listed, storage_error
from normlab.config.schema import CustomModelConfig, RunConfig
from normlab.launchers import pool
from normlab.launchers.sweep import Job
from normlab.runs import files

MOST_FILES, MOST_BYTES = 2_000, 32 << 20  # of a package that is copied whole
MOST_ENTRIES = 20_000  # of files and folders in it, whatever they are
MOST_BYTES_OF_RESOURCE = 256 << 10  # of a file that is no code
_CODE = (".py", *EXTENSION_SUFFIXES)
_RESOURCES = (".yaml", ".yml", ".json", ".toml", ".ini", ".cfg", ".txt")
_OF_CHECKOUT = ("normlab", "hydra_plugins")


@dataclass(frozen=True)
class Used:
    """What building networks took in a process.

    Attributes:
        modules: the user's own, imported in whatever way, by dotted name.
        files: others that were opened.
        relative: those that were opened by a path that begins in the present folder, which jobs begin in, too.
        said: sentences about how the networks will start.
    """

    modules: Mapping[str, source.OwnModule] = field(default_factory=dict)
    files: Sequence[Path] = ()
    relative: Sequence[str] = ()
    said: Sequence[str] = ()


def check_networks(jobs: Sequence[Job]) -> Used:
    """Check that the networks of runs take their batches, and return what that took; in a worker.

    Raises:
        UserError: for the first that does not.
    """
    opened = set[str]()

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str) or arguments[0].endswith((*_CODE, ".pyc")):
            return
        if str(arguments[1] or "r").startswith("r"):  # the mode
            opened.add(arguments[0])

    sys.addaudithook(note)
    said = pool.check_networks(jobs, here=False)
    read = {name: path for name in sorted(opened) if (path := Path(name).resolve()).is_file()}
    own = {name: path for name, path in read.items() if not source.is_installed(path)}
    relative = [name for name in own if not Path(name).is_absolute()]
    return Used(source.loaded_modules(), sorted(set(own.values())), relative, said)


def take(configs: Sequence[RunConfig], used: Used, warn: Callable[[str], object]) -> Path | None:
    """Write a snapshot of the code of runs, unless there is one; return its folder, None if all of it is installed.

    Args:
        configs: of the runs, all of one study.
        used: by their networks.
        warn: called with a sentence about what is not copied: packages that are too large, files by a relative path.

    Raises:
        UserError: if it cannot be written, or a part of the code cannot be read.
    """
    study = configs[0].study_folder.resolve()
    folder = study / "slurm" / "code"
    try:
        if used.relative:
            warn(
                f"The code reads {listed(used.relative, 3)} by a path from the present folder, and so will jobs,"
                " as it is then.\nTo have it copied, read it beside its module: Path(__file__).with_name(...)."
            )
        wanted = _checkout(warn) | _own(configs, used, warn)
        if not wanted:
            return None
        make_folder(study, "slurm", "code")
        return _store(folder, wanted)
    except OSError as error:
        raise storage_error(folder, error) from error


def make_folder(study: Path, *parts: str) -> Path:
    """Make a folder of a study and return it.

    Raises:
        UserError: if it cannot be made, or would be elsewhere: a link is none of the study's folders.
    """
    folder = study
    for part in parts:
        folder /= part
        if folder.is_symlink():
            raise UserError(f"{folder} is a link, and nothing is written through it.\nMove it away, or remove it.")
        files.make_folder(folder)
    return folder


def _store(folder: Path, wanted: Mapping[str, Path]) -> Path:
    """Write the snapshot of `wanted`, files by their place among modules; return its folder."""
    placed = {f"{frozen.MODULES}/{name}": path for name, path in sorted(wanted.items())}
    links = {name: str(path) for name, path in placed.items() if _is_linked(path)}
    contents = {name: _read(path) for name, path in placed.items() if name not in links}
    contents[frozen.START] = Path(frozen.__file__).read_bytes()
    manifest = {
        "git": git.state(),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items())},
        "links": links,
    }
    content = json.dumps(manifest, indent=1).encode()
    stored = folder / frozen.digest_of(content)
    if stored.is_dir() and not frozen.fault(stored):
        return stored
    draft = folder / f".{secrets.token_hex(4)}{files.TEMPORARY}"
    try:
        for name, each in {**contents, frozen.MANIFEST: content}.items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).write_bytes(each)
            (draft / name).chmod((draft / name).stat().st_mode & 0o555)  # told by editors
        for name, target in links.items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).symlink_to(target)
        with contextlib.suppress(OSError):  # there is none, or another submitter was faster
            if frozen.fault(stored):
                stored.rename(draft.with_suffix(".damaged"))
        try:
            draft.rename(stored)
        except OSError:
            if frozen.fault(stored):  # else another submitter was faster
                raise
    finally:
        for left in (draft, draft.with_suffix(".damaged")):
            shutil.rmtree(left, ignore_errors=True)
    return stored


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} is a part of the runs' code and cannot be copied for their jobs: {error.strerror}.\n"
            "Make it readable, or let jobs import what is there when they start: hydra.launcher.freeze_code=false."
        ) from None


def _is_linked(path: Path) -> bool:
    return not path.name.endswith(_CODE) and path.stat().st_size > MOST_BYTES_OF_RESOURCE


def _checkout(warn: Callable[[str], object]) -> dict[str, Path]:
    """Return the files of normlab by their place among modules; none where it is installed."""
    if source.is_installed(source.NORMLAB):
        return {}
    root = source.NORMLAB.parent
    found = {}
    for name in _OF_CHECKOUT:
        inside = _tree(root / name)
        if inside is None:
            warn(_too_large(f"package {name}", root))
        found.update({path.relative_to(root).as_posix(): path for path in inside or ()})
    return found


def _own(configs: Sequence[RunConfig], used: Used, warn: Callable[[str], object]) -> dict[str, Path]:
    """Return the user's own files by their place among modules."""
    data = {Path(folder).expanduser().resolve() for config in configs for folder in _folders(config)}
    targets = {config.norm.target for config in configs}
    targets |= {config.model.target for config in configs if isinstance(config.model, CustomModelConfig)}
    modules = {
        name: module
        for target in sorted(targets)
        for name, module in source.own_modules(target).items()
        if name.partition(".")[0] not in sys.stdlib_module_names  # what is loaded already goes first
    }
    modules |= used.modules
    found = _packages(modules, data, warn)
    places = {name: Path(_place(name, module)).parent for name, module in modules.items()}
    folders = {modules[name].file.parent: place for name, place in places.items()}
    folders |= {modules[name].folder: place for name, place in places.items()}
    for path in used.files:
        above = next((folder for folder in path.parents if folder in folders), None)
        if above and path not in found.values() and not (_is_hidden(path, above) or data & {path, *path.parents}):
            found[(folders[above] / path.relative_to(above)).as_posix()] = path
    return found


def _packages(
    modules: dict[str, source.OwnModule], data: Collection[Path], warn: Callable[[str], object]
) -> dict[str, Path]:
    """Return the files of modules and of their packages by their place; take out of `modules` what is too large."""
    found: dict[str, Path] = {}
    packages = {name: module.folder for name, module in sorted(modules.items()) if module.package}
    single = set(modules)
    for name, root in packages.items():
        if name not in single:  # inside of another one
            continue
        inside = _tree(root, data)
        of_package = {each for each in modules if f"{each}.".startswith(f"{name}.")}
        single -= of_package
        if inside is None:
            warn(_too_large(f"package {name}", root.parent))
            for each in of_package:
                del modules[each]
        found |= {f"{name.replace('.', '/')}/{path.relative_to(root).as_posix()}": path for path in inside or ()}
    size = sum(modules[name].file.stat().st_size for name in single if modules[name].file.exists())
    if len(single) > MOST_FILES or size > MOST_BYTES:
        warn(_too_large("code", modules[min(single)].file.parent))
        for each in single:
            del modules[each]
    return found | {_place(name, module): module.file for name, module in modules.items()}


def _folders(config: RunConfig) -> list[str]:
    """Return the folders of a run's data and record, which may be inside of a package's."""
    return [config.output_dir, config.data_dir, *filter(None, [getattr(config.dataset, "path", None)])]


def _too_large(what: str, folder: Path) -> str:
    return (
        f"The {what} in {folder} is too large to be copied (over {MOST_FILES} files or"
        f" {MOST_BYTES >> 20} MB): jobs import it from there, as it is when they start."
    )


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _place(name: str, module: source.OwnModule) -> str:
    """Return the place of a module among modules, e.g. nets/blocks.py."""
    suffix = next(suffix for suffix in sorted(_CODE, key=len, reverse=True) if module.file.name.endswith(suffix))
    return f"{name.replace('.', '/')}{'/__init__' if module.package else ''}{suffix}"


def _tree(root: Path, data: Collection[Path] = ()) -> list[Path] | None:
    """Return code and small texts below a package's folder; None if they, or all that is there, are too much.

    What is behind links, hidden, or in the folder of an environment or of `data` is left out.
    """
    found: list[Path] = []
    seen = size = 0
    for place, folders, names in os.walk(root):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith((".", "__pycache__"))
            and name not in ("site-packages", "node_modules")
            and not (Path(place) / name / "pyvenv.cfg").exists()
            and Path(place) / name not in data
        )
        for path in (Path(place) / name for name in sorted(names) if name.endswith((*_CODE, *_RESOURCES))):
            if path.is_symlink() or not path.is_file():
                continue
            of_file = path.stat().st_size
            if path.name.endswith(_CODE) or of_file <= MOST_BYTES_OF_RESOURCE:
                found.append(path)
                size += of_file
        seen += len(names) + len(folders)
        if len(found) > MOST_FILES or size > MOST_BYTES or seen > MOST_ENTRIES:
            return None
    return found
