"""The index is a cache: with it, without it or with a damaged one, a study is what the files of its runs say."""

import json
import math
import os
import pickle
import shutil
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from normlab import runs
from normlab.report.study import index, load
from normlab.report.study.find import find_studies
from normlab.report.study.load import Study
from normlab.runs import archive

REFERENCE = Path(__file__).parents[3] / "outputs" / "reference"
RECORDED = ["davis2021_scale_laptop", "gitman2017_imagenet_laptop", "santurkar2018_noise_laptop", "small_batch_laptop"]
PLACE = ["setting", "arm", "batch", "seed", "state"]


@pytest.fixture(autouse=True)
def index_of_small_studies(monkeypatch) -> None:
    monkeypatch.setattr(index, "WORTH", 1)


@pytest.fixture
def read_line_by_line(monkeypatch) -> list[str]:
    """The files of rows that were not taken from the index, as they are read."""
    found: list[str] = []

    def as_columns(path: Path | archive.PackedPath, content: bytes):
        found.append("/".join(str(path).split("/")[-2:]))
        return original(path, content)

    original = index.as_columns
    monkeypatch.setattr(index, "as_columns", as_columns)
    return found


@pytest.fixture
def small(add_run, add_probe, study) -> Path:
    """Three runs, of which one is running and one has a probe with layers, lists and what is not finite."""
    add_run("bn")
    add_run("none", state="running", accuracies=(0.5, None))
    rows = [
        {"step": 3, "layer": "conv1", "position": 0, "norm": 0.1 + 0.2, "edges": [0.0, 1.0]},
        {"step": 3, "layer": "fc", "position": 1, "norm": None, "edges": None},
    ]
    add_probe(add_run("gn"), "gradients", rows)
    return study


def assert_same(one: Study, other: Study) -> None:
    pd.testing.assert_frame_equal(one.runs, other.runs, check_exact=True)
    pd.testing.assert_frame_equal(one.evaluations, other.evaluations, check_exact=True)
    assert list(one.probes) == list(other.probes)
    for probe, rows in one.probes.items():
        pd.testing.assert_frame_equal(rows, other.probes[probe], check_exact=True)
    assert (one.configs, one.provenance) == (other.configs, other.provenance)
    assert (one.remarks, one.warnings) == (other.remarks, other.warnings)


def without_index(folder: Path, now=None) -> Study:
    (folder / index.NAME).unlink()
    return load(folder, now=now)


def assert_is_what_the_files_say(found: pd.DataFrame, runs: list[Path], file: str, key: list[str]) -> None:
    """The files are read here, each line by itself."""
    rows = [
        {"run": run.name, **json.loads(line)}
        for run in runs
        if (run / file).exists()
        for line in (run / file).read_text().splitlines()
    ]
    expected = pd.DataFrame(rows)
    expected = expected.sort_values([name for name in key if name in expected], ignore_index=True)
    assert list(found) == ["run", *PLACE, *(name for name in expected if name != "run")]
    for name in expected:
        if name in ("run", "layer", "histogram", "edges"):
            pairs = zip(found[name], expected[name], strict=True)
            assert all(
                one == other if isinstance(other, str | list) else one != one or one is None for one, other in pairs
            )
        else:
            plain = [math.nan if value is None else float(value) for value in expected[name]]
            np.testing.assert_array_equal(found[name].to_numpy(), plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_study_is_the_same_with_an_index_and_read_plainly(tmp_path, name, read_line_by_line) -> None:
    folder = tmp_path / name
    packed = REFERENCE / f"{name}{archive.SUFFIX}"
    zipfile.ZipFile(packed).extractall(folder)
    first = load(folder)
    assert read_line_by_line
    read_line_by_line.clear()
    second = load(folder)
    assert read_line_by_line == []
    assert_same(first, second)
    assert_same(first, load(packed))
    recorded = runs.find(folder)
    assert_is_what_the_files_say(second.evaluations, recorded, "metrics.jsonl", ["run", "epoch"])
    for probe, rows in second.probes.items():
        assert_is_what_the_files_say(rows, recorded, f"probes/{probe}.jsonl", ["run", "step", "layer"])
    for run in recorded:
        recorded_config = yaml.safe_load((run / "config.yaml").read_text())
        recorded_config = {key: value for key, value in recorded_config.items() if key not in ("format", "run_id")}
        assert second.configs[run.name] == runs.completed(recorded_config)
        assert second.provenance[run.name] == json.loads((run / "provenance.json").read_text())


def test_a_new_row_of_a_run_is_seen_and_nothing_else_is_read_again(small, now, read_line_by_line) -> None:
    before = load(small, now=now)
    running = before.runs.set_index("arm").loc["none", "run"]
    read_line_by_line.clear()
    with (small / running / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "step": 30, "test_accuracy": 0.75}\n')
    (small / running / "status.json").write_text('{"state": "done"}')
    found = load(small, now=now)
    assert read_line_by_line == [f"{running}/metrics.jsonl"]
    assert found.evaluations.query("arm == 'none'")["test_accuracy"].iloc[-1] == 0.75
    assert found.states()["done"] == 3
    assert_same(found, without_index(small, now))


def test_a_status_is_never_taken_from_the_index(small, now) -> None:
    before = load(small, now=now)
    status = small / before.runs.set_index("arm").loc["bn", "run"] / "status.json"
    written = status.stat()
    status.write_text(status.read_text().replace("done", "fail").replace("fail", "gone"))
    os.utime(status, ns=(written.st_atime_ns, written.st_mtime_ns))
    assert load(small, now=now).states()["unreadable"] == 1


def with_another_number(run: Path) -> None:
    """Of as many digits, in the same file; and the clock of the file system may be coarse."""
    path = run / "metrics.jsonl"
    written = path.stat()
    path.write_text(path.read_text().replace('"test_accuracy": 0.9', '"test_accuracy": 0.7'))
    os.utime(path, ns=(written.st_atime_ns, written.st_mtime_ns + 1))


def with_an_older_file_of_the_same_size(run: Path) -> None:
    path = run / "metrics.jsonl"
    other = path.with_suffix(".other")
    other.write_text(path.read_text().replace('"test_accuracy": 0.9', '"test_accuracy": 0.7'))
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


def with_a_column_less(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({k: v for k, v in row.items() if k != "wall_seconds"}) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(text)


def with_a_probe(run: Path) -> None:
    (run / "probes").mkdir()
    (run / "probes" / "ics.jsonl").write_text('{"step": 0, "layer": "fc", "l2": 0.25}\n')


def copied(run: Path) -> None:
    shutil.copytree(run, run.with_name("another"))
    text = (run / "config.yaml").read_text().replace("seed: 0", "seed: 1")
    (run.with_name("another") / "config.yaml").write_text(text)


@pytest.mark.parametrize(
    "change",
    [
        shutil.rmtree,
        with_another_number,
        with_an_older_file_of_the_same_size,
        lambda run: (run / "metrics.jsonl").unlink(),
        with_a_column_less,
        with_a_probe,
        copied,
    ],
)
def test_what_has_changed_is_seen(small, now, change) -> None:
    before = load(small, now=now)
    change(small / before.runs.set_index("arm").loc["bn", "run"])
    found = load(small, now=now)
    assert_same(found, without_index(small, now))
    with pytest.raises(AssertionError):
        assert_same(found, before)


def flipped(path: Path) -> None:
    """A number in the middle; the archive's checksums tell."""
    content = bytearray(path.read_bytes())
    at = content.index(np.float64(0.9).tobytes())
    content[at] ^= 1
    path.write_bytes(content)


def an_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.arange(3))


def without_an_array(path: Path) -> None:
    with np.load(path) as arrays:
        kept = {"head": arrays["head"]}
    with path.open("wb") as file:
        np.savez(file, **kept)


def _rewrite_head(path: Path, change) -> None:
    with np.load(path) as arrays:
        found = dict(arrays)
    head = json.dumps(change(json.loads(found.pop("head").tobytes()))).encode()
    with path.open("wb") as file:
        np.savez(file, head=np.frombuffer(head, np.uint8), **found)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.write_bytes(b"no archive at all"),
        lambda path: path.write_bytes(b""),
        lambda path: _rewrite_head(path, lambda head: head | {"version": index.VERSION + 1}),
        lambda path: _rewrite_head(path, lambda head: {"version": index.VERSION, "groups": [None]}),
        *(flipped, an_array, without_an_array),
    ],
)
def test_a_damaged_index_is_as_none_and_is_written_again(small, now, damage, read_line_by_line) -> None:
    before = load(small, now=now)
    damage(small / index.NAME)
    read_line_by_line.clear()
    assert_same(before, load(small, now=now))
    assert len(read_line_by_line) == 4
    read_line_by_line.clear()
    assert_same(before, load(small, now=now))
    assert read_line_by_line == []


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_an_index_is_executed(small, now, tmp_path) -> None:
    before = load(small, now=now)
    touched = tmp_path / "touched"
    for content in ({"head": np.array([Touch(touched)], dtype=object)}, None):
        with (small / index.NAME).open("wb") as file:
            if content:
                np.savez(file, allow_pickle=True, **content)
            else:
                pickle.dump(Touch(touched), file)
        assert_same(before, load(small, now=now))
    assert not touched.exists()


def test_a_study_whose_folder_cannot_be_written_is_loaded_all_the_same(small, now) -> None:
    before = load(small, now=now)
    (small / index.NAME).unlink()
    (small / index.NAME).mkdir()  # what even root cannot replace by a file
    names = sorted(small.iterdir())
    assert_same(before, load(small, now=now))
    assert sorted(small.iterdir()) == names


def test_a_line_that_cannot_be_read_is_told_of_every_time(small, now) -> None:
    [run] = [run for run in runs.find(small) if run.name.startswith("bn")]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], "{bad", lines[2]]))
    first = load(small, now=now)
    assert [f"{run / 'metrics.jsonl'}, line 2" in warning for warning in first.warnings] == [True]
    assert_same(first, load(small, now=now))


@pytest.mark.slow
def test_reports_at_once_do_no_harm(small, now) -> None:
    before = load(small, now=now)
    (small / index.NAME).unlink()
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: load(small, now=now), range(16)):
            assert_same(before, found)
    assert sorted(path.name for path in small.iterdir() if path.is_file()) == [index.NAME]
    assert_same(before, load(small, now=now))


def test_an_index_is_no_run_and_no_study(small) -> None:
    found, studies = runs.find(small), find_studies(small.parent)
    load(small)
    assert (small / index.NAME).exists()
    assert (runs.find(small), find_studies(small.parent)) == (found, studies)


def test_a_study_that_is_read_at_once_leaves_no_index(small, monkeypatch) -> None:
    monkeypatch.setattr(index, "WORTH", 100)
    load(small)
    assert not (small / index.NAME).exists()


def test_an_index_is_not_written_for_the_sake_of_a_few_rows(small, add_run) -> None:
    load(small)
    written = (small / index.NAME).stat().st_mtime_ns
    add_run("bn", seed=1, epochs=60, accuracies=(0.5,) * 60)
    load(small)
    assert (small / index.NAME).stat().st_mtime_ns > written
    written = (small / index.NAME).stat().st_mtime_ns
    add_run("bn", seed=2, epochs=1, accuracies=(0.5,))
    load(small)
    assert (small / index.NAME).stat().st_mtime_ns == written


def a_bomb(path: Path) -> None:
    """A thousandth of the size of what it unpacks to."""
    with np.load(path) as arrays:
        head = arrays["head"]
    with path.open("wb") as file:
        np.savez_compressed(file, **{"head": head, "0": np.zeros((9, 1_000_000)), "1": np.zeros((9, 1_000_000))})


def a_link(path: Path) -> None:
    elsewhere = path.parents[1] / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("made", [a_bomb, a_link, a_pipe])
def test_an_index_that_nobody_writes_so_is_not_read(small, now, made, read_line_by_line) -> None:
    before = load(small, now=now)
    made(small / index.NAME)
    read_line_by_line.clear()
    tracemalloc.start()
    assert_same(before, load(small, now=now))
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()
    assert len(read_line_by_line) == 4


def test_an_index_of_another_user_is_not_read(small, now, monkeypatch, read_line_by_line) -> None:
    load(small, now=now)
    read_line_by_line.clear()
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    load(small, now=now)
    assert len(read_line_by_line) == 4
