#!/usr/bin/env python3
"""Click through the console of `demo` at random, and look at what it makes of that.

    python tests/bench/soak.py [--minutes 60] [--seed 1]

Reported: clicks, what the program logged as an error, the memory of the process at the start, each
tenth of the time and the end, and its growth per hour in the second half as a line through that.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).parents[n] / part) for n, part in ((1, ""), (1, "browser"), (2, ""))
]

from browsing import FLAGS, chromium, open_console, shown
from demonstration import demonstrating
from playwright.sync_api import Error, Page, sync_playwright

MOST_GROWTH = 30.0  # MiB an hour, above what a garbage collector leaves for later
WORDS = (
    "qwen3-14b",
    "",
    "x" * 300,
    "<b>bold</b>",
    "-1",
    "1e9",
    "Ada Lovelace",
    "'; DROP TABLE x",
    "ü",
)


def resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def act(page: Page, chance: random.Random) -> bool:
    """One thing that an operator without a plan might do; whether it could be done now."""
    what = chance.random()
    with contextlib.suppress(Error):
        if what < 0.02:
            page.reload()
            shown(page)
        elif what < 0.2:
            tabs = page.get_by_role("tab").all()
            chance.choice(tabs).click(timeout=2000)
        elif what < 0.4:
            fields = page.locator("input:visible, textarea:visible").all()
            if fields:
                chance.choice(fields).fill(chance.choice(WORDS), timeout=1000)
        elif what < 0.5:
            rows = page.get_by_role("gridcell").filter(visible=True).all()
            if rows:
                chance.choice(rows).click(timeout=1000)
        else:
            buttons = page.locator("button:visible:enabled").all()
            if buttons:
                chance.choice(buttons).click(timeout=1000)
        return True
    return False


def soak(minutes: float, seed: int) -> int:
    chance, began, acts = random.Random(seed), time.monotonic(), 0  # noqa: S311
    with tempfile.TemporaryDirectory() as folder, demonstrating(Path(folder)) as demo:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            open_console(page, demo.url)
            memory: list[tuple[float, float]] = []
            while (passed := (time.monotonic() - began) / 60) < minutes:
                acts += act(page, chance)
                page.wait_for_timeout(chance.uniform(100, 900))
                if not memory or passed - memory[-1][0] >= minutes / 40:
                    memory.append((passed, resident_mib(demo.process.pid)))
                if page.url.startswith("chrome-error") or not page.url.startswith(demo.origin):
                    open_console(page, demo.url)
            browser.close()
        cpu = cpu_seconds(demo.process.pid)
        said = demo.said.read_text()
    growth = report(acts, memory, said)
    print(f"{cpu / minutes / 60:.1%} of a core in all")  # noqa: T201
    return int("Traceback" in said or growth > MOST_GROWTH or acts < 10 * minutes)


def report(acts: int, memory: list[tuple[float, float]], said: str) -> float:
    print(f"{acts} acts in {memory[-1][0]:.0f} minutes")  # noqa: T201
    faults = [line for line in said.splitlines() if "incident" in line or "Traceback" in line]
    print(f"{len(faults)} unexpected errors", *faults[:20], sep="\n")  # noqa: T201
    tenths = memory[:: max(1, len(memory) // 10)]
    print("memory:", ", ".join(f"{mib:.0f} MiB at {minute:.0f} min" for minute, mib in tenths))  # noqa: T201
    late = memory[len(memory) // 2 :]
    growth = 60 * statistics.linear_regression(*zip(*late, strict=True)).slope
    print(f"growth in the second half: {growth:+.1f} MiB an hour")  # noqa: T201
    return growth


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    sys.exit(soak(given.minutes, given.seed))
