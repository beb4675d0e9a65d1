"""What each tool has of a run, read back by the tool itself; and a run that takes no notice of what a tool does."""

import contextlib
import json
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from launchers.commands import SMALL, start
from outcome import SPEED, folder, outcome
from training.test_packing import together

from normlab import loggers, runs
from normlab.cli import doctor
from normlab.common.errors import InterruptedRunError, UserError
from normlab.config.schema import RunConfig
from normlab.launchers import preflight
from normlab.runs import files
from normlab.training.run import train_run

Numbers = list[tuple[str, int, float]]  # name, step, value: a list, so that what is there twice is seen


def recorded(config: RunConfig, without: tuple[str, ...] = ()) -> Numbers:
    rows, warnings = runs.read_metrics(folder(config))
    assert not warnings
    return sorted((k, row["step"], row[k]) for row in rows for k in row if k not in ("step", *without))


def near(numbers: Numbers) -> list[tuple[str, int, object]]:
    """In float32, as TensorBoard keeps them."""
    return [(name, step, pytest.approx(value, rel=1e-6)) for name, step, value in numbers]


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory) -> Path:
    """MLflow takes seconds to make one."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with warnings.catch_warnings(action="ignore"):  # of SQLAlchemy, about MLflow's use of it
        MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def database(request, tmp_path) -> None:
    if "mlflow" in request.node.name:
        files.make_folder(tmp_path / "outputs")
        shutil.copy(request.getfixturevalue("empty_database"), tmp_path / "outputs")


# ---- what a tool has of a run


def of_tensorboard(config: RunConfig) -> tuple[Numbers, str, str]:
    """The numbers, the settings and how the run ended."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder(config))).Reload()
    numbers = sorted((tag, e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag))
    texts = (events.Tensors(f"{tag}/text_summary")[-1] for tag in ("config", "end"))
    settings, end = (text.tensor_proto.string_val[0].decode() for text in texts)
    return numbers, settings, end


def mlflow_runs(config: RunConfig, experiment: str, database: str = "mlflow.db") -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{config.output_dir}/{database}")
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def of_mlflow(config: RunConfig) -> tuple[Numbers, str, str]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{config.output_dir}/mlflow.db")
    [run] = [run for run in mlflow_runs(config, config.study) if run.info.run_name == folder(config).name]
    histories = [client.get_metric_history(run.info.run_id, key) for key in run.data.metrics]
    numbers = sorted((m.key, m.step, m.value) for history in histories for m in history)
    settings = "\n".join(f"{key}: {value}" for key, value in run.data.params.items())
    return numbers, settings, f"state: {run.data.tags['normlab.state']} {run.info.status}"


def of_wandb(config: RunConfig) -> tuple[Numbers, str, str]:
    """By the command with which W&B shows what a local run holds."""
    [path] = folder(config).glob("wandb/offline-run-*/*.wandb")
    shown = subprocess.run(
        [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", path],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    numbers, settings, end = [], "", ""
    for record in map(json.loads, shown.stdout.splitlines()):
        told = record[record["type"]]
        if record["type"] == "run":
            settings += "".join(f"{key}: {value}\n" for key, value in told["config"]["update"].items())
        elif record["type"] == "summary":
            end += "".join(f"{key}: {value}\n" for key, value in told["update"].items())
        elif record["type"] == "history":
            step = told["step"]["num"]
            numbers += [(key, step, value) for key, value in told["item"].items() if not key.startswith("_")]
    return sorted(numbers), settings, end


READ: dict[str, Callable[[RunConfig], tuple[Numbers, str, str]]] = {
    "tensorboard": of_tensorboard,
    "mlflow": of_mlflow,
    "wandb": of_wandb,
}
SLOW = [pytest.param(tool, marks=pytest.mark.slow) for tool in ("mlflow", "wandb")]
every_tool = pytest.mark.parametrize("tool", ["tensorboard", *SLOW])


@every_tool
def test_a_tool_has_every_number_of_the_record_and_the_run_is_as_without_it(tiny, tool, capfd) -> None:
    plain, told = tiny("study=plain", "weight_average=0.9"), tiny(f"logger={tool}", "weight_average=0.9")
    train_run(plain)
    status = train_run(told)
    numbers, settings, end = READ[tool](told)
    assert numbers == near(recorded(told))
    assert {"epoch", "train_loss", "test_accuracy", "lr", *SPEED} <= {name for name, _, _ in numbers}
    assert "weight_average: 0.9" in settings
    assert "state: done" in end
    assert outcome(told) == outcome(plain)
    assert "WARNING" not in (folder(told) / "run.log").read_text()
    assert train_run(told) == status  # skipped, and nothing more is told
    assert READ[tool](told)[0] == numbers
    assert capfd.readouterr() == ("", "")


def fail() -> None:
    raise TypeError("planted")


@every_tool
def test_an_interrupted_run_goes_on_in_the_same_place(tiny, tool, steps) -> None:
    config = tiny(f"logger={tool}", "epochs=3")
    steps.interrupt(config, after=5)  # of nine, three an epoch
    numbers, _, end = READ[tool](config)
    assert {step for _, step, _ in numbers} == {3}
    assert "state: interrupted" in end
    assert train_run(config)["state"] == "done"
    numbers, _, end = READ[tool](config)
    assert numbers == near(recorded(config))
    assert "state: done" in end


@every_tool
def test_what_is_measured_twice_is_there_once(tiny, tool, steps) -> None:
    """A run that fails after an evaluation, without a checkpoint, begins anew."""
    config = tiny(f"logger={tool}", "checkpoint_seconds=null")
    steps.after(5, fail)
    with pytest.raises(TypeError):
        train_run(config)
    numbers, _, end = READ[tool](config)
    assert {step for _, step, _ in numbers} == {3}
    assert "state: failed" in end
    train_run(config)
    numbers = [row for row in READ[tool](config)[0] if row[0] not in SPEED or tool != "mlflow"]
    assert numbers == near(recorded(config, SPEED if tool == "mlflow" else ()))  # it keeps the times of the first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state", "status", "settings", "disturb"),
    [
        ("done", "FINISHED", (), lambda steps: None),
        ("diverged", "FINISHED", ("optimizer.lr=1e30",), lambda steps: None),
        ("interrupted", "KILLED", (), lambda steps: steps.stop_after(5)),
        ("failed", "FAILED", (), lambda steps: steps.after(5, fail)),
        ("failed", "FAILED", ("batch=1", "model.target=normlab.nowhere"), lambda steps: None),  # before it trains
    ],
)
def test_mlflow_knows_how_a_run_ended(tiny, steps, state, status, settings, disturb) -> None:
    config = tiny("logger=mlflow", *settings)
    disturb(steps)
    with contextlib.suppress(InterruptedRunError, TypeError, UserError):
        train_run(config)
    assert of_mlflow(config)[2] == f"state: {state} {status}"


@pytest.mark.slow
def test_the_same_run_of_two_studies_is_two_runs_of_mlflow(tiny, steps) -> None:
    first, second = (tiny("logger=mlflow", "logger.experiment=shared", f"study={name}") for name in ("first", "second"))
    steps.interrupt(first, after=5)
    train_run(second)
    found = mlflow_runs(second, "shared")
    assert {run.data.tags["normlab.study"]: run.data.tags["normlab.state"] for run in found} == {
        "first": "interrupted",
        "second": "done",
    }


@pytest.mark.slow
def test_the_same_run_of_two_studies_has_two_names_in_wandb(tiny) -> None:
    folders = []
    for name in ("first", "second"):
        config = tiny("logger=wandb", f"study={name}")
        train_run(config)
        folders += [path.name.rpartition("-run-")[2].partition("-")[2] for path in folder(config).glob("wandb/*-run-*")]
    assert len(folders) == len(set(folders)) == 2


@pytest.mark.slow
def test_mlflow_s_own_address_counts_where_the_settings_have_none(tiny, tmp_path, empty_database, monkeypatch) -> None:
    shutil.copy(empty_database, tmp_path / "elsewhere.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/elsewhere.db")
    config = tiny("logger=mlflow")
    train_run(config)
    assert len(mlflow_runs(config, config.study, "../elsewhere.db")) == 1
    assert mlflow_runs(config, config.study) == []


@pytest.mark.slow
def test_a_record_that_was_deleted_is_another_run_of_mlflow(tiny) -> None:
    config = tiny("logger=mlflow", "epochs=1")
    for _ in range(2):
        train_run(config)
        shutil.rmtree(folder(config))
    assert len(mlflow_runs(config, config.study)) == 2


# ---- several runs at a time


@every_tool
def test_runs_in_one_process_are_kept_apart(tiny, tool) -> None:
    configs = [tiny(f"logger={tool}", f"seed={seed}") for seed in range(2)]
    exits = sys.exit, sys.excepthook
    assert [status["state"] for status in together(configs)] == ["done"] * 2
    assert (sys.exit, sys.excepthook) == exits
    for config in configs:
        assert READ[tool](config)[0] == near(recorded(config))
    assert len({tuple(recorded(config, SPEED)) for config in configs}) == 2


@pytest.mark.slow
def test_workers_of_a_pool_that_all_begin_a_database_of_mlflow(tmp_path) -> None:
    words = ("-m", *SMALL, "seed=0,1", "logger=mlflow", "hydra.launcher.slots=2")
    home = tmp_path / "home"
    home.mkdir()
    with start(home, "train.py", *words) as process:  # whose workers have no MLflow of this process
        out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert "logger" not in out + error
    records = runs.find(home / "outputs" / "default")
    assert len(records) == 2
    for run in records:
        settings = {**runs.read_config(run), "output_dir": str(home / "outputs")}
        config = RunConfig.model_validate(settings)
        assert of_mlflow(config)[0] == near(recorded(config))


# ---- a tool that fails


class Broken:
    def __init__(self, run: runs.Run, settings: object) -> None:
        pass

    def log(self, row: loggers.Row) -> None:
        pass

    def end(self, facts: object) -> None:
        pass


@pytest.mark.parametrize("error", [OSError("planted\nat length"), KeyboardInterrupt()])
@pytest.mark.parametrize("method", ["__init__", "log", "end"])
def test_a_tool_that_fails_costs_one_warning(tiny, method, error, monkeypatch, capfd) -> None:
    def fails(*arguments: object) -> None:
        raise error

    plain, told = tiny("study=plain"), tiny("logger=tensorboard")
    monkeypatch.setattr(
        import_module("normlab.loggers.tensorboard"), "TensorBoard", type("", (Broken,), {method: fails})
    )
    train_run(plain)
    train_run(told)
    assert outcome(told) == outcome(plain)
    words = f"logger=tensorboard is off for the rest of this run: {type(error).__name__}: "
    [line] = [line for line in (folder(told) / "run.log").read_text().splitlines() if "WARNING" in line]
    assert words in line
    assert "at length" not in line
    assert capfd.readouterr().err.count(words) == 1


def test_a_library_that_cannot_be_imported_costs_one_warning(tiny, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "normlab.loggers.tensorboard", None)
    config = tiny("logger=tensorboard")
    assert train_run(config)["state"] == "done"
    assert (folder(config) / "run.log").read_text().count("WARNING logger=tensorboard is off") == 1


def test_a_tool_that_hangs_is_left_behind(tiny, monkeypatch) -> None:
    released = threading.Event()
    hangs = type("", (Broken,), {"log": lambda *_: released.wait(60)})
    monkeypatch.setattr(import_module("normlab.loggers.tensorboard"), "TensorBoard", hangs)
    monkeypatch.setattr(loggers, "END_SECONDS", 0.2)
    config = tiny("logger=tensorboard")
    assert train_run(config)["state"] == "done"
    released.set()
    assert "WARNING logger=tensorboard did not finish" in (folder(config) / "run.log").read_text()


@pytest.mark.slow
def test_wandb_without_network_or_login_is_a_warning_and_no_question(tiny, monkeypatch, capfd) -> None:
    from normlab.loggers import wandb

    monkeypatch.setattr(wandb, "SERVER_SECONDS", 1.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    # A study of its own: after a failed start, W&B's service takes the run's id for used until the process ends.
    config = tiny("logger=wandb", "logger.mode=online", "study=unreachable")
    assert train_run(config)["state"] == "done"
    assert (folder(config) / "run.log").read_text().count("WARNING logger=wandb is off for the rest of this run") == 1
    out, error = capfd.readouterr()
    assert out == ""
    assert len(error.splitlines()) == 1


# ---- settings


@every_tool
def test_a_logger_makes_no_other_run(tiny, tool) -> None:
    assert runs.run_id(tiny(f"logger={tool}").as_dict()) == runs.run_id(tiny().as_dict())


@pytest.mark.parametrize("there", [False, True])
def test_a_missing_package_is_reported_before_the_run(tiny, tmp_path, monkeypatch, there) -> None:
    """And a folder that happens to have its name, such as wandb makes, is none."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    sys.path_importer_cache.clear()
    if there:
        files.make_folder(tmp_path / "wandb")
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "wandb", raising=False)
        with pytest.raises(UserError, match=r"logger=wandb .* not installed: wandb.\n.*'normlab\[wandb\]'"):
            preflight.check_logger(tiny("logger=wandb").logger)
        [finding] = doctor.logger(tiny("logger=wandb"))
    assert finding.level == "problem"
    assert "pip install 'normlab[wandb]'" in finding.fix
    assert not list(doctor.logger(tiny()))
