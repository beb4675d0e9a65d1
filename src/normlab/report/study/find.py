"""Find studies: every folder that holds runs, and the one that a name means."""

from pathlib import Path

from normlab.common.errors import UserError, did_you_mean, listed
from normlab.common.installation import command_name


def find_studies(output_dir: Path) -> list[str]:
    """Return every folder below `output_dir` that holds runs, by name; a study's name may have two parts."""
    configs = [*output_dir.glob("*/*/config.yaml"), *output_dir.glob("*/*/*/config.yaml")]
    folders = {path.parent.parent for path in configs if not path.parent.name.startswith(".")}
    return sorted(folder.relative_to(output_dir).as_posix() for folder in folders)


def holds_runs(folder: Path) -> bool:
    """Return whether a folder is that of a study."""
    return folder.is_dir() and next(folder.glob("*/config.yaml"), None) is not None


def study_folder(study: str, output_dir: Path) -> Path:
    """Return the folder of a study.

    Raises:
        UserError: if there is no such study.
    """
    folder = output_dir / study
    if holds_runs(folder):
        return folder
    names = find_studies(output_dir)
    raise UserError(
        f"There is no study {study} in {output_dir}."
        + (f"\nStudies there: {listed(names, 5)}." if names else " It holds no study yet.")
        + did_you_mean(study, names, "study=")
        + f"\nTo start it: {command_name('train')} -m study={study} norm=bn,none"
    )
