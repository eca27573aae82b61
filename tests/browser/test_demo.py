"""Every tab of the console over an imagined server: what is seen, by whom, and how it is used."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from browsing import button, open_console, open_tab
from demonstration import Demo, demonstrating
from playwright.sync_api import Browser, Page, expect

pytestmark = pytest.mark.browser
TABS = (
    "Overview", "Models", "Library", "Hardware", "Routes", "Keys & usage", "Energy", "Benchmark",
    "Monitoring", "System",
)  # fmt: skip
LOOKS = [(1280, "light"), (1280, "dark"), (1920, "light"), (1920, "dark")]


@pytest.fixture(params=LOOKS, ids=lambda look: f"{look[0]}-{look[1]}")
def seen(request: pytest.FixtureRequest, browser: Browser, demo: Demo) -> Iterator[Page]:
    """A page of that width and scheme, whose console and network are watched."""
    width, scheme = request.param
    context = browser.new_context(
        viewport={"width": width, "height": 1000}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
    asked: set[str] = set()
    page.on("request", lambda r: asked.add("/".join(r.url.split("/")[:3])))
    open_console(page, demo.url)
    yield page
    context.close()
    assert not faults
    assert {origin for origin in asked if origin.startswith("http")} == {demo.origin}


def test_every_tab_has_something_to_say_and_fits_its_page(seen: Page) -> None:
    too_wide: dict[str, list[str]] = {}
    for tab in TABS:
        open_tab(seen, tab)
        panel = seen.get_by_role("tabpanel").filter(visible=True).first
        expect(panel).not_to_have_text(re.compile(r"^\s*$"))
        seen.wait_for_timeout(500)  # what is drawn last may be what is too wide
        expect(seen.locator(".toast-body.error")).to_have_count(0)
        too_wide |= {tab: cut} if (cut := seen.evaluate(TOO_WIDE)) else {}
    assert not too_wide


# The page, and visible tables, that can be pushed to the side: something of them is not seen.
TOO_WIDE = """() => [document.documentElement,
                     ...document.querySelectorAll('.table-wrap, .table-container')]
  .filter(box => (box.offsetParent || box === document.documentElement)
                 && box.scrollWidth > box.clientWidth + 1)
  .map(box => box.innerText.split('\\n').slice(0, 3).join(' '))"""


def test_nobody_is_kept_out_by_a_serious_fault(seen: Page) -> None:
    axe, found = Axe(), {}
    for tab in TABS:
        open_tab(seen, tab)
        seen.wait_for_timeout(2000)  # the page names what Gradio does not
        result = axe.run(seen)
        serious = {
            fault["id"]: [node["html"][:200] for node in fault["nodes"][:4]]
            for fault in result.response["violations"]
            if fault["impact"] in {"serious", "critical"}
        }
        if serious:
            found[tab] = serious
    assert not found, json.dumps(found, indent=1)


@pytest.fixture
def own_demo(tmp_path: Path) -> Iterator[Demo]:
    """One that a test may change."""
    with demonstrating(tmp_path) as running:
        yield running


def test_a_model_that_failed_is_helped_by_another_cut_of_its_gpu(
    page: Page, own_demo: Demo
) -> None:
    open_console(page, own_demo.url)
    expect(page.get_by_text("llama-8b should run and does not.")).to_be_visible()
    button(page, "Show log").click()
    log = page.locator(".log textarea").filter(visible=True)
    expect(log).to_have_value(re.compile("CUDA out of memory"))
    open_tab(page, "Hardware")
    page.get_by_role("button", name="Cut a GPU into MIG slices").click()
    page.get_by_label("GPU", exact=True).filter(visible=True).click()
    page.get_by_role("option", name=re.compile("GPU 7")).click()
    slices = page.get_by_label("Slices", exact=True)
    slices.fill("gpt-oss-20b=30, qwen-tts=8, llama-8b=18")
    slices.press("Enter")
    button(page, "Plan").click()
    card = page.locator(".plan-card").filter(visible=True).first
    expect(card).to_contain_text("create the slice 2g.20gb at 4 of GPU 7")
    expect(card).to_contain_text("Interrupted")
    button(card, "Do it").click()
    page.reload()  # in the middle of it
    job = page.locator("#job").first
    expect(job).to_contain_text("done", timeout=120_000)
    open_tab(page, "Overview")
    expect(page.get_by_text("All is well").first).to_be_visible()


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP])
def test_it_leaves_nothing_behind(tmp_path: Path, ending: signal.Signals) -> None:
    with demonstrating(tmp_path) as running:
        (home,) = (tmp_path / "tmp").iterdir()
        assert (home / "config.json").exists()
        running.process.send_signal(ending)
        assert running.process.wait(60) == 0
    assert not [*(tmp_path / "tmp").iterdir()]
    assert "Traceback" not in running.said.read_text()
