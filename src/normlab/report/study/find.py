"""Find studies: every folder that holds runs, every study in one file, and the one that a name means."""

from pathlib import Path

from normlab.common.errors import UserError, did_you_mean, listed
from normlab.common.installation import command_name, study_words
from normlab.runs.archive import SUFFIX


def find_studies(output_dir: Path) -> list[str]:
    """Return the studies below `output_dir`, by name; a name may have two parts.

    A folder that holds runs is one, and so is a file NAME.normlab.zip beside which there is no such folder.
    """
    configs = [*output_dir.glob("*/*/config.yaml"), *output_dir.glob("*/*/*/config.yaml")]
    folders = {path.parent.parent for path in configs if not path.parent.name.startswith(".")}
    names = {folder.relative_to(output_dir).as_posix() for folder in folders}
    packed = [*output_dir.glob(f"*{SUFFIX}"), *output_dir.glob(f"*/*{SUFFIX}")]
    return sorted(names | {packed_name(path.relative_to(output_dir)) for path in packed if path.is_file()})


def packed_name(path: Path) -> str:
    """Return the name of a study in one file by the file's path as seen from the folder of studies."""
    return path.as_posix().removesuffix(".zip").removesuffix(".normlab")


def holds_runs(folder: Path) -> bool:
    """Return whether a folder is that of a study."""
    return folder.is_dir() and next(folder.glob("*/config.yaml"), None) is not None


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
            if path.is_file() or holds_runs(path):
                plain = folder is output_dir and not Path(study).is_absolute() and ".." not in Path(study).parts
                shown = path.relative_to(output_dir) if plain else Path(path.name)
                return packed_name(shown) if path.is_file() else shown.as_posix(), path
    if isinstance(study, Path):
        raise UserError(f"The folder {study} holds no runs.\nGive a study's name, or the folder that its runs are in.")
    names = find_studies(output_dir)
    words = study_words(study.removesuffix(SUFFIX), output_dir)
    raise UserError(
        f"There is no study {study} in {output_dir}."
        + (f"\nStudies there: {listed(names, 5)}." if names else " It holds no study yet.")
        + did_you_mean(study, names, "study=")
        + f"\nTo start it: {command_name('train')} -m {words} norm=bn,none"
    )
