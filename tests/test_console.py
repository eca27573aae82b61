"""Views and console: what the operator reads, and who may read it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import gradio as gr
import httpx
import pytest
from builders import (
    GPU_0,
    GPU_1,
    NOW,
    SECRET_MARK,
    a_model,
    a_secret,
    a_site,
    a_snapshot,
    a_state,
    an_engine,
    as_wished,
    but,
    ended,
    on_gpus,
    seen,
    the,
)
from fakes import Server, a_world, some_tools
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import llm_manager as lm

CHAT = "llm-model-chat-0"
HOST = "127.0.0.1:7860"
KEY = a_secret("console")
TOKEN = KEY.get_secret_value()
COOKIE = "llm-manager-a1b2c3"


def a_job(**changes: Any) -> lm.JobView:
    given: dict[str, Any] = {
        "id": "1",
        "title": "Deploy chat",
        "started_at": NOW,
        "finished_at": None,
        "lines": ("one", "two"),
        "fault": None,
    }
    return lm.JobView(**given | changes)


# --- the gate --------------------------------------------------------------------------------


async def behind(scope: Any, receive: Any, send: Any) -> None:
    """What must not be reached: it answers anybody."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"inside"})


GUARD = lm.Guard(behind, behind, lambda: KEY, "a1b2c3")


def ask(path: str = "/", app: Any = GUARD, **headers: str | bytes) -> httpx.Response:
    """One request to the gate; underscores in header names are dashes."""
    sent = {"host": HOST, **{name.replace("_", "-"): value for name, value in headers.items()}}

    async def asking() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{HOST}") as client:
            return await client.get(path, headers=sent)  # type: ignore[arg-type]

    return asyncio.run(asking())


def session(app: Any = GUARD, token: str = TOKEN) -> str:
    """The cookie that the right token is exchanged for."""
    return ask(f"/?token={token}", app).headers["set-cookie"].split(";")[0]


def test_the_right_token_becomes_a_cookie_that_scripts_and_other_sites_never_see() -> None:
    answer = ask(f"/?token={TOKEN}")
    assert answer.status_code == 303
    assert answer.headers["location"] == "/"
    cookie, *attributes = answer.headers["set-cookie"].split("; ")
    assert cookie.startswith(f"{COOKIE}=")
    assert {"HttpOnly", "SameSite=strict"} <= set(attributes)
    assert TOKEN not in str(answer.headers)
    assert ask(cookie=cookie).text == "inside"


@pytest.mark.parametrize("token", ["wrong", TOKEN[:-1], TOKEN + "x", "%00", "ä", "%ff"])
def test_a_wrong_token_opens_nothing(token: str) -> None:
    answer = ask(f"/?token={token}")
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("path", ["/", "/gradio_api/info", "/gradio_api/queue/join", "/config"])
@pytest.mark.parametrize(
    "cookie", ["", "x=y", f"{COOKIE}=", f"{COOKIE}=1", f"other={TOKEN}", f"{COOKIE}={TOKEN}"]
)
def test_nothing_is_answered_without_the_cookie(path: str, cookie: str) -> None:
    answer = ask(path, cookie=cookie)
    assert answer.status_code == 401
    assert "url" in answer.text


def test_a_token_counts_on_the_first_page_alone() -> None:
    assert ask(f"/config?token={TOKEN}").status_code == 401


def test_another_installations_cookie_opens_nothing() -> None:
    other = lm.Guard(behind, behind, lambda: a_secret("other"), "a1b2c3")
    assert ask(app=other, cookie=session()).status_code == 401


def test_a_cookie_of_strange_bytes_is_only_a_wrong_cookie() -> None:
    assert ask(cookie=f"{COOKIE}=".encode() + b"\xe9").status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:7860"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "localhost.evil.example:7860"},
        {"host": "0.0.0.0:7860"},
        {"host": ""},
        {"host": "127.0.0.1:x"},
        {"origin": "https://evil.example"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": f"https://{HOST}"},
        {"origin": "http://localhost:7860"},
        {"origin": "null"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/", f"/?token={TOKEN}", "/gradio_api/queue/join"])
def test_a_foreign_page_is_refused_even_with_the_operators_cookie(
    path: str, headers: dict[str, str]
) -> None:
    answer = ask(path, cookie=session(), **headers)
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "localhost:7860"},
        {"host": "127.0.0.1:12345"},
        {"host": "[::1]:7860"},
        {"origin": f"http://{HOST}", "sec_fetch_site": "same-origin"},
        {"sec_fetch_site": "none"},
    ],
    ids=str,
)
def test_the_operators_own_page_passes_through_any_tunnel(headers: dict[str, str]) -> None:
    assert ask(cookie=session(), **headers).text == "inside"


@pytest.mark.parametrize("path", ["/", "/none", f"/?token={TOKEN}", "/?token=x", "/api/v1/status"])
@pytest.mark.parametrize("cookie", ["", "good"])
def test_every_answer_forbids_frames_referrers_and_other_servers(path: str, cookie: str) -> None:
    answer = ask(path, cookie=session() if cookie else "")
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    policy = dict(
        part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["object-src"] == policy["form-action"] == "'none'"
    assert "connect-src" not in policy, "so that default-src holds for it"
    assert "//" not in answer.headers["content-security-policy"]


def test_a_websocket_is_refused_whoever_opens_it() -> None:
    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    headers = [(b"host", HOST.encode()), (b"cookie", session().encode())]
    asyncio.run(GUARD({"type": "websocket", "path": "/", "headers": headers}, None, send))
    assert said == [{"type": "websocket.close", "code": 1008}]


class Hands:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_who_guesses_must_wait_and_no_page_that_is_open_does() -> None:
    clock = Hands()
    guard = lm.Guard(behind, behind, lambda: KEY, "a1b2c3", lm.Guesses(clock))
    cookie = session()
    for guess in range(10):
        assert ask(f"/?token={guess}", guard).status_code == 401
        clock.now += 1
    for token in ("another", TOKEN):
        answer = ask(f"/?token={token}", guard)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "50"
        assert "set-cookie" not in answer.headers
    assert ask(cookie=cookie, app=guard).text == "inside"
    clock.now += 50
    assert ask(f"/?token={TOKEN}", guard).status_code == 303, "no minute is longer than a minute"


def test_the_same_wrong_token_is_one_guess_however_often_it_comes() -> None:
    guard = lm.Guard(behind, behind, lambda: KEY, "a1b2c3", lm.Guesses(Hands()))
    for _ in range(50):
        assert ask("/?token=of-last-year", guard).status_code == 401
    assert ask(f"/?token={TOKEN}", guard).status_code == 303


def test_guesses_are_forgotten_and_kept_in_bounds() -> None:
    clock = Hands()
    guesses = lm.Guesses(clock)
    guard = lm.Guard(behind, behind, lambda: KEY, "a1b2c3", guesses)
    for guess in range(500):
        ask(f"/?token={guess}", guard)
    assert [len(wrong) for wrong in guesses._wrong.values()] == [10]
    clock.now = 60
    ask(f"/?token={TOKEN}", guard)
    assert guesses._wrong == {}


def test_one_account_of_the_server_shuts_out_no_other() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        assert lm.account_of(client.getsockname()) == os.getuid()
        address = client.getsockname()
        client.close()  # the kernel keeps the connection, and says that it is root's
        assert lm.account_of(address) is None
    for stranger in (("127.0.0.1", 0), ("192.0.2.1", 7860), None):
        assert lm.account_of(stranger) is None


# --- the page, as Gradio builds it ------------------------------------------------------------


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> lm.Manager:
    store = lm.StateStore(tmp_path_factory.mktemp("home"))
    store.ensure(fixed_names=True)
    store.save(a_state(a_model(), hugging_face_home="/hub", secrets=a_state().secrets))
    site = lm.Site(generated=str(store.generated), hugging_face_home="/hub", compile_caches="/c")
    gpus = lm.SimulatedGpus([lm.SimulatedCard("<b>H200</b>", "Hopper", 143771)])
    return lm.Manager(store, some_tools(a_world(store, gpus)), site, engine_options={})


@pytest.fixture(scope="module")
def app(manager: lm.Manager) -> Iterator[lm.Guard]:
    return lm.build_app(manager, lm.Watch(manager, seconds=3600))


def test_the_whole_page_is_built_and_served_behind_the_gate(app: lm.Guard) -> None:
    cookie = session(app)
    page = ask("/", app, cookie=cookie)
    assert page.status_code == 200
    assert "LLM Manager" in page.text
    for path in ("/", "/config", "/gradio_api/info", "/theme.css", "/gradio_api/startup-events"):
        assert ask(path, app).status_code == 401
        assert ask(path, app, cookie=cookie, host="evil.example").status_code == 403


def test_nothing_but_tabs_stands_among_the_tabs(app: lm.Guard) -> None:
    # Of anything else there Gradio (6.31) makes the last tab twice, and its news goes astray.
    cookie = session(app)
    config = ask("/config", app, cookie=cookie).json()
    kinds = {component["id"]: component["type"] for component in config["components"]}
    among = next(
        node["children"] for node in nodes_of(config["layout"]) if kinds.get(node["id"]) == "tabs"
    )
    assert len(among) == 10
    assert {kinds[child["id"]] for child in among} == {"tabitem"}


def nodes_of(layout: Any) -> Iterator[Any]:
    yield layout
    for child in layout.get("children") or ():
        yield from nodes_of(child)


def test_no_handler_of_the_page_is_public_and_no_secret_is_in_it(app: lm.Guard) -> None:
    cookie = session(app)
    config = ask("/config", app, cookie=cookie)
    handlers = config.json()["dependencies"]
    assert handlers
    assert {handler["api_visibility"] for handler in handlers} == {"private"}
    assert SECRET_MARK not in config.text
    assert SECRET_MARK not in ask("/", app, cookie=cookie).text
    assert ask("/gradio_api/info", app, cookie=cookie).json()["named_endpoints"] == {}


def test_the_pages_of_fastapi_itself_are_off(app: lm.Guard) -> None:
    cookie = session(app)
    for path in ("/docs", "/redoc", "/openapi.json", "/monitoring"):
        assert ask(path, app, cookie=cookie).status_code in {404, 403}, path


@pytest.mark.parametrize(
    "path",
    [
        *("upload", "upload_progress", "file=/etc/hostname", "file/etc/hostname", "deep_link"),
        *("proxy=http://127.0.0.1/", "run/on_register", "api/on_register", "call/on_register"),
        *("call/v2/on_register", "stream/x", "component_server", "process_recording", "reset"),
        *("vibe-code", "vibe-edit", "openapi.json", "dev/reload", "runs", "user", "token"),
        *("profiling/traces", "custom_component/1/client/component/x.js", "queue/status"),
    ],
)
def test_what_gradio_has_and_no_tab_needs_is_shut(app: lm.Guard, path: str) -> None:
    cookie = session(app)
    assert ask(f"/gradio_api/{path}", app).status_code == 401
    answer = ask(f"/gradio_api/{path}", app, cookie=cookie)
    assert (answer.status_code, answer.text) == (404, "There is nothing here.\n")


@pytest.mark.parametrize(
    "path", ["login", "logout", "monitoring/summary", "pwa_icon", "robots.txt"]
)
def test_no_page_of_gradios_but_the_one_is_open(app: lm.Guard, path: str) -> None:
    cookie = session(app)
    assert ask(f"/{path}", app, cookie=cookie).text == "There is nothing here.\n"


def first_look(app: lm.Guard, cookies: str) -> dict[str, dict[str, Any]]:
    """What the page shows before it asks for anything, by component."""
    page = ask("/", app, cookie=cookies).text
    (known,) = re.findall(r"const known = (.*), \{components, dependencies\}", page)
    return cast("dict[str, dict[str, Any]]", json.loads(known))


def test_a_page_shows_at_once_what_there_is(app: lm.Guard) -> None:
    cookie = session(app)
    # Times in it are the browser's, whose first page does not tell which zone it is in.
    assert first_look(app, cookie) == {}
    told = first_look(app, f"{cookie}; {lm.ZONE_COOKIE}=Europe/Rome")
    assert any("models ready" in str(each.get("value")) for each in told.values())
    newest = ask("/news?tab=Overview", app, cookie=f"{cookie}; {lm.ZONE_COOKIE}=Europe/Rome")
    assert [*told.values()][-1] == {"value": newest.json()["number"]}, "then it asks for nothing"


def test_what_one_browser_asks_for_is_not_the_page_of_all(app: lm.Guard) -> None:
    cookie = session(app)
    odd = ask("/?deep_link=none", app, cookie=cookie, host="127.0.0.1:9").text
    assert '"deep_link_state":"none"' in odd
    assert odd == ask("/", app, cookie=cookie, host="127.0.0.1:9").text
    assert "127.0.0.1:9" not in ask("/", app, cookie=cookie).text


def test_what_a_page_shows_at_once_ends_no_script(app: lm.Guard) -> None:
    cookie = session(app)
    page = ask("/", app, cookie=f"{cookie}; {lm.ZONE_COOKIE}=UTC").text
    (script,) = re.findall(r"const known = (.*), \{components", page)
    assert "\\u003cdiv" in script
    assert "<" not in script


def test_nothing_is_chosen_from_on_the_tab_in_front_that_the_server_would_not_know(
    desk: lm.Desk,
) -> None:
    # The choices that a page is shown at once are in its HTML only: Gradio would refuse them.
    page, news = lm.build_console(desk.manager, desk.watch)
    tell = next(fn for fn in page.fns.values() if fn.name == "tell")
    assert news.first_tab == "Overview"
    assert [part for part in tell.outputs if hasattr(part, "choices")] == []


def test_a_page_is_described_once_and_not_for_each_that_opens_it(app: lm.Guard) -> None:
    cookie = session(app)
    ask("/", app, cookie=f"{cookie}; {lm.ZONE_COOKIE}=UTC")
    holder = app._app.routes[-1].app.state_holder
    assert list(holder["a page"].components) == []
    page = holder["a page"].blocks_config
    page.blocks.clear()
    assert len(holder["another"].blocks_config.blocks) > 300, "each has its own"


def test_every_path_of_our_own_is_open_to_the_page(app: lm.Guard) -> None:
    own = [route.path for route in app._app.routes if getattr(route, "endpoint", None)]
    assert len(own) >= 5
    assert [path for path in own if not lm.PAGE_PATHS.fullmatch(re.sub(r"{.+}", "x", path))] == []


def test_only_what_bears_its_hash_in_its_name_is_kept_by_browsers(app: lm.Guard) -> None:
    cookie = session(app)
    page = ask("/", app, cookie=cookie)
    (script, *_) = re.findall(r"/assets/[\w.-]+\.js", page.text)
    assert "immutable" in ask(script, app, cookie=cookie).headers["cache-control"]
    for path in ("/", "/config", "/assets/none.js", "/news?tab=Overview", "/audit.csv"):
        assert ask(path, app, cookie=cookie).headers["cache-control"] == "no-store", path


def test_the_page_is_told_once_what_changed_in_its_tab(app: lm.Guard) -> None:
    cookie = session(app)
    first = ask("/news?tab=Energy", app, cookie=cookie).json()
    assert first == ask("/news?tab=Energy", app, cookie=cookie).json()
    assert ask("/news?tab=", app, cookie=cookie).json() | {"start": ""} == {
        "start": "", "tab": None, "number": 0
    }  # fmt: skip
    assert ask("/news?tab=Energy", app).status_code == 401


class Looked:
    """A watch that counts how often it is asked."""

    def __init__(self) -> None:
        self.looks = 0

    def latest(self) -> lm.Snapshot:
        self.looks += 1
        return a_snapshot()


def test_a_refresh_is_one_look_however_many_pages_there_are() -> None:
    clock, watch, words = Hands(), Looked(), ["one"]
    news = lm.News(cast("lm.Watch", watch), clock)
    news.add("A", [lambda _: words[0], lm.summary_line])
    news.add("B", [lm.summary_line])
    for _ in range(10):
        *shown, known = lm.tell_news(news, "A", 0)
        assert shown == ["one", lm.summary_line(a_snapshot())]
        lm.tell_news(news, "B", 0)
    assert watch.looks == 1
    clock.now += 2
    assert lm.tell_news(news, "A", known) == [gr.skip(), gr.skip(), known]
    assert watch.looks == 2
    words[0], clock.now = "two", 4
    told, kept, newer = lm.tell_news(news, "A", known)
    assert (told, kept) == ("two", gr.skip())
    assert newer > known
    assert lm.tell_news(news, "A", 0)[:2] == ["two", lm.summary_line(a_snapshot())]


def test_a_view_that_fails_keeps_what_it_showed_and_shuts_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, words = Hands(), ["one"]

    def fails(_: lm.Snapshot) -> str:
        return words[0]

    news = lm.News(cast("lm.Watch", Looked()), clock)
    news.add("A", [fails, lambda _: clock.now])
    assert lm.tell_news(news, "A", 0)[:2] == ["one", 0]
    words.clear()
    for clock.now in (2, 4):
        assert lm.tell_news(news, "A", 0)[:2] == ["one", clock.now]
    assert len(caplog.records) == 1
    news.add("B", [fails, lambda _: "well"])
    assert lm.tell_news(news, "B", 0)[:2] == [gr.skip(), "well"], "it never showed anything"


def test_what_cannot_be_checked_is_no_message_at_every_key(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken() -> None:
        raise KeyError("x")

    assert lm.typed_fault(broken) == ""
    assert "KeyError" in caplog.text
    assert "ladder" in lm.typed_fault(lambda: lm.parse_ladder(None))
    assert lm.typed_fault(lambda: lm.parse_ladder("1")) == ""


@pytest.fixture
def desk(tmp_path: Path) -> lm.Desk:
    """Of a server with one model, which is stopped."""
    server = Server(tmp_path)
    server.store.save(
        replace(server.manager.state(), models=(a_model(wish="stopped"),), endpoint="stopped")
    )
    return lm.Desk(server.manager, lm.Watch(server.manager, seconds=3600))


def test_what_is_confirmed_is_what_was_shown(desk: lm.Desk) -> None:
    manager, change = desk.manager, lm.deploying("chat")
    *_, text, pending = lm.planned(desk, "deploy", "chat", change)
    manager.save(lm.configuring_edge({"hostnames": ["gpu.lan"]}))
    card, _, newer, now = lm.confirmed_plan(desk, pending, change)
    assert card["visible"]
    assert manager.jobs() == []
    assert newer.startswith(lm.PLAN_CHANGED)
    assert "gpu.lan" in newer
    assert "gpu.lan" not in text
    card, _, _, left = lm.confirmed_plan(desk, now, change)
    assert (card["visible"], left) == (False, None)
    assert [job.title for job in manager.jobs()] == [change.title]


def test_the_time_in_the_name_of_a_dump_is_no_other_plan() -> None:
    names = (lm.automatic_dump(NOW), lm.automatic_dump(NOW + timedelta(seconds=1)))
    assert len({lm.AUTOMATIC_DUMP.sub("", f"dump into backups/{name}: x") for name in names}) == 1


def test_only_a_key_that_opens_something_is_handed_out(desk: lm.Desk) -> None:
    page, _ = lm.build_console(desk.manager, desk.watch)
    on_granted = next(f.fn for f in page.fns.values() if f.name == "on_granted")
    key = lm.new_direct_key("ada", (), emergency=False)
    secret = key.secret.get_secret_value()
    shown, kept = on_granted(key, None)
    assert (shown["value"], shown["visible"], kept) == ("", False, None)
    assert on_granted(key, ("grant", key, "another plan"))[1] == key
    desk.manager.save(lm.granting_direct(key))
    shown, kept = on_granted(key, None)
    assert secret in shown["value"]
    assert kept is None
    assert on_granted(None, None)[0]["visible"] is False


def test_a_form_that_is_filled_in_has_nothing_of_an_earlier_model(
    desk: lm.Desk, tmp_path: Path
) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    place = str(tmp_path / "weights")
    _, _, *filled = lm.form_of(desk.manager, place, None)
    raw = lm.registration(*filled)
    assert raw == {
        "name": "weights", "type": "chat", "source": {"kind": "local", "path": place},
        "served_model_name": "weights", "engine_arguments": [], "image": None, "recipe": None,
        "replicas": 1, "placement": {"kind": "cpu", "kv_cache_mib": 4096},
    }  # fmt: skip
    with gr.Blocks():
        assert len(lm.build_model_form(desk).filled) == len(filled) + 2


def test_a_page_opens_though_what_it_shows_first_is_a_bug(
    desk: lm.Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = lm.build_app(desk.manager, desk.watch)
    token = desk.manager.state().secrets.console_key.get_secret_value()
    cookie = session(app, token)
    monkeypatch.setattr(lm, "tell_news", lambda *_: 1 / 0)
    assert first_look(app, f"{cookie}; {lm.ZONE_COOKIE}=UTC") == {}
    assert "division by zero" in caplog.text


def test_the_audit_and_the_page_of_the_api_are_for_the_operator_alone(
    app: lm.Guard, manager: lm.Manager
) -> None:
    manager.save(lm.setting_hub_token("hf_x"))
    assert ask("/api/v1/docs", app).status_code == 401
    assert ask("/audit.csv", app).status_code == 401
    cookie = session(app)
    exported = ask("/audit.csv", app, cookie=cookie)
    assert exported.headers["content-type"].startswith("text/csv")
    assert "Set the Hugging Face token,2" in exported.text
    assert "hf_x" not in exported.text
    assert "POST /api/v1/jobs" in ask("/api/v1/docs", app, cookie=cookie).text
    assert ask("/api/v1/status", app, cookie=cookie).status_code == 401


@pytest.mark.parametrize(
    ("cookie", "shown"),
    [
        ("a=b; llm-manager-zone=Europe/Berlin; c=d", "2026-07-01 14:05 CEST"),
        ("llm-manager-zone=America/New_York", "2026-07-01 08:05 EDT"),
        ("llm-manager-zone=Mars/Olympus", "2026-07-01 12:05 UTC"),
        ("llm-manager-zone=../../etc/passwd", "2026-07-01 12:05 UTC"),
        ("llm-manager-zone=Europe", "2026-07-01 12:05 UTC"),
        ("another-llm-manager-zone=Europe/Berlin", "2026-07-01 12:05 UTC"),
        ("", "2026-07-01 12:05 UTC"),
    ],
)
def test_times_are_shown_in_the_zone_that_the_browser_tells(cookie: str, shown: str) -> None:
    request = gr.Request(headers={"cookie": cookie})
    noon = datetime(2026, 7, 1, 12, 5, tzinfo=UTC)
    assert lm.format_time(noon, lm.zone_of(request)) == shown


def test_who_renews_the_token_ends_every_session(manager: lm.Manager) -> None:
    watch = lm.Watch(manager, seconds=3600)
    guard = lm.build_app(manager, watch)
    before = manager.state()
    cookie = session(guard)
    assert ask("/news?tab=", guard, cookie=cookie).status_code == 200
    manager.save(lm.renewing_console_key(a_secret("new")))
    watch._latest = manager.snapshot()
    assert ask("/news?tab=", guard, cookie=cookie).status_code == 401
    assert ask(f"/?token={TOKEN}", guard).status_code == 401
    assert ask(f"/?token={a_secret('new').get_secret_value()}", guard).status_code == 303
    watch._latest = replace(watch._latest, state=None)
    assert ask("/news?tab=", guard, cookie=cookie).status_code == 401, "not even unreadable"
    manager.save(lm.renewing_console_key(before.secrets.console_key))


def test_what_is_wrong_with_what_is_typed_is_shown_as_text() -> None:
    assert "&lt;img&gt;" in lm.fault_html("<img>")


def test_a_certificate_is_described_by_the_fields_of_its_kind_alone() -> None:
    shown = {
        kind: [name for name, update in zip(lm.TLS_DETAILS, lm.shown_tls_details(kind), strict=True)
               if update["visible"]]
        for _, kind in lm.TLS_CHOICES
    }  # fmt: skip
    assert shown == {
        "internal": [], "own": ["certificate_path", "key_path"], "acme": ["email", "directory_url"],
    }  # fmt: skip


def test_what_is_not_ok_is_told_first() -> None:
    fine, wrong = (
        lm.Check(name="disk", ok=True, text="free"),
        lm.Check(name="Docker", ok=False, text="down", advice="Start it."),
    )
    assert [row[0] for row in lm.check_rows([fine, wrong])] == ["Docker", "disk"]
    assert lm.checks_text([fine]) == "All 1 checks are ok."
    assert lm.checks_text([fine, wrong]) == "**1 of 2 checks are not ok:** see its advice."


def test_without_a_dump_it_is_said_what_one_is_for() -> None:
    none = a_snapshot()
    assert (lm.dumps_text(none), lm.dump_table(none)["visible"]) == (lm.NO_DUMPS, False)
    dump = lm.Dump(file="one.dump", size_bytes=1, taken_at=NOW)
    one = a_snapshot(dumps=(dump,))
    assert (lm.dumps_text(one), lm.dump_choices(one)) == ("", {"choices": ["one.dump"]})
    assert lm.dump_table(one) == {
        "value": [["one.dump", "1 B", "2026-03-04 05:06 UTC", "stays"]], "visible": True,
    }  # fmt: skip


def test_an_error_is_shown_as_text_and_a_bug_only_by_its_number() -> None:
    with pytest.raises(gr.Error) as raised, lm.shown_to_operator():
        raise lm.RefusedError("<img src=x onerror=alert(1)>.", advice="A & B.")
    assert raised.value.message == "&lt;img src=x onerror=alert(1)&gt;. A &amp; B."
    with pytest.raises(gr.Error) as raised, lm.shown_to_operator():
        raise KeyError("sk-internal")
    assert re.fullmatch(
        r"Unexpected error [0-9a-f]{8}\. The journal has the details\.", raised.value.message
    )


# --- user text is never markup ------------------------------------------------------------

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
ALPHABET = st.sampled_from([*"ab1 *_`~#+-.!|<>&[](){}\\\"'=:/^$\t"])
LINES = st.text(ALPHABET, max_size=30)


def tags_in(markdown: str) -> list[str]:
    return re.findall(r"<(\w+)", MARKDOWN.render(markdown))


@settings(max_examples=200)
@given(LINES)
@example("<script>alert(1)</script>")
@example("[x](javascript:alert(1))")
@example("![x](http://x)")
@example("&lt;b&gt;")
def test_no_line_of_user_text_can_become_markup(text: str) -> None:
    assert tags_in(f"- x {lm.plain(text)} y") == ["ul", "li"]
    assert tags_in(f"**{lm.plain('a' + text + 'a')}** y") == ["p", "strong"]


@pytest.mark.parametrize("text", ["a\n- b", "a\n\nb", "a\n1. b", "a  \nb", "a\r\n\r\n    b"])
def test_no_lines_of_user_text_can_become_markup(text: str) -> None:
    assert tags_in(f"- x {lm.plain(text)} y") == ["ul", "li"]


@settings(max_examples=100)
@given(st.lists(LINES | st.sampled_from(["~~~", "~~~~~~", "~~~~~~~", "```"])).map("\n".join))
def test_no_text_can_close_its_code_block(text: str) -> None:
    assert tags_in(lm.code_block(text)) == ["pre", "code"]


HOSTILE = "<b>x</b>[y](javascript:1)"


def test_hostile_text_stays_text_wherever_it_is_shown() -> None:
    fault = lm.ManagerError(HOSTILE, advice=HOSTILE)
    snapshot = a_snapshot(
        faults=(fault,), jobs=(a_job(title=HOSTILE, fault=HOSTILE, finished_at=NOW),)
    )
    plan = lm.plan_state(a_state(a_model()), lm.Observed(), a_site())
    shown = [
        lm.matters_html(snapshot),
        lm.job_title(snapshot),
        lm.job_title(replace(snapshot, jobs=(a_job(title=HOSTILE),))),
        lm.revoke_question(HOSTILE),
        lm.plan_markdown(HOSTILE, plan),
        lm.plan_markdown(HOSTILE, lm.plan_state(a_state(), as_wished(a_state()), a_site())),
    ]
    for text in shown:
        assert not {"a", "b", "img"} & {*tags_in(text)}, text


# --- the tab Models ------------------------------------------------------------


def a_fleet() -> lm.Snapshot:
    """One model that ended, one that is stopped, one that serves."""
    state = a_state(*(a_model(name, wish=wish) for name, wish in FLEET))
    wished = as_wished(state)
    observed = but(wished, ended(the(wished, "llm-model-bad-0"), 1))
    load = lm.EngineLoad(running=2, waiting=1, tokens=9, cached=0.1)
    loads = {lm.ContainerName("llm-model-good-0"): load}
    return a_snapshot(
        state, observed=observed, plan=None, health=lm.RouteHealth(loads=loads),
        rates={"good": lm.EngineRates(generated_tokens=312.0)},
        fates={"bad": f"{HOSTILE} ran out of memory."},
    )  # fmt: skip


FLEET = (("calm", "stopped"), ("good", "running"), ("bad", "running"))


def test_the_models_that_need_somebody_are_first_and_say_what_they_are_at() -> None:
    rows = lm.fleet_rows(a_fleet())
    assert [row[0] for row in rows] == ["bad", "good", "calm"]
    assert all(len(row) == len(lm.FLEET_HEADERS) for row in rows)
    assert [re.sub("<[^>]*>", "", row[1]) for row in rows] == ["✕ failed", "✓ ready", "■ stopped"]
    assert rows[1][4] == "2 running, 1 waiting · 312 tokens/s"


def test_without_a_model_there_is_no_empty_table_but_the_next_step() -> None:
    assert lm.fleet_view(a_snapshot(a_state())) == {"value": [], "visible": False}
    assert lm.fleet_view(a_fleet())["visible"]


def test_a_button_is_off_only_with_a_reason() -> None:
    able = {
        name: {verb for verb, why in lm.why_not(a_fleet(), name).items() if not why}
        for name in ("bad", "good", "calm", "gone", None)
    }
    assert able["bad"] == {"deploy", "stop", "restart", "remove"}
    assert able["good"] == {"stop", "restart", "remove"}
    assert able["calm"] == {"deploy", "remove"}
    assert able["gone"] == able[None] == set()


def test_a_model_that_serves_can_be_deployed_where_the_plan_would_change_it() -> None:
    state = a_state(a_model(engine_arguments=("--seed", "1")))
    before = as_wished(a_state(a_model()))
    plan = lm.plan_state(state, before, a_site())
    assert not lm.why_not(a_snapshot(state, observed=before, plan=plan), "chat")["deploy"]
    whole = replace(a_snapshot(state), plan=lm.plan_state(state, as_wished(state), a_site()))
    assert lm.why_not(whole, "chat")["deploy"]
    other = a_state(a_model(), a_model("other"))
    plan = lm.plan_state(other, as_wished(a_state(a_model())), a_site())
    assert lm.why_not(a_snapshot(other, plan=plan), "chat")["deploy"]
    assert not lm.why_not(a_snapshot(other, plan=plan), "other")["restart"]


def test_the_card_of_a_model_has_its_address_a_request_and_its_fate_as_text() -> None:
    card = lm.model_card(a_fleet(), "bad")
    assert "&lt;b&gt;x&lt;/b&gt;" in card
    assert "<b>x</b>" not in card
    assert "https://" in card
    assert "/chat/completions" in card
    assert "Register and deploy" in lm.model_card(a_snapshot(a_state()), None)
    assert "Click a row" in lm.model_card(a_fleet(), None)


@pytest.mark.parametrize(
    ("kind", "said"),
    [("chat", "/v1/chat/completions"), ("vision", '"content": "Hello"'), ("embedding", '"input"'),
     ("rerank", "/v1/rerank"), ("speech-to-text", "-F file=@speech.wav"),
     ("text-to-speech", "-o speech.wav"), ("image", "/v1/images/generations")],
)  # fmt: skip
def test_a_request_to_paste_is_of_the_models_own_kind(kind: lm.ModelType, said: str) -> None:
    request = lm.curl_example(lm.Edge(), "name", "sk-x", kind)
    assert said in request
    assert "'Authorization: Bearer sk-x'" in request


# --- what is shown ------------------------------------------------------------


def test_a_model_is_one_row() -> None:
    assert lm.model_rows(a_snapshot()) == [
        ["chat", "chat", "ready", "chat", "Qwen/Qwen3-0.6B", "CPU, 4096 MiB KV cache", "3 min"]
    ]
    assert len(lm.MODEL_HEADERS) == 7


def test_without_docker_a_phase_is_unknown_and_not_invented() -> None:
    (row,) = lm.model_rows(a_snapshot(observed=None, plan=None))
    assert row[2] == "unknown"
    assert row[6] == ""


def test_without_a_state_there_are_no_rows_and_the_summary_says_so() -> None:
    snapshot = a_snapshot(observed=None, plan=None)
    blind = replace(snapshot, state=None)
    assert lm.model_rows(blind) == []
    assert lm.summary_line(blind) == "The state cannot be read."
    assert lm.summary_line(snapshot) == "Docker does not answer."
    assert not blind.state_has_models


@pytest.mark.parametrize(
    ("wish", "containers", "busy", "phase"),
    [
        ("running", {"running": True, "ready": True}, False, "ready"),
        ("running", {"running": True, "ready": False}, False, "starting"),
        ("running", {"running": False}, True, "pending"),
        ("running", {"running": False}, False, "failed"),
        ("running", None, False, "failed"),
        ("running", None, True, "pending"),
        ("stopped", {"running": True}, True, "stopping"),
        ("stopped", None, False, "stopped"),
    ],
)
def test_a_phase_says_where_a_model_stands(
    wish: lm.Wish, containers: dict[str, bool] | None, busy: bool, phase: str
) -> None:
    state = a_state(a_model(wish=wish))
    there = [] if containers is None else [seen(an_engine(state), **containers)]
    observed = but(as_wished(a_state()), *there)
    assert lm.phase_of(state, state.model("chat"), observed, busy) == phase


def test_a_model_is_ready_only_with_all_its_replicas() -> None:
    state = a_state(a_model(replicas=2))
    observed = but(as_wished(state), without=CHAT)
    assert lm.phase_of(state, state.model("chat"), observed, busy=False) == "starting"


def test_containers_are_rows_in_the_order_of_their_names() -> None:
    state = a_state(a_model())
    observed = as_wished(state)
    observed = but(observed, ended(the(observed, CHAT), 137))
    rows = lm.component_rows(a_snapshot(state, observed=observed))
    assert [(row[0], row[2]) for row in rows] == [
        ("llm-caddy", "ready"),
        ("llm-litellm-a", "ready"),
        ("llm-model-chat-0", "ended with 137"),
        ("llm-postgres", "ready"),
    ]


def test_the_overview_is_silent_when_all_is_well() -> None:
    assert lm.attention(a_snapshot()) == []


def test_the_overview_names_what_should_run_and_does_not() -> None:
    state = a_state(a_model())
    observed = as_wished(state)
    observed = but(observed, ended(the(observed, CHAT), 1))
    plan = lm.plan_state(state, observed, a_site())
    snapshot = a_snapshot(state, observed=observed, plan=plan)
    assert [matter.text for matter in lm.attention(snapshot)] == [
        "chat should run and does not. Read its log, then deploy it again.",
        "2 steps away from what is wished. Review and apply the plan.",
    ]
    busy = replace(snapshot, jobs=(a_job(),))
    assert lm.attention(busy) == []


def test_the_overview_says_first_that_postgresql_is_down() -> None:
    state = a_state(a_model())
    database = the(as_wished(state), lm.database_name(state))
    for fallen in (ended(database, 1), replace(database, ready=False)):
        down = a_snapshot(state, observed=but(as_wished(state), fallen))
        assert lm.attention(down)[0].text.startswith("PostgreSQL is down.")
        assert lm.attention(replace(down, jobs=(a_job(),))) == []
    stopped = replace(state, endpoint="stopped")
    assert not lm.is_database_down(stopped, but(as_wished(state), ended(database, 0)))
    assert not lm.is_database_down(state, lm.Observed())


def test_the_overview_names_a_route_that_nobody_is_to_answer() -> None:
    off = a_model("off", wish="stopped")
    route = lm.Route(name="both", members=("off",))
    state = a_state(a_model(), off, routes=(route,))
    (matter,) = lm.attention(a_snapshot(state))
    assert matter.tab == "Routes"
    assert "Nobody answers for the route both" in matter.text
    stands_in = replace(state, routes=(replace(route, fallbacks=("chat",)),))
    assert lm.attention(a_snapshot(stands_in)) == []
    assert lm.hollow_routes(replace(state, endpoint="stopped")) == []


def test_the_summary_counts_and_names_the_endpoint() -> None:
    state = a_state(a_model(), a_model("off", wish="stopped"))
    line = lm.summary_line(a_snapshot(state))
    assert line == "1 of 2 models ready; https://localhost/v1 answers."
    assert "starts with the first" in lm.summary_line(a_snapshot(a_state(endpoint="stopped")))


def test_a_job_says_how_it_stands() -> None:
    running = a_snapshot(jobs=(a_job(), a_job(title="older", finished_at=NOW)))
    assert "Deploy chat" in lm.job_title(running)
    assert "3 min 20 s" in lm.job_title(running)
    assert lm.running_job(running) is not None
    done = a_snapshot(jobs=(a_job(finished_at=NOW + timedelta(seconds=9)),))
    assert "done in 9 s" in lm.job_title(done)
    failed = a_snapshot(jobs=(a_job(finished_at=NOW, fault="No luck."),))
    assert "failed" in lm.job_title(failed)
    assert "No luck" in lm.job_title(failed)
    assert lm.running_job(failed) is None
    assert lm.job_title(a_snapshot()) == ""


def test_a_task_hides_no_fault_and_no_change() -> None:
    """Only a change excuses that the server is not as wished."""
    task = a_job(title="Download a/b", kind="task")
    state = a_state(a_model())
    down = a_snapshot(state, observed=but(as_wished(state), without=CHAT), jobs=(task,))
    assert lm.running_job(down) is None
    assert "chat should run" in lm.attention(down)[0].text
    assert "Download a/b" in lm.job_title(down)
    assert "Cancel" in lm.job_bar_html(down)
    both = replace(down, jobs=(task, a_job()))
    assert "Deploy chat" in lm.job_title(both)


def test_the_plan_is_shown_before_it_is_done() -> None:
    before = a_state(a_model())
    plan = lm.plan_state(before.with_model(a_model("other")), as_wished(before), a_site())
    text = lm.plan_markdown("Deploy other", plan)
    assert "create llm-model-other-0" in text
    assert "+- model_name: other" in text
    nothing = lm.plan_state(before, as_wished(before), a_site())
    assert "nothing to do" in lm.plan_markdown("Deploy chat", nothing)
    assert lm.pending_plan_text(a_snapshot()).startswith("Nothing")
    assert "cannot be planned" in lm.pending_plan_text(a_snapshot(plan=None))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0 s"), (0.9, "0 s"), (59, "59 s"), (60, "1 min"), (200, "3 min 20 s"),
        (3600, "1 h"), (18120, "5 h 2 min"), (86400 * 4 + 3600 * 3 + 59, "4 d 3 h"),
    ],
)  # fmt: skip
def test_a_duration_has_two_units_at_most(seconds: float, text: str) -> None:
    assert lm.format_duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 1024**3, "5.0 GiB"),
     (3 * 1024**5, "3072.0 TiB")],
)  # fmt: skip
def test_a_size_is_read_in_its_unit(size: float, text: str) -> None:
    assert lm.format_size(size) == text


def test_placements_and_sources_are_read_at_a_glance() -> None:
    hardware = lm.Hardware(gpus=(lm.Gpu(uuid=GPU_1, index=1),))
    gone, there = on_gpus(GPU_0), on_gpus(GPU_1, memory_fraction=0.3)
    assert lm.format_placement(gone, hardware) == GPU_0[:12]
    assert lm.format_placement(there, hardware) == "30% of GPU 1"
    mig = lm.MigPlacement(gpu_uuid=GPU_1, profile="1g.18gb", start=2)
    assert lm.format_placement(mig, hardware) == "1g.18gb at 2 of GPU 1"
    assert lm.format_source(lm.HubSource(repository="a/b", revision="main")) == "a/b@main"
    assert lm.format_source(lm.LocalSource(path="/srv/x")) == "/srv/x"


def test_what_a_colleague_gets_can_be_pasted() -> None:
    state = a_state(a_model())
    text = lm.hand_out(state, lm.KeySettings(alias="Ada"), "sk-1")
    assert "API key:   sk-1\nBase URL:  https://localhost/v1\n" in text
    assert "curl -k https://localhost/v1/chat/completions" in text
    own = lm.Edge(hostnames=("llm.example.org",), https_port=8443, tls=lm.AcmeTls(email="a@b.c"))
    assert lm.base_url(own) == "https://llm.example.org:8443/v1"
    assert "-k" not in lm.curl_example(own, "chat", "sk-1")


def test_the_cause_is_found_in_an_engines_log() -> None:
    assert lm.last_error_line("all is well\n") is None
    text = (
        "INFO starting\n"
        "(EngineCore pid=9) ValueError: No available memory for the cache blocks.\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert lm.last_error_line(text) == "ValueError: No available memory for the cache blocks."
    assert lm.last_error_line("vllm: error: unrecognized arguments: --x") == (
        "vllm: error: unrecognized arguments: --x"
    )
    assert len(lm.last_error_line(f"ValueError: {'x' * 999}") or "") == 400


def test_a_pull_says_one_line_per_tenth() -> None:
    progress = lm.PullProgress("x/y:1")
    lines = [
        progress.line(
            {
                "status": "Downloading",
                "id": "layer",
                "progressDetail": {"current": n, "total": 1000},
            }
        )
        for n in range(0, 1001, 5)
    ]
    said = [line for line in lines if line]
    assert len(said) == 11
    assert said[-1] == "  x/y:1: 1000 B of 1000 B"
    assert progress.line({"status": "Extracting"}) is None
    assert progress.line({}) is None


# --- what the forms send ------------------------------------------------------------


def test_a_filled_form_is_a_model() -> None:
    raw = lm.registration(
        " chat ", "chat", lm.ORIGINS[0], " a/b ", "--seed 1", "", "", "", 64, 2, ["cpu"]
    )
    model = lm.parse_model(raw, a_state(), {})
    assert (model.name, model.served_model_name, model.replicas) == ("chat", "chat", 2)
    assert model.source == lm.HubSource(repository="a/b")
    assert model.placement == lm.CpuPlacement(kv_cache_mib=64)
    assert model.engine_arguments == ("--seed", "1")


def test_a_form_can_name_a_directory_and_gpus() -> None:
    raw = lm.registration(
        "chat", "chat", lm.ORIGINS[1], "/srv/x", "", "q", "", "x/y:1", None, 1, [GPU_0], None, 0.4
    )
    model = lm.parse_model(raw, a_state(), {})
    assert model.source == lm.LocalSource(path="/srv/x")
    assert model.placement == on_gpus(GPU_0, memory_fraction=0.4)
    assert (model.served_model_name, model.image) == ("q", "x/y:1")


def test_a_form_can_name_a_slice_and_then_no_gpu_counts() -> None:
    raw = lm.registration(
        *("chat", "chat", lm.ORIGINS[0], "a/b", "", "", "", "", 64, 1),
        gpus=[GPU_1],
        mig_slice=f"{GPU_0}:3g.20gb:4",
    )
    model = lm.parse_model(raw, a_state(), {})
    assert model.placement == lm.MigPlacement(gpu_uuid=GPU_0, profile="3g.20gb", start=4)


def test_an_empty_form_is_refused_with_what_is_missing() -> None:
    raw = lm.registration("", "chat", lm.ORIGINS[0], "", "", "", "", "", None, 1)
    assert "placement" not in raw, "where nothing is chosen, the program chooses"
    with pytest.raises(lm.RefusedError, match=r"name: .*source\.repository: "):
        lm.parse_model(raw, a_state(), {})


def test_https_settings_come_from_their_form() -> None:
    state = a_state(edge=lm.Edge(address="10.0.0.5"))
    raw = lm.edge_settings("a.org, b.org", 8443, 8080, "acme", "", "", " a@b.c ", None)
    assert lm.configuring_edge(raw).edit(state).edge == lm.Edge(
        address="10.0.0.5",
        hostnames=("a.org", "b.org"),
        https_port=8443,
        http_port=8080,
        tls=lm.AcmeTls(email="a@b.c"),
    )
    incomplete = lm.configuring_edge(lm.edge_settings("a.org", 443, 80, "own", "", "", "", ""))
    with pytest.raises(lm.RefusedError, match="certificate_path"):
        incomplete.edit(state)


def test_the_facts_of_status_are_keyed_like_the_table() -> None:
    facts = lm.status_facts(a_snapshot())
    assert facts["models"][0]["served_as"] == "chat"
    assert {row["container"] for row in facts["containers"]} == set(
        as_wished(a_state(a_model())).containers
    )
    assert facts["attention"] == []
