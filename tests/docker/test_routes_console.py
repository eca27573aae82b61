"""The tab Routes in a real browser, over a real engine, LiteLLM, Caddy and a provider that fails.

One walk, because every change of what is routed starts another LiteLLM, which takes its time.
"""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from browsing import button, cell, open_console, open_tab
from consoles import serving
from docker.models.containers import Container
from installation import CHEAP, Install, Installation
from playwright.sync_api import Locator, Page, expect

import llm_manager as lm

pytestmark = [pytest.mark.docker, pytest.mark.browser]
UPSTREAMS = Path(__file__).with_name("upstreams.py")


@pytest.fixture(scope="module")
def here(install_for_module: Install, tiny_models: Path) -> Installation:
    """One running model."""
    here = install_for_module()
    here.add("chat", tiny_models / "tiny-chat", more=f"{CHEAP} --max-model-len 512")
    here.cli("deploy", "chat")
    return here


@pytest.fixture(scope="module")
def far(here: Installation, docker_client: docker.DockerClient) -> Iterator[Container]:
    """A provider beside it, which is none of the installation's containers."""
    name = f"{here.state().name_prefix}far"
    container = docker_client.containers.run(
        "llm-manager-test/base:latest", ["/upstreams.py", "far"], entrypoint="python3",
        name=name, network=lm.network_name(here.state()), detach=True,
        volumes={str(UPSTREAMS): {"bind": "/upstreams.py", "mode": "ro"}},
    )  # fmt: skip
    yield container
    container.remove(force=True)


@pytest.fixture(scope="module")
def url(here: Installation, far: Container) -> Iterator[str]:
    # After it: a new container is a new network interface, and Chromium then drops what it loads.
    with serving(here) as url:
        yield url


def order(far: Container, **behaviour: Any) -> None:
    far.reload()
    (network,) = far.attrs["NetworkSettings"]["Networks"].values()
    request = urllib.request.Request(
        f"http://{network['IPAddress']}:8000/control", json.dumps(behaviour).encode()
    )
    with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
        assert answer.status == 200


def fold(page: Page, name: str) -> Locator:
    """The open part of the tab with that title."""
    title = page.get_by_role("button", name=name)
    if title.get_attribute("aria-expanded") != "true":
        title.click()
    return page.locator(".block").filter(has=title).last


def field(page: Page, label: str) -> Locator:
    # Of a text field, what explains it is part of its label.
    return page.get_by_label(re.compile(rf"^\s*{label}")).filter(visible=True).first


def enter(page: Page, label: str, *texts: str) -> None:
    """Into a dropdown that takes what is typed."""
    for text in texts:
        field(page, label).fill(text)
        field(page, label).press("Enter")


def card(page: Page) -> Locator:
    return page.locator(".plan-card:visible").filter(has_text="would do this").first


def do_it(page: Page) -> None:
    card(page).get_by_role("button", name="Do it").click()
    expect(card(page)).to_be_hidden()


def done(page: Page, title: str) -> None:
    expect(page.get_by_text(re.compile(f"{title} · done in"))).to_be_visible(timeout=200_000)


def way(page: Page, ending: str) -> Locator:
    return page.locator(f'.way[aria-label$="{ending}"]')


def lane(page: Page, name: str, ending: str = "/v1") -> Locator:
    ways = page.locator(".way").first if ending == "/v1" else way(page, ending)
    return ways.locator(".lane").filter(has=page.locator("b", has_text=re.compile(f"^{name}$")))


def ask(page: Page, target: str, status: str) -> None:
    """One request in the console, until its answer is shown."""
    enter(page, "Ask for", target)
    button(page, "Try it").click()
    expect(cell(page, status)).to_be_visible()


def test_from_a_provider_to_a_route_that_survives_it(
    page: Page, url: str, here: Installation, far: Container
) -> None:
    open_console(page, url)
    open_tab(page, "Routes")
    expect(lane(page, "chat")).to_contain_text("active")
    add_a_provider(page, far)
    bad_input_loses_nothing_typed(page)
    see_the_plan_of_a_route_and_apply_it(page, here)
    expect(lane(page, "all")).to_contain_text("also gpt")
    expect(lane(page, "all")).to_contain_text("in order")
    ask_along_the_route(page)
    see_the_provider_break(page, far)


def add_a_provider(page: Page, far: Container) -> None:
    fold(page, "Providers")
    enter(page, "Name", "far")
    field(page, "Address").fill(f"http://{far.name}:8000")
    field(page, "Key").fill("sk-of-the-provider")
    button(page, "Plan the provider").click()
    expect(page.get_by_text("nothing to do but to write the wish down")).to_be_visible()
    page.locator(".plan-card:visible").get_by_role("button", name="Do it").click()
    expect(cell(page, f"http://{far.name}:8000")).to_be_visible()
    expect(cell(page, "set")).to_be_visible()


def bad_input_loses_nothing_typed(page: Page) -> None:
    fold(page, "Change a route, or make one")
    enter(page, "Public name", "all")
    enter(page, "Members", "far/tiny", "nobody")
    field(page, "Also called").fill("gpt, default")
    button(page, "Plan the route").click()
    expect(page.get_by_text("there is no model or provider for").first).to_be_visible()
    expect(field(page, "Public name")).to_have_value("all")
    expect(field(page, "Also called")).to_have_value("gpt, default")


def see_the_plan_of_a_route_and_apply_it(page: Page, here: Installation) -> None:
    field(page, "Members").press("Backspace")
    enter(page, "Members", "chat")
    enter(page, "Who of them answers", "in-order")
    button(page, "Plan the route").click()
    expect(card(page)).to_contain_text("+- model_name: all")
    expect(card(page)).to_contain_text("gpt: all")
    expect(card(page)).not_to_contain_text("sk-of-the-provider")
    assert not here.state().routes, "a plan changes nothing"
    do_it(page)
    done(page, "Route all")


def ask_along_the_route(page: Page) -> None:
    fold(page, "Try one request")
    ask(page, "gpt", "200 OK")
    for hop in ("Caddy", "LiteLLM", "far/tiny", "all of it"):
        expect(cell(page, hop)).to_be_visible()
    expect(lane(page, "all").locator("li", has_text="far/tiny")).to_contain_text("active")


def see_the_provider_break(page: Page, far: Container) -> None:
    order(far, fail=503)
    ask(page, "all", "chat-0")
    leg = lane(page, "all").locator("li", has_text="far/tiny")
    expect(leg).to_contain_text("it is not available (503)")
    expect(leg).to_contain_text("cool-down")
    expect(leg).to_contain_text(re.compile("left out for .* more"))
    expect(leg).to_contain_text("unavailable")
    expect(lane(page, "all").locator("li", has_text="chat-0")).to_contain_text("active")
    order(far)
    ask(page, "all", "far/tiny")
    expect(leg).to_contain_text("degraded")


def test_a_direct_key_is_planned_shown_once_and_revoked(
    page: Page, url: str, here: Installation
) -> None:
    open_console(page, url)
    open_tab(page, "Routes")
    expect(way(page, "/models/{name}/v1")).to_contain_text("no direct key is made")
    fold(page, "Direct keys, past LiteLLM")
    enter(page, "For whom", "lab")
    button(page, "Plan the key").click()
    expect(card(page)).to_be_visible()
    secret = page.locator("#new-direct-key textarea")
    expect(secret).to_be_hidden()
    do_it(page)
    expect(secret).to_have_value(re.compile("sk-.*/models/chat/v1", re.DOTALL))
    key = re.search(r"sk-[\w-]+", secret.input_value())
    assert key
    done(page, "Direct key lab")
    expect(way(page, "/models/{name}/v1")).to_contain_text("whoever has a direct key: lab")
    fold(page, "Try one request")
    ask(page, "/models/chat", "200 OK")
    expect(cell(page, "engine")).to_be_visible()
    with here.http(key[0]) as http:
        assert http.get("/models/chat/v1/models").status_code == 200
        button(page, "Revoke").click()
        do_it(page)
        done(page, "Revoke the direct key lab")
        assert http.get("/models/chat/v1/models").status_code == 401


def test_the_kill_switch_closes_every_open_route_at_once(
    page: Page, url: str, here: Installation
) -> None:
    open_console(page, url)
    open_tab(page, "Routes")
    opened = way(page, "/open/{name}/v1")
    expect(opened).to_contain_text("no model is open")
    fold(page, "Open routes, and the size of requests")
    page.get_by_role("checkbox", name="chat").check()
    page.get_by_role("checkbox", name="Open routes exist").check()
    button(page, "Plan these settings").click()
    expect(card(page)).to_contain_text("/open/chat")
    do_it(page)
    done(page, "Change who may come in")
    expect(opened).to_contain_text("● open")
    fold(page, "Try one request")
    ask(page, "/open/chat", "200 OK")
    with here.http("anything") as http:
        assert http.get("/open/chat/v1/models").status_code == 200
        button(page, "Close every open route").click()
        do_it(page)
        done(page, "Close every open route")
        assert http.get("/open/chat/v1/models").status_code == 404
    expect(opened).to_contain_text("closed by the kill switch")


def test_both_proofs_are_a_click_and_their_dated_results_stay(page: Page, url: str) -> None:
    open_console(page, url)
    open_tab(page, "Routes")
    fold(page, "Proofs")
    button(page, "Probe every route").click()
    done(page, "Try every route")
    probed = page.get_by_text(re.compile(r"Green, 2\d{3}-.* UTC.*answered"))
    expect(probed).to_be_visible()
    button(page, "Prove privacy").click()
    done(page, "Prove privacy")
    proven = page.get_by_text(re.compile(r"Green, 2\d{3}-.* UTC.*nothing was found"))
    expect(proven).to_be_visible()
    page.reload()
    open_tab(page, "Routes")
    fold(page, "Proofs")
    expect(probed).to_be_visible()
    expect(proven).to_be_visible()


def test_the_command_line_shows_the_same_and_keeps_nothing_of_a_prompt(here: Installation) -> None:
    shown = json.loads(here.cli("routes", "--json"))
    chat = next(row for row in shown if (row["way_in"], row["public_name"]) == ("v1", "chat"))
    assert (chat["answered_by"], chat["state"]) == ("chat-0", "active")
    canary = f"canary {time.monotonic_ns()}"
    assert "200 OK" in here.cli("try", "chat", "--prompt", canary)
    assert not [name for name, text in here.logs().items() if canary in text]
    assert canary not in "".join(p.read_text() for p in here.home.rglob("*.json"))
