#!/usr/bin/env python3
"""How long the Keys tab takes where there are many keys and much use; run by hand (five minutes).

    python tests/bench/bench_keys.py [--keys 1000] [--rows 1000000] [--days 90] [--rounds 3]

A real installation, PostgreSQL, LiteLLM and the console in a real browser. Each time stands beside
that of the same page with ten keys, of the same run; and how keys are listed, beside LiteLLM's own
list of them. The times are only told.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT.parent), str(ROOT), str(ROOT / "docker")]

import docker
from bench_usage import TARGET_SECONDS, say
from browsing import FLAGS, cell, choose, open_console, open_tab, shown, sort_by
from consoles import resident_mib, serving
from installation import DOCKER_URL, Installation
from playwright.sync_api import Page, expect, sync_playwright
from usage_rows import database_of, empty, fill

import llm_manager as lm

FEW = 10


@contextlib.contextmanager
def endpoint() -> Iterator[Installation]:
    """One with no model of its own: nothing has to start for it."""
    client = docker.DockerClient(base_url=DOCKER_URL, timeout=120)
    with tempfile.TemporaryDirectory() as folder:
        here = Installation(client, Path(folder) / "home").prepare()
        try:
            here.cli("provider", "add", "lab", "--kind", "openai", "--url", "http://far:8000")
            here.cli("route", "set", "tiny", "--member", "lab/tiny")
            here.cli("apply")
            yield here
        finally:
            here.destroy()


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def lists(here: Installation, rounds: int) -> dict[str, float]:
    """Keys out of the tables, and page by page from LiteLLM."""
    manager = here.manager()
    api = manager.keys.gateway(manager.state())

    def pages() -> None:
        page, of = 1, 1
        while page <= of:
            asked = {"page": page, "size": 100, "return_full_object": "true"}
            of, page = api._call("GET", "/key/list", params=asked)["total_pages"], page + 1

    return {
        "a list of keys": min(timed(manager.keys.all) for _ in range(rounds)),
        "LiteLLM's own list of them": min(timed(pages) for _ in range(rounds)),
    }


def open_keys(page: Page) -> None:
    open_tab(page, "Keys & usage")
    expect(cell(page, "key 1")).to_be_visible()


def search(page: Page, name: str) -> None:
    page.get_by_placeholder("Filter...").first.fill(name)
    expect(cell(page, name)).to_be_visible()


def sort(page: Page) -> None:
    sort_by(page, "For", "descending")
    expect(cell(page, "key 9")).to_be_visible()


def usage(page: Page, by: str) -> None:
    if by == "key":
        open_tab(page, "Usage")
    else:
        choose(page, "Added up by", by)
    expect(page.get_by_role("link", name=f"Download usage-by-{by}")).to_be_visible()


def download(page: Page) -> None:
    with page.expect_download() as started:
        page.get_by_role("link", name="Download usage-by-key").click()
    started.value.path()


def visits(page: Page, url: str, keys: int, rounds: int) -> dict[str, float]:
    """The best time of each thing that is done in the tab."""
    deeds: dict[str, Callable[[], object]] = {
        "the tab is opened": lambda: open_keys(page),
        "a key is searched": lambda: search(page, f"key {keys}"),
        "all are back": lambda: search(page, ""),
        "keys are sorted": lambda: sort(page),
        "usage is opened": lambda: usage(page, "key"),
        "its CSV": lambda: download(page),
        **{
            f"usage by {by} is chosen": lambda by=by: usage(page, by)  # type: ignore[misc]
            for by in ("group", "model", "day", "hour")
        },
    }
    open_console(page, url)
    found = dict.fromkeys(deeds, 1e9)
    for _ in range(rounds):
        for what, deed in deeds.items():
            found[what] = min(timed(deed), found[what])
        page.reload()
        shown(page)
    return found


def measured(here: Installation, keys: int, rounds: int) -> dict[str, float]:
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with serving(here) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        found = visits(page, url, keys, rounds)
        browser.close()
        return found | lists(here, rounds) | {"peak MiB of the console": resident_mib(here)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--days", type=int, default=90)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    yesterday = lm.utc_now().date() - timedelta(days=1)
    with endpoint() as here:
        with database_of(here) as connection:
            fill(connection, keys=FEW, rows=1000, days=given.days, last=yesterday)
        few = measured(here, FEW, given.rounds)
        with database_of(here) as connection:
            empty(connection)
            fill(connection, keys=given.keys, rows=given.rows, days=given.days, last=yesterday)
        say(f"{given.rows:,} requests of {given.keys:,} keys, beside 1,000 of {FEW}:")
        for what, many in measured(here, given.keys, given.rounds).items():
            verdict = "  TOO SLOW" if many > TARGET_SECONDS and "MiB" not in what else ""
            say(f"{many:8.2f} ({few[what]:.2f}; {many / few[what]:.1f} times)  {what}{verdict}")


if __name__ == "__main__":
    main()
