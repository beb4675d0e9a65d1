"""The sweeper, in the package that Hydra searches (see normlab_launchers.py)."""

import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import ConfigCompositionException, HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hydra_plugins.normlab_launchers import SweepLauncher

_WITH_OPTIONS = {"norm", "model", "init", "sampler", "schedule"}  # groups whose choices have their own


class GridSweeper(Sweeper):
    """`hydra/sweeper=grid`: the product of all lists on the command line, or the runs of an experiment at a budget.

    An experiment is a union of grids. A grid maps settings to a value, a list of values, or a mapping from budgets to
    one of these; values are written as on the command line, and its runs are the product of its lists. A budget's
    size is such a mapping too, and takes the place of every grid's own values; what the user gives on the command line
    takes the place of both. A norm there (or model, init, ...) that a grid has keeps its options and goes to that grid
    alone; another goes to every grid and leaves behind the options, which it may not have. Probes leave behind the
    options of those that are not among them.

    Args:
        grids: of the experiment; none: the command line is the grid.
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
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Make the launcher that the configuration names."""
        from normlab.config.hydra import refuse_folders

        refuse_folders(config.hydra)
        self.hydra_context, self.config = hydra_context, config
        self.folder = Path(config.hydra.sweep.dir).expanduser()
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Launch the runs of a command line; return their results in one batch."""
        runs = self.runs([*(f"{key}={value}" for key, value in self.params.items()), *arguments])
        self.folder.mkdir(parents=True, exist_ok=True)  # as Hydra's own sweeper does
        try:
            return [self._launch(runs)]
        except ConfigCompositionException:  # of a run, before any has started
            from normlab.common.errors import listed
            from normlab.common.terminal import say
            from normlab.launchers.composing import serving

            assert self.hydra_context
            assert self.config is not None
            left, lacking = serving(self.hydra_context.config_loader, self.config, runs)
            if not lacking:
                raise
        if self.config.get("quiet") is not True:
            for setting, choices in lacking.items():
                say(f"{setting} is not for {listed(choices, 3)}: there is no such setting with it.", flush=True)
        return [self._launch(left)]

    def _launch(self, runs: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
        if not isinstance(self.launcher, SweepLauncher):  # which checks every run itself before any starts
            from normlab.launchers import pool, sweep

            assert self.hydra_context
            assert self.config is not None
            read = sweep.read(self.hydra_context, self.config, runs, here=False)
            if read.jobs:
                pool.print_once(read.jobs, pool.check_networks(read.jobs))
            runs = list(dict(zip(reversed(read.folders), reversed(runs), strict=True)).values())[::-1]
        results = self.launcher.launch(runs, initial_job_idx=0)
        for each in results:
            _ = each.return_value  # raises the error of a run that failed under one of Hydra's own launchers
        return results

    def runs(self, arguments: Sequence[str]) -> list[list[str]]:
        """Return the overrides of each run, each run once.

        Raises:
            HydraException: for a budget that is not there.
        """
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader if self.hydra_context else None)
        if not self.grids and not self.sizes:
            return _product(parser, arguments)
        if self.budget is None or self.budget not in self.sizes:
            given = f"has no budget={self.budget}" if self.budget else "needs a budget"
            known = ", ".join(f"budget={name}" for name in self.sizes)
            raise HydraException(f"experiment={self.experiment} {given}. Expected one of: {known}.")
        typed = {override.get_key_element() for override in parser.parse_overrides(list(arguments))}
        chosen = sorted(typed & _WITH_OPTIONS)
        grids = [
            {key: self._at_budget(key, value) for key, value in {**(grid or {}), **self.sizes[self.budget]}.items()}
            for grid in self.grids or [{}]
        ]
        names = cache(partial(_names, parser))
        choices = self._choices(parser, chosen, grids, [word for word in arguments if word.startswith("experiment=")])
        of_any = {group: {value for each in choices for value in each[group]} for group in chosen}
        found: list[tuple[tuple[str, ...], bool, list[str]]] = []
        for grid, own in zip(grids, choices, strict=True):
            words = [f"{key}={_as_word(value)}" for key, value in grid.items() if key not in chosen]
            for run in _product(parser, [*words, *arguments]):
                settings = dict(word.split("=", 1) for word in run)
                choice = {group: names(f"{group}={settings[group]}") for group in chosen}
                others = {group for group in chosen if not choice[group] <= own[group]}
                fits = not any(choice[group] <= of_any[group] for group in others)
                lost = {key for key in settings if key.partition(".")[0] in others}
                if "probe" in typed:
                    probes = names(f"probe={settings['probe']}")
                    lost |= {key for key in settings if key.startswith("probe.") and key.split(".")[1] not in probes}
                kept = [f"{key}={value}" for key, value in settings.items() if key in typed or key not in lost]
                found.append((tuple(settings[group] for group in chosen), fits, kept))
        fitting = {values for values, fits, _ in found if fits}  # choices that no grid has together go to every grid
        runs = {tuple(sorted(run)): run for values, fits, run in found if fits or values not in fitting}
        return list(runs.values())

    def _choices(
        self, parser: OverridesParser, groups: Sequence[str], grids: Sequence[Mapping[str, Any]], file: list[str]
    ) -> list[dict[str, set[str]]]:
        """Return for each grid what it has of each group: its values, or else the choice of the experiment's file."""
        in_file: Mapping[str, Any] = {}
        if self.hydra_context and any(group not in grid for grid in grids for group in groups):
            composed = self.hydra_context.config_loader.load_configuration("config", file, RunMode.MULTIRUN)
            in_file = composed.hydra.runtime.choices
        return [
            {
                group: {
                    name
                    for [word] in _product(parser, [f"{group}={_as_word(grid[group])}"])
                    for name in _names(parser, word)
                }
                if group in grid
                else {str(in_file.get(group))}
                for group in groups
            }
            for grid in grids
        ]

    def _at_budget(self, key: str, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if self.budget not in value:
            raise HydraException(
                f"experiment={self.experiment}: the grid's {key} has no value for budget={self.budget}."
            )
        return value[self.budget]


def _product(parser: OverridesParser, arguments: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each run, as Hydra's own sweeper does: of a setting that is given twice the last."""
    choices: dict[str, list[str]] = {}
    for override in parser.parse_overrides(list(arguments)):
        key = override.get_key_element()
        sweeps = override.is_sweep_override()
        try:
            values = list(override.sweep_string_iterator()) if sweeps else [override.get_value_element_as_str()]
        except (ValueError, RuntimeError) as error:  # of a range without steps, perhaps in an iterator
            if not override.is_range_sweep():
                raise
            raise HydraException(f"{override.input_line}: this range has no end.\nGive it a step above 0.") from error
        choices[key] = [f"{key}={value}" for value in values]
        if not choices[key]:
            raise HydraException(f"{override.input_line}: nothing matches, so the sweep has no runs.")
    return [list(run) for run in itertools.product(*choices.values())]


def _names(parser: OverridesParser, word: str) -> frozenset[str]:
    """Return the choices that a word names, however it is written: norm=wn, norm="wn", norm=[wn], norm=wn.yaml."""
    value = parser.parse_override(word).value()
    texts = [str(each.text if isinstance(each, QuotedString) else each) for each in _listed(value)]
    with suppress(OmegaConfBaseException):  # what cannot be resolved here is refused where it is composed
        texts = [str(OmegaConf.create({"choice": text}).choice) for text in texts]
    return frozenset(text.removeprefix("./").removesuffix(".yaml") for text in texts)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _as_word(value: Any) -> str:
    """Return a value as on the command line, where a text is already."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(_as_word, value))
    return value if isinstance(value, str) else json.dumps(value)
