"""The command line's product of runs, against Hydra's own sweeper."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper

from hydra_plugins.normlab_sweepers import GridSweeper


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
