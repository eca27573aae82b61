"""The operator's own certificate: read as certbot leaves it, refused in time, renewed by itself."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from builders import NOW, a_model, a_site, a_state, as_wished
from certificates import a_certificate, expired
from fakes import Server, until

import llm_manager as lm
from llm_manager import Certificate


def edge_with(folder: Path, *names: str) -> lm.Edge:
    tls = lm.OwnCertificate(
        certificate_path=str(folder / "fullchain.pem"), key_path=str(folder / "privkey.pem")
    )
    return lm.Edge(tls=tls, hostnames=names or ("localhost",))


def read(edge: lm.Edge) -> Certificate:
    seen = lm.read_certificate(edge)
    assert seen is not None
    return seen


# --- reading --------------------------------------------------------------------------------------


def test_links_are_followed_and_chain_and_key_become_one_text(tmp_path: Path) -> None:
    archive, live = a_certificate(tmp_path / "archive"), tmp_path / "live"
    live.mkdir()
    for name in ("fullchain.pem", "privkey.pem"):
        (live / name).symlink_to(Path("..", "archive", name))
    seen = read(edge_with(live))
    parts = ("fullchain.pem", "privkey.pem")
    assert seen.pem == "".join((archive / name).read_text() for name in parts)
    assert seen.fault == ""
    assert seen.expires_at is not None
    assert "PRIVATE" not in repr(seen)


def test_every_name_of_the_edge_must_be_in_it_addresses_too(tmp_path: Path) -> None:
    folder = a_certificate(tmp_path, "*.example.org", "10.1.2.3")
    assert read(edge_with(folder, "llm.example.org", "10.1.2.3")).fault == ""
    fault = read(edge_with(folder, "llm.example.org", "10.1.2.4")).fault
    assert "IP address mismatch, certificate is not valid for '10.1.2.4'" in fault


def test_other_kinds_of_certificates_are_not_looked_for() -> None:
    assert lm.read_certificate(lm.Edge()) is None


def without_key(folder: Path) -> None:
    (folder / "privkey.pem").unlink()


def of_another(folder: Path) -> None:
    a_certificate(folder / "other")
    (folder / "other" / "privkey.pem").replace(folder / "privkey.pem")


def under_a_passphrase(folder: Path) -> None:
    key = folder / "privkey.pem"
    subprocess.run(
        ["openssl", "ec", "-aes128", "-passout", "pass:x", "-in", key, "-out", key],
        check=True, capture_output=True,
    )  # fmt: skip


def exchanged(folder: Path) -> None:
    (folder / "privkey.pem").write_text((folder / "fullchain.pem").read_text())


def garbled(folder: Path) -> None:
    chain = folder / "fullchain.pem"
    chain.write_text(chain.read_text().replace("M", "A", 1))


BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (without_key, r"No such file or directory \(.+/privkey.pem\)"),
    (of_another, r"its key cannot be used with it \(KEY_VALUES_MISMATCH\)"),
    (under_a_passphrase, "its key cannot be used with it"),
    (exchanged, "privkey.pem holds no private key in PEM"),
    (garbled, "cannot be used with it"),
    (expired, "certificate has expired"),
]


@pytest.mark.parametrize(("damage", "reason"), BROKEN, ids=lambda p: getattr(p, "__name__", ""))
def test_what_clients_would_refuse_is_told_in_one_sentence(
    tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    damage(a_certificate(tmp_path))
    seen = read(edge_with(tmp_path))
    assert seen.pem == ""
    path = tmp_path / "fullchain.pem"
    assert lm.re.fullmatch(rf"The certificate {path} cannot be used: .*{reason}.*\.", seen.fault)


# --- planning -------------------------------------------------------------------------------------

OWN = lm.OwnCertificate(certificate_path="/c", key_path="/k")
STATE = a_state(a_model(), edge=lm.Edge(tls=OWN))
FIRST, SECOND = Certificate(pem="first\n"), Certificate(pem="second\n")
BAD = Certificate(fault="The certificate /c cannot be used: expired.")


def serving(seen: Certificate) -> lm.Observed:
    """The world in which this certificate is served, and still wished."""
    return as_wished(STATE, certificate=seen)


def steps(observed: lm.Observed, state: lm.State = STATE) -> list[str]:
    plan = lm.plan_state(state, observed, a_site())
    return [lm.describe(step) for stage in plan.stages for step in stage.steps]


def test_a_served_certificate_needs_nothing() -> None:
    assert steps(serving(FIRST)) == []


def test_a_renewed_certificate_is_written_and_loaded_and_its_key_not_shown() -> None:
    pem = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
    renewed = replace(serving(FIRST), certificate=Certificate(pem=pem))
    assert steps(renewed) == [
        "write caddy/certificate.pem: the certificate changed",
        "check and load caddy/Caddyfile: what is served changed",
    ]
    diff = lm.plan_state(STATE, renewed, a_site()).diff()
    assert "AAAA" not in diff
    assert "+-----BEGIN PRIVATE KEY-----(" in diff
    assert lm.renewed_certificate(STATE, renewed) == pem


def test_one_that_cannot_be_used_leaves_the_served_one_alone_and_is_told() -> None:
    observed = replace(serving(FIRST), certificate=BAD)
    assert steps(observed) == []
    assert lm.renewed_certificate(STATE, observed) == ""
    (matter,) = lm.certificate_matters(observed, NOW)
    assert matter.startswith(f"{BAD.fault} The one before is still served.")


def test_without_any_that_can_be_used_the_endpoint_stays_as_it_is() -> None:
    """A running edge with Caddy's own authority is not taken down for it."""
    before = replace(STATE, edge=lm.Edge())
    observed = as_wished(before, certificate=BAD)
    assert steps(observed) == [f"cannot be done: {BAD.fault} {lm.CERTIFICATE_ADVICE}"]


def test_a_certificate_of_another_kind_takes_the_file_away_after_the_reload() -> None:
    done = steps(serving(FIRST), replace(STATE, edge=lm.Edge()))
    assert [line.partition(":")[0] for line in done] == [
        "check and load caddy/Caddyfile", "write caddy/certificate.pem",
    ]  # fmt: skip


def test_an_edge_made_with_mounted_certificates_is_replaced_once() -> None:
    spec = lm.render_edge(STATE, a_site())
    assert [mount.target for mount in spec.mounts] == ["/etc/caddy", "/data"]
    assert spec.hash == lm.render_edge(replace(STATE, edge=lm.Edge()), a_site()).hash


@pytest.mark.parametrize(("days", "told"), [(13, ["in 13 days"]), (15, [])])
def test_the_end_of_a_certificate_is_told_two_weeks_before(days: int, told: list[str]) -> None:
    soon = NOW + lm.timedelta(days=days, minutes=1)
    found = lm.certificate_matters(lm.Observed(certificate=Certificate(expires_at=soon)), NOW)
    assert [words in text for words, text in zip(told, found, strict=True)] == [True] * len(told)


# --- the service ----------------------------------------------------------------------------------


def test_the_service_serves_a_renewed_certificate_by_itself_once(tmp_path: Path) -> None:
    server, folder = Server(tmp_path / "home"), a_certificate(tmp_path / "tls")
    chain, key = folder / "fullchain.pem", folder / "privkey.pem"
    tls = {"kind": "own", "certificate_path": str(chain), "key_path": str(key)}
    server.do(lm.configuring_edge({"tls": tls}))
    server.manager.register(
        {"name": "chat", "type": "chat", "source": {"kind": "hub", "repository": "a/b"}}
    )
    server.do(lm.deploying("chat"))
    assert not server.manager.plan(lm.applying())

    def served() -> str:
        return server.store.read_generated()[lm.CERTIFICATE]

    before = served()
    watch = lm.Watch(server.manager, seconds=0.001)
    key.write_text("half a key")  # certbot is at work
    assert until(lambda: bool(watch.latest().observed.certificate.fault))  # type: ignore[union-attr]
    assert served() == before
    a_certificate(folder)
    assert until(lambda: served() == chain.read_text() + key.read_text())
    assert until(
        lambda: not lm.running_job(watch.latest()) and not server.manager.plan(lm.applying())
    )
    watch.close()
    titles = [job.title for job in watch.latest().jobs]
    assert titles.count("Serve the renewed certificate") == 1
