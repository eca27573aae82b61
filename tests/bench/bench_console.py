"""How soon the page can be used, what it costs to keep open, and what is sent when.

Run by hand: `python tests/bench/bench_console.py [--minutes 5]`. Beside the console, with one model
and with 60, an empty page of Gradio is measured in the same run: what differs is ours.
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

TESTS = Path(__file__).parent.parent
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
TICKS = os.sysconf("SC_CLK_TCK")
OPENINGS = 7
# The first frame that shows it; Playwright hears of it a tenth of a second later.
WATCH_FOR = """{
  const look = () => {
    const found = document.evaluate("//*[text()='SIGN']", document, null, 9).singleNodeValue;
    if (found?.checkVisibility()) window.usable = performance.now();
    else requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
}"""


@dataclass(frozen=True)
class Console:
    """A console that runs, and what it has cost so far."""

    process: subprocess.Popen[str]
    url: str
    sign: str  # a page that shows this can be used

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def resident_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


@contextlib.contextmanager
def console(port: int, models: int | None) -> Iterator[Console]:
    """The real one over the simulated server; without models, an empty page of Gradio."""
    with tempfile.TemporaryDirectory() as home:
        what = ["--empty"] if models is None else ["--models", str(models)]
        program = [sys.executable, TESTS / "simulated_console.py", *what]
        process = subprocess.Popen(
            [*program, "--port", str(port), "--home", home], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            token = ""
            if models is not None:
                state = json.loads((Path(home) / "config.json").read_text())
                token = f"?token={state['secrets']['console_key']}"
            sign = "Nothing" if models is None else "chat-00"
            yield Console(process, f"http://127.0.0.1:{port}/{token}", sign)
        finally:
            process.kill()
            process.wait()


def open_page(context: BrowserContext, served: Console, page: Page | None = None) -> Page:
    page = page or context.new_page()
    page.goto(served.url)
    page.get_by_text(served.sign, exact=True).filter(visible=True).first.wait_for()
    return page


def opening(browser: Browser, served: Console) -> None:
    """One browser that has its files after the first time, as an operator's has."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.add_init_script(WATCH_FOR.replace("SIGN", served.sign))
    times, busy = [], []
    for number in range(OPENINGS + 1):
        before = served.cpu_seconds()
        page = context.new_page()
        session = context.new_cdp_session(page)
        session.send("Performance.enable")
        open_page(context, served, page)
        usable = page.evaluate("window.usable") / 1000
        metrics = session.send("Performance.getMetrics")["metrics"]
        worked = next(each["value"] for each in metrics if each["name"] == "TaskDuration")
        if number:
            times.append(usable)
            busy.append(worked)
        else:
            sent = page.evaluate(
                "performance.getEntriesByType('resource').reduce((n, e) => n + e.transferSize, 0)"
            )
            count = page.evaluate("performance.getEntriesByType('resource').length")
            print(f"  first opening {usable:.2f} s, {count} files, {sent / 1e6:.2f} MB;"
                  f" the manager worked {served.cpu_seconds() - before:.2f} s")  # fmt: skip
        page.close()
    print(f"  then usable after: best {min(times):.2f} s, median {statistics.median(times):.2f} s;"
          f" the browser worked {statistics.median(busy):.2f} s")  # fmt: skip
    context.close()


def resting(browser: Browser, served: Console, pages: int, seconds: float) -> None:
    """What pages cost that are only open."""
    context = browser.new_context()
    opened = [open_page(context, served) for _ in range(pages)]
    watched = opened or [browser.new_page()]
    watched[0].wait_for_timeout(6000)
    sent: list[tuple[str, int]] = []

    def note(url: str, size: int) -> None:
        sent.append((url.rpartition("/")[2].partition("?")[0], size))

    for page in opened:
        page.on("requestfinished", lambda it: note(it.url, it.sizes()["responseBodySize"]))
    before = served.cpu_seconds()
    watched[0].wait_for_timeout(seconds * 1000)
    spent = served.cpu_seconds() - before
    totals = {name: (sum(n == name for n, _ in sent), sum(s for n, s in sent if n == name))
              for name in sorted({name for name, _ in sent})}  # fmt: skip
    print(
        f"  {pages:2} pages: {spent / seconds:6.2%} of a core, {served.resident_mib():.0f} MiB; "
        + ", ".join(f"{name} {n}x {size / max(n, 1):.0f} B" for name, (n, size) in totals.items())
    )
    context.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=0.5, help="at rest, per number of pages")
    parser.add_argument("--port", type=int, default=17990)
    arguments = parser.parse_args()
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        for number, models in enumerate((None, 1, 60)):
            print("An empty page" if models is None else f"The console, {models} models")
            with console(arguments.port + number, models) as served:
                opening(browser, served)
                for pages in (0, 1, 10) if models != 1 else (0, 1):
                    if models is not None or pages < 10:
                        resting(browser, served, pages, arguments.minutes * 60)


if __name__ == "__main__":
    main()
