"""The command line's product of runs, against Hydra's own sweeper."""

import pytest
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, RunMode

from hydra_plugins.normlab_sweepers import GridSweeper
from normlab.common.errors import UserError
from normlab.common.installation import CONF


def sweeper() -> GridSweeper:
    """A sweeper as Hydra sets it up; within initialize_config_dir."""
    own = GridSweeper(grids=[], sizes={}, budget=None, experiment=None)
    own.hydra_context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks())
    return own


def runs(*arguments: str) -> list[list[str]]:
    return GridSweeper(grids=[], sizes={}, budget=None, experiment=None).runs(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("norm=bn",),
        ("norm=bn,none", "seed=range(0,3)"),
        ("seed=1,2", "batch=8", "seed=3"),
        ("+norm.gamma_init=0,1", "~label_smoothing", "++a.b=c"),
        ("study='a, b',\"c\"", "optimizer.lr=choice(1e-3,0.1)", "probe=[ics,gradients],[]"),
        ("optimizer={lr:0.3,name:sgd}", "note=null,true", "seed=shuffle(1)"),
    ],
    ids=" ".join,
)
def test_equal_to_hydras_own(arguments) -> None:
    [basic] = [kind for kind in Plugins.instance().discover(Sweeper) if kind.__name__ == "BasicSweeper"]
    [expected] = basic.split_arguments(OverridesParser.create().parse_overrides(list(arguments)), None)
    assert runs(*arguments) == expected


def test_an_interval_has_no_product() -> None:
    with pytest.raises(HydraException):
        runs("optimizer.lr=interval(0,1)")


@pytest.mark.parametrize("word", ["seed=range(3,0)", "norm=glob(x*)", "seed=glob(*)"])
def test_a_list_of_nothing_is_refused(word) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(HydraException, match="nothing matches"):
        sweeper().runs((word, "norm=bn,none"))


def test_a_range_without_steps_is_refused() -> None:
    with pytest.raises(HydraException, match="has no end"):
        runs("seed=range(0,1,0)")


def test_choices_are_found_by_pattern() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert sweeper().runs(("norm=glob([b*,n*],exclude=*n)", "seed=1")) == [
            [f"norm={name}", "seed=1"]
            for name in sorted(file.stem for file in (CONF / "norm").glob("[bn]*.yaml"))
            if not name.endswith("n")
        ]


class Failing(Launcher):
    """A launcher as those of Hydra, whose results hold the errors of runs."""

    def setup(self, **_: object) -> None: ...

    def launch(self, job_overrides, initial_job_idx):
        results = [JobReturn(overrides=each, status=JobStatus.COMPLETED) for each in job_overrides]
        results[-1].status, results[-1].return_value = JobStatus.FAILED, UserError("the second run failed")
        return results


def test_a_run_that_failed_under_a_launcher_of_hydra_fails_the_sweep(tmp_path) -> None:
    own = GridSweeper(grids=[], sizes={}, budget=None, experiment=None)
    own.launcher, own.folder = Failing(), tmp_path / "new"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        own.hydra_context = sweeper().hydra_context
        own.config = own.hydra_context.config_loader.load_configuration("config", [], RunMode.MULTIRUN)
        with pytest.raises(UserError, match="the second run failed"):
            own.sweep(["seed=0,1"])
    assert own.folder.is_dir()
