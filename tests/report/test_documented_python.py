"""The Python of the documentation runs as it stands, block after block, in a folder that has a study."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def blocks(page: str) -> list[tuple[int, str]]:
    """The ```python blocks of a page, each with the number of its first line."""
    text = (ROOT / page).read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: block.start(1)].count("\n"), block[1]) for block in found]


@pytest.fixture
def study_named_default(add_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for norm, accuracy in (("bn", 0.9), ("affine", 0.85), ("bnminus", 0.88), ("none", 0.8)):
        for batch in (8, 32):
            for seed in (0, 1):
                accuracies = (0.3, 0.5, accuracy - 0.01 * seed)
                add_run(norm, batch, seed, accuracies, study="default", status={"wall_seconds": 3.0})
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_blocks_of_a_page_run_in_order(page: str, study_named_default: None) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    with torch.random.fork_rng():
        for line, block in blocks(page):
            exec(compile("\n" * line + block, ROOT / page, "exec"), names)  # an error names the page and its line


def test_the_page_about_python_has_blocks() -> None:
    assert len(blocks("docs/python.md")) >= 6
