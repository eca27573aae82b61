"""The console in a real browser: alone without Docker, and the whole story over real containers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import nvml_standin
import pytest
from browsing import button, cell, choose, open_console, open_tab
from consoles import serving, without_docker
from fake_hub import FakeHub
from installation import CHEAP, Install, Installation
from playwright.sync_api import Page, Route, expect
from test_story import ANSWER, ask

pytestmark = pytest.mark.browser
TABS = (
    "Overview", "Models", "Library", "Hardware", "Routes", "Keys & usage", "Energy", "Benchmark",
    "Monitoring", "System",
)  # fmt: skip
DEPLOY_SECONDS = 240


def test_without_docker_the_console_comes_up_and_says_what_to_do(
    page: Page, tmp_path: Path
) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    with serving(without_docker(tmp_path / "home")) as url:
        open_console(page, url)
        expect(page.get_by_text(re.compile("Docker does not answer.*systemctl start docker"))
               ).to_be_visible()  # fmt: skip
        for name in TABS:
            open_tab(page, name)
    own = url.split("/?", maxsplit=1)[0]
    assert [each for each in asked if not each.startswith((own, "data:", "blob:"))] == []


def test_a_page_of_which_a_file_did_not_arrive_loads_itself_again(
    page: Page, tmp_path: Path
) -> None:
    asked: list[str] = []
    lost: list[str] = []

    def lose_the_first_component(route: Route) -> None:
        asked.append(route.request.url)
        of_a_component = any("/Blocks-" in url for url in asked) and "/Index-" in asked[-1]
        if of_a_component and not lost:
            lost.append(asked[-1])
            route.abort("internetdisconnected")
        else:
            route.continue_()

    # Not a script: the browser asks for one that did not arrive once more.
    page.route(re.compile(r"/assets/(Blocks-.*|.*\.css)$"), lose_the_first_component)
    with serving(without_docker(tmp_path / "home")) as url:
        open_console(page, url)
        open_tab(page, "Keys & usage")
    assert asked.count(*lost) > 1


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
    with FakeHub() as hub, serving(here, HF_ENDPOINT=hub.url) as url:
        hub.add("acme/chat", tiny_models / "tiny-chat", pipeline_tag="text-generation")
        open_console(page, url)
        expect(page.get_by_text("From an empty server to the first answer")).to_be_visible()
        add_from_the_hub(page, "acme/chat")
        choose_a_small_kv_cache(page)
        page.get_by_label("Engine arguments").press_sequentially(f"{CHEAP} --max-model-len 512")
        expect(page.locator(".fit-card:visible")).to_contain_text("requests of 512 tokens")
        register(page, "Chat_1")
        expect(page.get_by_text("must be lower-case letters").first).to_be_visible()
        register(page, "chat")
        with here.step("deploy from the hub in the console, with a reload in the middle"):
            deploy(page)
        secret = create_key(page, "Ada <b>Lovelace</b>")
        assert ask(here.openai(secret)) == ANSWER
        page.reload()
        open_tab(page, "Keys & usage")
        expect(page.get_by_role("gridcell", name="Ada <b>Lovelace</b>")).to_be_visible()
        assert secret not in page.content(), "a secret is shown once"
        revoke_after_a_question(page, "Ada <b>Lovelace</b>")
        stop_and_see_the_plan_first(page)


def revoke_after_a_question(page: Page, alias: str) -> None:
    choose(page, "Key (or click its row)", alias)
    button(page, "Revoke").click()
    expect(page.get_by_text("Its requests are refused from then on")).to_be_visible()
    button(page, "Not now").click()
    expect(page.get_by_role("gridcell", name=alias)).to_be_visible()
    button(page, "Revoke").click()
    button(page, "Revoke it").click()
    expect(page.get_by_text(f"Revoked the key of {alias}.")).to_be_visible()
    expect(page.get_by_role("gridcell", name=alias)).to_have_count(0)


def add_from_the_hub(page: Page, repository: str) -> None:
    """From a search to the form that registers what was found."""
    open_tab(page, "Library")
    page.get_by_label("Search the Hugging Face hub").fill("chat")
    button(page, "Search").click()
    cell(page, repository).click()
    expect(cell(page, "LlamaForCausalLM")).to_be_visible()
    button(page, "Add as a model").click()
    expect(page.get_by_label("Repository or directory")).to_have_value(repository)


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


def register(page: Page, name: str) -> None:
    page.get_by_label("Name", exact=False).filter(visible=True).first.fill(name)
    button(page, "Register and deploy").click()


def deploy(page: Page) -> None:
    """Confirm the plan that came with the registration, and wait for an answer."""
    expect(page.locator(".plan-card:visible").first).to_contain_text("download acme/chat")
    page.get_by_role("button", name="Do it").click()
    expect(page.get_by_text("running for")).to_be_visible()
    # Gradio (6.31) ties no label to a text box with a copy button: found by their ids.
    page.get_by_role("button", name="What it did").click()
    progress = page.locator("#job textarea")
    expect(progress).to_have_value(re.compile("wait until"), timeout=60_000)
    page.reload()
    # Another page, the same job from its first line on.
    page.get_by_role("button", name="What it did").click()
    expect(progress).to_have_value(re.compile("^download acme/chat"))
    expect(page.get_by_text(re.compile("Deploy chat · done in"))).to_be_visible(
        timeout=DEPLOY_SECONDS * 1000
    )
    expect(page.get_by_text("1 of 1 models ready")).to_be_visible()


def create_key(page: Page, alias: str) -> str:
    open_tab(page, "Keys & usage")
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
