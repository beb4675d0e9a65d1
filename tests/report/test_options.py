"""The options of a report: what they refuse, and what they change in all that a report writes."""

import csv
import dataclasses
import io
import json

import pytest
from PIL import Image
from recorded import adder

from normlab import report
from normlab.cli.commands import _carry_out
from normlab.common.errors import UserError
from normlab.common.installation import CONF
from normlab.runs import reading

OPTIONS = report.options()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A study of two arms, two batch sizes and three seeds, at one of which runs were validated."""
    outputs = tmp_path_factory.mktemp("options")
    add_run = adder(outputs)
    for norm, level in (("bn", 0.0), ("none", -0.2)):
        for batch in (8, 32):
            for seed in (0, 1, 2):
                run = add_run(norm, batch, seed, (0.5, 0.9 + level, 0.8 + level + (0.01 - level / 50) * seed))
                if batch == 32:
                    (run / "metrics.jsonl").write_text(validated(run))
    return outputs


@pytest.fixture
def reported(tmp_path):
    return lambda **changes: build(tmp_path / "outputs", **changes)


@pytest.fixture
def swept(outputs):
    return lambda **changes: build(outputs, **changes)


def build(outputs, **changes):
    """The report's folder with options that differ from the menu's."""
    return report.build("study", outputs, dataclasses.replace(OPTIONS, **{"figures": False, **changes})).parent


def validated(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return "".join(
        json.dumps(row | {"val_accuracy": value, "val_loss": 1.0}) + "\n"
        for row, value in zip(rows, (0.99, 0.1, 0.2), strict=True)
    )


def rows(folder, table):
    with (folder / f"{table}.csv").open() as file:
        return list(csv.DictReader(file))


def means(folder, table):
    return {(row["arm"], row["batch"]): pytest.approx(float(row["mean"])) for row in rows(folder, table) if row["mean"]}


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("metric", "test_acuracy", "Did you mean metric=test_accuracy?"),
        ("metric", "accuracy", "Did you mean metric=test_accuracy?"),
        ("value", "last", "expected one of final, best"),
        ("figure_size", "doble", "Did you mean figure_size=double?"),
        ("figure_style", "ggplt", "Did you mean figure_style=ggplot?"),
        ("figure_style", 3, "expected a style of matplotlib"),
        ("thresholds", [0.5, 0.8, 0.5], "two are the same"),
        ("thresholds", [80], "Example: thresholds=[0.5,0.8,0.95]"),
        ("thresholds", [0.5] * 21, "at most 20"),
        ("thresholds", 0.8, "expected a list of at most 20 accuracies between 0 and 1"),
        ("thresholds", ["high"], "expected a list of at most 20 accuracies between 0 and 1"),
        ("confidence", 95, "Example: confidence=0.95"),
        ("confidence", 1, "Example: confidence=0.95"),
        ("confidence", float("nan"), "Example: confidence=0.95"),
        ("figures", "maybe", "expected true or false"),
        ("alpha", 0, "Example: alpha=0.05"),
        ("alpha", 5, "Example: alpha=0.05"),
        ("arms", "bn", "Example: arms=[bn,none]"),
        ("arms", [], "expected null or a list of names"),
        ("batches", ["8"], "expected null or a list of whole numbers"),
        ("seeds", [True], "expected null or a list of whole numbers"),
        ("baseline", [1], "Example: baseline=bn"),
        ("settings", "resnet18", "Example: settings=[resnet18]"),
    ],
)
def test_an_option_that_is_not_valid_is_named_with_what_was_expected(option, value, told):
    with pytest.raises(UserError) as error:
        dataclasses.replace(OPTIONS, **{option: value})
    shown = {"['high']": "[high]", "[True]": "[true]"}.get(str(value), str(value).replace(" ", ""))  # as one types it
    assert str(error.value).startswith(f"{option}={shown} is not valid")
    assert told in str(error.value)
    assert len(str(error.value).splitlines()) <= 5


def test_a_metric_that_no_run_recorded_is_answered_with_those_that_are(add_run, reported):
    add_run()
    with pytest.raises(UserError) as error:
        reported(metric="val_accuracy")
    assert "Recorded: test_accuracy, test_loss, train_accuracy." in str(error.value)


@pytest.mark.parametrize(
    ("metric", "table", "mean"),
    [("train_accuracy", "train_accuracy", 86.0), ("test_loss", "loss", 0.19), ("val_accuracy", "val_accuracy", 20.0)],
)
def test_every_table_is_by_the_metric(swept, metric, table, mean):
    folder = swept(metric=metric)
    assert means(folder, table)["bn", "32"] == mean
    assert "final" in (folder / "difference.md").read_text().lower()
    text = (folder / "report.md").read_text()
    assert "test accuracy" not in text.lower().split("## verdicts")[0]
    if metric == "train_accuracy":  # it has no gap to itself
        assert {row["quantity"] for row in rows(folder, "convergence")} == {"final", "best"}


def test_the_best_epoch_is_that_of_the_validation_images_where_there_are_some(swept):
    folder = swept(value="best")
    found = means(folder, "accuracy")
    assert (found["bn", "8"], found["bn", "32"]) == (90.0, 50.0)  # 0.5 is where validation was best
    caption = (folder / "accuracy.md").read_text()
    assert (
        "Best test accuracy (at the best epoch: that with the best value on the validation images; in runs" in caption
    )
    assert "chosen on the test images, hence optimistic" in caption
    assert means(folder, "difference")["none", "8"] == -20.0


def test_chosen_cells_are_those_of_tables_and_verdicts_and_the_page_says_so(swept):
    folder = swept(arms=["bn", "none"], batches=[8], seeds=[0, 1])
    assert {(row["batch"], row["n"]) for row in rows(folder, "accuracy")} == {("8", "2")}
    assert {row["n"] for row in rows(folder, "verdicts")} <= {"0", "2"}
    assert "Only arms=[bn,none] batches=[8] seeds=[0,1] is reported" in (folder / "report.md").read_text()
    assert "Bold:" in (folder / "accuracy.tex").read_text()
    alone = swept(arms=["none"])
    assert "baseline=bn is left out of this report" in (alone / "report.md").read_text()
    assert "Bold:" not in (alone / "accuracy.tex").read_text()  # nothing can be


def test_cells_without_a_finished_run_are_told_with_what_was_chosen(add_run, reported):
    add_run("bn")
    add_run("none", state="failed", accuracies=())
    with pytest.raises(UserError, match=r"no finished run of arms=\[none\] yet: 1 failed"):
        reported(arms=["none"])


def test_commands_over_all_studies_refuse_to_leave_cells_out(outputs):
    options = dataclasses.replace(OPTIONS, arms=["bn"])
    for command in (
        lambda: report.build_claims(outputs, options),
        lambda: report.build_results(outputs, outputs / "page.md", options),
    ):
        with pytest.raises(UserError, match=r"arms=\[bn\]: .* is about whole studies"):
            command()
    for command in ("claims", "results"):
        with pytest.raises(UserError, match=f"study=mine: `{command}` is about all studies of output_dir"):
            _carry_out(command, {**reading.read_yaml(CONF / "report.yaml"), "study": "mine"})


def test_a_verdict_needs_a_p_value_of_at_most_alpha_and_its_caption_says_so(swept):
    verdicts = {}
    for alpha in (0.05, 1e-9):
        folder = swept(alpha=alpha)
        for row in rows(folder, "verdicts"):
            decided = row["p_holm"] != "" and float(row["p_holm"]) <= alpha
            assert (row["verdict_of_comparison"] in ("supported", "contradicted")) == decided
        assert f"p at most {alpha:g} for" in (folder / "verdicts.md").read_text()
        verdicts[alpha] = {row["verdict"] for row in rows(folder, "verdicts")}
    assert "supported" in verdicts[0.05]
    assert verdicts[1e-9] == {"inconclusive"}


@pytest.mark.slow
def test_tables_and_figures_of_earlier_options_are_removed(swept):
    folder = swept(figures=True)
    (folder / "difference.txt").write_text("a reader's own")
    swept(arms=["none"])
    assert {path.name for path in folder.glob("difference*")} == {"difference.txt"}
    assert {path.suffix for path in folder.glob("learning_curves.*")} == {".png", ".pdf", ".json"}  # figures=false
    swept(figures=True, batches=[8])
    assert not list(folder.glob("accuracy_against_batch*"))
    assert (folder / "difference.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("size", "width", "height"), [("single", 3.4 * 160, None), ("slide", 1920, 1080)])
def test_every_figure_has_the_size_and_style_that_are_asked_for_and_leaves_no_style_behind(
    swept, size, width, height, tmp_path
):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    style = tmp_path / "red.mplstyle"  # with dots per inch of its own
    style.write_text("figure.facecolor: ff0000\nsavefig.facecolor: ff0000\nfigure.dpi: 80\nsavefig.dpi: 72\n")
    folder = swept(figures=True, figure_size=size, figure_style=str(style) if height else None)
    images = {path.stem: Image.open(io.BytesIO(path.read_bytes())).convert("RGB") for path in folder.glob("*.png")}
    assert {"accuracy_against_batch", "learning_curves", "train_against_test"} <= set(images)
    assert {image.width for image in images.values()} == {int(width)}
    assert not height or {image.height for image in images.values()} == {height}
    assert (images["learning_curves"].getpixel((0, 0)) == (255, 0, 0)) == bool(height)
    assert dict(mpl.rcParams) == before


def test_an_option_that_does_not_exist_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean baseline"):
        report.options(basline="none")
    assert report.options(baseline="none") == dataclasses.replace(report.options(), baseline="none")
