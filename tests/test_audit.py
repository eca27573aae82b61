"""The audit: who changed what when, whoever did it and however it ended."""

from __future__ import annotations

import csv
import io
import os
import stat
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, timedelta
from pathlib import Path

import pytest
from builders import NOW
from fakes import Crash, Server, until

import llm_manager as lm

CHAT = {"name": "chat", "type": "chat", "source": {"kind": "hub", "repository": "a/b"}}
ADA = lm.Actor(name="ada", channel="command line")


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


@pytest.fixture
def trail(tmp_path: Path) -> lm.AuditTrail:
    return lm.AuditTrail(tmp_path, ADA)


def last(server: Server) -> lm.AuditEntry:
    return server.manager.audit.entries()[-1]


def file_of(home: Path) -> Path:
    return home / "audit.jsonl"


def test_what_is_saved_and_what_is_done_is_one_entry_each(server: Server) -> None:
    with server.manager.audit.acting_as(ADA):
        server.manager.register(CHAT)
        job = server.manager.start(lm.deploying("chat"))
    list(job.follow())
    saved, done = server.manager.audit.entries()
    assert (saved.who, saved.channel, saved.what) == ("ada", "command line", "Register chat")
    assert (saved.result, saved.job, saved.fault) == ("done", "", "")
    assert (done.who, done.what, done.result, done.job) == ("ada", "Deploy chat", "done", job.id)
    assert done.finished_at is not None
    assert saved.started_at <= done.started_at <= done.finished_at


def test_what_failed_says_why(server: Server) -> None:
    server.manager.register(CHAT | {"engine_arguments": ["--broken"]})
    server.world.broken.add("--broken")
    with pytest.raises(lm.ManagerError) as failed:
        server.do(lm.deploying("chat"))
    assert (last(server).result, last(server).fault) == ("failed", str(failed.value))


def test_what_was_refused_is_told_with_its_sentence(server: Server) -> None:
    for act in (server.manager.start, server.manager.save):
        with pytest.raises(lm.RefusedError):
            act(lm.deploying("nobody"))
        assert last(server).result == "failed"
        assert last(server).fault.startswith("There is no model called 'nobody'. ")


def test_what_was_cancelled_is_not_called_a_failure(server: Server) -> None:
    server.manager.register(CHAT)
    cancel = server.manager.audit.acting_as(ADA)(server.manager.cancel_job)
    server.trouble.watch = lambda: cancel(server.manager.jobs()[0].id)
    with pytest.raises(lm.CancelledError):
        server.do(lm.deploying("chat"))
    _, deployed, cancelled, *_ = server.manager.audit.entries()
    assert (deployed.what, deployed.result, deployed.fault) == ("Deploy chat", "cancelled", "")
    assert (cancelled.who, cancelled.what) == ("ada", "Cancel: Deploy chat")


def test_a_bug_is_a_failure_whose_text_stays_out(trail: lm.AuditTrail) -> None:
    with pytest.raises(KeyError), trail.noting("Set a password"):
        raise KeyError("sk-secret")
    (entry,) = trail.entries()
    assert entry.result == "failed"
    assert "sk-secret" not in file_of(trail._path.parent).read_text()


def test_a_change_is_noted_before_it_has_any_effect(server: Server) -> None:
    """Killed in between, it is not forgotten."""
    server.manager.register(CHAT)
    seen: list[lm.AuditEntry] = []
    server.trouble.watch = lambda: seen.append(last(server))
    server.do(lm.deploying("chat"))
    assert (seen[0].what, seen[0].result, seen[0].finished_at) == ("Deploy chat", "begun", None)


def test_what_a_job_changes_on_its_way_is_the_doing_of_whoever_started_it(server: Server) -> None:
    def work(_: lm.Control) -> None:
        server.manager.save(lm.applying())

    with server.manager.audit.acting_as(ADA):
        job = server.manager.start_task("Build x", work)
    list(job.follow())
    assert [(entry.who, entry.what) for entry in server.manager.audit.entries()] == [
        ("ada", "Build x"), ("ada", "Apply the plan"),
    ]  # fmt: skip


def test_what_the_program_does_by_itself_is_nobody_elses_doing(server: Server) -> None:
    server.store.audit = lm.AuditTrail(server.store.home, ADA)
    server.manager.register(CHAT)
    server.do(lm.deploying("chat"))
    watch = lm.Watch(server.manager, seconds=0.01, revivals=lm.Revivals(pauses=(0.0,)))
    server.world.end("llm-model-chat-0", 1)
    assert until(lambda: last(server).what == "Start chat again")
    watch.close()
    assert (last(server).who, last(server).channel) == ("llm-manager", "itself")
    assert watch.latest().state is not None


def test_nobody_else_reads_it(trail: lm.AuditTrail) -> None:
    trail.begin("x")(None)
    assert stat.S_IMODE(file_of(trail._path.parent).stat().st_mode) == 0o600


def test_a_line_that_a_crash_tore_harms_no_other(trail: lm.AuditTrail, tmp_path: Path) -> None:
    trail.begin("first")(None)
    with file_of(tmp_path).open("ab") as file:
        file.write(b'{"who":"ada","what":"to')
    assert [entry.what for entry in trail.entries()] == ["first"]
    trail.begin("second")(None)
    assert [(entry.what, entry.result) for entry in trail.entries()] == [
        ("first", "done"), ("second", "done"),
    ]  # fmt: skip


def test_lines_of_several_processes_never_mix(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib, llm_manager as lm\n"
        "trail = lm.AuditTrail(pathlib.Path(sys.argv[1]), lm.ITSELF, 1)\n"
        "for n in range(100): trail.begin(sys.argv[2] + 'x' * 9000 + str(n))(None)\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), name], cwd=lm.PROGRAM.parent)
        for name in "ab"
    ]
    assert [process.wait() for process in processes] == [0, 0]
    entries = lm.AuditTrail(tmp_path, ADA).entries()
    assert len(files(tmp_path)) == 399  # each line but the last in one of its own
    assert {entry.result for entry in entries} == {"done"}
    for name in "ab":
        own = [entry.what.strip("abx") for entry in entries if entry.what.startswith(name)]
        assert own == [str(n) for n in range(100)]


def fill(trail: lm.AuditTrail, *names: str) -> None:
    for name in names:
        trail.begin(name)(None)


def files(home: Path) -> list[str]:
    return sorted(path.name for path in home.glob("audit-*.jsonl"))


def test_a_full_file_makes_way_and_every_entry_is_told_in_its_order(tmp_path: Path) -> None:
    trail = lm.AuditTrail(tmp_path, ADA, full_bytes=600)
    names = [str(n) for n in range(12)]
    fill(trail, *names)
    assert len(files(tmp_path)) >= 3
    assert [(e.what, e.result) for e in trail.entries()] == [(name, "done") for name in names]
    assert [e.what for e in trail.newest(5)] == names[-5:]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in tmp_path.glob("audit*"))
    # What begins in one file and ends in another is one entry still.
    end = trail.begin("long")
    fill(trail, *names)
    end(None)
    assert [e.result for e in trail.entries() if e.what == "long"] == ["done"]


def test_full_files_are_never_written_again_and_never_take_each_others_place(
    tmp_path: Path,
) -> None:
    trail = lm.AuditTrail(tmp_path, ADA, full_bytes=1)
    (tmp_path / "audit-29990101-000000.jsonl").write_bytes(b"")  # the clock was set back since
    (tmp_path / "audit-notes.jsonl").write_bytes(b"of the operator")
    fill(trail, "a", "b")
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    assert [*before][1:4] == [f"audit-29990101-00000{n}.jsonl" for n in (1, 2, 3)]
    fill(trail, "c")
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    assert [entry.what for entry in trail.entries()] == ["a", "b", "c"]


def test_only_files_that_may_hold_entries_of_the_time_are_read(tmp_path: Path) -> None:
    trail = lm.AuditTrail(tmp_path, ADA)
    old, new = (tmp_path / f"audit-{day}-120000.jsonl" for day in ("20260301", "20260304"))
    line = lm._AUDIT_ENTRY.dump_json
    entry = lm.AuditEntry(who="ada", channel="API", what="x", started_at=NOW)
    old.mkdir()  # whoever reads it fails
    new.write_bytes(line(entry) + b"\n" + line(replace(entry, started_at=NOW - timedelta(days=2))))
    assert trail.entries(since=NOW - timedelta(days=1)) == [entry]
    with pytest.raises(lm.ManagerError, match="read the audit"):
        trail.entries()


def test_a_kill_between_two_files_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trail = lm.AuditTrail(tmp_path, ADA, full_bytes=1)
    fill(trail, "a")

    def killed(_: Path) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(lm, "sync_folder", killed)
        with pytest.raises(Crash):
            trail.begin("b")
    assert not file_of(tmp_path).exists()
    assert [entry.what for entry in trail.entries()] == ["a"]
    fill(trail, "c")
    assert [entry.what for entry in trail.entries()] == ["a", "c"]


def test_a_key_that_is_typed_where_a_name_is_asked_for_stays_out(trail: lm.AuditTrail) -> None:
    key = "sk-Zm9vYmFyYmF6cXV4"
    with pytest.raises(lm.RefusedError), trail.noting(f"Revoke the key {key}"):
        raise lm.RefusedError(f"There is no key called {key!r}.", advice="See the list.")
    assert "Zm9v" not in file_of(trail._path.parent).read_text()
    assert trail.entries()[0].what == "Revoke the key sk-…"


def test_what_cannot_be_written_goes_to_the_journal_and_stops_nothing(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk is emptied by changes."""
    file_of(server.store.home).mkdir()
    server.manager.register(CHAT)
    assert server.manager.state().models
    assert '"what":"Register chat"' in caplog.text


def test_versions_are_chosen_by_when_they_were_written() -> None:
    versions = [(1, NOW), (2, NOW + timedelta(hours=1))]
    assert lm.version_choices(versions, UTC) == [
        ("2, as of 2026-03-04 06:06 UTC", "2"), ("1, as of 2026-03-04 05:06 UTC", "1"),
    ]  # fmt: skip


def test_entries_are_chosen_by_day_and_exported(trail: lm.AuditTrail) -> None:
    entries = [
        lm.AuditEntry(who="ada", channel="API", what='Route "a, b"', started_at=NOW, job="1")
        .ended(lm.RefusedError("No.", advice="Yes."), NOW + timedelta(seconds=3)),
        lm.AuditEntry(who="bob", channel="console", what="x", started_at=NOW + timedelta(days=1)),
    ]  # fmt: skip
    for entry in entries:
        trail._append(entry)
    assert trail.entries() == entries
    assert trail.entries(since=NOW + timedelta(hours=1)) == entries[1:]
    assert lm.audit_rows(entries)[::-1] == [
        ["2026-03-04 05:06 UTC", "ada", "API", 'Route "a, b"', "failed: No. Yes.", "3 s", "1"],
        ["2026-03-05 05:06 UTC", "bob", "console", "x", "begun", "", ""],
    ]
    first, _ = csv.DictReader(io.StringIO(lm.audit_csv(entries)))
    assert (first["what"], first["fault"]) == ('Route "a, b"', "No. Yes.")
    assert first["started_at"] == "2026-03-04T05:06:07Z"


def test_only_root_is_believed_that_sudo_called_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_USER", "ada")
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert lm.operating_system_user() == ADA
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert lm.operating_system_user().name == "uid 54321"
    monkeypatch.delenv("SUDO_USER")
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert lm.operating_system_user().name == "root"
