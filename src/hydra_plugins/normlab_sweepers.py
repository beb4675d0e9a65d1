"""Where Hydra looks for sweepers (see normlab_launchers.py)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper  # Hydra's own; pinned to 1.3
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from hydra_plugins.normlab_launchers import RunLauncher

_WITH_OPTIONS = {
    "norm",
    "model",
    "init",
    "sampler",
    "schedule",
    "probe",
}  # groups whose choices have options of their own


class GridSweeper(Sweeper):
    """`hydra/sweeper=grid`: the product of all lists on the command line, or the runs of an experiment at a budget.

    An experiment is a union of grids. A grid maps settings to a value, a list of values, or a mapping from budgets to
    one of these; values are in the words of the command line, and its runs are the product of its lists. A budget's
    size is such a mapping too, and takes the place of every grid's own values; what the user says on the command line
    takes the place of both. Whoever chooses another norm there (or model, init, ...) leaves behind its options, which
    the other may not have.

    Args:
        grids: the question; none: the command line's.
        sizes: by budget.
        budget: one of `sizes`.
        experiment: its name, for messages.
        params: further settings, as those of the command line, which goes before them.
    """

    def __init__(
        self,
        grids: Sequence[Mapping[str, Any]],
        sizes: Mapping[str, Mapping[str, Any]],
        budget: str | None,
        experiment: str | None,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        self.grids, self.sizes, self.budget, self.experiment = grids, sizes, budget, experiment
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.folder = Path(config.hydra.sweep.dir)
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        runs = self.runs([*(f"{key}={value}" for key, value in self.params.items()), *arguments])
        if not isinstance(self.launcher, RunLauncher):  # which composes every run itself before any starts
            self.validate_batch_is_legal(runs)
        self.folder.mkdir(parents=True, exist_ok=True)  # as Hydra's own sweeper does
        return [self.launcher.launch(runs, initial_job_idx=0)]

    def runs(self, arguments: Sequence[str]) -> list[list[str]]:
        """The overrides of each run, each run once.

        Raises:
            HydraException: for a budget that is not there.
        """
        parser = OverridesParser.create()
        if not self.grids:
            return _product(parser, arguments)
        if self.budget is None or self.budget not in self.sizes:
            given = f"has no budget={self.budget}" if self.budget else "needs a budget"
            known = ", ".join(f"budget={name}" for name in self.sizes)
            raise HydraException(f"experiment={self.experiment} {given}. Expected one of: {known}.")
        chosen = {override.key_or_group for override in parser.parse_overrides(list(arguments))} & _WITH_OPTIONS
        found: dict[tuple[str, ...], list[str]] = {}
        for question in self.grids:
            grid = {**question, **self.sizes[self.budget]}
            own = [
                f"{key}={_in_words(self._at_budget(key, value))}"
                for key, value in grid.items()
                if key.partition(".")[0] not in chosen
            ]
            found |= {tuple(sorted(run)): run for run in _product(parser, [*own, *arguments])}
        return list(found.values())

    def _at_budget(self, key: str, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if self.budget not in value:
            raise HydraException(
                f"experiment={self.experiment}: the grid's {key} has no value for budget={self.budget}."
            )
        return value[self.budget]


def _product(parser: OverridesParser, arguments: Sequence[str]) -> list[list[str]]:
    [batch] = BasicSweeper.split_arguments(parser.parse_overrides(list(arguments)), None)
    return batch


def _in_words(value: Any) -> str:
    """As on the command line; a text is in its words already."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(_in_words, value))
    return value if isinstance(value, str) else json.dumps(value)
