"""What tests in a real browser share: the console of an installation, and ways around in it."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import docker
from installation import Installation, free_ports
from playwright.sync_api import Locator, Page, expect

# No sandbox: tests run as root. The rest keeps Chromium from calling home.
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
NOWHERE = "unix:///nonexistent.sock"


def without_docker(home: Path, **variables: str) -> Installation:
    """An installation that no Docker engine answers, and that nobody needs one for."""
    client = cast("docker.DockerClient", None)
    here = Installation(client, home, variables={"DOCKER_HOST": NOWHERE} | variables)
    here.cli("image", "list")  # its state is there from now on
    return here


@contextlib.contextmanager
def serving(here: Installation, **variables: str) -> Iterator[str]:
    """The real console of an installation, and its address with the token."""
    (port,) = free_ports(1)
    console = here.popen("serve", "--port", str(port), **variables)
    try:
        assert console.stdout is not None
        assert "listens on" in console.stdout.readline()
        yield here.cli("url", "--port", str(port)).strip()
    finally:
        console.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            console.wait(20)
        console.kill()
        if console.stderr is not None:
            print(console.stderr.read())  # noqa: T201 - shown where the test fails


def open_console(page: Page, url: str) -> None:
    page.goto(url)
    shown(page)
    assert "token" not in page.url, "the token does not stay in the address bar or the history"


def shown(page: Page) -> None:
    """Wait until the page can be used: Gradio covers it while it loads."""
    expect(page.get_by_role("tab", name="Overview")).to_be_visible(timeout=30_000)
    cover = page.get_by_test_id("status-tracker").and_(page.locator(".translucent"))
    expect(cover).to_have_count(0, timeout=30_000)


def open_tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).first.click()
    # While it measures which tabs fit, Gradio (6.31) has the last one twice.
    expect(page.get_by_role("tab", name=name).first).to_have_attribute("aria-selected", "true")


def button(page: Page, name: str) -> Locator:
    """The visible one of exactly this name."""
    return page.get_by_role("button", name=name, exact=True)


def cell(page: Page, text: str) -> Locator:
    """A cell of a visible table; Gradio adds its buttons' names to that of a chosen one."""
    return page.get_by_role("gridcell").filter(has_text=text).filter(visible=True).first


def choose(page: Page, label: str, option: str) -> None:
    """Pick from a dropdown."""
    page.get_by_label(label, exact=True).filter(visible=True).click()
    page.get_by_role("option", name=option, exact=True).click()


def sort_by(page: Page, header: str, way: str) -> None:
    """The first table that has such a column, `ascending` or `descending`."""
    column = page.get_by_role("columnheader", name=header).filter(visible=True).first
    column.click()
    column.get_by_label("Open cell menu").click()
    page.get_by_role("menuitem", name=f"Sort {way}").click()


def resident_mib(here: Installation) -> float:
    """The most memory that the console of an installation has had so far."""
    home = f"LLM_MANAGER_HOME={here.home}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end while we look
            is_ours = home in (process / "environ").read_bytes().split(b"\0")
            if is_ours and b"serve" in (process / "cmdline").read_bytes().split(b"\0"):
                status = (process / "status").read_text()
                (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
                return int(line.split()[1]) / 1024
    raise AssertionError("no console of this installation runs")
