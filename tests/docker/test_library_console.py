"""The tab Library and the registration form in a real browser, over a hub on loopback.

No engine starts here, and Docker need not answer: weights are looked for, fetched and removed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import button, cell, choose, open_console, open_tab
from consoles import serving, without_docker
from fake_hub import FakeHub, a_safetensors, an_index
from installation import Installation
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.browser
ARCHITECTURE = json.loads((Path(__file__).parent.parent / "fit" / "qwen3-8b.json").read_text())
CONFIG = json.dumps(ARCHITECTURE["config"] | {"architectures": ["Qwen3ForCausalLM"]})
BERT = json.dumps({"architectures": ["BertModel"], "model_type": "bert"})
SLOW = 200_000  # bytes a second: the large shards take most of a minute, a cancel no time


def a_model(config: str = CONFIG) -> dict[str, str | bytes]:
    return {"config.json": config, "tokenizer.json": "{}", "model.safetensors": a_safetensors()}


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        chat, embedding = "text-generation", "feature-extraction"
        hub.add("acme/chat-8b", a_model(), pipeline_tag=chat, downloads=1_234_567)
        hub.add("acme/chat-embed", a_model(BERT), pipeline_tag=embedding, downloads=5)
        hub.add("acme/gated", a_model(), pipeline_tag=chat).troubles.gated = True
        hub.add("acme/stored", a_model())
        hub.add("acme/used", a_model())
        shards = {f"model-{n}.safetensors": a_safetensors(4_500_000, fill=n) for n in (2, 3)}
        shards["model-1.safetensors"] = a_safetensors(500_000)
        index = {"model.safetensors.index.json": an_index(*shards)}
        slow = hub.add("acme/slow", {"config.json": CONFIG, **index, **shards})
        slow.troubles.bytes_per_second = SLOW
        yield hub


@pytest.fixture(scope="module")
def here(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return without_docker(tmp_path_factory.mktemp("library") / "home", HF_ENDPOINT=hub.url)


@pytest.fixture(scope="module")
def url(here: Installation) -> Iterator[str]:
    with serving(here) as url:
        yield url


@pytest.fixture
def library(page: Page, url: str) -> Page:
    open_console(page, url)
    open_tab(page, "Library")
    return page


def name(page: Page, repository: str) -> None:
    page.get_by_label("Repository, or directory of this server").fill(repository)


def folder(here: Installation, repository: str) -> Path:
    return here.home / "huggingface" / "hub" / f"models--{repository.replace('/', '--')}"


def test_a_repository_is_found_by_its_name_and_its_type_and_a_click_shows_its_facts(
    library: Page,
) -> None:
    search = library.get_by_label("Search the Hugging Face hub")
    search.fill("chat")
    search.press("Enter")
    expect(cell(library, "acme/chat-8b")).to_be_visible()
    expect(cell(library, "1.23 M")).to_be_visible()
    expect(cell(library, "acme/chat-embed")).to_be_visible()
    choose(library, "Type", "embedding")
    button(library, "Search").click()
    expect(cell(library, "acme/chat-8b")).to_be_hidden()
    cell(library, "acme/chat-embed").click()
    expect(cell(library, "BertModel")).to_be_visible()
    choose(library, "Type", "any type")
    search.fill("no such thing")
    button(library, "Search").click()
    expect(library.get_by_text("Nothing on the hub has that in its name")).to_be_visible()


def test_a_download_is_shown_survives_a_reload_and_is_said_to_be_cancelled(
    library: Page, here: Installation
) -> None:
    name(library, "acme/slow")
    button(library, "Download").click()
    bar = library.locator(".fit-card:visible").get_by_role("progressbar")
    expect(bar).to_have_attribute("aria-valuenow", re.compile(r"^[1-9]\d?$"))
    words = re.compile(r"acme/slow: .* of 18\.1 MiB \(\d+%\), .*/s, .* left, 3 of 5 files")
    expect(library.locator(".fit-card:visible").get_by_text(words)).to_be_visible()
    library.reload()
    expect(library.get_by_text(re.compile("Download acme/slow · running for"))).to_be_visible()
    open_tab(library, "Library")
    expect(bar).to_have_attribute("aria-valuenow", re.compile(r"^[1-9]\d?$"))
    button(library, "Cancel it").click()
    expect(library.get_by_text(re.compile("Download acme/slow .* was cancelled"))).to_be_visible()
    expect(bar).to_be_hidden()
    button(library, "Refresh").click()
    expect(cell(library, "acme/slow")).to_be_visible()
    expect(cell(library, "lacks model-2.safetensors and 1 more")).to_be_visible()
    assert not list(folder(here, "acme/slow").rglob("*.incomplete"))


def test_a_found_repository_fills_the_form_whose_sum_follows_what_is_typed(library: Page) -> None:
    name(library, "acme/chat-embed")
    button(library, "Add as a model").click()
    expect(library.get_by_label("Name", exact=False).filter(visible=True).first).to_have_value(
        "chat-embed"
    )
    expect(library.get_by_label("Type", exact=True).filter(visible=True)).to_have_value("embedding")
    open_tab(library, "Library")
    name(library, "acme/chat-8b")
    button(library, "Add as a model").click()
    expect(library.get_by_role("tab", name="Models")).to_have_attribute("aria-selected", "true")
    expect(library.get_by_label("Type", exact=True).filter(visible=True)).to_have_value("chat")
    expect(library.get_by_label("Repository or directory")).to_have_value("acme/chat-8b")
    expect(library.get_by_text(": chat · 40,960 tokens")).to_be_visible()
    total = library.locator(".fit-card:visible")
    expect(total).to_contain_text("these requests need 5,778 MiB")  # 40,960 tokens, on the CPU
    run = library.locator(".cm-content:visible")
    expect(run).to_contain_text("acme/chat-8b")
    library.get_by_label("Engine arguments").fill("--max-model-len 512")
    expect(total).to_contain_text("requests of 512 tokens at a time")
    expect(total).not_to_contain_text("these requests need")
    expect(run).to_contain_text("--max-model-len 512")


def test_a_gated_and_a_missing_repository_are_told_in_words(library: Page) -> None:
    name(library, "acme/gated")
    button(library, "Look at it").click()
    expect(cell(library, "this server's token does not open it")).to_be_visible()
    button(library, "Download").click()
    refused = re.compile("acme/gated is gated, and this server may not read it.*config token")
    expect(library.get_by_text(refused).first).to_be_visible()
    name(library, "acme/absent")
    button(library, "Look at it").click()
    absent = r"acme/absent is not on 127\.0\.0\.1:\d+, or is private"
    expect(library.get_by_text(re.compile(absent))).to_be_visible()
    open_tab(library, "Models")
    source = library.get_by_label("Repository or directory")
    source.fill("acme/absent")
    source.press("Enter")
    expect(library.get_by_text(re.compile(f"⚠️ {absent}"))).to_be_visible()


def test_stored_weights_go_after_a_question_and_those_of_a_model_not_at_all(
    page: Page, url: str, here: Installation
) -> None:
    for repository in ("acme/stored", "acme/used"):
        here.cli("pull", repository)
    here.cli("model", "add", "keeper", "--repository", "acme/used")
    open_console(page, url)
    open_tab(page, "Library")
    expect(cell(page, "acme/used")).to_be_visible()
    if (dismiss := button(page, "Dismiss")).is_visible():  # what a test before this one left
        dismiss.click()
    cell(page, "acme/used").click()
    chosen = page.get_by_label("Stored repository")
    expect(chosen).to_have_value("acme/used")
    button(page, "Delete").click()
    expect(page.get_by_text("acme/used is used by keeper").first).to_be_visible()
    cell(page, "acme/stored").click()
    expect(chosen).to_have_value("acme/stored")
    button(page, "Delete").click()
    question = page.locator(".plan-card:visible").filter(has_text="This would be deleted").first
    expect(question).to_contain_text(re.compile(r"acme/stored: revision \w{8}; frees"))
    button(page, "Not now").click()
    expect(question).to_be_hidden()
    assert (folder(here, "acme/stored") / "blobs").is_dir(), "a question deletes nothing"
    button(page, "Delete all that is unused").click()
    expect(question).to_contain_text("acme/stored")
    expect(question).not_to_contain_text("acme/used")
    button(page, "Delete for good").click()
    expect(page.get_by_text(re.compile("Deleted: "))).to_be_visible()
    expect(cell(page, "acme/stored")).to_be_hidden()
    expect(cell(page, "acme/used")).to_be_visible()
    assert (folder(here, "acme/stored").exists(), folder(here, "acme/used").exists()) == (
        False, True,
    )  # fmt: skip
