"""Command lines for more seeds, read as the command reads them and composed by Hydra."""

import itertools
import shlex
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import open_dict

from hydra_plugins.normlab_sweepers import GridSweeper
from normlab import runs
from normlab.common.installation import CONF
from normlab.config import schema
from normlab.config.command_line import read
from normlab.launchers.composing import compose
from normlab.report import load
from normlab.report.adding import _merged, as_text, commands, settings
from normlab.report.study.arms import cell_key

REFERENCE = Path(__file__).parents[2] / "outputs" / "reference"


@pytest.fixture
def composed():
    """What Hydra composes of a command line's words, as checked configurations."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("config", [], run_mode=RunMode.MULTIRUN)
        with open_dict(config):
            config.hydra.job.config_name = "config"
        sweeper = GridSweeper(grids=[], sizes={}, budget=None, experiment=None)

        def configs(words):
            line = read(words, "train", ("doctor",))
            overrides = sweeper.runs([word for word in line.words() if not word.startswith("-")])
            return [schema.parse(each).as_dict() for each in compose(loader, config, overrides)]

        yield configs


def added(composed, lines):
    found = [config for line in lines for config in composed(shlex.split(line)[2:])]
    assert {(config["study"], config["output_dir"]) for config in found} == {("a_study", "an output's folder")}
    return sorted(runs.run_name(config) for config in found)


def wanted(configs, seeds):
    return sorted(runs.run_name({**config, "seed": seed}) for config in configs for seed in seeds)


SWEEPS = {  # words, and the number of command lines
    ("norm=bn,none", "batch=8,32", "seed=0,1"): 1,
    ("norm=gn,ln,nf,bnp", "model=cifar_resnet"): 1,
    ("dataset=image_folder", "dataset.path='/an odd/[folder], \"x\"'", "dataset.crop_scale=[0.1,1.0]"): 1,
    ("norm=bn", "norm.scale_init=0.5", "optimizer=adam", "optimizer.lr=1e-7,0.5", "norm_batch=4,null"): 2,
    ("model=custom", "model.name=own", "model.target=a.b.C", "+model.kwargs.x='1'", "+model.kwargs.y=[a b,null]"): 1,
    ("norm=none", "norm._target_=my.Norm", "norm.name=mine", "+norm.share='0.5'", "~norm.conv_bias"): 1,
    ("model=deep_linear", "norm=bn", "probe=[ics,landscape]", "probe.ics.times=7", "probe.landscape.reach=[1.0,2]"): 1,
    (
        "model=vgg",
        "schedule=step",
        "schedule.milestones=[0.5]",
        "sampler=paired",
        "init=fixup",
        "eval_stats=precise",
    ): 1,
}


@pytest.mark.parametrize(("sweep", "number"), SWEEPS.items(), ids=["  ".join(sweep) for sweep in SWEEPS])
def test_the_commands_give_exactly_the_wanted_runs(composed, sweep, number) -> None:
    cells = list({runs.run_id({**config, "seed": 0}): config for config in composed(sweep)}.values())
    lines = commands(cells, [5, 6, 7, 8, 9, 10], "a_study", "an output's folder")
    assert added(composed, lines) == wanted(cells, range(5, 11))
    assert len(lines) == number


def test_two_arms_need_a_short_line(composed) -> None:
    configs = composed(["norm=bn,none", "batch=8", "optimizer.lr=0.1"])
    [line] = commands(configs, [2, 3], "x", "outputs")
    assert line.split(" ", 2)[2] == "-m study=x norm=bn,none batch=8 optimizer.lr=0.1 seed=2,3"


def test_a_network_is_of_the_choice_that_leaves_its_name_open(composed) -> None:
    [line] = commands(composed(["model=torchvision", "model.name=resnet18"]), [2], "x", "outputs")
    assert line.split(" ", 2)[2] == "-m study=x model=torchvision norm=bn batch=128 model.name=resnet18 seed=2"


def test_thousands_of_cells_are_joined_at_once() -> None:
    lists = {"norm": "abcdefghij", "batch": [str(i) for i in range(20)], "optimizer.lr": [str(i) for i in range(10)]}
    cells = [
        dict(zip(lists, ([each] for each in values), strict=True)) for values in itertools.product(*lists.values())
    ]
    assert _merged([dict(reversed(cell.items())) if i % 2 else cell for i, cell in enumerate(cells)]) == [
        {name: list(values) for name, values in lists.items()}
    ]


@pytest.mark.parametrize(
    "given", [{"a b": 1}, {"a/b": 1}, {"1st": 1}, {"x": {"a b": 1}}, {"x": [{"1": 1}]}, {"x": {2: 3}}]
)
def test_keys_that_hydra_does_not_read_as_they_are_have_no_command(composed, given) -> None:
    [config] = composed(["model=custom", "model.name=own", "model.target=a.b.C", "+model.kwargs={x: {y: inf}}"])
    lines = commands([config], [5], "a_study", "an output's folder")
    assert added(composed, lines) == wanted([config], [5])
    assert commands([{**config, "model": {**config["model"], "kwargs": given}}], [1], "x", "outputs") == []


def test_what_no_command_gives_has_none(composed) -> None:
    [config] = composed(["norm=bn"])
    assert settings({**config, "norm": {**config["norm"], "imported": True}}) is None
    assert settings({**config, "unheard_of": 1}) is None
    assert settings({**config, "optimizer": {**config["optimizer"], "lr": "fast"}}) is None
    assert settings({**config, "norm": None}) is None
    for note in ("\x1b[2J", "${oc.env:HOME}"):
        noted = {**config, "norm": {**config["norm"], "_target_": "my.Norm", "note": note}}
        assert commands([noted], [1], "x", "outputs") == []


@pytest.mark.parametrize("text", ["a b", "it's", "a,b", "null", "1e5", "back\\", "\\'", "$HOME", "ü", "", "a=b"])
def test_texts_arrive_as_they_are(composed, text) -> None:
    words = ["model=custom", "model.name=own", "model.target=a.b.C", f"+model.kwargs.note={as_text(text)}"]
    assert composed(words)[0]["model"]["kwargs"] == {"note": text}


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(REFERENCE.glob("*.zip")), ids=lambda path: path.name.partition(".")[0])
def test_recorded_studies_get_the_same_runs_with_other_seeds(composed, path) -> None:
    cells = list({cell_key(config): config for config in load(path).configs.values()}.values())
    lines = commands(cells, [90, 91], "a_study", "an output's folder")
    assert added(composed, lines) == sorted(set(wanted(cells, (90, 91))))  # cells may differ in threads alone
