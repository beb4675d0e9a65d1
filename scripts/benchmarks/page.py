"""`scripts/bench page`: the HTML page of a study of 1,000 runs in a real Chromium, against one of 12 runs.

Made-up numbers in the form of recorded ones, as for `scripts/bench records`. Seconds from opening the file until a cell
that is clicked shows its curves; each round has a new window, so that nothing is kept from the one before.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.records import STUDY, Synthetic, machine

ROOT = Path(__file__).parents[2]


def chromium() -> str | None:
    """The system's Chromium; None if there is none, and Playwright's own is taken."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def made(folder: Path, runs: int, epochs: int) -> tuple[Path, float]:
    """The page of a study of so many runs, and the seconds that the report took."""
    Synthetic(folder, runs, epochs, 1)
    begun = time.perf_counter()
    command = [sys.executable, "report.py", f"study={STUDY}", f"output_dir={folder}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / STUDY / "report" / "index.html", time.perf_counter() - begun


def seconds_to_open(browser: Any, page: Path) -> tuple[float, float]:
    """Until the page is loaded; until a cell of it shows its runs' curves."""
    window = browser.new_page()
    begun = time.perf_counter()
    window.goto(page.as_uri())
    loaded = time.perf_counter() - begun
    window.locator("button.cell").first.click()
    window.locator("dialog[open] .curves path").first.wait_for()
    shown = time.perf_counter() - begun
    window.close()
    return loaded, shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[12, 1000])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    chosen = parser.parse_args()

    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        pages = {runs: made(Path(temporary) / str(runs), runs, chosen.epochs) for runs in chosen.runs}
        opened: dict[int, list[tuple[float, float]]] = {runs: [] for runs in pages}
        for _ in range(chosen.rounds):
            for runs, (page, _) in pages.items():
                opened[runs].append(seconds_to_open(browser, page))
        rows = [
            {"runs": runs, "megabytes": page.stat().st_size / 1e6, "report_seconds": took, "opened": opened[runs]}
            for runs, (page, took) in pages.items()
        ]
        version = browser.version
        browser.close()
    print(f"{machine()}, Chromium {version}; {chosen.epochs} evaluations a run; medians of {chosen.rounds} rounds\n")
    print("| runs | page, MB | report, s | loaded, s | a cell's curves shown, s |\n|---|---|---|---|---|")
    for row in rows:
        loaded, shown = (statistics.median(times) for times in zip(*row["opened"], strict=True))
        print(f"| {row['runs']} | {row['megabytes']:.1f} | {row['report_seconds']:.1f} | {loaded:.2f} | {shown:.2f} |")
    if chosen.json:
        content = {"machine": machine(), "chromium": version, "epochs": chosen.epochs, "measured": rows}
        chosen.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
