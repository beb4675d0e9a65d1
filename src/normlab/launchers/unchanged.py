"""Check that a finished run is still what its command would train: the same images, own network and own norm.

They are no settings, so they are no part of a run's identity: a new seed would share a cell with runs of another kind.
"""

import sys

from normlab import runs
from normlab.common.errors import UserError
from normlab.common.source import changed_modules
from normlab.common.terminal import say
from normlab.config import weights
from normlab.config.schema import ArrayDataset, FolderDataset, RunConfig
from normlab.data.inventory import is_gone
from normlab.data.recorded import ImageFiles, image_files


class Unchanged:
    """Compares finished runs with what is there now; of one sweep, whose folders of images it lists once."""

    def __init__(self) -> None:
        self._files: dict[str, ImageFiles | UserError | None] = {}
        self._said: set[str] = set()

    def check(self, run: runs.Run, config: RunConfig) -> None:
        """Check a finished run. What is not recorded is not compared; of what is gone, a line says so.

        Raises:
            UserError: if something has changed: what, how to keep the result, how to begin anew; if the images cannot
                be listed or read any more.
        """
        made = runs.read_provenance(run.folder)
        if made.get("data"):
            self._check_images(run, config, made["data"])
        self._check_weights(run, config, made.get("weights"))
        recorded = made.get("own_code")
        recorded = recorded if isinstance(recorded, dict) else {}
        now = config.own_code()
        for setting in sorted(recorded.keys() - now.keys()):
            target = config.norm.target if setting == "norm._target_" else getattr(config.model, "target", "")
            self._say(f"The code of {setting}={target} is not found now: it is not compared.")
        for setting, code in now.items():
            before = recorded.get(setting)
            modules = changed_modules(before, code) if isinstance(before, dict) else []
            subject, change = f"The code of {setting}={code['object']}", f"module {', '.join(modules)}"
            if modules and not code["modules"].keys() & set(modules):  # by a path that only importing the code adds
                self._say(f"{subject}: {change} is not found without importing it, and is not compared.")
            elif modules:
                if setting == "model.target":
                    raise _changed(subject, change, run, f"{config.model.name.lstrip('.')}*", "model.name=...")
                raise _changed(subject, change, run, f"*-{config.norm.name}-b*", "another file of conf/norm")

    def _check_images(self, run: runs.Run, config: RunConfig, recorded: object) -> None:
        files = self._files_of(config)
        if files is None:
            return
        try:
            if isinstance(files, UserError):
                raise files
            change = files.change(recorded)
        except UserError as error:
            raise UserError(
                f"{run.title} is finished, but its images cannot be read any more as they were.\n{error}"
            ) from None
        if change:
            name = config.dataset.name
            subject = f"The images of dataset={name} in {files.path}"
            raise _changed(subject, change, run, f"*-{name}-*", "dataset.name=...")

    def _check_weights(self, run: runs.Run, config: RunConfig, recorded: object) -> None:
        try:
            change = weights.change(config.weights, recorded)
        except UserError:
            self._say(f"model.weights={config.weights} is not there now: it is not compared.")
            return
        if change:
            subject, pattern = f"The file of model.weights={config.weights}", f"{config.model.name.lstrip('.')}*"
            raise _changed(subject, change, run, pattern, "the file another name")

    def _files_of(self, config: RunConfig) -> ImageFiles | UserError | None:
        """Return the images of a run, or why they cannot be listed; None for those known by name, or gone."""
        key = config.dataset.model_dump_json()
        if key not in self._files:
            self._files[key] = None
            if isinstance(config.dataset, FolderDataset | ArrayDataset) and is_gone(config.dataset):
                self._say(f"{config.dataset.path} has no images now: they are not compared.")
                return None
            try:
                self._files[key] = image_files(config)
            except UserError as error:
                self._files[key] = error
        return self._files[key]

    def _say(self, text: str) -> None:
        """Print a line once, also if quiet."""
        if text not in self._said:
            self._said.add(text)
            say(text, file=sys.stderr, flush=True)


def _changed(subject: str, change: str, run: runs.Run, pattern: str, name: str) -> UserError:
    return UserError(
        f"{subject} changed after {run.title} finished: {change}.\n"
        "That result stays apart from new ones only under another name.\n"
        f"To keep it, name what is there now: {name}, or a study=... of its own.\n"
        f"To train anew, delete what was made of the old: {run.folder.parent}/{pattern}"
    )
