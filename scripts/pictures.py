"""Make the README's pictures anew, in docs/figures, from a recorded study: scripts/pictures.py [STUDY.normlab.zip]

The report of the study is built in a temporary folder, and its page opened in the system's Chromium (extra `test`).
"""

import io
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from normlab.report import options
from normlab.report.write import write_report

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "outputs/reference/cifar10_jpeg_laptop.normlab.zip"
FOLDER = ROOT / "docs/figures"
COLORS = 128  # of a picture: fewer bytes, and no difference that one sees
MOST_BYTES = 200_000
WINDOWS = {"page": (1200, 900), "page_cell": (1000, 800), "page_phone": (390, 844)}  # by the picture's name


def picture(browser: Any, page: Path, name: str) -> bytes:
    """Return what a window shows of the page, in the light theme, as PNG."""
    width, height = WINDOWS[name]
    window = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
    window.goto(page.as_uri())
    if name == "page_cell":
        window.locator("table button.cell").first.click()
        window.locator("dialog[open]").wait_for()
        window.evaluate("document.activeElement.blur()")
    image = Image.open(io.BytesIO(window.screenshot(animations="disabled")))
    window.close()
    content = io.BytesIO()
    image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(content, "PNG", optimize=True)
    return content.getvalue()


def main(study: Path) -> None:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        sys.exit("No Chromium is installed: chromium, chromium-browser or google-chrome.")
    with TemporaryDirectory() as folder, sync_playwright() as tool:
        copy = shutil.copy(study, folder)
        page = write_report(copy, folder, options()).page
        browser = tool.chromium.launch(executable_path=program, args=["--no-sandbox", "--hide-scrollbars"])
        for name in WINDOWS:
            content = picture(browser, page, name)
            if len(content) > MOST_BYTES:
                sys.exit(f"{name}.png would have {len(content):,} bytes, and more than {MOST_BYTES:,} load slowly.")
            (FOLDER / f"{name}.png").write_bytes(content)
            print(f"{FOLDER / name}.png: {len(content):,} bytes")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else STUDY)
