"""A program's whole story over the REST API, on the real server and the real stack."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from installation import Install, Installation, free_ports

pytestmark = pytest.mark.docker


@pytest.fixture
def installation(install: Install) -> Installation:
    return install()


@pytest.fixture
def program(installation: Installation) -> Iterator[httpx.Client]:
    """A program with a token of its own, beside the running service."""
    (port,) = free_ports(1)
    token = json.loads(installation.cli("token", "create", "ci", "--json"))["token"]
    running = installation.popen("serve", "--port", str(port))
    assert running.stdout is not None
    assert "listens on" in running.stdout.readline()
    with httpx.Client(
        base_url=f"http://127.0.0.1:{port}/api/v1",
        headers={"Authorization": f"Bearer {token}"},
        transport=httpx.HTTPTransport(retries=5),
        timeout=60,
        trust_env=False,
    ) as client:
        yield client
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=30)


def done(program: httpx.Client, **change: Any) -> list[str]:
    """What the job of a change said, after it ended well."""
    answer = program.post("/jobs", json=change)
    assert answer.status_code == 202, answer.text
    while True:
        job = program.get(f"/jobs/{answer.json()['id']}").json()
        if job["finished_at"]:
            assert job["fault"] is None, job
            return [*job["lines"]]
        time.sleep(0.5)


def test_a_program_brings_up_the_endpoint_and_hands_out_keys_that_hold_until_it_revokes_them(
    installation: Installation, program: httpx.Client
) -> None:
    assert program.get("/keys").status_code == 503  # nothing runs yet
    lab = {"name": "lab", "kind": "openai", "base_url": "http://10.255.255.1:9"}
    done(program, change="set-provider", provider=lab)
    route = {"name": "far", "members": ["lab/x"]}
    planned = program.post("/plan", json={"change": "set-route", "route": route}).json()
    assert "create" in str(planned["stages"])
    assert not installation.containers()
    done(program, change="set-route", route=route)
    assert program.get("/plan").json()["stages"] == []

    made = program.post("/keys", json={"alias": "Ada", "models": ["far"]}).json()
    with installation.http(made["key"]) as ada:
        listed = ada.get("/v1/models")
        assert [model["id"] for model in listed.json()["data"]] == ["far"], listed.text
        assert program.post("/keys", json={"alias": "Ada"}).status_code == 409
        assert program.delete("/keys/Ada").status_code == 204
        assert ada.get("/v1/models").status_code == 401
    assert program.delete("/keys/Ada").status_code == 404

    told = json.loads(installation.cli("audit", "--json"))
    ours = [(e["what"], e["result"]) for e in told if (e["who"], e["channel"]) == ("ci", "API")]
    assert ours == [
        ("Provider lab", "done"),
        ("Route far", "done"),
        ("Create the key Ada", "done"),
        ("Revoke the key Ada", "done"),
    ]
    assert made["key"] not in (installation.home / "audit.jsonl").read_text()
