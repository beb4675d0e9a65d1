"""Where Hydra looks for sweepers (see normlab_launchers.py)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException


class ExperimentSweeper(BasicSweeper):
    """`hydra/sweeper=experiment`: the runs of an experiment at a budget.

    An experiment is a union of grids. A grid maps settings to a value, a list of values, or a mapping from budgets to
    one of these; values are in the words of the command line, and its runs are the product of its lists. A budget's
    size is such a mapping too, and takes the place of every grid's own values; what the user says on the command line
    takes the place of both.

    Args:
        grids: the question.
        sizes: by budget.
        budget: one of `sizes`.
        experiment: its name, for messages.
    """

    def __init__(
        self,
        grids: Sequence[Mapping[str, Any]],
        sizes: Mapping[str, Mapping[str, Any]],
        budget: str | None,
        experiment: str | None,
    ) -> None:
        super().__init__(max_batch_size=None)
        self.grids, self.sizes, self.budget, self.experiment = grids, sizes, budget, experiment

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:  # type: ignore[override]
        """One batch: the runs of every grid, each run once. `overrides` are those of the command line."""
        if self.budget is None or self.budget not in self.sizes:
            given = f"has no budget={self.budget}" if self.budget else "needs a budget"
            known = ", ".join(f"budget={name}" for name in self.sizes)
            raise HydraException(f"experiment={self.experiment} {given}. Expected one of: {known}.")
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)  # type: ignore[union-attr]
        runs: dict[tuple[str, ...], list[str]] = {}
        for question in self.grids:
            grid = {**question, **self.sizes[self.budget]}
            grid = {key: value[self.budget] if isinstance(value, Mapping) else value for key, value in grid.items()}
            own = parser.parse_overrides([f"{key}={_values(value)}" for key, value in grid.items()])
            [batch] = BasicSweeper.split_arguments([*own, *overrides], None)
            runs |= {tuple(sorted(run)): run for run in batch}
        return [list(runs.values())]


def _values(value: Any) -> str:
    """As on the command line; a text is in its words already."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(_values, value))
    return value if isinstance(value, str) else json.dumps(value)
