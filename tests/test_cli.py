"""Main: the real program, on a server whose Docker does not answer."""

from __future__ import annotations

import asyncio
import concurrent.futures
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from builders import a_model
from certificates import a_certificate, expired

import llm_manager as lm

HUB = ("--repository", "Qwen/Qwen3-0.6B")


@dataclass(frozen=True)
class Ended:
    """How one command ended, and what it said."""

    status: int
    out: str
    err: str

    def refusal(self) -> str:
        """The one line for the operator: a sentence of fact, a sentence of advice."""
        assert self.status == lm.FAILED, self
        assert self.out == ""
        assert "Traceback" not in self.err
        (line,) = self.err.splitlines()
        assert re.fullmatch(r".+\. .+[.?]", line), line
        return line


def environment(home: Path) -> dict[str, str]:
    return os.environ | {"LLM_MANAGER_HOME": str(home), "DOCKER_HOST": "unix:///nonexistent"}


def program(home: Path, *arguments: str) -> subprocess.Popen[str]:
    """The program as the operator starts it; `run` does the same in this process, and fast."""
    return subprocess.Popen(
        [sys.executable, str(lm.PROGRAM), *arguments],
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def started(home: Path, *arguments: str) -> Ended:
    process = program(home, *arguments)
    out, err = process.communicate(timeout=60)
    return Ended(process.returncode, out, err)


Run = Callable[..., Ended]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """One command in this process, on a home of its own."""
    for name, value in environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)

    def command(*arguments: str) -> Ended:
        try:
            status = lm.main(arguments)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        said = capsys.readouterr()
        return Ended(status, said.out, said.err)

    return command


@pytest.fixture
def with_chat(run: Run, tmp_path: Path) -> Run:
    """The same on a home that has a model, which was never deployed."""
    store = lm.StateStore(tmp_path / "home")
    source = lm.HubSource(repository="Qwen/Qwen3-0.6B")
    store.save(
        lm.registering(a_model(source=source, wish="stopped")).edit(store.ensure(fixed_names=True))
    )
    return run


def facts(ended: Ended) -> Any:
    assert ended.err == ""
    return json.loads(ended.out)


# --- as a process of its own ---------------------------------------------------------------


def test_a_command_that_fails_says_one_fact_and_one_advice_and_ends_with_1(tmp_path: Path) -> None:
    line = started(tmp_path, "plan").refusal()
    assert line.startswith("Docker does not answer, so LLM Manager could not look at its")
    assert "systemctl start docker" in line


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """The console on a free port, with its home."""
    home = tmp_path_factory.mktemp("home")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = program(home, "serve", "--port", str(port))
    assert process.stdout is not None
    assert process.stdout.readline() == (
        f"LLM Manager listens on 127.0.0.1:{port}; `url` prints its address.\n"
    )
    yield port, home
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode in {0, -signal.SIGTERM}, err
    assert "Traceback" not in out + err


def connected(port: int) -> httpx.Client:
    transport = httpx.HTTPTransport(retries=5)  # it says that it listens a moment before it does
    # A page takes the server some 50 ms, and a test may have left it many to make.
    return httpx.Client(
        base_url=f"http://127.0.0.1:{port}", transport=transport, trust_env=False, timeout=60
    )


def token_of(home: Path) -> str:
    return lm.reveal(lm.StateStore(home).load().secrets.console_key)


def test_the_console_comes_up_without_docker_for_its_operator_alone(
    console: tuple[int, Path],
) -> None:
    port, home = console
    with connected(port) as client:
        assert client.get("/").status_code == 401
        assert client.get("/config").status_code == 401
        assert client.get("/", headers={"host": "evil.example"}).status_code == 403
        assert client.get("/?token=wrong").status_code == 401
        page = client.get(f"/?token={token_of(home)}", follow_redirects=True)
        assert page.status_code == 200
        assert "LLM Manager" in page.text
        assert client.get("/config").status_code == 200


def test_a_taken_port_is_said_before_anything_starts(console: tuple[int, Path]) -> None:
    port, home = console
    line = started(home, "serve", "--port", str(port)).refusal()
    assert line.startswith(f"Port {port} of 127.0.0.1 cannot be used: ")
    assert "Is the console running already?" in line


def test_small_answers_of_the_console_are_sent_at_once() -> None:
    """Nagle's algorithm would hold each back until the last is acknowledged: 40 ms."""
    told: list[int] = []

    def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        told.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def connecting() -> None:
        listener = lm.listen(0)
        async with await asyncio.start_server(connected, sock=listener):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            await reader.read()
            writer.close()

    asyncio.run(connecting())
    assert told == [1]


def test_programs_come_in_with_a_token_on_the_same_port(console: tuple[int, Path]) -> None:
    port, home = console
    store = lm.StateStore(home)
    token, secret = lm.new_admin_token("ci")
    store.save(lm.granting_token(token).edit(store.load()))
    bearer = {"authorization": f"Bearer {lm.reveal(secret)}"}
    change = {"change": "set-route", "route": {"name": "r", "members": ["nobody"]}}
    with connected(port) as client:
        assert client.get("/api/v1/status").status_code == 401
        assert client.get("/config", headers=bearer).status_code == 401
        status = client.get("/api/v1/status", headers=bearer)
        assert status.json()["summary"] == "Docker does not answer."
        assert client.get("/api/v1/plan", headers=bearer).status_code == 503
        assert client.post("/api/v1/jobs", json=change, headers=bearer).status_code == 409
        (entry,) = client.get("/api/v1/audit", headers=bearer).json()
    assert (entry["who"], entry["channel"], entry["what"]) == ("ci", "API", "Route r")
    assert entry["result"] == "failed"


def test_a_browser_that_goes_away_in_mid_answer_ends_nothing(console: tuple[int, Path]) -> None:
    port, home = console
    with connected(port) as client:
        client.get(f"/?token={token_of(home)}")
        (cookie,) = (f"{name}={value}" for name, value in client.cookies.items())
    question = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nCookie: {cookie}\r\n\r\n"
    for n in range(60):
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.sendall(question.encode() * (1 + n % 4))
    with connected(port) as client:
        assert client.get("/").status_code == 401


def test_output_that_nobody_reads_is_no_failure(tmp_path: Path) -> None:
    lm.StateStore(tmp_path).ensure(fixed_names=True)
    process = program(tmp_path, "config", "show")
    assert process.stdout is not None
    process.stdout.close()  # as `| head` does
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait() in {0, -signal.SIGPIPE}


# --- models ------------------------------------------------------------------------------------


def test_a_model_is_added_listed_shown_changed_and_removed(run: Run) -> None:
    assert run("model", "add", "chat", *HUB).out == (
        "Registered chat on CPU, 4096 MiB KV cache. Next: llm_manager.py deploy chat\n"
        "The hub could not be asked for a commit: the model follows the branch `main`.\n"
    )
    (row,) = facts(run("model", "list", "--json"))
    assert (row["name"], row["phase"], row["source"]) == ("chat", "unknown", "Qwen/Qwen3-0.6B")
    assert run("model", "set", "chat", "--replicas", "2", "--arguments", "--seed 1").out == (
        "Saved chat. Next: llm_manager.py plan\n"
    )
    shown = facts(run("model", "show", "chat"))
    assert (shown["replicas"], shown["engine_arguments"]) == (2, ["--seed", "1"])
    assert shown["wish"] == "stopped"
    # Removing acts at once, so it needs Docker; the wish is written down all the same.
    run("model", "remove", "chat")
    assert facts(run("model", "list", "--json")) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("model", "add", "Chat", *HUB), "name: 'Chat' must be lower-case"),
        (("model", "add", "chat", *HUB), "There is a model called chat already"),
        (("model", "add", "b", *HUB, "--type", "video"), "type: Input should be 'chat'"),
        (("model", "add", "b", *HUB, "--arguments", "--prot 1"), "--prot is unknown"),
        (("model", "add", "b", *HUB, "--arguments", "'"), "cannot be read"),
        (("model", "add", "b", "--path", "srv"), "source.path: "),
        (("model", "set", "chat", "--replicas", "0"), "replicas: "),
        (("model", "set", "nobody", "--replicas", "1"), "no model called 'nobody'"),
        (("model", "show", "nobody"), "Registered models: chat"),
        (("deploy", "nobody"), "no model called 'nobody'"),
        (("restart", "chat"), "chat is stopped"),
        (("rollback", "99"), "There is no version 99"),
        (("image", "set", "caddy", "caddy"), "caddy: 'caddy' must be a pinned image"),
        (("config", "set", "--https-port", "0"), "https_port: "),
        (("config", "set", "--hostname", "{env.HOME}"), "hostnames[0]: "),
        (("config", "set", "--tls", "own"), "certificate_path: "),
        (("config", "set", "--https-port", "80"), "cannot both use port 80"),
        (("key", "create", ""), "alias: '' must be a printable name"),
        (("key", "create", "Ada", "--model", "x"), "No model is served as x"),
        (("key", "create", "Ada", "--rpm", "-1"), "rpm_limit: "),
        (("group", "list"), "Docker does not answer"),
        (("key", "list"), "Docker does not answer"),
        (("database", "show"), "Docker does not answer"),
        (("database", "dump"), "Docker does not answer"),
        (("database", "dump", "../x"), "cannot be the name of a dump"),
        (("database", "restore", "winter"), "There is no dump 'winter'"),
        (("database", "set", "--retention", "4000"), "retention_days"),
        (("monitoring", "set", "--retention-days", "4000"), "retention_days"),
        (("monitoring", "set", "--mail", "on", "--mail-to", "nobody"), "mail.to"),
        (("monitoring", "show"), "Docker does not answer"),
        (("usage",), "Docker does not answer"),
        (("usage", "--from", "yesterday"), "'yesterday' is no day"),
        (("usage", "--attention"), "Docker does not answer"),
        (("usage", "--engines"), "Docker does not answer"),
        (("statement",), "Docker does not answer"),
        (("statement", "--month", "2026-13"), "'2026-13-01' is no day"),
        (("price", "set", "chat", "--prompt", "-1", "--completion", "0"), "prompt: "),
        (
            ("price", "set", "chat", "--prompt", "1", "--completion", "0", "--currency", "euro"),
            "currency: ",
        ),
        (("price", "remove", "chat"), "'chat' has no price"),
        (("deploy", "chat", "--plan"), "Docker does not answer"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_one_sentence_and_changes_nothing(
    with_chat: Run, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    config = tmp_path / "home" / "config.json"
    before = config.read_text()
    assert said in with_chat(*arguments).refusal()
    assert config.read_text() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("model",),
        ("model", "add", "chat"),
        ("model", "add", "chat", *HUB, "--path", "/x"),
        ("deploy",),
        ("image", "set", "engine", "x:1"),
        ("serve", "--port", "x"),
        ("config", "set", "--tls", "none"),
        ("rollback", "last"),
        ("database", "set", "--retention", "0"),
        ("database", "restore"),
        ("--version-of-nothing",),
        ("dpeloy",),
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2_and_touches_nothing(
    run: Run, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    ended = run(*arguments)
    assert ended.status == lm.WRONG_USAGE
    assert ended.out == ""
    assert ended.err.startswith("usage: llm_manager.py")
    assert not list(tmp_path.iterdir())


def test_a_revision_of_a_registered_model_is_not_dropped_silently(with_chat: Run) -> None:
    ended = with_chat("model", "set", "chat", "--revision", "main")
    shown = facts(with_chat("model", "show", "chat"))
    assert ended.status != lm.DONE or shown["source"]["revision"] == "main"


def image_of(run: Run, part: str) -> str:
    rows = facts(run("image", "list", "--json"))
    return next(str(row["image"]) for row in rows if row["part"] == part)


# --- facts ---------------------------------------------------------------------------------------


def test_what_is_printed_as_json_is_json(with_chat: Run) -> None:
    status = with_chat("status", "--json")
    assert status.status == lm.FAILED  # Docker is absent, and that is a fact as well
    printed = json.loads(status.out)
    assert printed["summary"] == "Docker does not answer."
    assert printed["models"][0]["name"] == "chat"
    assert "Docker does not answer" in printed["attention"][0]
    assert image_of(with_chat, "caddy").startswith("caddy:")
    assert facts(with_chat("config", "show"))["models"][0]["name"] == "chat"


def test_an_admin_token_is_shown_once_listed_and_revoked(run: Run, tmp_path: Path) -> None:
    made = facts(run("token", "create", "ci", "--json"))
    (stored,) = lm.StateStore(tmp_path / "home").load().admin_tokens
    assert stored.sha256 == sha256(made["token"].encode()).hexdigest()
    assert facts(run("token", "list", "--json")) == [{"name": "ci"}]
    for command in (("token", "list"), ("config", "show"), ("audit",)):
        assert made["token"] not in run(*command).out
    assert "called ci already" in run("token", "create", "ci").refusal()
    assert "name: 'C I' must be" in run("token", "create", "C I").refusal()
    assert run("token", "revoke", "ci").out == "Revoked ci.\n"
    assert "no admin token called 'ci'" in run("token", "revoke", "ci").refusal()
    assert run("token", "create", "ci").out.startswith("admin-")


def test_every_change_is_in_the_audit_with_whoever_made_it(run: Run) -> None:
    me = lm.operating_system_user().name
    assert run("audit").out == ""
    run("image", "set", "caddy", "caddy:9")
    run("deploy", "nobody")
    done, failed = facts(run("audit", "--json"))
    assert (done["who"], done["what"], done["result"]) == (me, "Pin the caddy image", "done")
    assert failed["fault"].startswith("There is no model called 'nobody'.")
    assert re.search(rf"^20.+ +{me} +command line +Pin the caddy", run("audit").out, re.MULTILINE)
    assert len(run("audit", "--csv").out.splitlines()) == 3
    assert facts(run("audit", "--json", "--since", "2999-01-01")) == []
    assert "'soon' is no day" in run("audit", "--since", "soon").refusal()


def test_the_doctor_ends_with_3_where_something_is_to_be_done(run: Run) -> None:
    ended = run("doctor", "--json")
    assert ended.status == lm.TO_DO
    (docker,) = [check for check in facts(ended) if check["name"] == "Docker"]
    assert docker["ok"] is False
    table = run("doctor")
    assert table.status == lm.TO_DO
    assert re.search(r"^Docker +not ok +Docker does not answer", table.out, re.MULTILINE)


def test_status_without_docker_still_lists_the_models(with_chat: Run) -> None:
    ended = with_chat("status")
    assert ended.status == lm.FAILED
    assert re.search(r"^chat +chat +unknown", ended.out, re.MULTILINE)
    assert "! Docker does not answer" in ended.out


def test_the_live_view_is_printed_once_where_nobody_watches(with_chat: Run) -> None:
    ended = with_chat("top")
    assert ended.status == lm.DONE
    assert ended.out.startswith("Docker does not answer.\n")
    assert re.search(r"^chat +unknown", ended.out, re.MULTILINE)
    assert with_chat("top", "--json").status == lm.FAILED, "as status does"


def test_routes_without_docker_are_listed_and_nothing_is_said_of_them(with_chat: Run) -> None:
    ended = with_chat("routes")
    assert ended.status == lm.FAILED
    assert "https://localhost/v1: whoever has a virtual key; Docker does not answer" in ended.out
    assert re.search(r"^v1 +chat +chat-0 +untried +Docker does not answer", ended.out, re.MULTILINE)
    assert json.loads(with_chat("routes", "--json").out)[0]["public_name"] == "chat"
    assert "Docker does not answer" in with_chat("try", "chat").refusal()


def test_no_secret_is_printed_but_by_the_command_that_is_for_it(run: Run, tmp_path: Path) -> None:
    secrets = lm.StateStore(tmp_path / "home").ensure(fixed_names=True).secrets
    values = [lm.reveal(getattr(secrets, name)) for name in
              ("master_key", "salt_key", "database_password", "console_key")]  # fmt: skip
    for command in (
        ["config", "show"],
        ["status"],
        ["routes"],
        ["status", "--json"],
        ["plan"],
        ["doctor"],
    ):
        ended = run(*command)
        assert not [value for value in values if value in ended.out + ended.err], command
    assert run("url").out == f"http://127.0.0.1:7860/?token={values[3]}\n"
    renewed = run("url", "--renew").out
    assert values[3] not in renewed
    assert run("url").out == renewed


def test_a_wish_is_kept_although_docker_is_absent(with_chat: Run) -> None:
    ended = with_chat("deploy", "chat")
    assert ended.status == lm.FAILED
    assert "Docker does not answer" in ended.err
    assert facts(with_chat("model", "show", "chat"))["wish"] == "running"


# --- the stored state ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not valid JSON"),
        ("{}", "no schema_version"),
        ('{"schema_version": 99}', "is version 99"),
        ('{"schema_version": 1, "models": 7}', "models: "),
        (None, "is gone"),
    ],
)
def test_a_broken_state_is_refused_by_every_command(
    with_chat: Run, tmp_path: Path, text: str | None, said: str
) -> None:
    config = tmp_path / "home" / "config.json"
    config.unlink() if text is None else config.write_text(text)
    for command in (["config", "check"], ["model", "list"], ["deploy", "chat"]):
        line = with_chat(*command).refusal()
        assert said in line
        assert "history/" in line
    assert (config.read_text() if config.exists() else None) == text


def test_a_sound_state_is_called_sound(with_chat: Run) -> None:
    assert with_chat("config", "check").out.endswith("config.json is sound: 1 models.\n")


def test_settings_of_several_kinds_are_saved_together_or_not_at_all(run: Run) -> None:
    refused = run("config", "set", "--monitoring", "on", "--overhead", "1.3", "--https-port", "0")
    assert (refused.status, refused.out) == (lm.FAILED, "")
    kept = lm.open_manager().state()
    assert (kept.monitoring, kept.energy.overhead) == (False, 1.0)
    saved = run("config", "set", "--monitoring", "on", "--overhead", "1.3")
    assert (saved.status, saved.out) == (lm.DONE, "Saved. Next: llm_manager.py plan\n")
    kept = lm.open_manager().state()
    assert (kept.monitoring, kept.energy.overhead) == (True, 1.3)


def test_https_settings_are_saved_and_kept(run: Run) -> None:
    assert run("config", "set", "--hostname", "a.org", "--hostname", "b.org").status == lm.DONE
    arguments = ("--tls", "acme", "--email", "it@a.org", "--https-port", "8443")
    assert run("config", "set", *arguments).status == lm.DONE
    edge = facts(run("config", "show"))["edge"]
    assert (edge["hostnames"], edge["https_port"]) == (["a.org", "b.org"], 8443)
    assert edge["tls"]["email"] == "it@a.org"


def test_open_routes_and_the_largest_request_are_settings_of_the_edge(with_chat: Run) -> None:
    with_chat("config", "set", "--open-routes", "yes", "--max-request-mib", "5")
    with_chat("model", "set", "chat", "--open-route", "yes")
    shown = json.loads(with_chat("config", "show").out)
    assert (shown["edge"]["open_routes"], shown["edge"]["max_request_mib"]) == (True, 5)
    assert shown["models"][0]["open_route"]
    with_chat("config", "set", "--open-routes", "no")
    with_chat("model", "set", "chat", "--open-route", "no", "--replicas", "2")
    shown = json.loads(with_chat("config", "show").out)
    assert not shown["edge"]["open_routes"]
    assert not shown["models"][0]["open_route"]


def test_a_direct_key_is_shown_once_and_saved_although_docker_is_absent(
    with_chat: Run, tmp_path: Path
) -> None:
    made = with_chat("direct", "create", "lab", "--model", "chat")
    assert made.status == lm.FAILED, "nothing could be loaded"
    (secret,) = re.findall(r"sk-[\w-]{43}", made.out)
    assert "https://localhost/models/chat/v1\n" in made.out
    state = lm.parse_state((tmp_path / "home" / "config.json").read_text())
    assert [(k.name, k.secret.get_secret_value(), k.models) for k in state.direct_keys] == [
        ("lab", secret, ("chat",))
    ]
    listed = with_chat("direct", "list").out
    assert secret not in listed + with_chat("config", "show").out
    assert re.search(rf"^lab +chat +…{re.escape(secret[-4:])}$", listed, re.MULTILINE)
    assert (
        "no model called 'absent'"
        in with_chat("direct", "create", "x", "--model", "absent").refusal()
    )
    assert "no direct key called 'x'" in with_chat("direct", "revoke", "x").refusal()
    with_chat("direct", "revoke", "lab")
    assert json.loads(with_chat("direct", "list", "--json").out) == []


@pytest.mark.parametrize("files", ["absent", "expired"])
def test_a_certificate_that_cannot_be_served_is_refused_before_it_is_wished(
    run: Run, tmp_path: Path, files: str
) -> None:
    pair = expired(a_certificate(tmp_path / "tls")) if files == "expired" else tmp_path
    chain, key = pair / "fullchain.pem", pair / "privkey.pem"
    given = ("--certificate", str(chain), "--key", str(key))
    line = run("config", "set", "--tls", "own", *given).refusal()
    assert ("expired" if files == "expired" else "No such file") in line
    assert json.loads(run("config", "show").out)["edge"]["tls"] == {"kind": "internal"}


def test_monitoring_is_switched_and_set_without_a_secret_among_the_arguments(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("config", "set", "--monitoring", "on").status == lm.DONE
    monkeypatch.setattr(sys, "stdin", io.StringIO("http://chat.lan/s3cr3t-hook\ns3cr3t-mail\n"))
    told = (
        "--webhook",
        "on",
        "--mail",
        "on",
        "--mail-to",
        "team@x.org",
        "--mail-from",
        "llm@x.org",
    )
    server = ("--mail-server", "mail.x.org:587", "--mail-user", "llm")
    assert run("monitoring", "set", "--retention-days", "7", *told, *server).status == lm.DONE
    shown = run("config", "show").out
    stored = json.loads(shown)
    assert "s3cr3t" not in shown
    assert stored["monitoring"] is True
    assert stored["monitoring_settings"]["retention_days"] == 7
    assert stored["monitoring_settings"]["mail"]["server"] == "mail.x.org:587"
    state = lm.open_manager().state()
    assert lm.reveal(state.monitoring_settings.webhook) == "http://chat.lan/s3cr3t-hook"
    assert state.monitoring_settings.mail is not None
    assert lm.reveal(state.monitoring_settings.mail.password) == "s3cr3t-mail"
    run("monitoring", "set", "--webhook", "off", "--mail", "off")
    run("config", "set", "--monitoring", "off")
    assert not lm.open_manager().state().monitoring_settings.alerts
    assert not lm.open_manager().state().monitoring
    assert len(run("monitoring", "password").out.strip()) == 64


def test_what_the_database_keeps_is_saved_setting_by_setting(run: Run) -> None:
    run("database", "set", "--dumps", "3")
    run("database", "set", "--retention", "30")
    kept = json.loads(run("config", "show").out)["housekeeping"]
    assert kept == {"retention_days": 30, "dumps_kept": 3}
    run("database", "set", "--retention", "off")
    kept = json.loads(run("config", "show").out)["housekeeping"]
    assert kept == {"retention_days": None, "dumps_kept": 3}
    assert run("database", "list").out == ""


def test_how_energy_is_recorded_is_saved_setting_by_setting(run: Run) -> None:
    run("config", "set", "--energy-period", "5", "--price-per-kwh", "0.32", "--overhead", "1.4")
    run("config", "set", "--co2-grams-per-kwh", "381")
    run("config", "set", "--price-per-kwh", "off")
    shown = json.loads(run("config", "show").out)
    assert shown["energy"] == {
        "period_seconds": 5.0, "price_per_kwh": None, "co2_grams_per_kwh": 381.0, "overhead": 1.4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--energy-period", "0.01", "period_seconds"),
        ("--energy-period", "nan", "period_seconds"),
        ("--price-per-kwh", "-1", "price_per_kwh"),
        ("--price-per-kwh", "nan", "price_per_kwh"),
        ("--overhead", "0.9", "overhead"),
    ],
)
def test_energy_cannot_be_recorded_by_nonsense(
    run: Run, option: str, value: str, said: str
) -> None:
    line = run("config", "set", f"{option}={value}").refusal()
    assert "Energy cannot be recorded so" in line
    assert said in line
    assert json.loads(run("config", "show").out)["energy"]["period_seconds"] == 1.0


def test_an_image_is_pinned(run: Run) -> None:
    assert run("image", "set", "caddy", "caddy:2.12.0").status == lm.DONE
    assert image_of(run, "caddy") == "caddy:2.12.0"


# --- the service -------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root installs a service")
def test_the_installed_unit_names_this_copy_and_its_home(run: Run, tmp_path: Path) -> None:
    ended = run("install", "--root", str(tmp_path / "root"), "--no-start")
    assert ended.status == lm.DONE, ended
    unit = (tmp_path / "root/etc/systemd/system/llm-manager.service").read_text()
    assert f"ExecStart={sys.executable} {lm.PROGRAM} serve\n" in unit
    assert f"LLM_MANAGER_HOME={tmp_path}/home" in unit
    assert f"ReadWritePaths={tmp_path}/home" in unit
    assert "/opt/llm-manager" not in unit
    assert not (tmp_path / "home").exists(), "a packager's machine gets no secrets"


def test_systemd_finds_nothing_wrong_with_the_unit(
    tmp_path: Path, tool: Callable[[str], str]
) -> None:
    template = lm.PROGRAM.with_name("llm-manager.service").read_text()
    unit = tmp_path / "llm-manager.service"
    unit.write_text(
        lm.render_unit(template, python=sys.executable, program=str(lm.PROGRAM), home=str(tmp_path))
    )
    analyze = [tool("systemd-analyze"), "verify", "--man=no", "--recursive-errors=no", str(unit)]
    verified = subprocess.run(analyze, capture_output=True, text=True, check=False)
    assert "llm-manager.service:" not in verified.stderr
    assert verified.returncode == 0, verified.stderr


def test_a_single_engine_argument_may_begin_with_a_dash() -> None:
    given = ["model", "add", "x", "--path", "/x", "--arguments", "--enforce-eager"]
    parsed = lm.build_parser().parse_args(lm.join_values(given))
    assert lm.model_options(parsed)["engine_arguments"] == ["--enforce-eager"]


# --- providers and routes ----------------------------------------------------------------------


@pytest.fixture
def typing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_a_providers_key_is_typed_or_read_and_never_shown(
    run: Run, tmp_path: Path, typing: Callable[[str], None]
) -> None:
    add = (
        "provider",
        "add",
        "lab",
        "--kind",
        "openai",
        "--url",
        "http://host.docker.internal:9/v1",
    )
    typing("first-secret\n")
    said = run(*add, "--ask-key")
    assert said.out == "Saved. Next: llm_manager.py route set NAME --member lab/MODEL\n"
    (tmp_path / "key").write_text("second-secret\n")
    assert key_of(tmp_path) == "first-secret"
    run(*add)
    assert key_of(tmp_path) == "first-secret", "what is not given stays"
    run(*add, "--key-file", str(tmp_path / "key"))
    assert key_of(tmp_path) == "second-secret"
    shown = run("config", "show"), run("provider", "list"), run("provider", "list", "--json")
    assert all("second-secret" not in ended.out + ended.err for ended in shown)
    typing("\n")
    run(*add, "--ask-key")
    assert key_of(tmp_path) is None
    assert run(*add, "--key", "x").status == lm.WRONG_USAGE
    assert "read" in run(*add, "--key-file", str(tmp_path / "gone")).refusal()


def key_of(tmp_path: Path) -> str | None:
    key = lm.StateStore(tmp_path / "home").load().provider("lab").api_key
    return key.get_secret_value() if key else None


def test_providers_are_listed_with_what_is_wrong_with_them(run: Run) -> None:
    assert run("provider", "list") == Ended(lm.DONE, "", "")
    run("provider", "add", "cloud", "--kind", "cloud", "--vendor", "mistral")
    assert run("provider", "list").status == lm.DONE
    run("provider", "add", "here", "--kind", "ollama", "--url", "http://host.docker.internal:9")
    listed = run("provider", "list", "--json")
    assert listed.status == lm.FAILED
    cloud, here = facts(listed)
    assert (cloud["verdict"], cloud["kind"], cloud["models"]) == ("unknown", "cloud", [])
    assert here["fault"].startswith("Docker does not answer")
    table = run("provider", "list").out.splitlines()
    assert table[0].split() == ["Provider", "Kind", "Address", "Key", "Health", "Models"]
    assert run("provider", "models", "here").refusal().startswith("Docker does not answer")
    assert run("provider", "models", "gone").refusal().endswith("Providers: cloud, here.")


def test_setting_a_route_again_keeps_what_is_not_named(with_chat: Run) -> None:
    with_chat("provider", "add", "lab", "--kind", "exo", "--url", "http://10.0.0.7:52415")
    made = with_chat(
        "route", "set", "smart", "--member", "chat", "--member", "lab/a", "--alias", "gpt-4o",
        "--weight", "3", "--weight", "1", "--fallback", "lab/b", "--context-fallback", "chat",
        "--timeout", "60", "--retries", "0", "--failures", "2", "--cooldown", "5",
        "--parallel", "8", "--cache", "600",
    )  # fmt: skip
    assert (made.status, made.out) == (lm.DONE, "Saved. Next: llm_manager.py plan\n")
    whole = {
        "name": "smart", "members": ["chat", "lab/a"], "weights": [3, 1], "aliases": ["gpt-4o"],
        "strategy": "weighted", "fallbacks": ["lab/b"], "context_fallbacks": ["chat"],
        "timeout_seconds": 60, "retries": 0, "failures_allowed": 2, "cooldown_seconds": 5,
        "parallel": 8, "cache_seconds": 600,
    }  # fmt: skip
    unknown = {"served_by": None, "stand_in": None}
    assert smart(with_chat) == whole | unknown
    with_chat("route", "set", "smart", "--retries", "4", "--cache", "off")
    assert smart(with_chat) == whole | unknown | {"retries": 4, "cache_seconds": None}
    with_chat("route", "set", "smart", "--strategy", "latency", "--alias", "", "--parallel", "off")
    changed = smart(with_chat)
    assert (changed["strategy"], changed["weights"]) == ("latency", [])
    assert (changed["aliases"], changed["parallel"]) == ([], None)


def smart(run: Run) -> Any:
    return next(
        route for route in facts(run("route", "list", "--json")) if route["name"] == "smart"
    )


def test_every_public_name_is_listed_with_its_route_or_its_model(with_chat: Run) -> None:
    with_chat("route", "set", "smart", "--member", "chat")
    names = [route["name"] for route in facts(with_chat("route", "list", "--json"))]
    assert names == ["chat", "smart"]
    table = with_chat("route", "list").out
    assert "Docker does not answer" in table
    assert table.startswith("Public name")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("route", "set", "smart", "--member", "gone"), "there is no model or provider for 'gone'"),
        (("route", "set", "smart"), "members"),
        (("route", "set", "a b", "--member", "chat"), "letters, digits"),
        (("route", "set", "r", "--member", "chat", "--weight", "1", "--weight", "2"), "weights: 2"),
        (("provider", "add", "x", "--kind", "exo"), "needs its address"),
        (("provider", "add", "x", "--kind", "exo", "--url", "http://localhost"), "own container"),
        (("provider", "remove", "x"), "no provider called 'x'"),
        (("route", "remove", "smart"), "no route called 'smart'"),
    ],
)
def test_a_route_or_provider_that_cannot_be_is_refused(
    with_chat: Run, arguments: tuple[str, ...], said: str
) -> None:
    assert said in with_chat(*arguments).refusal()


def test_a_module_that_is_imported_on_first_use_may_be_first_used_by_many_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(0.3)\nanswer = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    module: Any = lm.LazyModule("slow_to_import")
    assert "slow_to_import" not in sys.modules
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert {*pool.map(lambda _: module.answer, range(8))} == {42}
