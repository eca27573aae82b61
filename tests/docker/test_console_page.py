"""The page in a real browser over the simulated server: what it asks for, and what it survives."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import pytest
from browsing import cell, open_console, open_tab, shown
from cutter import pass_on
from installation import free_ports
from playwright.sync_api import Browser, Page, expect

pytestmark = pytest.mark.browser
TESTS = Path(__file__).parent.parent
TABS = 10
SCROLLED = "[...document.querySelectorAll('*')].map(each => each.scrollTop).filter(Boolean)"


class Program:
    """A console that can be killed and started again on the same port."""

    def __init__(self, home: Path, models: int = 2) -> None:
        self.home, self.models = home, models
        (self.port,) = free_ports(1)

    def __enter__(self) -> Self:
        options = ["--port", str(self.port), "--home", str(self.home), "--models", str(self.models)]
        self._process = subprocess.Popen(
            [sys.executable, TESTS / "simulated_console.py", *options], stdout=subprocess.PIPE,
            text=True, env=os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "listens\n"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def url(self, port: int | None = None) -> str:
        state = json.loads((self.home / "config.json").read_text())
        return f"http://127.0.0.1:{port or self.port}/?token={state['secrets']['console_key']}"


class Tunnel:
    """Passes bytes to a port, as SSH does, while it is not cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.is_cut = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Every connection ends, and so does every new one at once."""
        self.is_cut = True
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self.is_cut = False

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self.is_cut:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._port))
            self._open += [client, server]
            for pair in ((client, server), (server, client)):
                threading.Thread(target=pass_on, args=pair, daemon=True).start()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with Program(tmp_path_factory.mktemp("home")) as program:
        yield program


@pytest.fixture
def complaints(page: Page) -> list[str]:
    """What the browser held against the page."""
    found: list[str] = []
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("console", lambda line: found.append(line.text) if line.type == "error" else None)
    return found


def fill_in(page: Page) -> Callable[[], None]:
    """Type into a form; what is returned checks that it is still there."""
    open_tab(page, "Models")
    page.get_by_role("button", name="Register a model").click()
    name = page.get_by_placeholder("chat", exact=True)
    name.press_sequentially("half-typ")
    return lambda: expect(name).to_have_value("half-typ")


def test_every_tab_is_built_from_the_consoles_own_files_alone(
    program: Program, page: Page, complaints: list[str]
) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    open_console(page, program.url())
    tabs = page.get_by_role("tab").all_text_contents()
    for name in tabs:
        open_tab(page, name)
        page.wait_for_load_state("networkidle")
    assert len(tabs) == TABS
    assert {urlsplit(url).netloc for url in asked if not url.startswith("data:")} == {
        f"127.0.0.1:{program.port}"
    }
    assert complaints == [], "the content policy forbids nothing that the page needs"


def test_all_tabs_fit_on_a_small_screen_and_obey_the_keyboard(program: Program, page: Page) -> None:
    open_console(page, program.url())
    tabs = page.get_by_role("tab")
    expect(tabs).to_have_count(TABS)
    places = [tabs.nth(number).bounding_box() for number in range(TABS)]
    assert max(place["x"] + place["width"] for place in places if place) < 1280
    tabs.first.focus()
    for name in ("Models", "Library"):
        page.keyboard.press("Tab")
        expect(page.get_by_role("tab", name=name)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("tab", name="Library")).to_have_attribute("aria-selected", "true")


def test_one_browser_may_have_ten_pages_open(program: Program, browser: Browser) -> None:
    with contextlib.closing(browser.new_context()) as context:
        for _ in range(10):
            open_console(context.new_page(), program.url())
        assert len(context.pages) == 10


def test_a_cut_tunnel_takes_nothing_from_the_page(program: Program, page: Page) -> None:
    tunnel = Tunnel(program.port)
    open_console(page, program.url(tunnel.port))
    still_there = fill_in(page)
    tunnel.cut()
    notice = page.locator("#notice")
    expect(notice).to_contain_text("does not answer")
    open_tab(page, "Energy")  # what it asks for waits
    tunnel.mend()
    expect(notice).to_have_count(0)
    expect(page.get_by_text("Connection Lost")).to_have_count(0)
    expect(page.get_by_text("No energy was recorded").filter(visible=True)).to_be_visible()
    open_tab(page, "Models")
    still_there()


def test_a_page_comes_back_by_itself_when_the_console_was_killed(
    tmp_path: Path, page: Page
) -> None:
    with Program(tmp_path) as program:
        open_console(page, program.url())
        page.evaluate("window.before = true")
    expect(page.locator("#notice")).to_contain_text("does not answer")
    with program:
        page.wait_for_function("window.before === undefined", timeout=40_000)
        shown(page)
        expect(page.get_by_text("chat-01").filter(visible=True).first).to_be_visible()
        expect(page.locator("#notice")).to_have_count(0)
        still_there = fill_in(page)
    expect(page.locator("#notice")).to_contain_text("does not answer")
    with program:
        expect(page.locator("#notice")).to_contain_text("started anew")
        still_there()
        page.locator("#notice").get_by_role("button", name="Reload").click()
        shown(page)
        expect(page.locator("#notice")).to_have_count(0)


def test_arrow_keys_lead_from_tab_to_tab(program: Program, page: Page) -> None:
    open_console(page, program.url())
    page.get_by_role("tab", name="Overview").focus()
    for key, tab in (("ArrowRight", "Models"), ("ArrowLeft", "Overview"), ("ArrowLeft", "System")):
        page.keyboard.press(key)
        front = page.get_by_role("tab", name=tab, exact=True)
        expect(front).to_have_attribute("aria-selected", "true")
        expect(front).to_be_focused()


def test_a_reload_leaves_the_tab_in_front_and_a_new_page_has_the_first(
    program: Program, page: Page
) -> None:
    open_console(page, program.url())
    open_tab(page, "Energy")
    page.reload()
    in_front = page.locator('[role="tab"][aria-selected="true"]').filter(visible=True).first
    expect(in_front).to_have_text("Energy")
    expect(page.get_by_text("No energy was recorded").filter(visible=True)).to_be_visible()
    open_console(page, program.url())
    expect(in_front).to_have_text("Overview")


def test_a_refresh_moves_nothing(tmp_path: Path, page: Page) -> None:
    with Program(tmp_path, models=60) as program:
        open_console(page, program.url())
        expect(cell(page, "chat-05")).to_be_visible()  # what cannot overflow yet cannot scroll
        page.mouse.move(640, 500)
        page.mouse.wheel(0, 300)
        page.wait_for_function(f"{SCROLLED}.length > 0")
        page.wait_for_timeout(500)  # it glides
        at, told = page.evaluate(SCROLLED), []
        page.on("requestfinished", lambda it: told.append(it.url) if "predict" in it.url else None)
        while len(told) < 3:
            page.wait_for_timeout(200)
        assert page.evaluate(SCROLLED) == at
        still_there = fill_in(page)
        count = len(told)
        while len(told) < count + 3:
            page.wait_for_timeout(200)
        still_there()
