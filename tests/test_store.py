"""Home: the home directory, for real: what is on the disk, who may read it, who may change it."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest
from builders import NOW, a_model, a_state, some_secrets

import llm_manager as lm

CHAT = lm.ContainerName("llm-model-chat-0")


@pytest.fixture
def store(tmp_path: Path) -> lm.StateStore:
    """A home as the first start leaves it."""
    store = lm.StateStore(tmp_path / "home")
    store.ensure(fixed_names=True)
    return store


@contextmanager
def another_process(home: Path, script: str) -> Iterator[subprocess.Popen[str]]:
    """The same program in a process of its own, with `store` at hand; killed at the end."""
    setup = (
        "import llm_manager as lm, sys, pathlib; store = lm.StateStore(pathlib.Path(sys.argv[1]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"{setup}\n{dedent(script)}", str(home)],
        cwd=lm.PROGRAM.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def everything_in(home: Path) -> dict[str, str]:
    return {
        str(path.relative_to(home)): path.read_text()
        for path in sorted(home.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


# --- the first start -----------------------------------------------------------------------


def test_the_first_start_makes_secrets_once(tmp_path: Path) -> None:
    first = lm.StateStore(tmp_path).ensure(fixed_names=True)
    again = lm.StateStore(tmp_path).ensure(fixed_names=True)
    assert lm.render_state(first) == lm.render_state(again)
    assert first.models == ()
    assert first.endpoint == "stopped"


def test_two_installations_have_different_names_and_secrets(tmp_path: Path) -> None:
    one, other = (lm.StateStore(tmp_path / name).ensure(fixed_names=False) for name in "ab")
    assert one.name_prefix == f"{one.instance}-"
    assert one.name_prefix != other.name_prefix
    assert one.secrets != other.secrets


def test_nobody_else_may_read_anything(store: lm.StateStore) -> None:
    store.write_generated("caddy/Caddyfile", "x")
    store.keep_log(CHAT, "x")
    store.save(a_state())
    with store.lock("a test"):
        for path in (store.home, *store.home.rglob("*")):
            assert mode(path) == (0o700 if path.is_dir() else 0o600), path


def test_a_home_that_others_could_read_is_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    lm.StateStore(tmp_path).ensure(fixed_names=True)
    assert mode(tmp_path) == 0o700


def test_a_home_without_config_but_with_history_is_refused(store: lm.StateStore) -> None:
    """Taken for new, it would plan the end of everything that runs."""
    store.save(a_state())
    store.config_path.unlink()
    with pytest.raises(lm.StateUnreadableError, match=r"config\.json is gone.* from history/"):
        lm.StateStore(store.home).ensure(fixed_names=True)
    assert not store.config_path.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"{}"])
def test_an_unreadable_state_is_refused_and_left_as_it_is(
    store: lm.StateStore, content: bytes
) -> None:
    store.config_path.write_bytes(content)
    with pytest.raises(lm.StateUnreadableError):
        store.ensure(fixed_names=True)
    assert store.config_path.read_bytes() == content


def test_a_home_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(lm.ManagerError, match="could not open its home"):
        lm.StateStore(tmp_path / "file" / "home").ensure(fixed_names=True)


# --- saving ------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(store: lm.StateStore) -> None:
    state = a_state(a_model(), a_model("embed", type="embedding"))
    store.save(state)
    assert store.load() == state


def test_a_state_that_breaks_a_rule_is_not_saved(store: lm.StateStore) -> None:
    before = everything_in(store.home)
    with pytest.raises(lm.RefusedError, match="used twice"):
        store.save(a_state(a_model(), a_model()))
    assert everything_in(store.home) == before


def test_history_holds_every_earlier_version_with_its_files(store: lm.StateStore) -> None:
    states = [a_state(*(a_model(f"m{i}") for i in range(n))) for n in range(12)]
    for n, state in enumerate(states):
        store.write_generated("caddy/Caddyfile", f"of {n}")
        store.save(state)
    assert store.versions() == [*range(1, 13)]
    for number in (2, 11):
        assert store.version(number).models == states[number - 2].models
        file = store.home / "history" / f"{number:06d}" / "generated" / "caddy" / "Caddyfile"
        assert file.read_text() == f"of {number - 1}"


def test_rolling_back_brings_back_no_key(store: lm.StateStore) -> None:
    """Database and colleagues would not follow, and what was revoked must stay so."""
    was = lm.DirectKey(name="was", secret=lm.pydantic.SecretStr("sk-revoked-since"))
    now = replace(was, name="now")
    provider = lm.Provider(name="lab", kind="openai", base_url="http://lab.example.org:1")
    old, new = (replace(provider, api_key=lm.pydantic.SecretStr(key)) for key in ("old", "new"))
    gone = replace(old, name="gone")
    store.save(a_state(a_model(), direct_keys=(was,), providers=(old, gone)))
    secrets = some_secrets(master_key=lm.pydantic.SecretStr("sk-today"))
    today = a_state(secrets=secrets, direct_keys=(now,), providers=(new,))
    store.save(today)
    back = lm.returning_to(2, store.version(2)).edit(today)
    assert back.models == (a_model(),)
    assert back.secrets == secrets
    assert back.direct_keys == (now,)
    assert back.providers == (new, gone)


def test_a_version_that_never_was_is_refused_with_what_there_is(store: lm.StateStore) -> None:
    with pytest.raises(lm.RefusedError, match="There is none yet"):
        store.version(1)
    store.save(a_state())
    with pytest.raises(lm.RefusedError, match="There are 1 to 1"):
        store.version(7)


def test_what_a_killed_save_left_does_not_count_as_a_version(store: lm.StateStore) -> None:
    (store.home / "history" / ".000001.abcd").mkdir()
    assert store.versions() == []
    store.save(a_state())
    assert store.versions() == [1]


FULL_DISK = """
    import resource, signal
    from dataclasses import replace
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    longer = replace(store.load(), hugging_face_home="/a/longer/state/than/before")
    size = store.config_path.stat().st_size
    for limit in (size // 2, size):  # too little for the copy in history/, then for the new file
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            store.save(longer)
        except lm.ManagerError as error:
            print(len(store.versions()), error)
"""


def test_a_save_that_cannot_be_written_changes_nothing(store: lm.StateStore) -> None:
    """The kernel cuts the write off in the middle, as a full disk does."""
    before = store.config_path.read_text()
    with another_process(store.home, FULL_DISK) as process:
        said, _ = process.communicate()
    copying, writing = said.splitlines()
    assert copying.startswith("0 LLM Manager could not save the state: File too large")
    assert writing.startswith("1 LLM Manager could not save the state: File too large")
    assert store.config_path.read_text() == before
    assert not [path for path in everything_in(store.home) if "/." in f"/{path}"]


@pytest.mark.parametrize("number", [28, 122], ids=["ENOSPC", "EDQUOT"])
def test_a_full_disk_is_called_that(number: int) -> None:
    full = pytest.raises(lm.ManagerError, match="disk is full; nothing was changed")
    with full, lm.file_errors("save the state"):
        raise OSError(number, "No space left on device")


def test_the_sentence_about_a_failed_write_names_no_none() -> None:
    with pytest.raises(lm.ManagerError) as raised, lm.file_errors("save the state"):
        raise OSError(27, "File too large")
    assert "None" not in str(raised.value)


# --- generated files and logs ---------------------------------------------------------------------


def test_generated_files_are_read_back_by_their_paths(store: lm.StateStore) -> None:
    store.write_generated("caddy/Caddyfile", "one")
    store.write_generated("litellm-a/config.yaml", "zwei ü")
    assert store.read_generated() == {"caddy/Caddyfile": "one", "litellm-a/config.yaml": "zwei ü"}
    store.write_generated("caddy/Caddyfile", None)
    store.write_generated("caddy/Caddyfile", None)
    assert store.read_generated() == {"litellm-a/config.yaml": "zwei ü"}


def test_a_half_written_generated_file_is_none(store: lm.StateStore) -> None:
    store.write_generated("caddy/Caddyfile", "one")
    (store.generated / "caddy" / ".Caddyfile.abcd").write_text("on")
    assert store.read_generated() == {"caddy/Caddyfile": "one"}


def test_a_kept_log_outlives_its_container_and_a_missing_one_is_empty(store: lm.StateStore) -> None:
    store.keep_log(CHAT, "first")
    assert store.kept_log(CHAT) == "first"
    assert store.kept_log(CHAT, previous=True) == ""
    assert store.kept_log(lm.ContainerName("llm-model-other-0")) == ""


def test_the_log_of_a_run_grows_and_that_of_the_run_before_is_kept(store: lm.StateStore) -> None:
    store.keep_log(CHAT, "first 0%\r100%\n")
    store.keep_log(CHAT, "first 0%\r100%\nit ended\n")
    store.keep_log(CHAT, "second\n")
    store.keep_log(CHAT, "second\nand more\n")
    assert store.kept_log(CHAT) == "second\nand more\n"
    assert store.kept_log(CHAT, previous=True) == "first 0%\r100%\nit ended\n"


def test_measurements_are_found_by_their_key_and_the_newest_500_are_kept(
    store: lm.StateStore,
) -> None:
    assert store.read_measured() == {}
    first = lm.Measured(weights_mib=1.5, context=4096, taken_at=NOW)
    store.note_measured("first", first)
    store.note_measured("second", lm.Measured())
    assert store.read_measured() == {"first": first, "second": lm.Measured()}
    many = {f"key {n}": lm.Measured(start_seconds=n) for n in range(499)}
    (store.home / "measured.json").write_bytes(
        lm._MEASURED.dump_json({"first": first, "second": first} | many)
    )
    store.note_measured("first", first)  # measured again: the oldest is now the second
    assert set(store.read_measured()) == {"first"} | {*many}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": {"context": "x"}}', b"\xff"])
def test_measurements_that_cannot_be_read_are_unknown(store: lm.StateStore, content: bytes) -> None:
    (store.home / "measured.json").write_bytes(content)
    assert store.read_measured() == {}
    store.note_measured("a", lm.Measured(context=1))
    assert store.read_measured() == {"a": lm.Measured(context=1)}


# --- the lock ------------------------------------------------------------------------------------

HOLDER = """
    with store.lock("Deploy chat"):
        print("held", flush=True)
        sys.stdin.read()
"""


def test_a_second_change_is_told_what_runs_and_since_when(store: lm.StateStore) -> None:
    release = store.acquire("Deploy chat")
    with pytest.raises(lm.BusyError, match=r"Deploy chat, since \d\d:\d\d:\d\d UTC, process \d+"):
        store.acquire("Stop chat")
    release()
    with store.lock("Stop chat"):
        pass


def test_the_lock_holds_between_processes_and_dies_with_its_holder(store: lm.StateStore) -> None:
    with another_process(store.home, HOLDER) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(lm.BusyError, match=f"Deploy chat.* process {process.pid}"):
            store.acquire("Stop chat")
        process.send_signal(signal.SIGKILL)
        process.wait()
        with store.lock("Stop chat"):
            pass


def test_a_state_can_be_read_while_a_change_holds_the_lock(store: lm.StateStore) -> None:
    with store.lock("Deploy chat"):
        assert replace(store.load(), models=()) == store.load()
