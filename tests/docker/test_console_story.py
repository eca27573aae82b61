"""The console in a real browser: alone without Docker, and the whole story over real containers."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import nvml_standin
import pytest
from conftest import Install
from installation import CHEAP, Installation, free_ports
from playwright.sync_api import Browser, Page, expect, sync_playwright
from test_story import ANSWER, ask

pytestmark = pytest.mark.browser
# No sandbox: tests run as root. The rest keeps Chromium from calling home.
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
TABS = ("Overview", "Models", "Hardware", "Keys", "System")
DEPLOY_SECONDS = 240


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    yield page
    page.close()


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


def open_console(page: Page, url: str) -> None:
    page.goto(url)
    expect(page.get_by_role("tab", name="Overview")).to_be_visible(timeout=30_000)
    assert "token" not in page.url, "the token does not stay in the address bar or the history"


def open_tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()
    expect(page.get_by_role("tab", name=name)).to_have_attribute("aria-selected", "true")


def test_without_docker_the_console_comes_up_and_says_what_to_do(
    page: Page, tmp_path: Path, docker_client: object
) -> None:
    here = Installation(docker_client, tmp_path / "home")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    nowhere = "unix:///nonexistent.sock"
    here.run("image", "list", DOCKER_HOST=nowhere)
    with serving(here, DOCKER_HOST=nowhere) as url:
        open_console(page, url)
        expect(page.get_by_text(re.compile("Docker does not answer.*systemctl start docker"))
               ).to_be_visible()  # fmt: skip
        for name in TABS:
            open_tab(page, name)
    own = url.split("/?", maxsplit=1)[0]
    assert [each for each in asked if not each.startswith((own, "data:", "blob:"))] == []


@pytest.mark.docker
def test_a_gpu_is_cut_in_the_console_after_a_picture_and_a_plan(
    page: Page, tmp_path: Path, docker_client: object, tool: Callable[[str], str]
) -> None:
    tool("cc")
    library = nvml_standin.library(tmp_path / "nvml")
    server = nvml_standin.Server(library, tmp_path / "server", ["A100 40 GB", "H100 80 GB"])
    here = Installation(docker_client, tmp_path / "home", variables=server.environment())
    here.run("image", "list")
    with serving(here) as url:
        open_console(page, url)
        open_tab(page, "Hardware")
        drawn = page.locator(".gpu-card:visible")
        expect(drawn).to_have_count(2)
        page.get_by_role("button", name="Cut a GPU into MIG slices").click()
        page.get_by_label("GPU", exact=True).click()
        page.get_by_role("option", name="GPU 0 A100-SXM4-40GB").click()
        wish_for(page, "8x 1g.5gb")
        expect(page.get_by_text("at most 7 of 1g.5gb fit")).to_be_visible()
        assert server.mig(0) == (0, 0)
        wish_for(page, "3g.20gb, 2x 1g.5gb")
        expect(page.locator(".plan-card:visible .slice", has_text="3g.20gb")).to_be_visible()
        expect(page.get_by_text("create the slice 3g.20gb at 4 of GPU 0")).to_be_visible()
        assert server.mig(0) == (0, 0), "a plan changes nothing"
        page.locator(".plan-card:visible").get_by_role("button", name="Do it").click()
        expect(drawn.first.get_by_text("3g.20gb")).to_be_visible(timeout=30_000)
        assert server.slices(0) == {("1g.5gb", 0), ("1g.5gb", 1), ("3g.20gb", 4)}
        page.get_by_role("button", name="Safe to reboot?").click()
        page.get_by_role("button", name="Look").click()
        expect(
            page.get_by_text("GPU 0: 1g.5gb at 0, 1g.5gb at 1, 3g.20gb at 4").last
        ).to_be_visible()


def wish_for(page: Page, slices: str) -> None:
    box = page.get_by_label("Slices")
    box.fill(slices)
    box.press("Enter")
    page.get_by_role("button", name="Plan", exact=True).click()


@pytest.mark.docker
def test_the_story_in_the_console_with_a_reload_in_the_middle(
    page: Page, install: Install, tiny_models: Path
) -> None:
    here = install()
    with serving(here) as url:
        open_console(page, url)
        expect(page.get_by_text("Register your first model")).to_be_visible()
        open_tab(page, "Models")
        choose_a_small_kv_cache(page)
        register(page, "Chat_1", tiny_models / "tiny-chat")
        expect(page.get_by_text("must be lower-case letters")).to_be_visible()
        register(page, "chat", tiny_models / "tiny-chat")
        expect(page.get_by_text("starts it")).to_be_visible()
        with here.step("deploy in the console, with a reload in the middle"):
            deploy(page)
        secret = create_key(page, "Ada <b>Lovelace</b>")
        assert ask(here.openai(secret)) == ANSWER
        page.reload()
        open_tab(page, "Keys")
        expect(page.get_by_role("gridcell", name="Ada <b>Lovelace</b>")).to_be_visible()
        assert secret not in page.content(), "a secret is shown once"
        stop_and_see_the_plan_first(page)


def choose_a_small_kv_cache(page: Page) -> None:
    """4 GiB would be millions of tokens of a tiny model, and minutes of book-keeping."""
    page.get_by_role("button", name="More settings").click()
    kv_cache = page.get_by_label("KV cache on the CPU")
    expect(kv_cache).to_have_value("4096")
    # Gradio (6.31) resets what is typed in the first moments after unfolding; a person is slower.
    for _ in range(20):
        kv_cache.fill("64")
        kv_cache.press("Tab")
        page.wait_for_timeout(500)
        if kv_cache.input_value() == "64":
            break
    expect(kv_cache).to_have_value("64")


def register(page: Page, name: str, weights: Path) -> None:
    page.get_by_label("Name", exact=False).first.fill(name)
    page.get_by_label("a directory of this server").check()
    page.get_by_label("Repository or directory").fill(str(weights))
    page.get_by_label("Engine arguments").fill(f"{CHEAP} --max-model-len 512")
    page.get_by_role("button", name="Register", exact=True).click()


def deploy(page: Page) -> None:
    page.get_by_role("button", name="Deploy", exact=True).click()
    expect(page.get_by_text("create").first).to_be_visible()
    page.get_by_role("button", name="Do it").click()
    expect(page.get_by_text("running for")).to_be_visible()
    # Gradio (6.31) ties no label to a text box with a copy button: found by their ids.
    progress = page.locator("#job textarea")
    expect(progress).to_have_value(re.compile("wait until"), timeout=60_000)
    page.reload()
    # Another page, the same job from its first line on.
    expect(progress).to_have_value(re.compile("^create network"))
    expect(page.get_by_text(re.compile("Deploy chat · done in"))).to_be_visible(
        timeout=DEPLOY_SECONDS * 1000
    )
    expect(page.get_by_text("1 of 1 models ready")).to_be_visible()


def create_key(page: Page, alias: str) -> str:
    open_tab(page, "Keys")
    page.get_by_label("For whom").fill(alias)
    page.get_by_role("button", name="Create key").click()
    shown = page.locator("#new-key textarea")
    expect(shown).to_have_value(re.compile("API key"))
    found = re.search(r"sk-[\w-]+", shown.input_value())
    assert found
    return found[0]


def stop_and_see_the_plan_first(page: Page) -> None:
    open_tab(page, "Models")
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.get_by_text(re.compile(r"discard \S*llm-model-chat-0"))).to_be_visible()
    page.get_by_role("button", name="Do it").click()
    expect(page.get_by_text(re.compile("Stop chat · done in"))).to_be_visible(timeout=120_000)
