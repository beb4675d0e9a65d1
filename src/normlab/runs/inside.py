"""What a study holds is its own: nothing is written through links, pipes and devices inside of it.

A study may come from anybody. The folder of the study itself, and what is above it, may be links: outputs are often on
a disk for them.
"""

import os
from pathlib import Path

from normlab.common.errors import UserError, storage_error
from normlab.runs.files import make_folder


def make_own_folder(folder: Path, above: Path) -> None:
    """Make a folder and those above it, unless they exist, and check that nothing in it leads elsewhere.

    Args:
        folder: the folder, in which something is about to be written.
        above: a folder above it, the study's, which may be a link. What is below may not.

    Raises:
        UserError: if it cannot be made, or if it, a folder between the two or anything inside of it is a link, a pipe
            or a device, but for what is in a folder wandb.
    """
    try:
        for part in [*reversed(folder.relative_to(above).parents[:-1]), folder.relative_to(above)]:
            path = above / part
            if path.is_symlink() or (path.exists() and not path.is_dir() and not path.is_file()):
                raise _leads_elsewhere(path, "a link" if path.is_symlink() else "neither a file nor a folder")
        make_folder(folder)
        _check(str(folder))
    except OSError as error:
        raise storage_error(folder, error) from error


def _check(folder: str) -> None:
    left = [folder]
    while left:
        with os.scandir(left.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if entry.name != "wandb":  # it keeps links to its cache there, and makes a folder for each process
                        left.append(entry.path)
                elif not entry.is_file(follow_symlinks=False):
                    kind = "a link" if entry.is_symlink() else "neither a file nor a folder"
                    raise _leads_elsewhere(Path(entry.path), kind)


def _leads_elsewhere(path: Path, kind: str) -> UserError:
    leads = f", to {os.readlink(path)}" if path.is_symlink() else ""  # noqa: PTH115  # of any text
    return UserError(
        f"{path} is {kind}{leads}, and nothing is written through it: what it leads to may be somebody else's.\n"
        f"Remove it, or move it away: mv {path} ..., and give the same command again."
    )
