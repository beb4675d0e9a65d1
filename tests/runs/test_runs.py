"""A run on disk: identity, names, status, metrics, damage, and what the operating system refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from pydantic import Field
from tools import works

from normlab import runs
from normlab.common.errors import UserError
from normlab.config.schema import SGD, Adam, RunConfig, Since
from normlab.runs import archive, files
from normlab.runs.identity import FORMAT
from normlab.runs.record import FormatError

REFERENCE = Path(__file__).parents[2] / "outputs" / "reference"
RECORDED = sorted(REFERENCE.glob(f"*{archive.SUFFIX}"))


@pytest.fixture
def run(make) -> runs.Run:
    run = runs.Run(make().as_dict())
    run.freeze()
    return run


@pytest.mark.parametrize(
    "setting",
    [
        *(
            "device=cpu",
            "threads=1",
            "study=other",
            "checkpoint_seconds=5",
            "save_weights=true",
            "keep_checkpoint=true",
        ),
        "data_dir=/elsewhere",
    ],
)
def test_how_a_run_is_carried_out_does_not_change_what_it_is(make, setting) -> None:
    assert runs.run_name(make(setting).as_dict()) == runs.run_name(make().as_dict())


@pytest.mark.parametrize(
    "setting",
    ["seed=1", "norm.eps=1e-3", "optimizer.lr=0.3", "epochs=9", "precision=bf16", "dataset.flip=true", "norm_batch=4"],
)
def test_what_can_change_a_result_changes_the_run(make, setting) -> None:
    assert runs.run_id(make(setting).as_dict()) != runs.run_id(make().as_dict())


def test_equal_numbers_make_equal_runs_however_they_are_written(make) -> None:
    for one, other in [
        ("optimizer.lr=1", "optimizer.lr=1.0"),
        ("norm.momentum=1", "norm.momentum=1.0"),
        ("norm.eps=1e-5", "norm.eps=0.00001"),
    ]:
        assert runs.run_id(make(one).as_dict()) == runs.run_id(make(other).as_dict())


def test_the_path_of_a_folder_is_not_part_of_a_run_but_its_name_is(make) -> None:
    def folder(*settings: str) -> str:
        return runs.run_id(make("dataset=image_folder", *settings).as_dict())

    assert folder("dataset.path=/a/x") == folder("dataset.path=/b/x", "dataset.workers=7")
    assert folder("dataset.path=/a/x") != folder("dataset.path=/a/x", "dataset.name=b")


def test_folders_differ_by_their_names_by_default(make) -> None:
    names = [make("dataset=image_folder", f"dataset.path={path}").dataset.name for path in ("/a/cats", "/a/dogs 2/")]
    assert names == ["cats", "dogs_2"]


@pytest.mark.parametrize(
    ("idle", "at_work"),
    [
        ("precise_batches=7", "eval_stats=precise"),
        ("calibration_images=7", "init=lsuv"),
        ("calibration_images=7", "init=bn_folded"),
        ("calibration_images=7", "norm=wn norm.init=data"),
        ("norm_batch=128", "eval_stats=batch"),
        ("norm_batch=128", "init=lsuv"),
        ("norm_batch=128", "batch=256"),
    ],
)
def test_what_means_nothing_makes_no_other_run(make, idle, at_work) -> None:
    """Groups of the training batch's size are the whole of it, but not of larger batches of other images."""
    at_work = at_work.split()
    assert runs.run_name(make(idle).as_dict()) == runs.run_name(make().as_dict())
    assert runs.run_id(make(idle, *at_work).as_dict()) != runs.run_id(make(*at_work).as_dict())


@pytest.mark.parametrize("study", RECORDED, ids=lambda path: path.name)
def test_recorded_runs_match_their_configuration(study) -> None:
    with archive.opened(study) as packed:
        for folder in runs.find(packed):
            config = runs.read_config(folder)
            status = runs.read_status(folder)
            today = RunConfig.model_validate(config).as_dict()
            assert today == config
            assert status is not None
            assert runs.run_id(today) == status["run_id"]
            assert folder.name == status["name"] == runs.run_name(config)
            assert status["run_id"] == runs.run_id(config)


def test_the_defaults_are_the_run_that_they_were_in_the_first_format_and_a_name_shows_the_main_settings(make) -> None:
    assert runs.run_id(make().as_dict()) == "404b9eb0b5"
    name = runs.run_name(make("norm=none", "batch=8", "norm_batch=4", "seed=2", "depth=50").as_dict())
    assert name.startswith("resnet50-digits-none-b8-g4-s2-")


class _SGD(SGD):
    """One with a setting that came later."""

    clip: Annotated[float, Since(2, neutral=0.0)]


class _Config(RunConfig):
    """One with settings that came later: of a run, of a group of one kind, and a group."""

    optimizer: Annotated[_SGD | Adam, Field(discriminator="name")]
    warm_start: Annotated[str | None, Since(2, neutral=None)]
    pruning: Annotated[dict[str, Any], Since(3, neutral={"name": "none"})]


LATER = {"optimizer": {"clip": 0.0}, "warm_start": None, "pruning": {"name": "none"}}


@pytest.fixture
def later(monkeypatch) -> None:
    """Settings that came with later formats of records."""
    identity = sys.modules[runs.identity.__module__]
    monkeypatch.setattr(identity, "_schema", lambda: _Config)
    monkeypatch.setattr(identity, "FORMAT", 3)


def _with(config: dict[str, Any], group: str, values: Any) -> dict[str, Any]:
    return config | {group: {**config.get(group, {}), **values} if isinstance(values, dict) else values}


def test_settings_that_come_later_change_no_run_while_they_change_nothing(make, later) -> None:
    recorded = make().as_dict()
    full = recorded
    for group, values in LATER.items():
        full = _with(full, group, values)
    assert runs.run_id(full) == runs.run_id(recorded)
    assert runs.completed(recorded) == runs.completed(full) == full


@pytest.mark.parametrize(
    ("group", "values"), [("optimizer", {"clip": 1.0}), ("warm_start", "a"), ("pruning", {"name": "random"})]
)
def test_settings_that_come_later_count_when_they_change_something(make, later, group, values) -> None:
    changed = _with(make().as_dict(), group, values)
    assert runs.run_id(changed) != runs.run_id(make().as_dict())
    assert runs.completed(changed)[group] == changed[group]


def test_a_setting_that_comes_later_to_one_kind_of_group_does_not_come_to_others(make, later) -> None:
    config = make("optimizer=adam").as_dict()
    assert "clip" not in runs.completed(config)["optimizer"]


def test_a_record_of_a_newer_format_is_a_sentence_and_stays(run) -> None:
    path = run.folder / "config.yaml"
    path.write_text(path.read_text().replace(f"format: {FORMAT}", f"format: {FORMAT + 1}"))
    before = path.read_text()
    for read in (run.freeze, lambda: runs.read_config(run.folder)):
        with pytest.raises(FormatError, match=f"record of format {FORMAT + 1}, and .* reads up to format {FORMAT}"):
            read()
    assert path.read_text() == before


def test_a_record_of_before_the_first_format_is_read_though_its_id_cannot_be_made_anew(run) -> None:
    path = run.folder / "config.yaml"
    path.write_text(path.read_text().replace(f"format: {FORMAT}\n", "").replace("epochs:", "epochs: 7 #"))
    assert runs.read_record(run.folder).config["epochs"] == 7
    run.write_status("done")  # with checksums, which no record without a format has
    with pytest.raises(UserError, match="lacks its format"):
        runs.read_record(run.folder)


def test_a_frozen_configuration_is_not_overwritten_by_how_the_run_is_carried_out_later(make, run) -> None:
    runs.Run(make("threads=3").as_dict()).freeze()
    assert runs.read_config(run.folder)["threads"] is None


@pytest.mark.parametrize("damage", ["", "norm: {", "as: it was\n", "dataset: 3\n"])
def test_a_damaged_configuration_is_written_again(run, damage) -> None:
    (run.folder / "config.yaml").write_text(damage)
    run.freeze()
    assert runs.read_config(run.folder) == run.config


def test_status_keeps_facts_that_are_not_given_again_and_a_planned_run_has_none(run) -> None:
    assert (runs.read_status(run.folder), run.state) == (None, "planned")
    assert runs.find(run.folder.parent) == [run.folder]
    run.write_status("running", started="then", step=3)
    status = run.write_status("done", ended="now")
    assert (status["state"], status["started"], status["step"], status["ended"]) == ("done", "then", 3, "now")
    assert json.loads((run.folder / "status.json").read_text()) == status


def test_numbers_that_are_not_finite_are_recorded_as_null(run) -> None:
    run.append_metrics({"epoch": 1, "step": 2, "train_loss": float("nan"), "test_loss": float("inf")})
    rows, warnings = runs.read_metrics(run.folder)
    assert rows == [{"epoch": 1, "step": 2, "train_loss": None, "test_loss": None}]
    assert not warnings


@pytest.mark.parametrize("damage", ['{"epoch": 2, "st', "[1]", '{"other": 1}', "\udcff"])
def test_a_damaged_line_costs_only_itself(run, damage) -> None:
    run.append_metrics({"epoch": 1, "step": 2})
    with (run.folder / "metrics.jsonl").open("ab") as file:
        file.write(damage.encode(errors="surrogateescape") + b"\n")
    run.append_metrics({"epoch": 3, "step": 6})
    rows, warnings = runs.read_metrics(run.folder)
    assert [row["epoch"] for row in rows] == [1, 3]
    assert len(warnings) == 1
    assert "metrics.jsonl, line 2 cannot be read" in warnings[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        '{"epoch": 1, "step": 2}',
        '{"epoch": 1, "step": 2}\n{"epoch": 2, "step": 4}\n',
        '{"epoch": 1, "step": 2}\r\n{"epoch": 2, "step": 4}\r\n',
        '{"epoch": 1, "step": 2}\n\n{"epoch": 2, "step": 4}\n',
        '{"epoch": 1, "step": 2\n"loss": 3}\n',  # both lines together would be one row
        '{"epoch": 1, "step": 2}, {"epoch": 2, "step": 4}\n',  # and this line two
        '{"epoch": 1, "step": 2}\n{"epoch": 2, "step": 4.0}\n{"epoch": 3}\n[]\n7\n',
        '{"epoch": 1, "step": 2}\n]\n',
        '{"epoch": 1, "step": 2, "loss": 0.1234567890123456789, "text": "a, \\u00e9 b"}\n',
    ],
)
def test_a_file_of_rows_is_read_as_each_of_its_lines_would_be(tmp_path, text) -> None:
    path = tmp_path / ("probe.jsonl" if "text" in text else "metrics.jsonl")
    path.write_text(text, newline="")
    expected, damaged = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = json.loads(line)
            assert isinstance(row["epoch"], int)
            assert isinstance(row["step"], int)
            expected.append(row)
        except (ValueError, TypeError, KeyError, AssertionError):
            damaged.append(number)
    rows, warnings = runs.read_rows(path)
    assert rows == expected
    assert [int(warning.split(", line ")[1].split()[0]) for warning in warnings] == damaged


def test_rows_after_the_step_of_a_resume_are_dropped(run) -> None:
    for step in (2, 4, 6):
        run.append_metrics({"epoch": step // 2, "step": step})
    run.keep_rows_until(4, 4)
    assert [row["step"] for row in runs.read_metrics(run.folder)[0]] == [2, 4]


@pytest.mark.parametrize("content", ["", "{", "null", "[1]", "\x00"])
def test_a_damaged_status_is_a_sentence_and_counts_as_failed(run, content) -> None:
    (run.folder / "status.json").write_text(content)
    with pytest.raises(UserError, match=r"status\.json cannot be read"):
        runs.read_status(run.folder)
    assert run.state == "failed"


@pytest.mark.slow
def test_recorded_configurations_equal_those_of_yaml() -> None:
    for study in RECORDED:
        with archive.opened(study) as packed:
            for folder in runs.find(packed):
                plain = yaml.safe_load((folder / "config.yaml").read_bytes())
                assert plain.pop("format") in range(1, FORMAT + 1)
                assert (plain["output_dir"], plain["data_dir"]) == ("outputs", "data")  # no folders of a machine
                plain.pop("run_id", None)
                full = runs.completed(plain)
                assert json.dumps(runs.read_config(folder)) == json.dumps(full)  # in the same order, too
                assert runs.run_id(full) == folder.name.rpartition("-")[2]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# only a comment",
        "# a comment\na: 1\n",
        "a: 1\na: 2\nseed: 3\nseed: 4\n",
        "seed: 3\na:\n  seed: 4\n",
        "seed: 012\na: 1\n",
        "a: |\n  seed: 5\n\n  text\nseed: 6\n",
        "a: 'one\n\n  two: 2\n  three'\nb: \"x\\n\\\n  y\"\n",
        "a: &shared {x: 1}\nb: *shared\n",
        "- a\n- b\n",
        "- - a\n  - b\n",
        "text\nseed: 1\n",
        "{a: 1,\nb: 2}\n",
        '"a": 1\nb: [1,\n  2]\n_c: null\n',
        "a: 1\n---\nb: 2\n",
        "a: [1,\nb: 2\n",
        "a: 2026-01-01\nb: 2026-13-45\n",
        "a: 1\r\nseed: 7\r\n",
    ],
)
def test_a_configuration_of_any_form_equals_that_of_yaml(tmp_path, text) -> None:
    (tmp_path / "config.yaml").write_text(text, newline="")
    for _ in range(2):  # the second time, its parts are known
        try:
            plain = yaml.safe_load(text)
            assert isinstance(plain, dict)
        except (yaml.YAMLError, ValueError, AssertionError):
            with pytest.raises(UserError, match=r"config\.yaml cannot be read"):
                runs.read_config(tmp_path)
        else:
            assert runs.read_config(tmp_path) == runs.completed(plain)


def test_runs_of_one_cell_have_their_own_seeds(make) -> None:
    found = []
    for seed in (0, 1, 10):
        run = runs.Run(make(f"seed={seed}").as_dict())
        run.freeze()
        found.append(runs.read_config(run.folder))
    assert [config["seed"] for config in found] == [0, 1, 10]
    assert [runs.run_name(config) for config in found] == [
        runs.run_name(make(f"seed={s}").as_dict()) for s in (0, 1, 10)
    ]


def test_a_configuration_from_disk_is_never_executed(run, tmp_path) -> None:
    (run.folder / "config.yaml").write_text(f"a: !!python/object/apply:os.mkdir ['{tmp_path}/executed']\n")
    with pytest.raises(UserError, match=r"config\.yaml cannot be read"):
        runs.read_config(run.folder)
    assert not (tmp_path / "executed").exists()


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def failing(file) -> None:
        file.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="The disk is full"):
        files.write_atomically(path, failing)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_below_a_file_cannot_be_made(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        files.make_folder(tmp_path / "file" / "folder")


def test_records_need_neither_torch_nor_hydra() -> None:
    code = "import sys, normlab.runs; print([m for m in ('torch', 'hydra', 'omegaconf', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of half a megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    if not works("mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)):
        pytest.skip("a full disk needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_checkpoint_on_a_full_disk_is_a_sentence_and_keeps_the_old_one(small_disk) -> None:
    import torch

    from normlab.training import checkpoint

    parts: dict[str, object] = {key: {} for key in ("network", "optimizer", "scaler", "probes", "position")}
    numbers = dict.fromkeys(("threads", "processes", "peak_memory_bytes"), 1)
    whole = {**parts, **numbers, "run_id": "a", "data_fingerprint": "", "memory_format": "contiguous", "averaged": None}
    checkpoint.save(small_disk, whole)
    with pytest.raises(UserError, match="The disk is full"):
        checkpoint.save(small_disk, whole | {"network": {"weight": torch.zeros(1_000_000)}})
    assert [saved for _, saved in checkpoint.load(small_disk, "a", pytest.fail)] == [whole]
    assert [path.name for path in small_disk.iterdir()] == [checkpoint.NEWEST]
