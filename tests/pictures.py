"""Make the pictures of README.md and docs/ from `demo`: `python tests/pictures.py [NAME ...]`.

It starts the simulated server, opens every tab in the system's Chromium and writes docs/NAME.png.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[n] / part) for n, part in ((0, "browser"), (1, ""))]

from browsing import FLAGS, button, chromium, open_console, open_tab, shown
from demonstration import demonstrating
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT = 1280, 900
DARK = "-dark"
# Of each picture its tab.
PICTURES = {
    "overview": "Overview", "models": "Models", "library": "Library", "hardware": "Hardware",
    "routes": "Routes", "keys": "Keys & usage", "energy": "Energy", "benchmark": "Benchmark",
    "monitoring": "Monitoring", "system": "System", f"overview{DARK}": "Overview",
}  # fmt: skip


def settle(page: Page) -> None:
    """Wait until nothing loads, and two looks at the server have left the page as it was."""
    shown(page)
    page.wait_for_function(
        """() => {
            const shape = document.body.scrollHeight
            window.still = window.shape === shape ? (window.still ?? 0) + 1 : 0
            window.shape = shape
            return window.still >= 12
        }""",
        polling=250,
    )


def take(browser: Browser, url: str, name: str) -> None:
    """One picture, in at most 256 colours: the console has few."""
    page = browser.new_page(
        viewport={"width": WIDTH, "height": HEIGHT}, locale="en-GB", timezone_id="Europe/Berlin",
        color_scheme="dark" if name.endswith(DARK) else "light", reduced_motion="reduce",
    )  # fmt: skip
    open_console(page, url)
    open_tab(page, PICTURES[name])
    prepare(page, name)
    settle(page)
    picture = Image.open(io.BytesIO(page.screenshot(animations="disabled"))).convert("RGB")
    file = ROOT / "docs" / f"{name}.png"
    picture.quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file.relative_to(ROOT)}: {file.stat().st_size // 1000} kB")  # noqa: T201 - a script
    page.close()


def prepare(page: Page, name: str) -> None:
    """What must be done before a tab shows its point."""
    if name == "hardware":  # the first four are whole
        page.locator(".gpu-card").filter(visible=True).nth(4).evaluate("e => e.scrollIntoView()")
    if name == "library":
        repository = page.get_by_label("Repository, or directory of this server")
        repository.fill("openai/gpt-oss-20b")
        button(page, "Look at it").click()
        expect(page.get_by_text("Where it would fit, the best first")).to_be_visible()
        repository.evaluate("element => element.closest('.actions').scrollIntoView()")


def main(names: list[str]) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        demonstrating(Path(folder)) as demo,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        for name in names or PICTURES:
            take(browser, demo.url, name)


if __name__ == "__main__":
    main(sys.argv[1:])
