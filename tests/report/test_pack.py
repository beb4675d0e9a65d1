"""A study in one file serves wherever a study is named, and is described for archives of research data."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from normlab import report
from normlab.common.errors import UserError
from normlab.launchers import preflight
from normlab.report.importing import Import, import_runs
from normlab.report.study import find, load
from normlab.runs import archive

ROOT = Path(__file__).parents[2]
IMPORT = {name: field.default for name, field in Import.model_fields.items() if not field.is_required()}
CITATION = """
cff-version: 1.2.0
license: [CC-BY-4.0, MIT]
title: What does it buy?
authors:
  - {family-names: Ada, given-names: Jo, name-particle: von, orcid: "https://orcid.org/0000-0001-2345-6789"}
  - {name: A laboratory}
"""


@pytest.fixture
def outputs(add_run, add_probe, tmp_path, monkeypatch) -> Path:
    """A study with a probe, remarks, and runs in every state; a checkpoint and a log lie in one of them."""
    run = add_run("bn")
    add_probe(run, "mine", [{"step": 3, "layer": "fc", "size": 0.25}])
    (run / "checkpoint.pt").write_bytes(b"weights")
    (run / "run.log").write_text("what the machine printed\n")
    (run.parent / "notes.md").write_text("We looked.\n")
    add_run("none", state="running", accuracies=(0.5, None))
    add_run("gn", state=None)
    add_run("ln", state="failed", status={"error": "It broke."})
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs"


def assert_same(one, other) -> None:
    for part in ("evaluations", "configs", "provenance", "remarks", "notes", "warnings", "name"):
        first, second = getattr(one, part), getattr(other, part)
        if part == "evaluations":
            first, second = first.drop(columns="state").to_dict("list"), second.drop(columns="state").to_dict("list")
        assert str(first) == str(second)
    assert one.runs.drop(columns=["note", "state"]).equals(other.runs.drop(columns=["note", "state"]))
    assert list(one.probes) == list(other.probes)
    assert all(one.probes[name].equals(other.probes[name]) for name in one.probes)


def test_a_packed_study_is_the_study_wherever_it_is_named(outputs, now, capsys) -> None:
    folder = load(outputs / "study", now=now)
    path = report.pack_study("study", outputs)
    out = capsys.readouterr().out
    assert path == outputs / "study.normlab.zip"
    assert "Packed 4 runs: 1 done, 1 running, 1 failed, 1 missing" in out
    assert "no CITATION.cff" in out
    assert f"report.py study={path}" in out
    assert not [name for name in zipfile.ZipFile(path).namelist() if name.endswith((".pt", ".log"))]
    assert find.find_studies(outputs) == ["study"]
    assert load("study", outputs, now=now).folder == outputs / "study", "the folder goes before the file"
    shutil.rmtree(outputs / "study")
    assert find.find_studies(outputs) == ["study"]
    for named in (path, str(path), "study", "study.normlab.zip", "outputs/study.normlab.zip", "../outputs/study"):
        assert_same(load(named, outputs, now=now), folder)
    packed = load("study", outputs, now=now)
    notes = dict(zip(packed.runs["state"], packed.runs["note"], strict=True))
    assert notes == {
        "done": "",
        "interrupted": "",
        "missing": "",
        "failed": "It broke.",
    }
    downloaded = outputs.parent / "study.normlab (1).zip"
    path.rename(downloaded)
    assert load(downloaded).name == "study.normlab (1)"
    with pytest.raises(UserError, match="There is no study study in"):
        load("study", outputs)


def test_its_report_is_written_beside_it_and_has_no_links_to_folders_that_are_not_there(outputs) -> None:
    page = report.build("study", outputs, report.options(figures=False))
    tables = {name: (page.parent / name).read_text() for name in ("accuracy.csv", "convergence.csv")}
    assert 'href="../ln-' in page.read_text()
    report.pack_study("study", outputs)
    shutil.rmtree(outputs / "study")
    page = report.build("study", outputs, report.options(figures=False))
    assert page == outputs / "report" / "study" / "index.html"
    assert {name: (page.parent / name).read_text() for name in tables} == tables
    assert 'href="../' not in page.read_text()
    assert '"href": ""' in page.read_text()
    assert find.find_studies(outputs) == ["study"]
    results = report.build_results(outputs, outputs / "results.md", report.options(figures=False)).read_text()
    assert "### [study](results/study.md)" in results
    assert "\n\nWe looked.\n" in results


def test_its_status_is_told_once_and_nothing_in_it_goes_on(outputs, capsys) -> None:
    path = report.pack_study("study", outputs, quiet=True)
    assert capsys.readouterr().out == f"{path}\n"
    report.study_status(str(path), outputs, watch=True, quiet=True)
    [line] = capsys.readouterr().out.splitlines()
    assert line == "Study study, 4 runs: 1 failed, 1 interrupted, 1 planned, 1 done"


def test_its_description_is_that_of_ro_crate(outputs, monkeypatch) -> None:
    (outputs / "study" / "CITATION.cff").write_text(CITATION)
    run = next((outputs / "study").glob("bn-*"))
    made = {"versions": {"torch": "2.9", "python": "3.11"}, "command": ["train.py", "-m", "norm=bn, none"]}
    (run / "provenance.json").write_text(json.dumps(made))
    with zipfile.ZipFile(report.pack_study("study", outputs)) as packed:
        crate = json.loads(packed.read("ro-crate-metadata.json"))
        names = packed.namelist()
    assert crate["@context"] == "https://w3id.org/ro/crate/1.1/context"
    graph = {entity["@id"]: entity for entity in crate["@graph"]}
    assert len(graph) == len(crate["@graph"])
    head, root = graph["ro-crate-metadata.json"], graph["./"]
    assert head["conformsTo"] == {"@id": "https://w3id.org/ro/crate/1.1"}
    assert head["about"] == {"@id": "./"}
    assert root["name"] == "What does it buy?"
    assert root["datePublished"] == "2026-01-01"  # of the last record
    assert "4 runs: 1 done" in root["description"]
    people = [graph[author["@id"]] for author in root["author"]]
    assert [(each["@type"], each["name"]) for each in people] == [
        ("Person", "Jo von Ada"),
        ("Organization", "A laboratory"),
    ]
    assert people[0]["@id"] == "https://orcid.org/0000-0001-2345-6789"
    assert [graph[each["@id"]]["name"] for each in root["license"]] == ["CC-BY-4.0", "MIT"]
    parts = [part["@id"] for part in root["hasPart"]]
    assert parts[:2] == ["manifest.json", "notes.md"]
    assert set(parts[2:]) == {f"{name.split('/')[0]}/" for name in names if "/" in name}
    actions = [graph[each["@id"]] for each in root["mentions"]]
    assert [action["name"] for action in actions] == [
        "python report.py pack study=study",
        "train.py -m 'norm=bn, none'",
    ]
    used = [graph[each["@id"]] for each in actions[1]["instrument"]]
    assert [(each["name"], each["softwareVersion"]) for each in used] == [("python", "3.11"), ("torch", "2.9")]
    for entity in crate["@graph"]:
        assert {"@id", "@type"} <= set(entity)
        for value in entity.values():
            for reference in value if isinstance(value, list) else [value]:
                if isinstance(reference, dict) and entity is not head:
                    assert reference["@id"] in graph


def test_a_file_is_replaced_unless_it_has_runs_that_the_folder_lacks(outputs, add_run) -> None:
    path = report.pack_study("study", outputs)
    before = path.read_bytes()
    run = add_run("bn", seed=1)
    report.pack_study("study", outputs)
    after = path.read_bytes()
    assert after != before
    shutil.rmtree(run)
    with pytest.raises(UserError, match="1 runs that the folder lacks: bn-b8-s1") as error:
        report.pack_study("study", outputs)
    assert "replace=true" in str(error.value)
    assert path.read_bytes() == after
    report.pack_study("study", outputs, replace=True)
    assert path.read_bytes() == before
    path.write_text("something else")
    with pytest.raises(UserError, match="replace=true"):
        report.pack_study("study", outputs)


def test_what_cannot_be_packed_is_refused_in_a_sentence(outputs, monkeypatch) -> None:
    path = report.pack_study("study", outputs)
    with pytest.raises(UserError, match=r"is packed already.\nTo change it, unpack it: unzip .* -d .*study"):
        report.pack_study(str(path), outputs)
    with pytest.raises(UserError, match="There is no study other"):
        report.pack_study("other", outputs)
    with pytest.raises(UserError, match="replace=7 is not valid"):
        report.pack_study("study", outputs, replace=7)
    (outputs / "study" / "notes.md").unlink()
    (outputs / "study" / "notes.md").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"notes.md is a link, and only files are packed"):
        report.pack_study("study", outputs)
    (outputs / "study" / "notes.md").unlink()
    os.mkfifo(outputs / "study" / "notes.md")
    with pytest.raises(UserError, match=r"notes.md cannot be read: it is no file"):
        report.pack_study("study", outputs)
    (outputs / "study" / "notes.md").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(archive, "MOST_BYTES", 1)
        with pytest.raises(UserError, match="study has more than 0 MiB of records"):
            report.pack_study("study", outputs)
    (outputs / "study" / "CITATION.cff").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"CITATION.cff cannot be read: it is a link, and links are not followed"):
        report.pack_study("study", outputs)


@pytest.mark.parametrize(
    ("citation", "why"),
    [
        ("authors: [", "while parsing"),
        ("authors: me", "authors: Input should be a valid list"),
        ("authors: [me]", "authors.0: Input should be"),
        ("authors: [null]", "authors.0: Input should be"),
        ("authors: [{name: 2020-01-01}]", "authors.0.name: Input should be a valid string"),
        ("authors: [{orcid: 0000-0001}]", "authors.0.orcid: String should match"),
        ("authors: &a [*a]", "more than 50 deep"),
        ("license: MIT OR GPL", "license"),
        ("- MIT", "Input should be a valid dictionary"),
    ],
)
def test_a_citation_of_another_form_is_refused(outputs, citation, why) -> None:
    (outputs / "study" / "CITATION.cff").write_text(citation)
    with pytest.raises(UserError) as error:
        report.pack_study("study", outputs)
    assert "CITATION.cff cannot be read" in str(error.value)
    assert why in str(error.value)


def test_authors_are_those_of_the_study_or_of_the_folder_where_it_is_packed(outputs, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    report.pack_study("study", outputs)  # not those of normlab
    assert "Authors and license are not in it" in capsys.readouterr().out
    monkeypatch.chdir(outputs)
    Path("CITATION.cff").write_text("license-url: https://example.org/l\nauthors: [{alias: jo}, {}]\n")
    path = report.pack_study("study", outputs)
    assert "license are those of CITATION.cff" in capsys.readouterr().out
    crate = zipfile.ZipFile(path).read("ro-crate-metadata.json").decode()
    assert all(f'"{text}"' in crate for text in ("jo", "anonymous", "https://example.org/l"))


def test_a_study_in_one_file_takes_no_runs(outputs, make) -> None:
    path = report.pack_study("study", outputs)
    archive.refuse_new_runs(outputs / "study")  # whose folder is there
    shutil.rmtree(outputs / "study")
    for study in ("study", "study.normlab.zip"):
        config = make(f"study={study}", f"output_dir={outputs}")
        with pytest.raises(UserError, match=f"{path} is a study in one file, which takes no further runs"):
            preflight.check(config)
        with pytest.raises(UserError, match="takes no further runs"):
            import_runs(study, outputs, {"source": "results.csv"} | IMPORT)


def test_a_file_that_is_none_costs_no_other_study(outputs) -> None:
    (outputs / "bad.normlab.zip").write_text("something else")
    (outputs / "gone.normlab.zip").symlink_to("nowhere")
    page = report.build_results(outputs, outputs / "results.md", report.options(figures=False))
    assert "### [study]" in page.read_text()
    report.build_claims(outputs, report.options())


def test_a_packed_configuration_that_grows_without_bound_costs_its_own_run(outputs) -> None:
    levels = ", ".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12))
    run = next((outputs / "study").glob("bn-*"))
    with (run / "config.yaml").open("a") as file:
        file.write(f"extra: {{l0: &l0 [1], {levels}}}\n")
    study = load(report.pack_study("study", outputs))
    assert study.states()["unreadable"] == 1
    assert any("more than 10000 values" in warning for warning in study.warnings)


@pytest.mark.slow
def test_the_command_packs_and_refuses_a_hostile_file(outputs) -> None:
    def command(*words: str) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, str(ROOT / "report.py"), *words, f"output_dir={outputs}"]
        return subprocess.run(call, capture_output=True, text=True)

    packed = command("pack", "study=study", "quiet=true")
    assert (packed.returncode, packed.stdout, packed.stderr) == (0, f"{outputs / 'study.normlab.zip'}\n", "")
    with zipfile.ZipFile(outputs / "other.normlab.zip", "w") as file:
        file.writestr("../outside", "x")
    refused = command("study=other")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "the entry '../outside' leads out of the file" in refused.stderr
