"""Check that a finished run is still what its command would train: the same images, own network and own norm.

They are no settings, so they are no part of a run's identity: a new seed would share a cell with runs of another kind.
"""

import contextlib

from normlab import runs
from normlab.common.errors import UserError
from normlab.common.source import changed_modules
from normlab.config.schema import RunConfig
from normlab.data.recorded import ImageFiles, image_files


class Unchanged:
    """Compares finished runs with what is there now; of one sweep, whose folders of images it lists once."""

    def __init__(self) -> None:
        self._files: dict[str, ImageFiles | None] = {}

    def check(self, run: runs.Run, config: RunConfig) -> None:
        """Check a finished run. What is not recorded, or not there any more, is not compared.

        Raises:
            UserError: if something has changed: what, how to keep the result, how to begin anew.
        """
        made = runs.read_provenance(run.folder)
        files, change = self._files_of(config), ""
        with contextlib.suppress(UserError):  # the folder is not to be read now
            change = files.change(made.get("data")) if files else ""
        if files and change:
            name = config.dataset.name
            subject = f"The images of dataset={name} in {files.path}"
            raise _changed(subject, change, run, f"*-{name}-*", "dataset.name=...")
        recorded = made.get("own_code")
        recorded = recorded if isinstance(recorded, dict) else {}
        for setting, code in config.own_code().items():
            before = recorded.get(setting)
            if isinstance(before, dict) and (modules := changed_modules(before, code)):
                subject, change = f"The code of {setting}={code['object']}", f"module {', '.join(modules)}"
                if setting == "model.target":
                    raise _changed(subject, change, run, f"{config.model.name.lstrip('.')}*", "model.name=...")
                raise _changed(subject, change, run, f"*-{config.norm.name}-b*", "another file of conf/norm")

    def _files_of(self, config: RunConfig) -> ImageFiles | None:
        key = config.dataset.model_dump_json()
        if key not in self._files:
            self._files[key] = None
            with contextlib.suppress(UserError):
                self._files[key] = image_files(config)
        return self._files[key]


def _changed(subject: str, change: str, run: runs.Run, pattern: str, name: str) -> UserError:
    return UserError(
        f"{subject} changed after {run.name} finished: {change}.\n"
        "That result stays apart from new ones only under another name.\n"
        f"To keep it, name what is there now: {name}, or a study=... of its own.\n"
        f"To train anew, delete what was made of the old: {run.folder.parent}/{pattern}"
    )
