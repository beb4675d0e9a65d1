"""Every experiment: its file, the runs of its budgets, and the way from its command to its verdicts at budget=smoke."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.types import HydraContext, RunMode
from omegaconf import open_dict

from hydra_plugins.normlab_sweepers import GridSweeper
from normlab import report
from normlab.config import schema as config
from normlab.launchers.composing import compose
from normlab.report.claims.claims import claims
from normlab.report.claims.judge import NOT_RUN, judge

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "conf" / "experiment").glob("*.yaml"))
NAMES = [file.stem for file in FILES]
DRAWN = "ioffe2017_small"  # the one whose figures are drawn
BUDGETS = ("smoke", "laptop", "paper")
EPOCHS = {"santurkar2018_deep_linear": 20, "cha2023_incremental": 5}  # of a step each; one for each task. Others: 1


@functools.cache
def read(name: str) -> tuple[str, dict[str, Any]]:
    text = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()
    return text, yaml.safe_load(text)


def runs_of(name: str, budget: str, *overrides: str) -> list[list[str]]:
    """What Hydra is asked to compose for each run."""
    sweeper = GridSweeper(**read(name)[1]["hydra"]["sweeper"], budget=budget, experiment=name)
    return sweeper.runs([f"experiment={name}", f"budget={budget}", *overrides])


@pytest.mark.parametrize("name", NAMES)
def test_a_file_says_what_it_is_and_costs(name) -> None:
    text, content = read(name)
    header = text[: text.index("\ndefaults:")]
    assert f"python train.py -m experiment={name} budget=laptop" in header
    for budget in BUDGETS:
        assert re.search(rf"{budget}: [\d,]+ runs", header), f"the header of {name} lacks the cost of {budget}"
    assert content["experiment"] == name
    assert content["study"] == "${experiment}_${budget}"
    assert set(content["hydra"]["sweeper"]["sizes"]) == set(BUDGETS)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """Hydra's loader and the menu, of which a sweep's runs are composed."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        menu = loader.load_configuration("config", [], run_mode=RunMode.MULTIRUN)
        with open_dict(menu):
            menu.hydra.job.config_name = "config"
    return loader, menu


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_header_counts_the_runs_and_each_is_valid(loaded, name) -> None:
    for budget in BUDGETS:
        counted = int(re.search(rf"{budget}: ([\d,]+) runs", read(name)[0])[1].replace(",", ""))  # type: ignore[index]
        assert len(runs_of(name, budget)) == counted
        one = ["seed=0", *(f"{setting}=0.1" for setting in read(name)[1].get("tuned", []))]  # of grids that are alike
        settings = [config.parse(run) for run in compose(*loaded, runs_of(name, budget, *one))]
        assert {run.budget for run in settings} == {budget}
        assert len({str(run) for run in settings}) == len(settings), "two of them are the same run"


def test_every_experiment_and_probe_and_claim_is_covered() -> None:
    assert {name for claim in claims() for name in claim.experiments} == set(NAMES)
    used = {
        probe
        for name in NAMES
        for default in read(name)[1]["defaults"]
        if isinstance(default, dict)
        for probe in default.get("override /probe", [])
    }
    assert used == set(config.PROBE_SECTIONS)


def test_what_the_user_says_takes_the_place_of_the_grids_and_the_budget() -> None:
    runs = runs_of("ioffe2017_small", "smoke", "seed=7", "norm=gn,bn", "norm_batch=8")
    assert [sorted(set(run) & {"seed=7", "norm=gn", "norm=bn", "norm_batch=8"}) for run in runs] == [
        ["norm=gn", "norm_batch=8", "seed=7"],
        ["norm=bn", "norm_batch=8", "seed=7"],
    ]


def test_another_choice_leaves_the_options_of_the_first_behind() -> None:
    [run] = runs_of("gitman2017_cifar", "smoke", "seed=0", "norm=ln")
    assert not [setting for setting in run if setting.startswith(("norm.", "norm=bn", "norm=wn"))]
    [run] = runs_of("davis2021_scale", "laptop", "seed=0", "norm=bnminus", "norm.eps=1e-3", "probe=[]")
    assert [setting for setting in run if setting.startswith(("norm", "probe"))] == [
        "norm=bnminus",
        "norm.eps=0.001",
        "probe=[]",
    ]


def test_a_choice_of_the_grids_keeps_its_options_and_the_settings_of_its_grid() -> None:
    def options(name: str, *overrides: str) -> list[list[str]]:
        runs = runs_of(name, "laptop", "seed=0", "optimizer.lr=0.1", *overrides)
        return [[word for word in run if word.startswith(("norm", "init", "sampler"))] for run in runs]

    assert options("gitman2017_cifar", "norm=ln,wn,bn,none") == [
        ["norm=ln"],
        ["norm.eps=0.0001", "norm=bn"],
        ["norm.init=data", "norm=wn"],
        ["norm=none"],
    ]
    assert options("gitman2017_cifar", "norm=wn", "norm.init=weights") == [["norm.init=weights", "norm=wn"]]
    every = [sorted(run) for run in runs_of("small_batch", "smoke") if "norm=bn" in run]
    assert [sorted(run) for run in runs_of("small_batch", "smoke", "norm=bn")] == every
    for written in ('"wn"', "[wn]", "wn.yaml", "${oc.env:NO_SUCH_NAME,wn}"):
        [[option, _]] = options("gitman2017_cifar", f"norm={written}")
        assert option == "norm.init=data"
    both = options("peerthum2023_init", "norm=bn", "init=bn_folded", "depth=18")  # each in another grid
    assert both == [["norm=bn", "init=bn_folded"]]


def test_the_choice_of_the_file_keeps_its_options(loaded) -> None:
    def widths(choice: str) -> set[bool]:
        name = "peerthum2023_accuracy"
        sweeper = GridSweeper(**read(name)[1]["hydra"]["sweeper"], budget="laptop", experiment=name)
        sweeper.hydra_context = HydraContext(config_loader=loaded[0], callbacks=Callbacks())
        runs = sweeper.runs([f"experiment={name}", "budget=laptop", "seed=0", choice])
        return {"model.width=0.25" in run for run in runs}

    assert (widths("model=resnet"), widths("model=vgg")) == ({True}, {False})


@pytest.mark.parametrize("probes", ["probe=ics", "probe=[ics]", "probe=[affine,ics]"])
def test_a_probe_keeps_its_options(probes) -> None:
    for run in runs_of("santurkar2018_ics", "laptop", "seed=0", probes):
        assert "probe.ics.times=12" in run
    for run in runs_of("santurkar2018_landscape", "laptop", "seed=0", "probe=[sharpness,affine]"):
        assert [word for word in run if word.startswith("probe.")] == ["probe.sharpness.times=3"]


def test_an_experiment_without_grids_has_the_sizes_of_its_budget() -> None:
    for grids in ([], [None], [{}]):
        sweeper = GridSweeper(grids=grids, sizes={"smoke": {"epochs": 1}}, budget="smoke", experiment="mine")
        assert sweeper.runs(["norm=gn,bn"]) == [["epochs=1", "norm=gn"], ["epochs=1", "norm=bn"]]


def test_a_budget_is_refused_for_one_run(command) -> None:
    status, _, error = command("train.py", "experiment=gitman2017_cifar", "budget=smoke", "norm=wn", "hydra.mode=RUN")
    assert (status, "budget=smoke is the size of an experiment's sweep" in error) == (1, True)


@pytest.mark.parametrize("name", [name for name in NAMES if "override /probe" in read(name)[0]])
def test_an_experiment_runs_with_other_probes(make, name) -> None:
    for probes in ("probe=[]", "probe=[affine]"):
        assert make(*runs_of(name, "laptop", "seed=0", probes)[0]).probe.keys() <= {"affine"}


def test_a_budget_that_is_missing_is_asked_for(command) -> None:
    status, _, error = command("train.py", "-m", "experiment=ioffe2017_small")
    assert status == 1
    assert "experiment=ioffe2017_small needs a budget" in error
    assert "Traceback" not in error


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_from_the_command_to_the_verdicts(name, command, tmp_path) -> None:
    """One seed, an epoch or few, few filters and test images, in one process: the pool and seeds have their tests."""
    text, _ = read(name)
    small = (
        "budget=smoke",
        "seed=0",
        f"epochs={EPOCHS.get(name, 1)}",
        *(("schedule.warmup_epochs=0.5",) if "warmup_epochs" in text else ()),
        *(("model.width=0.25",) if "/model: vgg" in text else ()),
        *(("dataset.train_size=32",) if name == "small_batch" else ()),  # which has 41 runs
        "dataset.test_size=40",
        "hydra/launcher=basic",
        "device=cpu",
        "threads=1",
        "output_dir=.",
    )
    trained = command("train.py", "-m", f"experiment={name}", *small)
    assert trained[0] == 0, trained
    reported = command("report.py", f"study={name}_smoke", "output_dir=.", f"figures={str(name == DRAWN).lower()}")
    assert reported[0] == 0, reported

    study = report.load(tmp_path / f"{name}_smoke")
    assert set(study.runs["state"]) <= {"done", "diverged"}
    assert not study.warnings
    judgements = {judgement.claim.id: judgement for judgement in judge(study)}
    for claim in claims():
        if name in claim.experiments and not claim.tuning:
            assert NOT_RUN not in {result.verdict for result in judgements[claim.id].results}, claim.id
    wanted = {probe for config in study.configs.values() for probe in config["probe"]}
    assert {probe for probe, rows in study.probes.items() if len(rows)} == wanted
