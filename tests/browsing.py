"""What tests in a real browser share: the browser, a page, and ways around in the console."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

# No sandbox: tests run as root. The rest keeps Chromium from calling home.
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]


def chromium() -> str:
    """The system's own, by whatever name."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        expect.set_options(timeout=40_000)  # two cores may be busy with other things
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    yield page
    page.close()


def open_console(page: Page, url: str) -> None:
    page.goto(url)
    shown(page)
    assert "token" not in page.url, "the token does not stay in the address bar or the history"


def shown(page: Page) -> None:
    """Wait until the page can be used: Gradio covers it while it loads."""
    expect(page.get_by_role("tab", name="Overview")).to_be_visible(timeout=30_000)
    cover = page.get_by_test_id("status-tracker").and_(page.locator(".translucent"))
    expect(cover).to_have_count(0, timeout=30_000)
    # Until the first content is there, Gradio may draw the tabs once more: the first is in front.
    expect(page.locator("#known-0 input")).not_to_have_value("0", timeout=30_000)


def open_tab(page: Page, name: str) -> None:
    tab = page.get_by_role("tab", name=name, exact=True)
    tab.click()
    expect(tab).to_have_attribute("aria-selected", "true")


def button(page: Page | Locator, name: str) -> Locator:
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
