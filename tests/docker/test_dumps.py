"""The database on the real PostgreSQL and LiteLLM: dump, destroy, restore, migrate, prune."""

from __future__ import annotations

import io
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import docker
import openai
import pytest
from installation import Install, Installation, built, served_outside

import llm_manager as lm

pytestmark = pytest.mark.docker
POSTGRES = "llm-manager-test/postgres:latest"
# As a LiteLLM that changes its tables, and then does not come up.
BREAKING = f"""FROM {POSTGRES}
ENTRYPOINT ["sh", "-c", "psql -qc 'ALTER TABLE \\"LiteLLM_VerificationToken\\" \
DROP COLUMN \\"key_name\\" CASCADE' \\"$DATABASE_URL\\"; exit 3"]
"""


@pytest.fixture(scope="module")
def here(install_for_module: Install) -> Iterator[Installation]:
    """An endpoint whose one model is served outside of Docker."""
    with served_outside(install_for_module) as made:
        yield made


def sql(here: Installation, *statements: str) -> str:
    """What PostgreSQL answers its administrator, past the program."""
    given = [word for text in statements for word in ("-c", text)]
    command = [*lm.PSQL, "-qtA", "-v", "ON_ERROR_STOP=1", *given]
    ended = here.container("llm-postgres").exec_run(command)
    said = bytes(ended.output).decode().strip()
    assert ended.exit_code == 0, said
    return said


def ask(here: Installation, key: str) -> str:
    reply = here.openai(key).chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello?"}]
    )
    return reply.choices[0].message.content or ""


def aliases(here: Installation) -> set[str]:
    """Of the keys that LiteLLM's database has."""
    known = 'SELECT key_alias FROM "LiteLLM_VerificationToken" WHERE key_alias IS NOT NULL'
    return {*sql(here, known).split()}


def dumps(here: Installation) -> list[str]:
    return [dump["file"] for dump in json.loads(here.cli("database", "list", "--json"))]


def databases(here: Installation) -> set[str]:
    return {*sql(here, "SELECT datname FROM pg_database WHERE NOT datistemplate").split()}


def started(here: Installation) -> dict[str, str]:
    """When each gateway that runs was started."""
    return {
        name: str(container.attrs["State"]["StartedAt"])
        for name, container in here.containers().items()
        if "litellm" in name and container.status == "running"
    }


def test_keys_work_as_before_after_dump_and_destruction_and_restore(here: Installation) -> None:
    ada = here.create_key("Ada", "tiny")
    assert ask(here, ada) == "answer of host"
    sql(here, 'DROP TRIGGER llm_manager_before ON "LiteLLM_ToolTable"')  # as in an old dump
    with here.step("a dump of LiteLLM's database"):
        here.cli("database", "dump", "before")
    assert dumps(here) == ["before.dump"]
    later = here.create_key("Grace", "tiny")
    sql(here, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    assert here.run("key", "list").returncode == lm.FAILED
    assert "drop the database from before" in here.cli(
        "database", "restore", "before", "--plan", status=lm.TO_DO
    )
    with here.step("the dump is restored"):
        here.cli("database", "restore", "before")
    assert ask(here, ada) == "answer of host"
    assert aliases(here) == {"Ada"}
    refusing = "SELECT tgname FROM pg_trigger WHERE tgrelid = '\"LiteLLM_ToolTable\"'::regclass"
    assert sql(here, refusing) == "llm_manager_before"
    with pytest.raises(openai.AuthenticationError):
        ask(here, later)
    assert databases(here) == {"litellm", "postgres"}
    assert len(dumps(here)) == 2
    assert here.cli("plan") == "Nothing to do.\n"


def test_a_truncated_or_foreign_dump_is_refused_and_changes_nothing(
    here: Installation, tmp_path: Path
) -> None:
    key = here.create_key("Edsger", "tiny")
    here.cli("database", "dump", "whole")
    whole = (here.home / "backups" / "whole.dump").read_bytes()
    before, there = started(here), dumps(here)
    for name, content, said in (
        ("half", whole[: len(whole) // 2], "end of file"),
        ("text", b"no dump at all", "valid archive"),
        ("empty", b"", "cannot be restored"),
    ):
        path = tmp_path / f"{name}.dump"
        path.write_bytes(content)
        refused = here.run("database", "restore", str(path))
        assert refused.returncode == lm.FAILED
        assert said in refused.stderr
        assert "cannot be restored" in refused.stderr
    assert started(here) == before
    assert dumps(here) == there
    assert databases(here) == {"litellm", "postgres"}
    assert ask(here, key) == "answer of host"
    left = here.container("llm-postgres").exec_run(["ls", lm.DUMP_INSIDE])
    assert left.exit_code != 0


def test_a_litellm_that_changes_the_tables_and_fails_returns_to_the_dump(
    here: Installation, docker_client: docker.DockerClient
) -> None:
    key = here.create_key("Barbara", "tiny")
    kept, before = here.state().images.litellm, started(here)
    name = f"llm-manager-breaking:{uuid.uuid4().hex[:8]}"
    with built(docker_client, name, fileobj=io.BytesIO(BREAKING.encode())):
        here.cli("image", "set", "litellm", name)
        assert "dump the database into backups/litellm-" in here.cli("plan", status=lm.TO_DO)
        with here.step("a broken LiteLLM, and the way back"):
            ended = here.run("apply")
        here.cli("image", "set", "litellm", kept)
    assert ended.returncode == lm.FAILED
    assert "The tables have changed: the database returns to litellm-" in ended.stdout
    column = (
        "SELECT count(*) FROM information_schema.columns "
        "WHERE table_name = 'LiteLLM_VerificationToken' AND column_name = 'key_name'"
    )
    assert sql(here, column) == "1"
    assert started(here) == before
    assert databases(here) == {"litellm", "postgres"}
    assert "Barbara" in aliases(here)
    assert ask(here, key) == "answer of host"
    assert here.cli("plan") == "Nothing to do.\n"


def test_the_size_is_told_in_bytes_and_words(here: Installation) -> None:
    size = json.loads(here.cli("database", "show", "--json"))
    assert size["database_bytes"] > size["spend_log_bytes"] > 0
    assert size["free_bytes"] > 0
    assert size["retention_days"] == 90
    assert "kept for 90 days" in here.cli("database", "show")
    assert "database" in here.run("doctor").stdout


OLD_ROWS = 2500  # more than one batch of LiteLLM's
DAYS_AGO = "now() - interval '{} days'"


def spend_rows(prefix: str, count: int, days: int) -> str:
    moment = DAYS_AGO.format(days)
    return (
        'INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, "startTime", "endTime") '  # noqa: S608
        f"SELECT '{prefix}-' || n, 'acompletion', {moment}, {moment} "
        f"FROM generate_series(1, {count}) n"
    )


def test_rows_of_requests_are_pruned_by_age_and_the_sums_by_day_stay(
    here: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By LiteLLM itself, in its own time: here every minute, which nobody waits an hour for."""
    monkeypatch.setattr(lm, "PRUNING_TIMES", "* * * * *")
    ask(here, here.create_key("Donald", "tiny"))
    by_day = 'SELECT count(*) FROM "LiteLLM_DailyUserSpend"'
    assert soon(lambda: sql(here, by_day) != "0", 120)
    sql(here, "UPDATE \"LiteLLM_DailyUserSpend\" SET date = '2001-02-03'")
    kept = sql(here, by_day)
    sql(here, spend_rows("old", OLD_ROWS, 40), spend_rows("young", 3, 20))
    here.cli("database", "set", "--retention", "30")
    list(here.manager().start(lm.applying()).follow())
    old, young = (
        f"SELECT count(*) FROM \"LiteLLM_SpendLogs\" WHERE request_id LIKE '{prefix}-%'"  # noqa: S608
        for prefix in ("old", "young")
    )
    with here.step("LiteLLM prunes its rows of requests"):
        assert soon(lambda: sql(here, old) == "0", 240)
    assert sql(here, young) == "3"
    assert int(sql(here, by_day)) >= int(kept)


def soon(holds: Callable[[], bool], seconds: float) -> bool:
    """Whether it comes true within the time that it may take at worst."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if holds():
            return True
        time.sleep(1)
    return False


def test_keys_come_along_to_another_server(here: Installation, tmp_path: Path) -> None:
    """The steps of docs/operations.md; of the old server only what was copied is left."""
    lise = here.create_key("Lise", "tiny")
    here.cli("database", "dump", "move")
    shutil.copytree(here.home, tmp_path / "copied", symlinks=True)
    here.destroy()
    there = replace(here, home=tmp_path / "copied")
    assert "llm-postgres" in there.cli("plan", status=lm.TO_DO)
    there.cli("apply")
    with pytest.raises(openai.AuthenticationError):
        ask(there, lise)
    there.cli("database", "restore", "move")
    assert ask(there, lise) == "answer of host"
    assert there.cli("plan") == "Nothing to do.\n"
