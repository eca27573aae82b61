"""The Overview in a real browser over a simulated server: what a click does, and what stays."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import uvicorn
from browsing import button, open_console, open_tab
from builders import a_model
from fakes import FakeGateway, Server, until
from playwright.sync_api import Browser, Page, expect

import llm_manager as lm

pytestmark = pytest.mark.browser
FACTS = lm.RepositoryFacts(
    repository="Qwen/Qwen3-0.6B",
    commit="a" * 40,
    pipeline_tag="text-generation",
    config={"architectures": ["Qwen3ForCausalLM"]},
)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    server = Server(tmp_path)
    server.world.repositories[FACTS.repository] = FACTS
    return server


@contextlib.contextmanager
def serving(server: Server) -> Iterator[str]:
    watch = lm.Watch(server.manager, seconds=0.2, revivals=lm.Revivals(pauses=()))
    app = lm.build_app(server.manager, watch)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        running = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield lm.console_url(server.manager.state(), listener.getsockname()[1])
        running.should_exit = running.force_exit = True
        thread.join()
    watch.close()


def test_a_newcomer_gets_from_nothing_to_a_key_by_one_button_after_the_other(
    server: Server, page: Page
) -> None:
    gateway = FakeGateway(server)
    with serving(server) as url:
        open_console(page, url)
        steps = page.locator(".first-run")
        expect(steps).to_contain_text("models run on the processor")
        button(page, FACTS.repository).click()
        expect(page.get_by_label("Repository or directory")).to_have_value(FACTS.repository)
        button(page, "Register").click()
        expect(page.get_by_text("Registered qwen3-0-6b")).to_be_visible()
        open_tab(page, "Overview")
        button(page, "Deploy qwen3-0-6b").click()
        button(page, "Do it").click()
        expect(steps.get_by_text("Make a key").first).to_be_visible()
        button(page, "Make a key").click()
        page.get_by_label("For whom").fill("Ada")
        button(page, "Create key").click()
        assert until(lambda: bool(gateway.keys))
        open_tab(page, "Overview")
        expect(steps.locator("[aria-current=step]")).to_contain_text("Send the first request")
        button(page, "Hide this").click()
        expect(steps).to_be_hidden()
        page.reload()
        expect(page.get_by_text(re.compile("All is well"))).to_be_visible()
        expect(steps).to_be_hidden()


def test_a_dead_model_is_one_line_whose_button_brings_it_back(server: Server, page: Page) -> None:
    server.store.save(replace(server.manager.state(), models=(a_model(), a_model("other"))))
    server.do(lm.applying())
    with serving(server) as url:
        open_console(page, url)
        expect(page.get_by_text(re.compile("2 of 2 models that should run"))).to_be_visible()
        server.world.end("llm-model-chat-0", 1)
        matters = page.locator(".matters")
        expect(matters).to_contain_text("chat ended")
        button(page, "Deploy again").click()
        expect(page.locator(".plan-card:visible").first).to_contain_text("llm-model-chat-0")
        button(page, "Do it").click()
        expect(page.get_by_text(re.compile("2 of 2 models that should run"))).to_be_visible()
        expect(matters).to_be_hidden()


def test_the_log_of_a_model_that_never_started_is_one_click_away(
    server: Server, page: Page
) -> None:
    model = a_model(engine_arguments=("--broken",))
    server.store.save(replace(server.manager.state(), models=(model,)))
    server.world.broken.add("--broken")
    with pytest.raises(lm.ManagerError):
        server.do(lm.deploying("chat"))
    with serving(server) as url:
        open_console(page, url)
        button(page, "Show log").click()
        expect(page.locator(".log textarea").filter(visible=True)).to_have_value(
            re.compile("The model does not fit")
        )


def test_a_click_on_a_model_leads_to_it(server: Server, page: Page) -> None:
    server.store.save(replace(server.manager.state(), models=(a_model(), a_model("other"))))
    server.do(lm.applying())
    with serving(server) as url:
        open_console(page, url)
        page.get_by_role("gridcell").filter(has_text="other").filter(visible=True).first.click()
        expect(page.get_by_role("tab", name="Models").first).to_have_attribute(
            "aria-selected", "true"
        )
        expect(page.get_by_label("Model", exact=True).filter(visible=True)).to_have_value("other")


def test_a_job_can_be_cancelled_and_its_result_stays_on_every_page_until_it_is_dismissed(
    server: Server, browser: Browser, page: Page
) -> None:
    def work(control: lm.Control) -> None:
        control.report("half of it")
        control.done_part = 0.5
        while not threading.Event().wait(0.05):
            control.check()

    server.manager.start_task("Count the stars", work)
    with serving(server) as url:
        open_console(page, url)
        panel = page.locator("#job").first
        expect(panel).to_contain_text("half of it")
        expect(panel.get_by_role("progressbar")).to_have_attribute("aria-valuenow", "50")
        before = page.get_by_role("tablist").first.bounding_box()
        panel.get_by_role("button", name="Cancel").click()
        expect(panel).to_contain_text("cancelled after", timeout=30_000)
        page.reload()
        expect(panel).to_contain_text("cancelled after")
        panel.get_by_role("button", name="Dismiss").click()
        expect(panel).to_be_hidden()
        assert page.get_by_role("tablist").first.bounding_box() == before, "nothing moves"
        other = browser.new_page()
        open_console(other, url)
        expect(other.locator("#job").first).to_be_hidden()
        other.close()


def test_times_are_those_of_the_browser(server: Server, browser: Browser) -> None:
    with server.manager.audit.noting("Stop chat"):
        pass
    with serving(server) as url:
        page = browser.new_page(timezone_id="Asia/Tokyo")
        open_console(page, url)
        expect(page.get_by_role("gridcell").filter(has_text="JST").first).to_be_visible()
        page.close()
