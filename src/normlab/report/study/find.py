"""Find studies: every folder that holds runs, every study in one file, and the one that a name means."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from normlab.common.errors import UserError, did_you_mean, listed
from normlab.common.installation import command_name, study_words
from normlab.runs.archive import SUFFIX
from normlab.runs.record import CONFIG


def find_studies(output_dir: Path) -> list[str]:
    """Return the studies below `output_dir`, by name; a name may have two parts.

    A folder that holds runs is one, and so is a file NAME.normlab.zip beside which there is no such folder. Of a folder
    that links lead to several times only one name is returned, and what cannot be read is no study.
    """
    names: dict[str, str] = {}  # by the place that they lead to
    for depth in (1, 2):
        for path in _below(output_dir, depth):
            name = os.path.relpath(path, output_dir)
            if path.name.endswith(SUFFIX) and names_a_study(path) and _is_file(path):
                names.setdefault(name.removesuffix(SUFFIX), name.removesuffix(SUFFIX))
            elif holds_runs(path):
                names.setdefault(os.path.realpath(path), name)
    return sorted(set(names.values()))


def _below(folder: Path, depth: int) -> Iterator[Path]:
    """Yield what is so many folders deep, links last; nothing of what cannot be read, or is hidden."""
    if depth == 0:
        yield folder
        return
    for entry in sorted(_entries(folder), key=lambda entry: (entry.is_symlink(), entry.name)):
        if depth == 1 or (not entry.name.startswith(".") and _is_folder(entry)):
            yield from _below(Path(entry.path), depth - 1)


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    # A ValueError: of a name with a NUL.
    with suppress(OSError, ValueError), os.scandir(folder) as entries:
        yield from entries


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # of a circle of links
        return False


def packed_name(path: Path) -> str:
    """Return the name of a study in one file by the file's path as seen from the folder of studies."""
    return path.as_posix().removesuffix(".zip").removesuffix(".normlab")


def names_a_study(path: Path) -> bool:
    """Return whether the name of a study in one file is one that a folder can have: not `...normlab.zip`."""
    return packed_name(Path(path.name)) not in ("", ".", "..")


def holds_runs(folder: Path) -> bool:
    """Return whether a folder is that of a study."""
    return any(
        not run.name.startswith(".") and _is_folder(run) and os.path.lexists(f"{run.path}/{CONFIG}")
        for run in _entries(folder)
    )


def _is_file(path: Path) -> bool:
    """Return whether there is a file; not, where the system refuses to tell."""
    return os.path.isfile(path)  # noqa: PTH113  # a Path raises what is no answer, of a name that is too long


def find_study(study: str | Path, output_dir: Path) -> tuple[str, Path]:
    """Return the name of a study, and the folder or the file that it is in.

    Args:
        study: its name below `output_dir`, or the path of its folder or file.
        output_dir: the folder that holds studies.

    Raises:
        UserError: if there is no such study, with the nearest that there is.
    """
    for folder in (output_dir, Path()) if isinstance(study, str) else (Path(),):
        place = folder / study
        for path in (place, Path(f"{place}{SUFFIX}")):
            if _is_file(path) or holds_runs(path):
                plain = folder is output_dir and not Path(study).is_absolute() and ".." not in Path(study).parts
                shown = path.relative_to(output_dir) if plain else Path(path.name)
                if _is_file(path) and not names_a_study(path):
                    raise UserError(f"{path} has no name before {SUFFIX}, and its report needs one.\nRename the file.")
                return packed_name(shown) if _is_file(path) else shown.as_posix(), path
    if isinstance(study, Path):
        raise UserError(f"The folder {study} holds no runs.\nGive a study's name, or the folder that its runs are in.")
    raise _no_study(study, output_dir)


def find_to_watch(study: str, output_dir: Path) -> tuple[str, Path]:
    """Return what `find_study` does, also of a folder that has no run yet, as that of a sweep that has just begun.

    Raises:
        UserError: if there is no such folder or file, with the nearest that there is.
    """
    try:
        return find_study(study, output_dir)
    except UserError:
        folder = output_dir / study
        if not os.path.isdir(folder) or not study:  # noqa: PTH112  # as of `_is_file`
            raise
        return study, folder


def _no_study(study: str, output_dir: Path) -> UserError:
    words = study_words(study.removesuffix(SUFFIX), output_dir)
    start = f"{command_name('train')} -m {words} norm=bn,none"
    folder = output_dir / study
    if os.path.isdir(folder) and study:  # noqa: PTH112  # as of `_is_file`
        return UserError(
            f"Study {study} has no run yet: {folder} is there, and no run has a record in it.\n"
            "A sweep that has just begun checks its runs before it writes the first record: give the same command again"
            f" in a while.\nIf none is under way, to start it: {start}"
        )
    names = find_studies(output_dir)
    return UserError(
        f"There is no study {study} in {output_dir}."
        + (f"\nStudies there: {listed(names, 5)}." if names else " It holds no study yet.")
        + did_you_mean(study, names, "study=")
        + f"\nTo start it: {start}"
    )
