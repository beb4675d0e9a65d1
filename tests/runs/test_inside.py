import os
from pathlib import Path

import pytest

from normlab import runs
from normlab.common.errors import UserError
from normlab.runs import files
from normlab.runs.inside import make_own_folder
from normlab.training.record import open_log


@pytest.fixture
def others(tmp_path):
    """What belongs to somebody else, and must stay as it is."""
    folder = tmp_path / "others"
    (folder / "folder").mkdir(parents=True)
    (folder / "file").write_text("theirs")
    return folder


@pytest.mark.parametrize("kind", ["folder", "file", "absent", "pipe"])
@pytest.mark.parametrize(
    "at", [".", "run.log", "metrics.jsonl", "probes", "probes/ics.jsonl", "run.lock", "deep/est/x"]
)
def test_nothing_is_written_to_a_run_through_what_leads_elsewhere(others, tmp_path, tiny, at, kind) -> None:
    run = runs.Run(tiny().as_dict())
    path = run.folder / at
    path.parent.mkdir(parents=True)
    os.mkfifo(path) if kind == "pipe" else path.symlink_to(others / kind)
    before = sorted(others.rglob("*"))
    for write in (run.freeze, run.lock().__enter__):
        with pytest.raises(UserError, match=rf"{path.name} is (a link|neither)"):
            write()
    assert sorted(others.rglob("*")) == before
    assert (others / "file").read_text() == "theirs"


def test_what_becomes_a_link_while_a_run_trains_is_not_followed(others, tmp_path, tiny) -> None:
    run = runs.Run(tiny().as_dict())
    run.freeze()
    log = open_log(run.folder, write=True)
    with run.lock():
        (run.folder / "probes").symlink_to(others / "folder")
        with pytest.raises(UserError, match="probes is a link"):
            run.append_probe("ics", [{"step": 1, "layer": "x"}])
        run.folder.rename(tmp_path / "moved")
        run.folder.symlink_to(others / "folder")
        log.info("a line")
        with pytest.raises(UserError):
            run.append_metrics({"epoch": 1, "step": 1})
    for handler in log.handlers:
        handler.close()
    assert list((others / "folder").iterdir()) == []
    assert "a line" in (tmp_path / "moved" / "run.log").read_text()


def test_folders_of_studies_and_those_above_may_be_links(others, tmp_path) -> None:
    (tmp_path / "study").symlink_to(others / "folder")
    make_own_folder(tmp_path / "study" / "report" / "part", tmp_path / "study")
    assert (others / "folder" / "report" / "part").is_dir()


def test_folders_within_folders_without_end_are_looked_at(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(1200):  # a path of so many is too long to be named
        Path("a").mkdir()
        os.chdir("a")
    try:
        make_own_folder(tmp_path, tmp_path)
        files.remove_temporaries(tmp_path)
    finally:
        for _ in range(1200):  # which a later session of pytest could not remove
            os.chdir("..")
            Path("a").rmdir()


def test_links_that_a_logger_keeps_in_its_folder_do_no_harm(tmp_path) -> None:
    (tmp_path / "run" / "wandb" / "run-1").mkdir(parents=True)
    (tmp_path / "run" / "wandb" / "run-1" / "core.log").symlink_to(tmp_path / "cache.log")
    make_own_folder(tmp_path / "run", tmp_path)
    (tmp_path / "run" / "probes").mkdir()
    (tmp_path / "run" / "probes" / "ics.jsonl").symlink_to("../../others")
    with pytest.raises(UserError, match=r"ics\.jsonl is a link, to"):
        make_own_folder(tmp_path / "run", tmp_path)
