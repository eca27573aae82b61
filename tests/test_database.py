"""The database's keeping: dumps and their rotation, the plan of a return, retention, its alarm."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from textwrap import dedent

import pytest
import yaml
from builders import NOW, a_model, a_site, a_state, as_wished, but, ended, seen, the
from fakes import Crash, Server, Trouble
from hypothesis import given
from hypothesis import strategies as st

import llm_manager as lm

STATE = a_state(a_model())
POSTGRES, GATEWAY = lm.database_name(STATE), lm.gateway_name(STATE, "a")
OTHER_LITELLM = "ghcr.io/berriai/litellm:v1.109.1"
MIGRATED = "newer tables, keys"


def a_dump(hours: int = 0, file: str = "") -> lm.Dump:
    moment = NOW + timedelta(hours=hours)
    return lm.Dump(file=file or lm.automatic_dump(moment), size_bytes=1, taken_at=moment)


# --- names and rotation --------------------------------------------------------------------------


@given(st.sets(st.integers(0, 99)), st.integers(1, 20))
def test_the_newest_automatic_dumps_stay_and_every_named_one(hours: set[int], kept: int) -> None:
    named = [a_dump(hour, lm.named_dump(f"summer-{hour}")) for hour in hours]
    gone = lm.stale_dumps([*map(a_dump, hours), *named], kept)
    assert {*gone} == {*map(a_dump, sorted(hours)[:-kept])}


def test_the_dump_that_is_being_restored_stays_whatever_its_age() -> None:
    oldest, *_ = dumps = [a_dump(hour) for hour in range(5)]
    assert oldest not in lm.stale_dumps(dumps, 1, spare=oldest.file)
    assert len(lm.stale_dumps(dumps, 1, spare=oldest.file)) == 3


@pytest.mark.parametrize(
    "name", ["", "../x", "/etc/x", ".hidden", "a b", "x" * 200, lm.automatic_dump(NOW)]
)
def test_a_name_that_leaves_the_folder_or_would_make_way_is_refused(name: str) -> None:
    with pytest.raises(lm.RefusedError, match="cannot be the name of a dump"):
        lm.named_dump(name)


def test_a_named_dump_may_be_given_with_or_without_its_ending() -> None:
    assert lm.named_dump("summer") == lm.named_dump("summer.dump") == "summer.dump"


# --- retention and size ------------------------------------------------------------------------


@pytest.mark.parametrize(("days", "said"), [(90, "90d"), (1, "1d"), (None, None)])
def test_litellm_is_told_how_long_to_keep_requests(days: int | None, said: str | None) -> None:
    state = replace(STATE, housekeeping=lm.Housekeeping(retention_days=days))
    settings = yaml.safe_load(lm.render_litellm_config(state, ()))["general_settings"]
    assert settings.get("maximum_spend_logs_retention_period") == said
    assert ("maximum_spend_logs_cleanup_cron" in settings) == (said is not None)


def test_ninety_days_are_kept_unless_somebody_says_otherwise() -> None:
    assert STATE.housekeeping.retention_days == 90


def a_size(database: int, free: int) -> lm.DatabaseSize:
    return lm.DatabaseSize(
        database_bytes=database, spend_log_bytes=0, spend_log_rows=None, oldest_row_at=None,
        free_bytes=free,
    )  # fmt: skip


def a_snapshot(size: lm.DatabaseSize | None) -> lm.Snapshot:
    return lm.Snapshot(
        taken_at=NOW, state=STATE, observed=as_wished(STATE), plan=None, database=size
    )


@pytest.mark.parametrize(("free", "warned"), [(201, False), (199, True), (0, True)])
def test_a_database_that_half_of_what_is_free_cannot_hold_again_needs_attention(
    free: int, warned: bool
) -> None:
    matters = lm.attention(a_snapshot(a_size(100, free)))
    assert any("The database takes 100 B" in matter.text for matter in matters) == warned


def test_a_size_that_nobody_knows_is_not_called_small_or_large() -> None:
    assert not lm.attention(a_snapshot(None))
    assert "not been asked" in lm.database_text(a_snapshot(None))
    assert "of it" in lm.database_text(a_snapshot(a_size(2048, 4096))).casefold()


# --- plans -------------------------------------------------------------------------------------


def planned(state: lm.State, observed: lm.Observed, dump: str = "") -> str:
    observed = replace(observed, taken_at=NOW)
    return str(lm.plan_state(state, observed, a_site(), dump=dump))


def with_images(**images: str) -> lm.State:
    return replace(STATE, images=replace(STATE.images, **images))


def test_a_dump_comes_before_another_litellm() -> None:
    text = planned(with_images(litellm=OTHER_LITELLM), as_wished(STATE))
    dump = text.index(
        "dump the database into backups/litellm-20260304T050607Z.dump: LiteLLM changes from "
        f"{STATE.images.litellm} to {OTHER_LITELLM}"
    )
    assert text.index("pull image") < dump < text.index("create llm-litellm-b")


def test_a_dump_comes_before_another_postgresql_touches_its_files() -> None:
    text = planned(with_images(postgres="postgres:16.9-alpine"), as_wished(STATE))
    dump = text.index("dump the database into backups/litellm-20260304T050607Z.dump: PostgreSQL")
    assert dump < text.index("set aside llm-postgres")


def test_a_postgresql_that_was_stopped_is_started_for_its_dump() -> None:
    world = as_wished(STATE)
    text = planned(
        with_images(postgres="postgres:16.9-alpine"), but(world, ended(the(world, POSTGRES)))
    )
    order = ("start llm-postgres", "wait until llm-postgres", "dump the database", "set aside")
    assert [text.index(step) for step in order] == sorted(text.index(step) for step in order)


@pytest.mark.parametrize("trouble", ["crashed", "hangs"])
def test_a_broken_postgresql_is_changed_without_a_dump(trouble: str) -> None:
    world = as_wished(STATE)
    broken = {
        "crashed": ended(the(world, POSTGRES), 1),
        "hangs": replace(the(world, POSTGRES), ready=False, started_at=NOW - timedelta(days=1)),
    }[trouble]
    text = planned(with_images(postgres="postgres:16.9-alpine"), but(world, broken))
    assert "set aside llm-postgres" in text
    assert "dump the database" not in text


@pytest.mark.parametrize(
    "after",
    [
        replace(STATE, housekeeping=lm.Housekeeping(retention_days=30)),
        with_images(caddy="caddy:2.12.0"),
        with_images(vllm_cpu="vllm/vllm-openai-cpu:v0.31.0-x86_64"),
    ],
    ids=["settings", "caddy", "engine"],
)
def test_what_changes_no_tables_is_done_without_a_dump(after: lm.State) -> None:
    text = planned(after, as_wished(STATE))
    assert text
    assert "dump the database" not in text


def test_the_plan_of_a_return_reads_the_dump_before_it_stops_anything() -> None:
    assert planned(STATE, as_wished(STATE), "/b/summer.dump") == dedent("""\
        database:
          load /b/summer.dump into a database of its own: it is read whole before anything is stopped
          stop llm-litellm-a: it uses the database
          dump the database into backups/litellm-20260304T050607Z.dump: what is there now
          put the loaded database in the place of LiteLLM's: asked for
          pause 2 s: the same slot starts again
          start llm-litellm-a: its database is back
          wait until llm-litellm-a is ready: it starts
          drop the database from before: it is in the dump""")  # noqa: E501


def test_a_second_gateway_that_still_drains_is_stopped_and_stays_so() -> None:
    draining = seen(lm.render_gateway(STATE, "b", (), a_site()))
    text = planned(STATE, but(as_wished(STATE), draining), "/b/summer.dump")
    assert "stop llm-litellm-a" in text
    assert "stop llm-litellm-b" in text
    assert "start llm-litellm-b" not in text


def test_without_its_endpoint_nothing_is_restored() -> None:
    stopped = replace(a_state(), endpoint="stopped")
    assert "cannot be done: PostgreSQL is wished stopped." in planned(
        stopped, lm.Observed(), "/b/summer.dump"
    )


# --- on a simulated server ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A served model, and a dump of the keys that were there; make a twin of it."""
    server = Server(tmp_path_factory.mktemp("settled") / "home")
    server.world.start_seconds = 0.0
    server.manager.register({
        "name": "chat",
        "source": {"kind": "hub", "repository": "Qwen/Qwen3-0.6B"},
        "type": "chat",
        "placement": {"kind": "cpu"},
    })  # fmt: skip
    server.do(lm.deploying("chat"))
    list(server.manager.database.dump("summer").follow())
    server.world.tables = "tables, keys of today"
    return server


@pytest.fixture
def server(settled: Server, tmp_path: Path) -> Server:
    return settled.twin(tmp_path / "home")


def test_after_a_return_all_is_as_in_the_dump_and_what_was_there_is_in_another(
    server: Server,
) -> None:
    lines = server.do(server.manager.database.restoring("summer.dump"))
    assert server.world.tables == "tables, keys"
    assert "tables, keys of today" in server.world.dumps.values()
    assert server.world.former is None
    assert server.world.routed() == {"chat"}
    assert not server.manager.plan(lm.applying())
    assert any("the way back: `database restore litellm-" in line for line in lines)


def test_the_name_does_without_its_ending(server: Server) -> None:
    assert server.manager.database.restoring("summer").dump.endswith("summer.dump")


def test_a_broken_dump_stops_nothing(server: Server) -> None:
    server.world.broken.add("summer.dump")
    gateways = [c.started_at for c in server.world.containers.values() if c.spec.role == "gateway"]
    with pytest.raises(lm.RefusedError, match="cannot be restored"):
        server.do(server.manager.database.restoring("summer.dump"))
    assert server.world.tables == "tables, keys of today"
    assert server.world.loaded_dump is None
    assert gateways == [
        c.started_at for c in server.world.containers.values() if c.spec.role == "gateway"
    ]


def test_a_dump_that_is_not_there_is_said_before_anything_is_planned(server: Server) -> None:
    with pytest.raises(lm.RefusedError, match="There is no dump"):
        server.manager.database.restoring("winter")


def effects(server: Server, folder: Path) -> int:
    twin = server.twin(folder)
    twin.restart(counting := Trouble())
    twin.do(twin.manager.database.restoring("summer.dump"))
    return counting.count


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_failure_at_any_moment_of_a_return_leaves_one_whole_database(
    server: Server, tmp_path: Path, after: bool
) -> None:
    """The one from before, unless all that failed is to clear that one away."""
    for at in range(1, effects(server, tmp_path / "counted") + 1):
        twin = server.twin(tmp_path / f"{at}")
        twin.restart(Trouble((at,), after=after, error=a_failure))
        failed = False
        try:
            twin.do(twin.manager.database.restoring("summer.dump"))
        except lm.ManagerError:
            failed = True
        wanted = "tables, keys of today" if failed else "tables, keys"
        assert twin.world.tables == wanted, at
        twin.restart()
        twin.do(lm.applying())
        assert twin.world.routed() == {"chat"}, at


def a_failure() -> lm.ManagerError:
    return lm.ContainerFailedError("Docker could not do that: no reason.", advice="Look.")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_at_any_moment_of_a_return_is_healed_by_the_next_plan(
    server: Server, tmp_path: Path, after: bool
) -> None:
    for at in range(1, effects(server, tmp_path / "counted") + 1):
        twin = server.twin(tmp_path / f"{at}")
        tools = twin.manager._tools
        change = twin.manager.database.restoring("summer.dump")
        twin.restart(Trouble((at,), after=after))
        tools = twin.manager._tools
        control = lm.Control(lambda _: None)
        with contextlib.suppress(Crash):
            lm.converge(twin.store.load(), a_site(), tools, control, change)
        twin.restart()
        twin.do(lm.applying())
        assert twin.world.tables in {"tables, keys", "tables, keys of today"}, at
        assert twin.world.routed() == {"chat"}, at
        twin.do(twin.manager.database.restoring("summer.dump"))
        assert (twin.world.tables, twin.world.former) == ("tables, keys", None), at


def pin_litellm(server: Server) -> None:
    server.world.migrations[OTHER_LITELLM] = MIGRATED
    server.manager.save(lm.pinning_image("litellm", OTHER_LITELLM))


def test_a_litellm_that_changed_the_tables_and_failed_returns_to_the_dump(server: Server) -> None:
    pin_litellm(server)
    server.world.broken.add(OTHER_LITELLM)
    with pytest.raises(lm.ContainerFailedError):
        server.do(lm.applying())
    assert server.world.tables == "tables, keys of today"
    assert server.world.routed() == {"chat"}


def test_a_return_that_fails_says_how_to_do_it_by_hand(server: Server) -> None:
    pin_litellm(server)
    server.world.broken.add(OTHER_LITELLM)
    lines = list[str]()

    def report(line: str) -> None:
        lines.append(line)
        if "database returns to" in line:
            server.world.end(POSTGRES)

    with pytest.raises(lm.ContainerFailedError):
        lm.converge(
            server.store.load(), a_site(), server.manager._tools, lm.Control(report), lm.applying()
        )
    assert any("Return by hand: `database restore litellm-" in line for line in lines)


def test_a_litellm_that_failed_before_it_changed_a_table_loses_no_row(server: Server) -> None:
    pin_litellm(server)
    server.world.migrations[OTHER_LITELLM] = "tables, keys of today and a request since"
    server.world.broken.add(OTHER_LITELLM)
    with pytest.raises(lm.ContainerFailedError):
        server.do(lm.applying())
    assert server.world.tables == "tables, keys of today and a request since"


def test_a_litellm_that_comes_up_keeps_what_it_made_of_the_tables(server: Server) -> None:
    pin_litellm(server)
    server.do(lm.applying())
    assert server.world.tables == MIGRATED
    assert "tables, keys of today" in server.world.dumps.values()


def test_only_so_many_automatic_dumps_stay(server: Server) -> None:
    server.manager.save(lm.keeping_house({"dumps_kept": 2}))
    for _ in range(4):
        server.world.clock.sleep(1)
        list(server.manager.database.dump().follow())
    assert len(server.world.dumps) == 3
    assert "summer.dump" in server.world.dumps


# --- the folder on the disk ----------------------------------------------------------------------


class Programs:
    """PostgreSQL's programs as its container runs them: a dump, then whether it can be read."""

    def __init__(self, *chunks: bytes, fails: str = "") -> None:
        self.chunks = chunks
        self.fails = fails
        self.inside: dict[str, bytes] = {}

    def put(self, name: lm.ContainerName, source: Path, target: str) -> None:  # noqa: ARG002
        self.inside[target] = source.read_bytes()

    def output(self, name: lm.ContainerName, command: Sequence[str]) -> Iterator[bytes]:
        if command[0] == "rm":
            self.inside.pop(command[-1], None)
        if command[0] == "pg_dump":
            yield from self.chunks
        if command[0] == self.fails:
            raise lm.ContainerFailedError(f"It ended in {name}.", advice="Look at its log.")


def programs(folder: Path, *chunks: bytes, fails: str = "") -> lm.PostgresPrograms:
    return lm.PostgresPrograms(Programs(*chunks, fails=fails), folder)  # type: ignore[arg-type]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def test_a_dump_is_whole_and_for_its_owner_alone(tmp_path: Path) -> None:
    sizes: list[int] = []
    database = programs(tmp_path / "backups", b"PGDMP", b"rows")
    assert database.dump(POSTGRES, "x.dump", sizes.append) == 9
    assert sizes == [5, 9]
    path = database.find("x.dump")
    assert path.read_bytes() == b"PGDMProws"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [dump.file for dump in database.dumps()] == ["x.dump"]


@pytest.mark.parametrize("program", ["pg_dump", "pg_restore"])
def test_a_dump_that_failed_or_cannot_be_read_back_leaves_nothing(
    tmp_path: Path, program: str
) -> None:
    with pytest.raises(lm.ContainerFailedError):
        programs(tmp_path, b"PGDMP", fails=program).dump(POSTGRES, "x.dump", lambda _: None)
    assert names_in(tmp_path) == set()


def test_a_cancelled_dump_leaves_nothing(tmp_path: Path) -> None:
    control = lm.Control(lambda _: None, "task")
    control.cancel()
    with pytest.raises(lm.CancelledError):
        programs(tmp_path, b"PGDMP").dump(POSTGRES, "x.dump", lambda _: control.check())
    assert names_in(tmp_path) == set()


def test_what_a_killed_manager_left_goes_with_the_next_dump(tmp_path: Path) -> None:
    (tmp_path / ".y.dump.part").write_bytes(b"PGD")
    programs(tmp_path, b"PGDMP").dump(POSTGRES, "x.dump", lambda _: None)
    assert names_in(tmp_path) == {"x.dump"}


def test_a_name_is_given_once(tmp_path: Path) -> None:
    database = programs(tmp_path, b"PGDMP")
    database.dump(POSTGRES, "x.dump", lambda _: None)
    with pytest.raises(lm.RefusedError, match=r"There is a dump x\.dump already"):
        database.dump(POSTGRES, "x.dump", lambda _: None)


def test_a_dump_from_elsewhere_is_found_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "brought.dump").write_bytes(b"PGDMP")
    database = programs(tmp_path / "backups")
    assert database.find(str(tmp_path / "brought.dump")) == tmp_path / "brought.dump"
    with pytest.raises(lm.RefusedError, match="none yet"):
        database.find("brought")


def test_settings_that_make_no_sense_are_refused_with_words() -> None:
    with pytest.raises(lm.RefusedError, match="retention_days"):
        lm.keeping_house({"retention_days": 0}).edit(STATE)
    kept = lm.keeping_house({"retention_days": None}).edit(STATE).housekeeping
    assert asdict(kept) == {"retention_days": None, "dumps_kept": 7}
