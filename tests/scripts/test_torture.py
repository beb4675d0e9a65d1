"""`scripts/torture fuzz` and `hostile`: that they see what they look for, and a few of their attacks."""

import shutil
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from attacks import fuzz, hostile, mutations, seen, watched
from normlab.common.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # of forks, and of what damaged files make numpy say
ATTACKS = 10
KINDS = (
    "status.json is a pipe",
    "report is a link to a folder of this machine",
    "config.yaml: anchors that multiply",
    "escape sequences as the network's name",
)


def refuse() -> None:
    raise UserError("It is not valid.")


def test_a_process_that_is_watched_is_ended_and_its_error_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "WAIT", 1.0)
    assert "still at work" in watched.watched(lambda: time.sleep(60)).fault
    monkeypatch.undo()
    assert watched.watched(lambda: len(bytearray(2 * watched.BYTES))).cause.startswith("MemoryError")
    assert watched.watched(lambda: [1 / 0]).cause == "ZeroDivisionError: division by zero"
    assert watched.watched(refuse)[:3] == (None, "It is not valid.", "")
    assert watched.watched(lambda: [print("seen"), 7][1])[:4] == (7, "", "", "seen\n")


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({}, "same"),
        ({"said": ["run-a is damaged"], "numbers": {"run-a": "2", "run-b": "1"}}, "told"),
        ({"said": ["run-a is damaged"], "numbers": {"run-a": "1", "run-b": "2"}}, "silently changed"),
        ({"said": ["run-b is damaged"]}, "silently changed"),
        ({"states": {"run-a": "failed", "run-b": "done"}}, "silently changed"),
        ({"tables": {"accuracy.csv": "2"}}, "silently changed"),
        ({"said": ["run-a is damaged"], "absurd": ["an accuracy of 7"]}, "silently changed"),
    ],
)
def test_an_outcome_is_told_only_by_a_sentence_that_names_the_run(change: dict[str, Any], outcome: str) -> None:
    before: dict[str, Any] = {"states": {"run-a": "done", "run-b": "done"}, "numbers": {"run-a": "1", "run-b": "1"}}
    before |= {"tables": {"accuracy.csv": "1"}, "said": [], "absurd": []}
    assert seen.compared(before, before | change, ["run-a"])[0] == outcome


def test_a_seed_gives_the_same_changes() -> None:
    content = b'{"epoch": 1, "step": 2}\n{"epoch": 2, "step": 4}\n'
    found = [[mutations.mutate(Random(i), "metrics.jsonl", content, b"") for i in range(200)] for _ in range(2)]
    assert found[0] == found[1]
    assert len({changed for _, changed in found[0]}) > 100


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> fuzz.Fuzz:
    return fuzz.Fuzz(tmp_path_factory.mktemp("fuzz").resolve(), batches=(8,))


@pytest.mark.slow
def test_changes_to_the_files_of_a_study_are_told_or_change_nothing(fuzzed: fuzz.Fuzz) -> None:
    for number in range(1, ATTACKS + 1):
        chance = Random(f"0 {number}")
        attack = fuzzed.attack(chance)
        outcome, why = fuzzed.outcome(attack, chance)
        assert not fuzz.is_fault(attack, outcome), f"{attack.file}: {attack.done}: {outcome}: {why}"


@pytest.mark.slow
def test_hostile_studies_are_told_of_and_change_nothing_else(fuzzed: fuzz.Fuzz, tmp_path: Path) -> None:
    scene = hostile.Hostile(tmp_path.resolve(), lambda folder: shutil.copytree(fuzzed.folder, folder))
    kinds = [kind for kind in hostile.kinds() if kind.name in KINDS]
    assert len(kinds) == len(KINDS)
    assert [(kind.name, problem) for kind in kinds for problem in scene.problems(kind)] == []
