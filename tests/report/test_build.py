import csv
import json
import re
import subprocess
import sys

import pytest
import yaml

from normlab import report
from normlab.common.errors import UserError


def build(study, output_dir, **changes):
    """The report with the menu's own defaults."""
    return report.build(study, output_dir, report.options(**changes))


@pytest.fixture
def sweep(add_run):
    for norm in ("bn", "none"):
        for batch in (8, 32):
            for seed in (0, 1):
                diverged = (norm, batch, seed) == ("none", 32, 1)
                accuracies = (0.2,) if diverged else (0.5, 0.8, 0.9 + 0.01 * seed)
                add_run(norm, batch, seed, accuracies, state="diverged" if diverged else "done")
    return add_run


@pytest.mark.slow
def test_a_report_has_every_table_and_figure_its_page_links_them_and_another_is_the_same(sweep, tmp_path):
    page = build("study", tmp_path / "outputs")
    folder = page.parent
    assert page == tmp_path / "outputs" / "study" / "report" / "index.html"
    text = (folder / "report.md").read_text()
    tables = "accuracy difference overall convergence epochs_to_accuracy seconds_to_accuracy cost verdicts"
    for name in tables.split():
        for suffix in ("md", "csv", "tex"):
            assert (folder / f"{name}.{suffix}").stat().st_size > 0
            assert f"({name}.{suffix})" in text
    for name in ("accuracy_against_batch", "learning_curves", "train_against_test"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert f"({name}.png)" in text
    assert "8 runs: 7 done, 0 running, 1 diverged" in text
    assert "Device: a processor" in text
    assert "90.0 (n=1, 1 of 2 diverged)" in text
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    build("study", tmp_path / "outputs")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
def test_a_study_of_losses_has_its_tables_and_figures(add_losses, tmp_path, capsys):
    for norm, losses in (("bn", (1e5, 500.0)), ("none", (1e5, 1700.0))):
        add_losses(norm, losses)
    page = build("study", tmp_path / "outputs")
    text = (page.parent / "report.md").read_text()
    for name in ("loss", "difference", "convergence", "cost"):
        assert f"({name}.csv)" in text
    for name in ("loss_by_arm", "learning_curves", "train_against_test"):
        assert (page.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "accuracy" not in text
    assert "1,700 (n=1)" in capsys.readouterr().out


def test_a_setting_that_does_not_measure_what_the_study_is_compared_by_is_told(add_run, add_losses, tmp_path, capsys):
    add_run("bn")
    add_losses("bn", (1e5, 500.0))
    page = build("study", tmp_path / "outputs", figures=False)
    assert "linear_regression, deep_linear18: its runs have no test accuracy" in page.read_text()


def test_terminal_and_csv_have_states_failures_and_the_table(sweep, tmp_path, capsys):
    sweep("affine", state="failed", accuracies=(), status={"error": "MemoryError: [out] of memory\nmore"})
    page = build("study", tmp_path / "outputs", figures=False)
    text = capsys.readouterr().out
    assert "7 done, 0 running, 1 diverged, 1 failed, 0 interrupted, 3 missing" in text
    assert "failed (MemoryError: [out] of memory more)" in text
    assert "90.5 ± 6.4 (n=2)" in text
    assert str(page) in text
    with (page.parent / "accuracy.csv").open() as file:
        [bn] = [row for row in csv.DictReader(file) if (row["arm"], row["batch"]) == ("bn", "8")]
    assert bn["n"] == "2"
    assert float(bn["mean"]) == pytest.approx(90.5, abs=1e-12)  # in full
    assert float(bn["high"]) - 90.5 == pytest.approx(12.7062047364 * 0.5, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "precondition", "ours"),
    [("MemorizedBatchNorm", None, True), ("NoNorm", "bnp", True), ("NoNorm", None, False)],
)
def test_whatever_shows_a_reconstruction_says_so_however_the_arm_is_called(add_run, tmp_path, norm, precondition, ours):
    for seed in (0, 1):
        add_run("bn", seed=seed, optimizer__precondition=None)
        config = add_run("mine", seed=seed, optimizer__precondition=precondition) / "config.yaml"
        config.write_text(config.read_text().replace("normlab.norms.mine", f"normlab.norms.{norm}"))
    folder = build("study", tmp_path / "outputs").parent
    sentence = "mine is a reconstruction of ours, as the paper leaves open what it does"
    captions = [*folder.glob("*.tex"), *(each for each in folder.glob("*.md") if each.stem != "report")]
    assert len(captions) > 6
    assert [each.name for each in captions if (sentence in " ".join(each.read_text().split())) != ours] == []
    for page in ("report.md", "index.html"):
        shown = (folder / page).read_text().count(sentence)
        assert shown >= len(captions) / 2 + 2 if ours else shown == 0  # of tables and figures


def test_a_wide_table_fits_80_columns(add_run, tmp_path, capsys):
    for batch in (2, 4, 8, 16, 32, 64, 128, 256):
        add_run("bn", batch)
    build("study", tmp_path / "outputs", figures=False)
    table = capsys.readouterr().out.split("Test accuracy")[1].split("Report:")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert table.count("90.0 (n=1)") == 8


def test_an_unknown_study_is_answered_with_the_nearest(add_run, tmp_path):
    add_run(study="digits_small")
    add_run(study="reference/cifar10")
    with pytest.raises(UserError) as error:
        build("digits_smal", tmp_path / "outputs")
    assert "There is no study digits_smal" in str(error.value)
    assert "digits_small, reference/cifar10" in str(error.value)
    assert "Did you mean study=digits_small?" in str(error.value)


def test_without_any_study_the_error_says_how_to_start_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(f"train.py -m study=default 'output_dir={tmp_path}/my runs' ")):
        build("default", tmp_path / "my runs")
    with pytest.raises(UserError, match=r"train\.py -m study=default norm=bn,none"):
        build("default", "outputs")


def test_a_study_without_a_finished_run_tells_its_states(add_run, tmp_path):
    add_run("bn", state="failed", accuracies=(), status={"error": "OSError: no space"})
    add_run("none", state=None)
    with pytest.raises(UserError) as error:
        build("study", tmp_path / "outputs")
    assert "no finished run yet: 1 failed, 1 missing" in str(error.value)
    assert "OSError: no space" in str(error.value)
    assert "train.py" in str(error.value)
    assert str(error.value).endswith(f"report.py status study=study output_dir={tmp_path}/outputs")
    assert len(str(error.value).splitlines()) <= 5


def test_a_baseline_that_is_no_arm_is_explained_and_the_rest_reported(sweep, tmp_path, capsys):
    page = build("study", tmp_path / "outputs", baseline="nonne", figures=False)
    assert "baseline=nonne is not an arm of this study" in page.read_text()
    assert "Did you mean baseline=none?" in capsys.readouterr().out
    assert not (page.parent / "difference.csv").exists()


def test_a_report_folder_that_cannot_be_made_is_a_sentence(sweep, study, tmp_path):
    (study / "report").write_text("in the way")
    with pytest.raises(UserError, match="Cannot write"):
        build("study", tmp_path / "outputs")


@pytest.mark.slow
def test_tables_claims_and_imports_need_neither_torch_nor_hydra_nor_matplotlib(sweep, better, tmp_path):
    (tmp_path / "results.csv").write_text("arm,test_accuracy\nmine,0.5\n")
    settings = {"dataset.name": "cifar10", "model.name": "resnet", "depth": 18, "batch": 128, "epochs": 20}
    source = {"source": str(tmp_path / "results.csv"), "set": settings}
    code = (
        "import sys; from normlab.report import Options, build, build_claims\n"
        f"outputs, options = {str(tmp_path / 'outputs')!r}, {report.options(figures=False)!r}\n"
        "build('study', outputs, options), build_claims(outputs, options)\n"
        "print({'torch', 'hydra', 'omegaconf', 'matplotlib', 'scipy.stats'} & set(sys.modules))\n"
        f"from normlab.report.importing import import_runs; import_runs('other', outputs, {source!r})\n"
        "print({'torch', 'hydra', 'omegaconf', 'matplotlib', 'tensorboard'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines().count("set()") == 2


@pytest.fixture
def better(add_run):
    """A study that supports a claim, below a folder of its own."""
    for seed in range(4):
        add_run("bn", seed=seed, accuracies=(0.5, 0.8, 0.9 + 0.01 * seed), study="mine/strong", budget="laptop")
        add_run("none", seed=seed, accuracies=(0.5, 0.6, 0.7 + 0.012 * seed), study="mine/strong", budget="laptop")


SENTENCE = "Batch normalization reaches a higher accuracy than no normalization."


def test_verdicts_are_in_terminal_page_and_files(better, tmp_path, capsys):
    page = build("mine/strong", tmp_path / "outputs", figures=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "Verdicts: digits, resnet, budget laptop supported Batch normalization reaches" in shown
    assert "paper: n/a" in shown
    assert f"| {SENTENCE} |" in " ".join((page.parent / "report.md").read_text().split())
    with (page.parent / "verdicts.csv").open() as file:
        found = next(csv.DictReader(file))
    assert (found["claim"], found["verdict"], found["n"]) == ("peerthum2023-bn-none", "supported", "4")
    assert (found["dataset"], found["model"], found["budget"]) == ("digits", "resnet", "laptop")
    latex = (page.parent / "verdicts.tex").read_text()
    assert latex.count(r"\begin{tabular") == 1
    assert r"d\_z" in latex


def test_a_study_that_speaks_to_no_claim_has_no_verdicts(add_run, tmp_path, capsys):
    add_run("bn")
    page = build("study", tmp_path / "outputs", figures=False)
    assert not (page.parent / "verdicts.csv").exists()
    assert "Verdicts" not in capsys.readouterr().out


def test_the_command_claims_judges_all_studies_and_tells_how_to_run_the_others(better, sweep, tmp_path, command):
    status, out, error = command("report.py", "claims")
    assert (status, error) == (0, "")
    assert "mine/strong: digits, resnet, budget laptop" in out
    assert "python train.py -m experiment=ioffe2017_small budget=laptop" in out
    page = (tmp_path / "outputs" / "claims.md").read_text()
    assert "mine/strong: digits, resnet, budget laptop" in page
    assert "study: digits, resnet, budget n/a" in page
    assert page.count(f"## {SENTENCE}") == 1
    assert "2 supported" in page  # the learning rate is that of a claim of Santurkar et al.


@pytest.mark.parametrize(("word", "meant"), [("claim", "claims, or study=claim"), ("mine/strong", "study=mine/strong")])
def test_an_unknown_command_is_answered_with_what_was_meant(word, meant, command):
    status, out, error = command("report.py", word)
    assert (status, out) == (1, "")
    assert f"{word}: there is no such command" in error
    assert f"Did you mean {meant}?" in error


ACTIVATIONS = {"step": 5, "layer": "a", "position": 0, "mean": 0.1, "variance": 1.0, "large": 0.1, "output_norm": 2.0}
ODD = [  # what a record may hold that our runs do not write: file, its part, the value in its place (...: none)
    ("metrics.jsonl", "images_per_second", [1, 2]),
    ("metrics.jsonl", "test_accuracy", {"top1": 0.5}),
    ("metrics.jsonl", "wall_seconds", [1]),
    ("metrics.jsonl", "train_accuracy", "high"),
    ("metrics.jsonl", "test_accuracy", 1e308),
    ("config.yaml", "optimizer", "sgd"),
    ("config.yaml", "schedule", 0.5),
    ("config.yaml", "norm_batch", [4]),
    ("config.yaml", "probe", 3),
    ("config.yaml", "seed", 10**20),
    ("config.yaml", "dataset", {"name": "digits", "kind": ["digits"]}),
    ("status.json", "peak_memory_bytes", "1e999"),
    ("provenance.json", "versions", {"torch": [2], "normlab": "0.2.0"}),
    ("probes/activations.jsonl", "layer", [1]),
    ("probes/activations.jsonl", "position", ...),
    ("probes/activations.jsonl", "position", [1, 2]),
    ("probes/activations.jsonl", "output_norm", {"a": 1}),
    ("probes/activations.jsonl", "large", 1e308),
]


@pytest.mark.parametrize(("file", "key", "value"), ODD)
def test_an_odd_record_costs_its_own_value_or_its_own_run_at_most(add_run, add_probe, study, file, key, value):
    for norm in ("bn", "none"):
        for seed in (0, 1):
            add_probe(add_run(norm, seed=seed), "activations", [ACTIVATIONS, {**ACTIVATIONS, "step": 6}])
    for path in study.glob(f"bn-*/{file}"):
        rows = [
            yaml.safe_load(text)
            for text in (path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()])
        ]
        for row in rows:
            row[key] = value
            if value is ...:
                del row[key]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build("study", study.parent, figures=False)
    assert report.pack_study("study", study.parent, quiet=True).exists()
    text = (study / "report" / "accuracy.md").read_text()
    [line] = [line for line in text.splitlines() if re.match(r"\| none ", line)]
    assert "90.0 ± 0.0 (n=2)" in line.replace("*", "")
