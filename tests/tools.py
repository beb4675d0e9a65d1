"""Programs that tests need beside Python's packages, tried before use: of a tool a machine may have only a part."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

EMPTY_PAPER = r"\documentclass{article}\usepackage[utf8]{inputenc}\usepackage{booktabs}\begin{document}x\end{document}"


def works(*command: str, **options: Any) -> bool:
    """Whether a command is there, and succeeds within a minute."""
    try:
        return not subprocess.run(command, capture_output=True, timeout=60, check=False, **options).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False


def require_latex() -> None:
    """Skip the test where LaTeX cannot set a table."""
    with tempfile.TemporaryDirectory() as folder:
        if not works("pdflatex", "-interaction=batchmode", "-halt-on-error", EMPTY_PAPER, cwd=folder):
            pytest.skip("needs pdflatex with booktabs (texlive-latex-recommended)")


def axe_script() -> str:
    """Return the script of axe-core, which checks a page's accessibility; skip the test where it is not installed."""
    folder = Path(os.environ.get("VENV", sys.prefix)) / "axe" / "node_modules" / "axe-core"
    if not (folder / "axe.min.js").is_file():
        pytest.skip(f"axe-core is not in {folder.parents[1]}: ./scripts/test installs it where npm is")
    return (folder / "axe.min.js").read_text(encoding="utf-8")


def start_chromium(playwright: Any) -> Any:
    """Start the system's Chromium; skip the test where there is none that starts and shows text."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    try:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        window = browser.new_page()
        window.set_content("<span>text</span>")
        width = window.locator("span").evaluate("(text) => text.getBoundingClientRect().width")
        window.close()
    except Exception as error:  # playwright's, of many kinds
        pytest.skip(f"{program} does not start: {str(error).splitlines()[0]}")
    if not width:
        pytest.skip(f"{program} has no fonts")
    return browser
