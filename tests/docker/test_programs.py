"""A program's whole story over the REST API, on the real server and the real stack."""

from __future__ import annotations

import csv
import io
import json
import subprocess
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
def port() -> int:
    (port,) = free_ports(1)
    return port


@pytest.fixture
def running(installation: Installation, port: int) -> Iterator[subprocess.Popen[str]]:
    """The service."""
    running = installation.popen("serve", "--port", str(port))
    assert running.stdout is not None
    assert "listens on" in running.stdout.readline()
    yield running
    running.terminate()
    running.communicate(timeout=30)


@pytest.fixture
def program(
    installation: Installation, running: subprocess.Popen[str], port: int
) -> Iterator[httpx.Client]:
    """A program with a token of its own, beside the running service."""
    assert running.poll() is None
    token = json.loads(installation.cli("token", "create", "ci", "--json"))["token"]
    with httpx.Client(
        base_url=f"http://127.0.0.1:{port}/api/v1",
        headers={"Authorization": f"Bearer {token}"},
        transport=httpx.HTTPTransport(retries=5),
        timeout=60,
        trust_env=False,
    ) as client:
        yield client


def done(program: httpx.Client, **change: Any) -> list[str]:
    """What the job of a change said, after it ended well."""
    return [*ended(program, program.post("/jobs", json=change))["lines"]]


def ended(program: httpx.Client, answer: httpx.Response) -> dict[str, Any]:
    """The job that was started, after it ended well."""
    assert answer.status_code == 202, answer.text
    while True:
        job = program.get(answer.headers["location"].removeprefix("/api/v1")).json()
        if job["finished_at"]:
            assert job["fault"] is None, job
            return dict(job)
        time.sleep(0.5)


def test_a_program_brings_up_the_endpoint_and_hands_out_keys_that_hold_until_it_revokes_them(
    installation: Installation, program: httpx.Client, running: subprocess.Popen[str]
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
    secrets = [made["key"], *course_of_two(installation, program)]
    direct_key_and_dump(program)

    told = json.loads(installation.cli("audit", "--json"))
    ours = [(e["what"], e["result"]) for e in told if (e["who"], e["channel"]) == ("ci", "API")]
    assert ours == [
        ("Provider lab", "done"),
        ("Route far", "done"),
        ("Create the key Ada", "done"),
        ("Create the key Ada", "failed"),
        ("Revoke the key Ada", "done"),
        ("Revoke the key Ada", "failed"),
        ("Create the group ML", "done"),
        ("Create keys from a list", "failed"),
        ("Create keys from a list", "done"),
        ("Create the keys Bob, Eve", "done"),
        ("Fetch the secrets of: Create keys from a list", "done"),
        ("Fetch the secrets of: Create keys from a list", "failed"),
        ("Change the key Bob: models", "done"),
        ("Block the key Bob", "done"),
        ("Unblock the key Bob", "done"),
        ("Another secret for the key Bob", "done"),
        ("Block the group ML", "done"),
        ("Revoke the group ML and its 2 keys", "done"),
        ("Direct key lab", "done"),
        ("Dump the database", "done"),
    ]
    kept = "".join(path.read_text(errors="replace") for path in installation.home.glob("audit*"))
    assert not [secret for secret in secrets if secret in kept]
    a_restart_takes_a_list_back(installation, program, running)


def a_restart_takes_a_list_back(
    installation: Installation, program: httpx.Client, running: subprocess.Popen[str]
) -> None:
    people = {"csv": "name\n" + "".join(f"Student {n}\n" for n in range(400))}
    assert program.post("/keys/import", json=people).status_code == 202
    keys = installation.manager().keys
    while not keys.all():
        time.sleep(0.1)
    running.terminate()  # as `systemctl restart` does
    running.communicate(timeout=30)
    assert keys.all() == []


def status_of(installation: Installation, key: str) -> int:
    with installation.http(key) as colleague:
        return colleague.get("/v1/models").status_code


def course_of_two(installation: Installation, program: httpx.Client) -> list[str]:
    """A list becomes keys that open, and are changed, blocked, rotated and revoked together."""
    made = program.post("/groups", json={"name": "ML", "models": ["far"]})
    assert made.status_code == 200, made.text
    people = {"csv": "name,email\nBob,bob@example.org\nEve,nonsense\n", "group": "ML"}
    assert "line 3" in program.post("/keys/import", json=people).json()["fact"]
    people["csv"] = people["csv"].replace("nonsense", "eve@example.org")
    job = ended(program, program.post("/keys/import", json=people))
    told = program.post(f"/jobs/{job['id']}/secrets")
    bob, eve = (row["key"] for row in csv.DictReader(io.StringIO(told.text)))
    assert program.post(f"/jobs/{job['id']}/secrets").status_code == 409
    assert [status_of(installation, key) for key in (bob, eve)] == [200, 200]
    assert program.patch("/keys/Bob", json={"models": ["far"]}).json()["models"] == ["far"]
    assert program.post("/keys/Bob/block").status_code == 204
    assert "blocked" in program.post("/keys/why", json={"key": bob}).text
    assert program.post("/keys/Bob/unblock").status_code == 204
    assert program.post("/keys/why", json={"key": bob, "model": "far"}).json()["faults"] == []
    other = program.post("/keys/Bob/rotate", json={"grace_hours": 0}).json()["key"]
    assert status_of(installation, other) == 200
    assert status_of(installation, bob) == 401
    assert program.post("/groups/ML/block").status_code == 204
    assert program.get("/groups").json()[0]["blocked"]
    assert program.delete("/groups/ML").json() == {"keys": 2}
    assert [status_of(installation, key) for key in (other, eve)] == [401, 401]
    used = program.get("/usage", params={"by": "day"})
    assert used.json()["query"]["by"] == "day", used.text
    assert program.get("/statement", headers={"Accept": "text/csv"}).text.startswith("month,group")
    return [bob, eve, other]


def direct_key_and_dump(program: httpx.Client) -> None:
    ended(program, program.post("/direct-keys", json={"name": "lab"}))
    assert [key["name"] for key in program.get("/direct-keys").json()] == ["lab"]
    ended(program, program.post("/database/dumps", json={"name": "summer"}))
    assert program.get("/database/dumps").json()[0]["file"] == "summer.dump"
    assert program.get("/database").json()["size"]["database_bytes"] > 0
    planned = program.post("/plan", json={"change": "restore-database", "dump": "summer"}).json()
    assert planned["interrupted"] or planned["stages"]
