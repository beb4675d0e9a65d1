"""Warnings about runs of one table or cell that were not made alike."""

import json
from pathlib import Path
from typing import Any

import pytest

from normlab.report.study.load import load
from normlab.report.study.provenance import continued, mixed_cells, mixed_provenance

MADE = {
    "device": "a processor",
    "threads": 1,
    "data_fingerprint": "a" * 64,
    "versions": {"normlab": "1", "torch": "2.0", "numpy": "2.1", "python": "3.11", "torchvision": "0.2"},
    "git": {"commit": "c" * 40, "diff": ""},
    "own_code": {"model.target": {"code": "d" * 64, "modules": {}}},
    "data": {"contents": "e" * 64},
    "weights": {"weights": "start.pt", "sha256": "e" * 64},
}


def made(run: Path, **facts: Any) -> Path:
    (run / "provenance.json").write_text(json.dumps(MADE | facts))
    return run


@pytest.mark.parametrize(
    ("facts", "difference"),
    [
        ({"data_fingerprint": "f" * 64}, "images (digest): aaaaaaaaaa (2 runs); ffffffffff (1 run)"),
        ({"data": {"contents": "f" * 64}}, "files of images (digest): eeeeeeeeee (2 runs); ffffffffff (1 run)"),
        (
            {"weights": {"weights": "start.pt", "sha256": "f" * 64}},
            "trained weights at the start (digest): eeeeeeeeee (2 runs); ffffffffff (1 run)",
        ),
        ({"threads": 2}, "threads: 1 (2 runs); 2 (1 run)"),
        (
            {"own_code": {"model.target": {"code": "f" * 64}}},
            "own code: model.target code ddddddd (2 runs); model.target code fffffff (1 run)",
        ),
    ],
)
def test_seeds_of_a_cell_that_were_not_made_alike_are_a_warning(add_run, study, facts, difference) -> None:
    for seed in (0, 1):
        made(add_run("bn", seed=seed))
        made(add_run("none", seed=seed))
    made(add_run("bn", seed=2), **facts)
    made(add_run("gn", seed=2), **facts)  # a cell of its own
    (warning,) = mixed_cells(load(study))
    assert warning.startswith("The seeds of bn, batch 8 (digits, resnet18) differ in their ")
    assert difference in warning


def test_seeds_with_networks_of_other_sizes_are_a_warning(add_run, study) -> None:
    for seed, parameters in enumerate((7, 7, 8000)):
        made(add_run("bn", seed=seed, status={"parameters": parameters}))
        made(add_run("none", batch=32, seed=seed, status={"parameters": parameters}))
    (warning,) = mixed_cells(load(study))
    assert "bn, batch 8 (digits, resnet18) and 1 more" in warning
    assert "number of parameters: 7 (2 runs); 8,000 (1 run)" in warning


def test_what_older_records_lack_is_no_difference(add_run, study) -> None:
    made(add_run("bn", seed=0))
    add_run("bn", seed=1)
    assert list(mixed_cells(load(study))) == []


@pytest.mark.parametrize("library", ["python", "numpy", "torchvision"])
def test_libraries_of_several_versions_in_a_table_are_a_warning(add_run, study, library) -> None:
    made(add_run("bn"))
    assert list(mixed_provenance(load(study))) == []
    made(add_run("none"), versions=MADE["versions"] | {library: "9.9"})
    (warning,) = mixed_provenance(load(study))
    assert "2 sets of library versions" in warning
    assert "9.9" in warning


def test_a_library_of_a_network_in_several_versions_is_a_warning_and_one_that_an_arm_lacks_is_none(
    add_run, study
) -> None:
    made(add_run("bn"), versions=MADE["versions"] | {"timm": "1.0", "norms": "3"})
    made(add_run("none"), versions=MADE["versions"] | {"timm": "1.0"})
    assert list(mixed_provenance(load(study))) == []
    made(add_run("gn"), versions=MADE["versions"] | {"timm": "1.1"})
    (warning,) = mixed_provenance(load(study))
    assert "2 versions of timm: timm 1.0 (2 runs); timm 1.1 (1 run)" in warning


def test_a_commit_that_could_not_be_read_is_told(add_run, study) -> None:
    made(add_run("bn"), git={"commit": None, "error": "it has no commit yet"})
    made(add_run("none"))
    (warning,) = mixed_provenance(load(study))
    assert "normlab 1, commit not recorded, torch 2.0 (1 run)" in warning


def test_runs_that_went_on_under_other_circumstances_are_a_warning(add_run, study) -> None:
    before = MADE | {"threads": 2, "versions": MADE["versions"] | {"torch": "1.9"}, "until_step": 30}
    before["versions"]["timm"] = "1.0"
    first = made(add_run("bn"), earlier=[before], versions=MADE["versions"] | {"timm": "1.1"})
    made(add_run("none"), earlier=[before], versions=MADE["versions"] | {"timm": "1.1"})
    made(add_run("gn"), earlier=[MADE | {"host": "another", "until_step": 3}])
    made(add_run("ln"), earlier="damaged")
    told = list(continued(load(study)))
    named = f"bn seed=0 ({first.name.rpartition('-')[2]})"
    assert told == [
        f"Interrupted and continued under other circumstances ({difference}): {named} from step 30 on and 1 more."
        for difference in ("torch 1.9, then 2.0", "timm 1.0, then 1.1", "threads 2, then 1")
    ]
