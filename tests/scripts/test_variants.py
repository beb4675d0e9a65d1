"""The tables of docs/variants.md that come from measurements; tests/norms/test_registry.py compares the page itself."""

import json
from pathlib import Path

import pytest
import variants
from recorded import adder


def plant(outputs: Path, norm: str, rates: dict[float, tuple[float, float]]) -> None:
    """Write three seeds at each learning rate with these accuracies, on validation and on test images."""
    for rate, (on_validation, on_test) in rates.items():
        for seed in range(3):
            run = adder(outputs)(norm, seed=seed, accuracies=(0.1, 0.1, on_test + 0.01 * seed), optimizer__lr=rate)
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            text = "".join(json.dumps({**row, "val_accuracy": on_validation}) + "\n" for row in rows)
            (run / "metrics.jsonl").write_text(text)


def rows_of(text: str) -> dict[str, list[str]]:
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {name.strip("`"): cells for name, *cells in lines}


def test_each_norm_is_shown_at_its_best_rate_by_validation_images(tmp_path: Path) -> None:
    plant(tmp_path, "bn", {0.01: (0.5, 0.99), 0.1: (0.9, 0.95), 1.0: (0.2, 0.99)})
    plant(tmp_path, "nf", {0.01: (0.2, 0.15), 0.1: (0.5, 0.45), 1.0: (0.3, 0.35)})
    text = variants.training(tmp_path / "study")
    assert text is not None
    rows = rows_of(text)
    assert rows["bn"] == ["96.0 ± 2.5 (n=3)", "0.1", "0.01; 0.1; 1", ""]
    assert rows["nf"] == ["46.0 ± 2.5 (n=3)", "0.1", "0.01; 0.1; 1", variants.REASONS["nf"]]
    assert "each arm at its best of 3 values of optimizer.lr, chosen on validation" in " ".join(text.split())
    assert "`tbbn`, which is for `sampler=class_incremental` alone" in " ".join(text.split())


def test_a_study_without_validation_images_leaves_the_section_as_it_is(tmp_path: Path) -> None:
    adder(tmp_path)("bn")
    assert variants.training(tmp_path / "study") is None


def test_costs_name_what_is_above_the_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(variants.BENCHMARK.read_text())
    found["ratios"] = {
        "bn": {"median": 1.0, "min": 0.9, "max": 1.1},
        "bn, norm_batch=4": {"median": 1.26, "min": 1.2, "max": 1.3},
        "gn": {"median": 1.5, "min": 1.4, "max": 1.6},
    }
    (tmp_path / "norms.json").write_text(json.dumps(found))
    monkeypatch.setattr(variants, "BENCHMARK", tmp_path / "norms.json")
    text = variants.costs()
    assert rows_of(text)["bn"][:4] == ["1.00", "0.90 to 1.10", "1.26", "1.20 to 1.30"]
    assert rows_of(text)["ln"][0] == "n/a"
    assert text.endswith("Above that: `bn, norm_batch=4` 1.26.")


def test_a_page_that_is_out_of_date_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "variants.md"
    page.write_text(variants.PAGE.read_text().replace("| `gn` |", "| `group` |", 1))
    monkeypatch.setattr(variants, "PAGE", page)
    with pytest.raises(SystemExit, match=r"out of date. Make it anew: python scripts/variants\.py"):
        variants.main(["--check"])
    variants.main([])
    assert page.read_text() == variants.made(page.read_text())
    page.write_text(page.read_text().replace("scripts/variants.py: cost", "scripts/variants.py: costs"))
    with pytest.raises(SystemExit, match="needs one place for each of: BN and its parts, "):
        variants.main([])
