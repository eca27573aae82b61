"""Lists of people: keys for all of them or for nobody, and secrets that are told once."""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from fakes import FakeGateway, Server

import llm_manager as lm

PEOPLE = "name,email\nAda,ada@x.org\nBob,\nEve,\n"


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


@pytest.fixture
def gateway(server: Server) -> FakeGateway:
    return FakeGateway(server)


def make(server: Server, text: str = PEOPLE) -> lm.Job:
    """The job of a list, when it has ended well."""
    job = server.manager.keys.create_many(text, {})
    list(job.follow())
    return job


def names(gateway: FakeGateway) -> list[str]:
    return [entry["key_alias"] for entry in gateway.keys.values()]


def test_everybody_gets_a_key_and_the_secrets_are_told_once(
    server: Server, gateway: FakeGateway
) -> None:
    job = make(server)
    assert names(gateway) == ["Ada", "Bob", "Eve"]
    assert server.manager.job(job.id).offers
    rows = list(csv.DictReader(io.StringIO(lm.reveal(server.manager.fetch(job.id)))))
    assert [row["name"] for row in rows] == ["Ada", "Bob", "Eve"]
    assert [sha256(row["key"].encode()).hexdigest() for row in rows] == [*gateway.keys]
    assert not server.manager.job(job.id).offers
    with pytest.raises(lm.RefusedError, match="no secrets to be fetched"):
        server.manager.fetch(job.id)


def test_the_secrets_are_in_no_file_log_or_job(
    server: Server, gateway: FakeGateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    job = make(server)
    shown = repr((job, job.view(), job.control))
    text = lm.reveal(server.manager.fetch(job.id))
    stored = b"".join(path.read_bytes() for path in server.store.home.rglob("*") if path.is_file())
    assert len(gateway.keys) == 3
    for row in csv.DictReader(io.StringIO(text)):
        assert row["key"] not in shown + caplog.text
        assert row["key"].encode() not in stored


def test_what_nobody_fetches_within_an_hour_is_forgotten() -> None:
    control = lm.Control(lambda _: None)
    assert not control.offers
    control.offer(lm.new_bearer(), seconds=0)
    assert control.take() is None
    control.offer(lm.new_bearer(), seconds=0)
    assert not control.offers
    assert control._offer is None
    control.offer(lm.new_bearer())
    assert control.offers


def test_only_one_of_many_that_fetch_gets_the_secrets() -> None:
    control, found = lm.Control(lambda _: None), list[object]()
    control.offer(lm.new_bearer())
    threads = [threading.Thread(target=lambda: found.append(control.take())) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(each is not None for each in found) == 1


def test_secrets_outlive_many_newer_jobs_until_they_are_fetched(
    server: Server, gateway: FakeGateway
) -> None:
    job = make(server)
    for _ in range(60):
        list(server.manager.start_task("Download", lambda _: None).follow())
    assert gateway.keys
    assert server.manager.fetch(job.id)
    list(server.manager.start_task("Download", lambda _: None).follow())
    with pytest.raises(lm.UnknownError):
        server.manager.job(job.id)


def test_it_tells_how_far_it_is(server: Server, gateway: FakeGateway) -> None:
    seen: list[tuple[str, float | None]] = []

    def look(_: str) -> None:
        (job,) = server.manager.jobs()
        seen.append((job.progress, job.done_part))

    gateway.made = look
    make(server)
    assert seen == [(f"{n} of 3 keys", n / 3) for n in range(3)]


TROUBLES: dict[str, Callable[[FakeGateway], None]] = {
    "one is refused": lambda g: setattr(g, "refuses", "Eve"),
    "an answer is lost": lambda g: setattr(g, "loses_answer_of", "Bob"),
    "it is away for a while": lambda g: setattr(g, "made", lambda _: setattr(g, "absent_for", 4)),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_when_litellm_fails_in_the_middle_nobody_has_a_key(
    server: Server, gateway: FakeGateway, trouble: str
) -> None:
    gateway.create_key({"key_alias": "Old"})
    TROUBLES[trouble](gateway)
    with pytest.raises(lm.GatewayError, match="No key was made: LiteLLM"):
        make(server)
    assert names(gateway) == ["Old"]
    assert not any(job.offers for job in server.manager.jobs())
    (entry, *_) = [
        e for e in server.manager.audit.entries() if e.what.startswith("Create the keys")
    ]
    assert (entry.what, entry.result) == ("Create the keys Ada, Bob, Eve", "failed")


def test_keys_that_cannot_be_taken_back_are_named(server: Server, gateway: FakeGateway) -> None:
    gateway.made = lambda name: setattr(gateway, "absent_for", 1000 * (name == "Bob"))
    with pytest.raises(lm.GatewayError, match="known to nobody: Ada, Bob, Eve") as failed:
        make(server)
    assert failed.value.advice == "Revoke them when LiteLLM answers again."
    assert names(gateway) == ["Ada", "Bob"]
    assert server.world.clock.now >= 100


def test_a_cancelled_list_leaves_no_key(server: Server, gateway: FakeGateway) -> None:
    gateway.made = lambda _: server.manager.cancel_job(server.manager.jobs()[0].id)
    with pytest.raises(lm.CancelledError):
        make(server)
    assert names(gateway) == []


def test_who_ends_the_program_waits_until_a_list_is_taken_back(
    server: Server, gateway: FakeGateway
) -> None:
    begun, going_on = threading.Event(), threading.Event()

    def slowly(_: str) -> None:
        begun.set()
        going_on.wait(5)

    gateway.made = slowly
    job = server.manager.keys.create_many(PEOPLE, {})
    assert begun.wait(5)
    server.manager.break_off("Another title", 0)
    assert not job.wait(0)
    assert not job.control.is_cancelled
    threading.Timer(0.1, going_on.set).start()
    server.manager.break_off(lm.MAKING_KEYS, 20)
    assert job.view().cancelled
    assert names(gateway) == []


def test_a_bad_row_is_refused_before_there_is_a_job(server: Server, gateway: FakeGateway) -> None:
    for text, said in (
        ("name,email\nAda,\nEve,nonsense\n", "line 3: "),
        ("name,group\nAda,Nowhere\n", "no group called 'Nowhere'"),
    ):
        with pytest.raises(lm.RefusedError, match=said):
            make(server, text)
    assert server.manager.jobs() == names(gateway) == []
    (first, _) = server.manager.audit.entries()
    assert (first.what, first.result) == ("Create keys from a list", "failed")


def test_only_one_list_is_made_at_a_time(server: Server, gateway: FakeGateway) -> None:
    refused: list[str] = []

    def again(_: str) -> None:
        with pytest.raises(lm.BusyError) as busy:
            server.manager.keys.create_many("name\nZoe\n", {})
        refused.append(str(busy.value))

    gateway.made = again
    make(server)
    assert "Create keys from a list, since" in refused[0]
    assert "Zoe" not in names(gateway)


def test_refused_changes_of_keys_are_in_the_audit(server: Server, gateway: FakeGateway) -> None:
    keys = server.manager.keys
    assert gateway.keys == {}
    for act in (
        lambda: keys.block("Ada"), lambda: keys.revoke("Ada"), lambda: keys.edit("Ada", {}),
        lambda: keys.rotate("Ada", lm.parse_grace(0)), lambda: keys.revoke_group("ML"),
        lambda: keys.set_group({"name": "ML", "models": ("gone",)}),
        lambda: keys.create(lm.KeySettings(alias="Ada", models=("gone",))),
    ):  # fmt: skip
        with pytest.raises(lm.RefusedError):
            act()
    told = [(entry.what, entry.result) for entry in server.manager.audit.entries()]
    assert told == [(what, "failed") for what in (
        "Block the key Ada", "Revoke the key Ada", "Change the key Ada",
        "Another secret for the key Ada", "Revoke the group ML", "Set the group ML",
        "Create the key Ada",
    )]  # fmt: skip


# --- another secret for a key ---


def a_key_of(server: Server, name: str, **more: object) -> str:
    """The SHA-256 of a new key."""
    secret = server.manager.keys.create(lm.parse_key_settings({"alias": name} | more))
    return sha256(lm.reveal(secret).encode()).hexdigest()


def test_the_former_secret_of_a_key_goes_with_it_and_is_never_extended(
    server: Server, gateway: FakeGateway
) -> None:
    keys = server.manager.keys
    keys.set_group({"name": "ML"})
    first = a_key_of(server, "Ada", group="ML")
    keys.rotate("Ada", lm.parse_grace(1))
    keys.rotate("Ada", lm.parse_grace(2))
    ends = {key.key_hash: key.settings.expires_at for key in keys.all()}
    assert len(ends) == 3
    assert keys.extend_group("ML", lm.utc_now() + lm.timedelta(days=30)) == 1
    moved = {key.key_hash for key in keys.all() if key.settings.expires_at != ends[key.key_hash]}
    assert len(moved) == 1
    assert first not in moved
    keys.block("Ada")
    assert all(key.blocked for key in keys.all())
    with pytest.raises(lm.RefusedError, match="is blocked"):
        keys.rotate("Ada", lm.parse_grace(1))
    keys.revoke("Ada")
    assert gateway.keys == {}


@pytest.mark.parametrize("fault", ["refused", "lost", "absent"])
def test_a_rotation_that_breaks_off_leaves_the_key_as_it_was(
    server: Server, gateway: FakeGateway, fault: str
) -> None:
    first = a_key_of(server, "Ada")
    before = dict(gateway.keys[first])
    gateway.refuses = "Ada" if fault == "refused" else ""
    gateway.loses_answer_of = "Ada" if fault == "lost" else ""
    update = gateway.update_key

    def update_then_vanish(key_hash: str, body: lm.Json) -> None:
        update(key_hash, body)
        gateway.absent_for = 2 if fault == "absent" else 0
        gateway.update_key = update  # type: ignore[method-assign]

    gateway.update_key = update_then_vanish  # type: ignore[method-assign]
    with pytest.raises(lm.GatewayError):
        server.manager.keys.rotate("Ada", lm.parse_grace(0))
    assert [*gateway.keys] == [first]
    (key,) = server.manager.keys.all()
    assert (key.settings.alias, key.settings.expires_at, key.replaced_by) == ("Ada", None, "")
    assert gateway.keys[first]["metadata"] == before["metadata"]


def test_where_not_even_that_works_it_is_said_when_the_key_ends(
    server: Server, gateway: FakeGateway
) -> None:
    a_key_of(server, "Ada")

    def vanish(_: str) -> None:
        gateway.absent_for = 10**6

    gateway.made = vanish
    gateway.loses_answer_of = "Ada"
    with pytest.raises(lm.GatewayError, match=r"The key of Ada may end at .* nobody has another"):
        server.manager.keys.rotate("Ada", lm.parse_grace(1))
