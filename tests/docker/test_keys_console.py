"""Keys for a list of people, and tokens for programs, in a real browser over a simulated server."""

from __future__ import annotations

import contextlib
import csv
import re
import socket
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
import uvicorn
from browsing import button, cell, choose, open_console, open_tab
from fakes import FakeGateway, Server, until
from playwright.sync_api import Browser, Page, expect

import llm_manager as lm

pytestmark = pytest.mark.browser


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


@pytest.fixture
def gateway(server: Server) -> FakeGateway:
    return FakeGateway(server)


@pytest.fixture
def url(server: Server, gateway: FakeGateway) -> Iterator[str]:
    assert gateway.keys == {}
    app = lm.build_app(server.manager, lm.Watch(server.manager, seconds=0.2))
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        serving = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=serving.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield lm.console_url(server.manager.state(), listener.getsockname()[1])
        serving.should_exit = serving.force_exit = True
        thread.join()


def test_a_list_outlives_the_page_that_asked_for_it_and_its_secrets_are_told_once(
    server: Server, gateway: FakeGateway, browser: Browser, page: Page, url: str
) -> None:
    closed = threading.Event()

    def halfway(name: str) -> None:
        if name == "Person 10":
            assert closed.wait(60)

    gateway.made = halfway
    open_console(page, url)
    open_tab(page, "Keys & usage")
    page.get_by_role("button", name="Many at once").click()
    rows = [f"Person {n},p{n}@example.org" for n in range(20)]
    page.get_by_label("CSV").fill("\n".join(["name,email", *rows]))
    button(page, "Create these keys").click()
    expect(page.locator("#job").first).to_contain_text("10 of 20 keys")
    page.close()
    closed.set()

    other = browser.new_page()
    open_console(other, url)
    open_tab(other, "Keys & usage")
    expect(other.get_by_text("20 keys are made.")).to_be_visible()
    button(other, "Fetch the secrets").click()
    with other.expect_download() as download:
        other.get_by_text("Download keys.csv").click()
    with download.value.path().open() as file:
        told = list(csv.DictReader(file))
    assert {sha256(row["key"].encode()).hexdigest() for row in told} == {*gateway.keys}
    expect(button(other, "Fetch the secrets")).to_be_hidden()
    other.close()
    assert not any(job.offers for job in server.manager.jobs())


def test_a_token_is_made_shown_once_and_revoked(server: Server, page: Page, url: str) -> None:
    open_console(page, url)
    open_tab(page, "System")
    open_tab(page, "Programs")
    page.get_by_label("New token for").fill("ci")
    button(page, "Create token").click()
    shown = page.locator("#new-token textarea, #new-token input")
    expect(shown).to_have_value(re.compile("^admin-.{43}$"))
    token = shown.input_value()
    api = url.partition("?")[0] + "api/v1/status"

    def status() -> int:
        headers = {"Authorization": f"Bearer {token}"}
        return httpx.get(api, headers=headers, trust_env=False).status_code

    assert status() == 200
    page.reload()
    open_tab(page, "System")
    assert token not in page.content()
    open_tab(page, "Programs")
    choose(page, "Token", "ci")
    button(page, "Revoke").click()
    button(page, "Revoke it").click()
    assert until(lambda: server.manager.state().admin_tokens == ())
    assert status() == 401


def test_what_would_happen_to_a_group_is_asked_before_it_does(
    server: Server, gateway: FakeGateway, page: Page, url: str
) -> None:
    keys = server.manager.keys
    keys.set_group({"name": "ML"})
    for name in ("Ada", "Grace"):
        keys.create(lm.parse_key_settings({"alias": name, "group": "ML"}))
    open_console(page, url)
    open_tab(page, "Keys & usage")
    open_tab(page, "Groups")
    cell(page, "ML").click()
    expect(page.get_by_label("Group (or click its row)")).to_have_value("ML")
    button(page, "Extend all").click()
    expect(page.get_by_text("and 2 end later")).to_be_visible()
    assert {key.settings.expires_at for key in keys.all()} == {None}
    button(page, "Do it").click()
    expect(page.get_by_text("2 keys of ML end")).to_be_visible()
    assert until(lambda: None not in {key.settings.expires_at for key in keys.all()})
    button(page, "Block all").click()
    expect(page.get_by_text("Block the group ML with its 2 keys?")).to_be_visible()
    button(page, "Not now").click()
    assert not any(group.blocked for group in keys.groups())
