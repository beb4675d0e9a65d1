"""Which test images a run got right: written, read and refused."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import composed

from normlab import runs
from normlab.common.errors import UserError
from normlab.report.study.load import load
from normlab.runs import correct, folder, sums

ORDER = "0" * 64
BITS = np.array([1, 0, 1, 1, 1, 0, 0, 1, 1, 0], bool)
WHOLE = {"order": ORDER, "classes": [["cat", 4], ["dog", 6]], "correct": "uYA="}


def content(**changes: Any) -> bytes:
    return json.dumps(WHOLE | changes).encode()


def test_bits_come_back_and_ten_thousand_of_them_take_two_kilobytes() -> None:
    text = correct.as_json(ORDER, ("cat", "dog"), (4, 6), np.packbits(BITS).tobytes())
    assert json.loads(text) == WHOLE
    found = correct.parse(Path("correct.json"), text)
    assert found.bits().tolist() == BITS.tolist()
    assert (found.images, found.number) == (10, BITS.sum())
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert len(correct.as_json(ORDER, names, [1000] * 10, bytes(1250))) < 2000


def test_classes_that_cannot_be_shown_apart_are_numbered() -> None:
    text = correct.as_json(ORDER, ("a\n", "a\\n", "b"), (3, 3, 4), np.packbits(BITS).tobytes())
    assert correct.parse(Path("correct.json"), text).classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"\xff", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "holds no JSON object"),
        (b"{}", "order is missing"),
        (content(order="x"), "order is"),
        (content(classes=[]), "classes is"),
        (content(classes=[["cat", -4], ["dog", 14]]), "classes.0.1 is -4"),
        (content(classes=[["cat", 2**62], ["dog", 6]]), "classes.0.1 is"),
        (content(classes=[["cat\x1b[2J", 4], ["dog", 6]]), "classes.0.0"),
        (content(classes=[["cat", 4], ["cat", 6]]), "two of its classes have the same name"),
        (content(classes=[["cat", 4], ["dog", 60]]), "2 bytes of bits for 64 images"),
        (content(classes=[["cat", 0]], correct=""), "it has no images"),
        (content(correct="uYE="), "more images than there are"),
        (content(correct="uY"), "cannot be read"),
        (content(correct="é"), "cannot be read"),
        (content(correct=7), "correct is 7"),
    ],
)
def test_what_is_no_record_of_images_is_refused_in_a_sentence(text, why) -> None:
    with pytest.raises(UserError, match=r"correct\.json cannot be read") as error:
        correct.parse(Path("x", "correct.json"), text)
    assert why in str(error.value)
    assert str(error.value).replace("\n", "").isprintable()


@pytest.fixture
def run(tmp_path) -> runs.Run:
    """A finished run that got six of ten images right."""
    run = runs.Run(composed("epochs=1", f"output_dir={tmp_path}", "study=x").as_dict())
    run.freeze()
    with run.lock():
        run.write_status("running", started=runs.now())
        run.write_provenance({"host": "here"})
        run.append_metrics({"epoch": 1, "step": 3, "test_accuracy": 0.6})
        run.write_correct(content())
        run.write_status("done")
    return run


def test_it_belongs_to_the_record(run) -> None:
    assert not runs.check(run.folder)
    assert load(run.folder.parent).correct[run.name].number == 6
    path = run.folder / correct.CORRECT
    path.write_bytes(content(correct="uQA="))
    assert "correct.json is not what the run wrote" in runs.check(run.folder)
    assert load(run.folder.parent).states()["unreadable"] == 1
    path.unlink()
    assert "correct.json is missing" in runs.check(run.folder)


@pytest.mark.parametrize(
    ("text", "why"),
    [(b"{", "correct.json cannot be read"), (content(correct="uQA="), "does not come to the accuracy")],
)
def test_a_strange_one_costs_its_run_the_tables_by_image_alone(run, text, why) -> None:
    with run.lock():
        run.write_correct(text)
        run.write_status("done")
    study = load(run.folder.parent)
    assert study.states()["done"] == 1
    assert not study.correct
    assert [why in warning for warning in study.warnings] == [True]


@pytest.mark.parametrize("stage", [(Path, "unlink"), (folder.Run, "_rewrite")])
def test_a_resumed_run_starts_without_it_and_is_a_record_if_it_is_killed_meanwhile(run, monkeypatch, stage) -> None:
    with run.lock():
        run.write_status("running")
        with monkeypatch.context() as killed:
            killed.setattr(*stage, Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run.keep_rows_until(3, 3)
        assert not runs.check(run.folder)
        run.keep_rows_until(3, 3)
        assert not (run.folder / correct.CORRECT).exists()
        run.write_status("interrupted")
    assert not runs.check(run.folder)


def test_a_process_that_is_killed_while_it_writes_it_leaves_a_record(run, monkeypatch) -> None:
    with run.lock():
        run.write_status("running")
        run.keep_rows_until(3, 3)
        monkeypatch.setattr(sums, "sum_of", Mock(side_effect=[*[sums.sum_of(b"", run.run_id)] * 2, KeyboardInterrupt]))
        with pytest.raises(KeyboardInterrupt):
            run.write_correct(content())
    monkeypatch.undo()
    assert (run.folder / correct.CORRECT).exists()
    assert not runs.check(run.folder)
