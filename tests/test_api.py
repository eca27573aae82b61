"""Programs: the REST API as a program meets it, over a simulated server."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from builders import SECRET_MARK
from fakes import FakeGateway, Server
from pydantic import SecretStr

import llm_manager as lm

HOST = "127.0.0.1:7860"
HUB = {"kind": "hub", "repository": "a/b"}
CHAT = {"name": "chat", "type": "chat", "source": HUB}


async def console(scope: Any, receive: Any, send: Any) -> None:
    """What no program must reach: it answers anybody."""
    await send({"type": "http.response.start", "status": 299, "headers": []})
    await send({"type": "http.response.body", "body": b"the console"})


class FakeTables:
    """What PostgreSQL would say of one key, used once, whatever it is asked."""

    def rows(self, sql: lm.Sql) -> list[tuple[Any, ...]]:
        if sql is lm.STANDINGS_SQL:
            return []
        if "GROUP BY team" in sql.text:
            return [("ML", "ML", "chat", 1, 20, 5, 7)]
        used = (1, 0, 20, 5, 7, 12.5, 1)
        return [("", "", *used), ("ab" * 32, "Ada", *used)]


class Program:
    """A program with a token, and the server that it speaks to."""

    def __init__(self, server: Server) -> None:
        self.server, self.manager = server, server.manager
        self.gateway = FakeGateway(server)
        self.manager.usage._tables = FakeTables  # type: ignore[method-assign,assignment]
        self.api = lm.build_api(self.manager, lm.Watch(self.manager, seconds=3600))
        gate = lm.TokenGate(self.api, self.manager)
        self.app = lm.Guard(console, gate, lambda: SecretStr("k"), "a1b2c3")
        token, secret = lm.new_admin_token("ci")
        self.manager.save(lm.granting_token(token))
        self.secret = secret.get_secret_value()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        """One request; underscores in header names are dashes."""
        sent = {"host": HOST, "authorization": f"Bearer {self.secret}"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()

        async def asking() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url=f"http://{HOST}") as client:
                return await client.request(method, f"/api/v1/{path}", content=raw, headers=sent)

        return asyncio.run(asking())

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.ask("GET", path, **headers)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return self.ask("POST", path, body, **{"content_type": "application/json"} | headers)

    def ask_json(self, method: str, path: str, body: Any) -> lm.Json:
        answer = self.ask(method, path, body, content_type="application/json")
        assert answer.is_success, answer.text
        return dict(answer.json())

    def finish(self, answer: httpx.Response) -> lm.Json:
        """The job as it is read from where the answer says, when it has ended."""
        assert answer.status_code == 202, answer.text
        job_id = answer.headers["location"].rpartition("/")[2]
        job = next(job for job in self.manager._jobs if job.id == job_id)
        with contextlib.suppress(lm.ManagerError):
            list(job.follow())
        return dict(self.get(answer.headers["location"].removeprefix("/api/v1/")).json())


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(Server(tmp_path))


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """One with a registered model, for what changes nothing."""
    program = Program(Server(tmp_path_factory.mktemp("home")))
    program.manager.register(CHAT)
    return program


def problem(answer: httpx.Response, status: int) -> str:
    """The one sentence of fact of an answer that has one of advice as well."""
    assert answer.status_code == status, answer.text
    told = answer.json()
    assert set(told) == {"fact", "advice"}
    assert told["fact"].endswith(".")
    assert told["advice"]
    return str(told["fact"])


# --- who may --------------------------------------------------------------------------------------

EVERYWHERE = ["status", "plan", "keys", "openapi.json", "nowhere", "jobs/x", "%2e%2e/x", "%0a", ""]
WRONG = [
    "",
    "Bearer ",
    "Bearer x",
    "Basic {secret}",
    "{secret}",
    "Bearer {secret}x",
    "Bearer\t{secret}",
]


@pytest.mark.parametrize("path", EVERYWHERE)
def test_nothing_is_answered_without_a_token(settled: Program, path: str) -> None:
    for shown in WRONG:
        answer = settled.get(path, authorization=shown.format(secret=settled.secret))
        assert "no admin token" in problem(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
    assert settled.get(path, authorization=f"bearer {settled.secret}").status_code != 401


def test_without_a_token_not_even_a_body_is_read(settled: Program) -> None:
    def pieces() -> Any:
        raise AssertionError
        yield b""

    refused = []

    async def send(message: lm.Json) -> None:
        refused.append(message)

    headers = [(b"host", HOST.encode()), (b"content-length", b"9")]
    scope = {"type": "http", "method": "POST", "path": "/api/v1/jobs", "headers": headers}
    asyncio.run(settled.app(scope | {"query_string": b""}, pieces, send))
    assert refused[0]["status"] == 401


def test_the_stored_hash_of_a_token_is_no_token(settled: Program) -> None:
    (stored,) = settled.manager.state().admin_tokens
    assert settled.secret not in lm.render_state(settled.manager.state())
    assert settled.get("status", authorization=f"Bearer {stored.sha256}").status_code == 401


def test_a_revoked_token_opens_nothing_from_then_on_whatever_is_rolled_back(
    program: Program,
) -> None:
    assert program.get("status").status_code == 200
    before = program.manager.state()
    program.manager.save(lm.revoking_token("ci"))
    assert program.get("status").status_code == 401
    program.manager.save(lm.returning_to(1, before))
    assert program.get("status").status_code == 401
    with pytest.raises(lm.UnknownError, match="no admin token called 'ci'"):
        program.manager.save(lm.revoking_token("ci"))


def test_a_name_of_a_token_is_given_once(settled: Program) -> None:
    with pytest.raises(lm.RefusedError, match="token called ci already"):
        settled.manager.save(lm.granting_token(lm.new_admin_token("ci")[0]))


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ],
    ids=str,
)
def test_a_page_from_elsewhere_is_refused_even_with_a_token(
    settled: Program, headers: dict[str, str]
) -> None:
    answer = settled.get("status", **headers)
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    preflight = settled.ask("OPTIONS", "jobs", access_control_request_method="POST", **headers)
    assert preflight.status_code == 403


def test_a_token_opens_no_console_and_a_cookie_no_api(settled: Program) -> None:
    session = settled.app._session()
    cookie = f"llm-manager-a1b2c3={session}"
    assert settled.get("status", authorization="", cookie=cookie).status_code == 401
    for path in ("../../config", "docs", "../v1", "../v12/status", "../v1%2f/status"):
        answer = settled.get(path)
        assert answer.status_code in {401, 404}, path
        assert answer.text != "the console"
    assert settled.get("docs", cookie=cookie).text == "the console"


# --- what it tells ------------------------------------------------------------------------------


def test_it_tells_what_there_is(program: Program) -> None:
    program.manager.register(CHAT)
    program.server.do(lm.deploying("chat"))
    program.manager.save(lm.routing({"name": "smart", "members": ["chat"]}))
    assert program.get("models/chat").json()["wish"] == "running"
    assert [model["name"] for model in program.get("models").json()] == ["chat"]
    routes = {route["name"]: route for route in program.get("routes").json()}
    assert routes["smart"]["members"] == ["chat"]
    assert routes["chat"]["served_by"] == ["chat"]
    told = program.get("status").json()
    assert {"schema_version", "health", "summary", "models", "containers", "attention"} <= set(told)
    assert [job["title"] for job in program.get("jobs").json()] == ["Deploy chat"]
    assert [e["what"] for e in program.get("audit").json()][-1] == "Route smart"
    assert program.get("audit?since=2999-01-01").json() == []
    assert "no day" in problem(program.get("audit?since=2026-99-99"), 422)
    assert program.get("plan").json()["stages"][0]["steps"]


def test_no_secret_is_told(program: Program) -> None:
    program.manager.save(
        lm.providing({
            "name": "lab", "kind": "openai", "base_url": "http://10.0.0.7",
            "api_key": f"sk-{SECRET_MARK}",
        })
    )  # fmt: skip
    program.manager.save(lm.granting_direct(lm.new_direct_key("ada")))
    hidden = [SECRET_MARK, program.secret] + [
        lm.reveal(secret)
        for secret in vars_of(program.manager.state().secrets)
        if isinstance(secret, SecretStr)
    ]
    for path in ("status", "models", "routes", "plan", "jobs", "audit", "openapi.json"):
        told = program.get(path).text
        assert not [secret for secret in hidden if secret in told], path


def vars_of(secrets: lm.Secrets) -> list[object]:
    return [getattr(secrets, name) for name in secrets.__slots__]


def test_its_own_document_and_page_ask_the_internet_for_nothing(settled: Program) -> None:
    document = settled.get("openapi.json").json()
    assert {"/api/v1/plan", "/api/v1/jobs/{job_id}"} <= set(document["paths"])
    page = lm.render_api_page(document)
    assert "POST /api/v1/jobs" in page
    assert "http" not in page.replace("https://", "", 0).split("<details>")[0]
    assert "<script" not in page
    assert " src=" not in page
    assert " href=" not in page


# --- what it does ---------------------------------------------------------------------------------


def test_a_model_is_registered_planned_deployed_and_stopped(program: Program) -> None:
    made = program.post("models", CHAT | {"engine_arguments": ["--seed", "1"]})
    assert made.status_code == 201
    assert (made.json()["wish"], made.json()["engine_arguments"]) == ("stopped", ["--seed", "1"])

    deploy = {"change": "deploy", "name": "chat"}
    plan = program.post("plan", deploy)
    assert plan.status_code == 200
    assert plan.json()["title"] == "Deploy chat"
    assert "create llm-model-chat-0" in plan.text
    assert program.server.world.containers == {}

    job = program.finish(program.post("jobs", deploy))
    assert (job["title"], job["fault"], job["cancelled"]) == ("Deploy chat", None, False)
    assert "  llm-caddy is ready after 0 s" in job["lines"]
    assert program.server.world.routed() == {"chat"}
    program.finish(program.post("jobs", {"change": "stop", "name": "chat"}))
    assert program.server.world.routed() == set()
    assert {(e.who, e.channel) for e in program.manager.audit.entries()[1:]} == {("ci", "API")}


def test_it_makes_the_plan_that_the_console_makes(settled: Program) -> None:
    theirs = lm.plan_facts("Deploy chat", settled.manager.plan(lm.deploying("chat")))
    ours = settled.post("plan", {"change": "deploy", "name": "chat"}).json()
    assert [stage["steps"] for stage in ours["stages"]] == [[*s.steps] for s in theirs.stages]
    assert ours["diff"] == theirs.diff


def test_settings_routes_and_providers_are_changed(program: Program) -> None:
    program.manager.register(CHAT | {"recipe": None})
    state = program.manager.state

    def do(**body: Any) -> None:
        assert program.finish(program.post("jobs", body))["fault"] is None, body

    do(change="set-model", name="chat", settings={"replicas": 2, "source": HUB | {"revision": "x"}})
    assert state().model("chat").replicas == 2
    assert state().model("chat").type == "chat"
    lab = {"name": "lab", "kind": "openai", "base_url": "http://10.0.0.7"}
    do(change="set-provider", provider=lab | {"api_key": "k1"})
    do(change="set-provider", provider=lab | {"base_url": "http://10.0.0.8"})
    assert lm.reveal(state().provider("lab").api_key) == "k1"
    do(change="set-route", route={"name": "r", "members": ["chat", "lab/x"], "retries": 1})
    assert state().routes[0].retries == 1
    do(change="remove-route", name="r")
    do(change="remove-provider", name="lab")
    do(change="apply")
    before = program.manager.state()
    do(change="roll-back", version=program.server.store.versions()[-1])
    assert state() != before
    do(change="remove-model", name="chat")
    assert state().models == ()


def test_a_job_is_cancelled(program: Program) -> None:
    program.manager.register(CHAT)
    cancelled: list[httpx.Response] = []
    path = "jobs/{}"

    def cancel() -> None:
        if not cancelled:
            job_id = program.manager.jobs()[0].id
            cancelled.append(program.ask("DELETE", path.format(job_id)))

    program.server.trouble.watch = cancel
    job = program.finish(program.post("jobs", {"change": "deploy", "name": "chat"}))
    assert cancelled[0].status_code == 202
    assert job["cancelled"]
    problem(program.ask("DELETE", path.format("none")), 404)


def test_a_key_is_made_listed_and_revoked(program: Program) -> None:
    made = program.post("keys", {"alias": "Ada/Bob", "rpm_limit": 3})
    assert made.status_code == 201
    assert made.json()["key"] in made.json()["hand_out"]
    (key,) = program.get("keys").json()
    settings = key["settings"]
    assert (settings["alias"], settings["rpm_limit"], "key" in key) == ("Ada/Bob", 3, False)
    assert "already" in problem(program.post("keys", {"alias": "Ada/Bob"}), 409)
    assert program.ask("DELETE", "keys/Ada/Bob").status_code == 204
    assert program.get("keys").json() == []
    problem(program.ask("DELETE", "keys/Ada/Bob"), 404)
    told = [(e.who, e.what, e.result) for e in program.manager.audit.entries()[1:]]
    assert told == [
        ("ci", "Create the key Ada/Bob", "done"), ("ci", "Create the key Ada/Bob", "failed"),
        ("ci", "Revoke the key Ada/Bob", "done"), ("ci", "Revoke the key Ada/Bob", "failed"),
    ]  # fmt: skip


def test_a_key_is_changed_rotated_blocked_and_diagnosed(program: Program) -> None:
    secret = program.post("keys", {"alias": "Ada/Bob", "rpm_limit": 3, "note": "x"}).json()["key"]
    edited = program.ask_json("PATCH", "keys/Ada/Bob", {"rpm_limit": None, "budget": 2.5})
    assert [edited[n] for n in ("rpm_limit", "budget", "note")] == [None, 2.5, "x"]
    assert program.ask("POST", "keys/Ada/Bob/block").status_code == 204
    why = program.ask_json("POST", "keys/why", {"key": secret})
    assert "It is blocked" in why["faults"][0]["fact"]
    assert program.ask("POST", "keys/Ada/Bob/unblock").status_code == 204
    why = program.ask_json("POST", "keys/why", {"key": secret})
    assert [fault["fact"] for fault in why["faults"]] == ["The endpoint is stopped."]
    other = program.post("keys/Ada/Bob/rotate", {"grace_hours": 1})
    assert other.status_code == 201
    assert other.json()["key"] != secret
    assert len(program.get("keys").json()) == 2
    program.post("keys/Ada/Bob/rotate", {"grace_hours": 0})
    assert len(program.get("keys").json()) == 2
    problem(program.post("keys/Ada/Bob/rotate", {"grace_hours": 1e300}), 422)
    problem(program.post("keys/nobody/rotate", {}), 404)
    nonsense = program.ask(
        "PATCH", "keys/Ada/Bob", {"period": "day", "budget": None}, content_type="application/json"
    )
    assert "without a budget" in problem(nonsense, 422)


def test_a_list_of_people_is_a_job_whose_secrets_are_told_once(program: Program) -> None:
    program.post("groups", {"name": "ML"})
    people = {"csv": "name,email\nAda,ada@x.org\nBob,\n", "group": "ML", "rpm_limit": 3}
    refused = program.post("keys/import", people | {"csv": "name,email\nAda,\nEve,nonsense\n"})
    assert "line 3: " in problem(refused, 409)
    job = program.finish(program.post("keys/import", people))
    assert job["offers"]
    assert "sk-" not in json.dumps(job)
    told = program.ask("POST", f"jobs/{job['id']}/secrets")
    assert told.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(told.text)))
    assert [(row["name"], row["group"]) for row in rows] == [("Ada", "ML"), ("Bob", "ML")]
    assert {sha256(row["key"].encode()).hexdigest() for row in rows} == {*program.gateway.keys}
    assert "no secrets" in problem(program.ask("POST", f"jobs/{job['id']}/secrets"), 409)
    assert not program.get(f"jobs/{job['id']}").json()["offers"]
    problem(program.ask("POST", "jobs/none/secrets"), 404)


def test_a_group_is_made_extended_blocked_and_revoked(program: Program) -> None:
    made = program.post("groups", {"name": "ML/1", "budget": 5, "note": "a course"})
    assert (made.status_code, made.json()["budget"]) == (200, 5)
    changed = program.post("groups", {"name": "ML/1", "rpm_limit": 9}).json()
    assert (changed["budget"], changed["rpm_limit"], changed["note"]) == (5, 9, "a course")
    for alias in ("Ada", "Bob"):
        program.post("keys", {"alias": alias, "group": "ML/1"})
    until = {"until": "2999-01-01T00:00:00Z"}
    assert program.post("groups/ML/1/extend", until).json() == {"keys": 2}
    assert program.post("groups/ML/1/extend", {"until": None}).json() == {"keys": 2}
    problem(program.post("groups/ML/1/extend", {"until": "2999-01-01T00:00:00"}), 422)
    problem(program.post("groups/ML/1/extend", {"until": "1999-01-01T00:00:00Z"}), 409)
    assert program.ask("POST", "groups/ML/1/block").status_code == 204
    assert program.get("groups").json()[0]["blocked"]
    assert program.ask("POST", "groups/ML/1/unblock").status_code == 204
    assert program.ask("DELETE", "groups/ML/1").json() == {"keys": 2}
    assert program.get("keys").json() == program.get("groups").json() == []
    problem(program.ask("DELETE", "groups/ML/1"), 404)


def test_a_direct_key_is_made_told_once_and_revoked(program: Program) -> None:
    program.manager.register(CHAT)
    answer = program.post("direct-keys", {"name": "lab", "models": ["chat"]})
    made = answer.json()
    assert made["base_urls"][0].endswith("/models/chat/v1")
    assert program.finish(answer)["fault"] is None
    (stored,) = program.manager.state().direct_keys
    assert lm.reveal(stored.secret) == made["key"]
    (listed,) = program.get("direct-keys").json()
    assert (listed["name"], made["key"] in str(listed)) == ("lab", False)
    revoke = {"change": "revoke-direct-key", "name": "lab"}
    assert program.finish(program.post("jobs", revoke))["fault"] is None
    problem(program.post("plan", revoke), 404)
    problem(program.post("direct-keys", {"name": "x", "models": ["nobody"]}), 404)


def test_use_and_statements_are_told_as_json_or_csv(settled: Program) -> None:
    report = settled.get("usage?by=group&from=2026-11-01&to=2026-11-21").json()
    assert report["query"] | {"limit": 0} == {
        "first": "2026-11-01", "last": "2026-11-21", "by": "group", "limit": 0,
    }  # fmt: skip
    assert (report["total"]["requests"], report["rows"][0]["name"]) == (1, "Ada")
    statement = settled.get("statement?month=2026-10").json()
    assert (statement["month"], statement["lines"][0]["completion_tokens"]) == ("2026-10-01", 7)
    for path in ("usage", "statement", "audit"):
        as_csv = settled.get(f"{path}?format=csv")
        assert as_csv.headers["content-type"] == "text/csv; charset=utf-8"
        assert len([*csv.reader(io.StringIO(as_csv.text))]) >= 2
        assert settled.get(path, accept="text/csv").text.splitlines()[0] == as_csv.text.split()[0]
        told = settled.get(f"{path}?format=json", accept="text/csv")
        assert told.headers["content-type"] == "application/json"
    assert settled.get("usage/attention").json() == settled.get("usage/engines").json() == []
    for path in ("usage?from=2026-99-99", "usage?by=color", "usage?from=2026-02-01&to=2026-01-01",
                 "statement?month=2026-13", "statement?month=0000-01", "usage?until=2026-01-01",
                 "keys?x=", "usage?format=xml"):  # fmt: skip
        problem(settled.get(path), 422)
    for path in ("usage?to=0001-01-02", "usage?to=9999-12-31", "statement?month=9999-12"):
        assert settled.get(path).status_code == 200
    assert "used nothing" in problem(settled.get("statement?group=Nobody"), 409)


def test_prices_are_set_and_removed(program: Program) -> None:
    price = {"prompt": 0.5, "completion": 2, "currency": "CHF"}
    told = program.ask_json("PUT", "prices/org/model", price)
    assert (told["currency"], told["models"][0]["model"]) == ("CHF", "org/model")
    assert program.ask_json("PUT", "prices/*", {"prompt": 0, "completion": 0})["currency"] == "CHF"
    assert program.get("statement").json()["lines"][0]["cost"] == 0
    assert len(program.ask("DELETE", "prices/org/model").json()["models"]) == 1
    problem(program.ask("DELETE", "prices/org/model"), 404)
    assert len(program.get("prices").json()["models"]) == 1


def test_the_database_is_dumped_and_restored_and_its_keeping_changed(program: Program) -> None:
    assert "not running" in problem(program.get("database"), 503)
    program.manager.register(CHAT)
    program.server.do(lm.deploying("chat"))
    assert program.get("database").json()["keeps"]["retention_days"] == 90
    kept = program.ask_json("PATCH", "database", {"retention_days": None})
    assert (kept["retention_days"], kept["dumps_kept"]) == (None, 7)
    assert program.finish(program.post("database/dumps", {"name": "summer"}))["fault"] is None
    assert program.finish(program.post("database/dumps", {}))["fault"] is None
    assert "summer.dump" in {dump["file"] for dump in program.get("database/dumps").json()}
    restore = {"change": "restore-database", "dump": "summer"}
    assert program.post("plan", restore).json()["title"] == "Restore the database from summer.dump"
    assert program.finish(program.post("jobs", restore))["fault"] is None
    problem(program.post("plan", restore | {"dump": "winter"}), 404)
    problem(program.post("plan", restore | {"dump": "/etc/passwd"}), 422)


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"change": "deploy", "name": "nobody"}, 404, "no model called 'nobody'"),
        ({"change": "remove-route", "name": "x"}, 404, "no route called 'x'"),
        ({"change": "roll-back", "version": 99}, 404, "no version 99"),
        ({"change": "restart", "name": "chat"}, 409, "chat is stopped"),
        ({"change": "set-route", "route": {"name": "r", "members": ["x"]}}, 409, "x"),
        ({"change": "roll-back", "version": "1"}, 422, "version: "),
        ({"change": "roll-back", "version": True}, 422, "version: "),
        ({"change": "roll-back", "version": 0}, 422, "version: "),
        ({"change": "deploy"}, 422, "name: "),
        ({"change": "deploy", "name": "chat", "now": True}, 422, "now: "),
        ({"change": "explode", "name": "chat"}, 422, "'explode'"),
        ({"change": "set-model", "name": "chat", "settings": {"name": "x"}}, 422, "settings.name"),
        ({"change": "set-model", "name": "chat", "settings": {"wish": "running"}}, 422, "wish"),
        ({"change": "set-model", "name": "chat", "settings": {"replicas": 99}}, 422, "replicas"),
        ({"change": "cut", "gpu": "9", "wish": "off"}, 409, "9"),
        ([], 422, "cannot be used"),
        (None, 422, "body"),
        (b"{", 422, "JSON decode error"),
        (b"\xff", 400, "parsing the body"),
        (b'{"change": "deploy", "name": "\\ud800"}', 422, "cannot be used"),
        (b"[" * 100_000, 400, "parsing the body"),
    ],
    ids=lambda value: str(value)[:60],
)
@pytest.mark.parametrize("path", ["plan", "jobs"])
def test_what_cannot_be_done_is_told_with_advice_and_changes_nothing(
    settled: Program, path: str, body: Any, status: int, said: str
) -> None:
    before = settled.manager.state()
    assert said in problem(settled.post(path, body), status)
    assert settled.manager.state() == before


def test_a_body_that_is_not_called_json_is_refused(settled: Program) -> None:
    """A form of a web page could send it as plain text."""
    body = json.dumps({"change": "apply"}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert "not called JSON" in problem(settled.post("jobs", body, content_type=kind), 422)


def test_a_second_change_is_refused_while_one_runs(settled: Program) -> None:
    with settled.server.store.lock("Deploy chat"):
        told = problem(settled.post("jobs", {"change": "apply"}), 409)
    assert "Deploy chat, since" in told


def test_what_does_not_answer_is_not_the_programs_fault(program: Program) -> None:
    program.server.world.docker_answers = False
    assert "Docker does not answer" in problem(program.post("plan", {"change": "apply"}), 503)
    assert [route["served_by"] for route in program.get("routes").json()] == []
    program.server.store.config_path.write_text("{")
    problem(program.get("models"), 503)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "nowhere", 404), ("DELETE", "plan", 405), ("GET", "models/x", 404)],
)
def test_what_is_not_there_is_told_alike(
    settled: Program, method: str, path: str, status: int
) -> None:
    answer = settled.ask(method, path)
    problem(answer, status)
    assert (status == 405) == ("allow" in answer.headers)


def test_who_guesses_tokens_must_wait(program: Program) -> None:
    for guess in range(10):
        assert program.get("status", authorization=f"Bearer {guess}").status_code == 401
    answer = program.get("status")
    assert "Too many wrong tokens" in problem(answer, 429)
    assert 0 < int(answer.headers["retry-after"]) <= 60


def test_a_state_of_before_has_no_tokens(settled: Program) -> None:
    raw = json.loads(lm.render_state(replace(settled.manager.state(), admin_tokens=())))
    del raw["admin_tokens"]
    assert lm.parse_state(json.dumps(raw)).admin_tokens == ()
