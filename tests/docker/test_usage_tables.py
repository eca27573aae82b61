"""Usage out of LiteLLM's real tables: who may read them, how, and that nothing is lost."""

from __future__ import annotations

import csv
import json
import re
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import docker
import openai
import psycopg
import pytest
from browsing import button, cell, open_console, open_tab, sort_by
from consoles import resident_mib, serving
from installation import Install, Installation
from playwright.sync_api import Page, expect
from pydantic import SecretStr
from test_routing import Upstream, wait_until
from usage_rows import LAST, PASSWORD, database_of, fill, litellm_database, own_connection

import llm_manager as lm

pytestmark = pytest.mark.docker
KEYS, ROWS, DAYS = 60, 20_000, 40
UPSTREAMS = Path(__file__).with_name("upstreams.py")


# --- the tables ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(docker_client: docker.DockerClient) -> Iterator[str]:
    with litellm_database(docker_client) as address:
        with own_connection(address) as connection:
            fill(connection, keys=KEYS, rows=ROWS, days=DAYS)
        yield address


@pytest.fixture(scope="module")
def tables(address: str) -> lm.UsageTables:
    return lm.UsageTables(address, SecretStr(PASSWORD), SecretStr("of-a-reader"))


def used(tables: lm.UsageTables, by: lm.Grouping, days: int, **more: Any) -> lm.UsageReport:
    query = lm.UsageQuery(first=LAST - timedelta(days=days - 1), last=LAST, by=by, **more)
    return lm.parse_usage(query, tables.rows(lm.usage_sql(query)))


def figures(row: lm.UsageRow) -> list[int]:
    names = ("requests", "failures", "prompt_tokens", "cached_tokens", "completion_tokens")
    return [getattr(row, name) for name in names]


def test_every_way_to_add_up_comes_to_the_same(tables: lm.UsageTables) -> None:
    reports = {by: used(tables, by, 30) for by in lm.get_args(lm.Grouping)}
    totals = {by: figures(report.total) for by, report in reports.items()}
    assert totals["key"][0] > ROWS / 2
    assert all(total == totals["key"] for total in totals.values())
    for report in reports.values():
        sums = [sum(column) for column in zip(*map(figures, report.rows), strict=True)]
        assert sums == figures(report.total)
    lengths = {by: len(report.rows) for by, report in reports.items()}
    assert lengths == {"key": KEYS, "group": 19, "model": 4, "day": 30, "hour": 720}
    assert [row.name for row in reports["day"].rows] == sorted(r.name for r in reports["day"].rows)
    latencies = [report.total.latency_ms for report in reports.values()]
    assert latencies == pytest.approx([latencies[0]] * 5)


def test_a_keys_row_is_what_its_requests_were(address: str, tables: lm.UsageTables) -> None:
    row = used(tables, "key", DAYS).rows[0]
    with own_connection(address) as connection:
        asked = """
SELECT count(*), count(*) FILTER (WHERE status = 'failure'), sum(prompt_tokens),
       sum((metadata #>> '{usage_object,prompt_tokens_details,cached_tokens}')::int),
       sum(completion_tokens)
  FROM "LiteLLM_SpendLogs" WHERE api_key = %s"""
        found = connection.execute(asked, [row.subject]).fetchone()
    assert found is not None
    assert list(found) == figures(row)
    assert row.name.startswith("key ")


def test_a_limit_leaves_rows_out_and_no_sum(tables: lm.UsageTables) -> None:
    whole, part = used(tables, "key", 7), used(tables, "key", 7, limit=10)
    assert (len(part.rows), part.left_out) == (10, KEYS - 10)
    assert part.total == whole.total
    assert part.rows == whole.rows[:10], "those that used most"


def test_a_statement_is_the_months_use_by_groups_and_models(tables: lm.UsageTables) -> None:
    month = LAST.replace(day=1)
    prices = lm.Prices(models=(lm.Price(model="*", prompt=1, completion=0),))
    statement = lm.parse_statement(month, tables.rows(lm.statement_sql(month)), prices)
    groups = used(tables, "group", LAST.day)
    assert list(statement.by_group)[-1] == "no group"
    for row in groups.rows:
        lines = statement.by_group[row.name]
        assert sum(line.requests for line in lines) == row.requests
        assert sum(line.prompt_tokens for line in lines) == row.prompt_tokens
        assert sum(line.cost or 0 for line in lines) == pytest.approx(row.prompt_tokens / 1e6)
    assert len(groups.rows) == len(statement.by_group)


@pytest.mark.parametrize(("by", "index"), [
    *((by, "LiteLLM_DailyUserSpend_date_idx") for by in ("key", "group", "model", "day")),
    ("group", "LiteLLM_DailyTeamSpend_date_idx"),
    ("hour", "hours_pkey"),
])  # fmt: skip
def test_a_range_is_found_by_an_index(tables: lm.UsageTables, by: Any, index: str) -> None:
    asked = lm.usage_sql(lm.UsageQuery(first=LAST, last=LAST, by=by))
    plan = tables.rows(lm.Sql(f"EXPLAIN {asked.text}", asked.values))
    assert index in str(plan)
    assert "Seq Scan on" not in "".join(
        line for (line,) in plan if "hours" in line or "Daily" in line
    )


def test_limits_and_unused_keys_are_told(tables: lm.UsageTables) -> None:
    standings = lm.parse_standings(tables.rows(lm.STANDINGS_SQL))
    assert len(standings) == KEYS + 20
    close = lm.close_to_limits(standings)
    assert [s.name for s in close] == []  # spend of at most 60 of 100, of every fourth key


def test_the_reader_reads_usage_and_can_do_nothing_else(
    address: str, tables: lm.UsageTables
) -> None:
    tables.rows(lm.STANDINGS_SQL)
    reader = {"host": address, "dbname": "litellm", "user": lm.READER, "password": "of-a-reader"}
    for statement in (
        'SELECT * FROM "LiteLLM_Config"',
        'SELECT * FROM "LiteLLM_CredentialsTable"',
        'DELETE FROM "LiteLLM_SpendLogs"',
        'UPDATE "LiteLLM_VerificationToken" SET max_budget = NULL',
        "CREATE TABLE mine (n int)",
        "CREATE ROLE other",
        "COPY (SELECT 1) TO PROGRAM 'true'",
    ):
        with psycopg.connect(**reader) as connection:
            connection.execute("SET default_transaction_read_only = off")
            connection.commit()
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement.encode())
    with (
        psycopg.connect(**reader) as connection,
        pytest.raises(psycopg.errors.ReadOnlySqlTransaction),
    ):
        connection.execute("CREATE TEMPORARY SEQUENCE mine")


def test_a_table_that_litellm_made_anew_is_read_again(address: str, tables: lm.UsageTables) -> None:
    tables.rows(lm.STANDINGS_SQL)
    with own_connection(address) as connection:
        connection.execute(f'REVOKE ALL ON "LiteLLM_TeamTable" FROM {lm.READER}'.encode())
    assert tables.rows(lm.STANDINGS_SQL)


ASKED = """
INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, api_key, api_base, status, prompt_tokens,
       completion_tokens, "startTime", "endTime", request_duration_ms, metadata)
SELECT 'later-' || n, 'acompletion', 'key', 'http://far/v1',
       CASE WHEN n = 3 THEN 'failure' ELSE 'success' END, 10 * n, n, moment, moment, 1000 * n,
       '{"usage_object": {"prompt_tokens_details": {"cached_tokens": "5 or so"}}}'
  FROM (SELECT n, %s::timestamp + n * interval '40 minutes' AS moment
          FROM generate_series(1, 4) AS n) AS asked
    ON CONFLICT (request_id) DO NOTHING"""
LATER = LAST + timedelta(days=9)


@pytest.fixture
def asked(address: str, tables: lm.UsageTables) -> Iterator[psycopg.Connection]:
    """Four requests on a later day, of which LiteLLM wrote two twice."""
    tables.rows(lm.STANDINGS_SQL)
    with own_connection(address) as connection:
        connection.autocommit = True
        connection.execute(ASKED.encode(), [LATER])
        connection.execute(ASKED.encode(), [LATER])
        yield connection
        connection.execute("DELETE FROM \"LiteLLM_SpendLogs\" WHERE request_id ~ '^later-'")
        connection.execute("DELETE FROM llm_manager.hours WHERE hour >= %s", [LATER])
        connection.execute("DELETE FROM llm_manager.uses WHERE hour >= %s", [LATER])


def hours(tables: lm.UsageTables) -> dict[str, list[int]]:
    query = lm.UsageQuery(first=LATER, last=LATER, by="hour")
    report = lm.parse_usage(query, tables.rows(lm.usage_sql(query)))
    return {row.name[11:13]: figures(row) for row in report.rows}


THEN = {"00": [1, 0, 10, 0, 1], "01": [1, 0, 20, 0, 2], "02": [2, 1, 70, 0, 7]}


def test_hours_keep_what_retention_prunes(
    asked: psycopg.Connection, tables: lm.UsageTables
) -> None:
    assert hours(tables) == THEN
    before = used(tables, "hour", 20)
    asked.execute("DELETE FROM \"LiteLLM_SpendLogs\" WHERE request_id = 'later-1'")
    asked.execute('DELETE FROM "LiteLLM_SpendLogs" WHERE "startTime" < %s', [LAST])
    assert hours(tables) == THEN
    asked.execute('DROP TRIGGER llm_manager_hours ON "LiteLLM_SpendLogs"')
    assert used(tables, "hour", 20) == before, "added up anew, but for what is not known any more"


USED_BY = {"key": "api_key", "group": "coalesce(team_id, '')"}


@pytest.mark.parametrize("by", USED_BY)
def test_who_used_which_engine_is_told_by_the_hour(
    address: str, tables: lm.UsageTables, by: Any
) -> None:
    told = {row[:3]: row[4:] for row in tables.rows(lm.uses_sql(LAST, by))}
    with own_connection(address) as connection:
        asked = f"""
SELECT extract(epoch FROM date_trunc('hour', "startTime"))::bigint, api_base, {USED_BY[by]},
       count(*), sum(prompt_tokens), sum(completion_tokens)
  FROM "LiteLLM_SpendLogs" WHERE "startTime" >= %s AND "startTime" < %s GROUP BY 1, 2, 3"""  # noqa: S608
        rows = connection.execute(asked.encode(), [LAST, LAST + timedelta(days=1)]).fetchall()
    assert told == {row[:3]: row[3:] for row in rows}
    assert len(told) > 100
    names = {row[3] for row in tables.rows(lm.uses_sql(LAST, by))}
    assert "key 1" in names or {"group 1", ""} <= names


def test_who_used_an_engine_is_found_by_an_index(tables: lm.UsageTables) -> None:
    asked = lm.uses_sql(LAST, "key")
    plan = str(tables.rows(lm.Sql(f"EXPLAIN {asked.text}", asked.values)))
    assert "uses_pkey" in plan
    assert "Seq Scan on uses" not in plan


def test_an_installation_that_knew_no_hours_by_key_adds_them_up(
    asked: psycopg.Connection, tables: lm.UsageTables
) -> None:
    before = used(tables, "hour", 20), sorted(tables.rows(lm.uses_sql(LAST, "key")))
    asked.execute("DROP TABLE llm_manager.uses")
    again = used(tables, "hour", 20), sorted(tables.rows(lm.uses_sql(LAST, "key")))
    assert again == before
    more = ASKED.replace("later", "later-yet")
    asked.execute(more.encode(), [LATER])
    assert hours(tables) == {hour: [2 * n for n in row] for hour, row in THEN.items()}
    by_key = [row[2:] for row in tables.rows(lm.uses_sql(LATER, "key"))]
    assert sorted(by_key) == [("key", "", 2, 20, 2), ("key", "", 2, 40, 4), ("key", "", 4, 140, 14)]


def test_sums_that_fail_lose_no_account(asked: psycopg.Connection, tables: lm.UsageTables) -> None:
    asked.execute('ALTER TABLE "LiteLLM_SpendLogs" RENAME api_base TO base_of_api')
    try:
        more = ASKED.replace("api_base", "base_of_api").replace("later", "later-still")
        asked.execute(more.encode(), [LATER])
    finally:
        asked.execute('ALTER TABLE "LiteLLM_SpendLogs" RENAME base_of_api TO api_base')
    rows = asked.execute("SELECT FROM \"LiteLLM_SpendLogs\" WHERE request_id ~ '^later'")
    assert rows.rowcount == 8
    assert hours(tables) == THEN
    asked.execute('DROP TRIGGER llm_manager_hours ON "LiteLLM_SpendLogs"')
    assert hours(tables) == {hour: [2 * n for n in row] for hour, row in THEN.items()}


def test_a_query_that_takes_too_long_is_ended(address: str, tables: lm.UsageTables) -> None:
    tables.rows(lm.STANDINGS_SQL)
    with own_connection(address) as connection:
        connection.execute(f"ALTER ROLE {lm.READER} SET statement_timeout = '100ms'".encode())
    try:
        with pytest.raises(lm.DatabaseError, match="did not have the answer"):
            tables.rows(lm.Sql("SELECT pg_sleep(60)", {}))
    finally:
        with own_connection(address) as connection:
            connection.execute(f"ALTER ROLE {lm.READER} SET statement_timeout = '10s'".encode())


def test_what_is_wrong_is_said_in_words(address: str, tables: lm.UsageTables) -> None:
    with pytest.raises(lm.DatabaseError, match="not there as this program knows them"):
        tables.rows(lm.Sql('SELECT * FROM "LiteLLM_Gone"', {}))
    with pytest.raises(lm.DatabaseError, match=r"PostgreSQL refuses that: division by zero\. "):
        tables.rows(lm.Sql("SELECT 1 / 0", {}))
    with pytest.raises(lm.DatabaseError, match="more than 20,000 rows"):
        tables.rows(lm.Sql("SELECT generate_series(1, 1000000000)", {}))
    stranger = lm.UsageTables(address, SecretStr("wrong"), SecretStr("wrong-too"))
    with pytest.raises(lm.DatabaseError, match="PostgreSQL does not answer"):
        stranger.rows(lm.STANDINGS_SQL)


# --- what was really asked -------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(install_for_module: Install) -> Installation:
    """An endpoint with no model of its own, whose provider is `far`."""
    here = install_for_module()
    here.cli("provider", "add", "lab", "--kind", "openai", "--url", "http://far:8000")
    here.cli("route", "set", "tiny", "--member", "lab/tiny")
    with here.step("an endpoint whose use is counted"):
        here.cli("apply")
    return here


@pytest.fixture(scope="module")
def far(here: Installation, docker_client: docker.DockerClient) -> Iterator[Upstream]:
    network = lm.network_name(here.state())
    container = docker_client.containers.create(
        "llm-manager-test/base:latest",
        ["python3", "/upstreams.py", "far"],
        name=f"{here.state().name_prefix}far",
        network=network,
        networking_config={network: docker_client.api.create_endpoint_config(aliases=["far"])},
        volumes={str(UPSTREAMS): {"bind": "/upstreams.py", "mode": "ro"}},
    )
    try:
        container.start()
        container.reload()
        address = container.attrs["NetworkSettings"]["Networks"][network]["IPAddress"]
        upstream = Upstream(str(address))
        wait_until(upstream.is_up, "the provider answers", 30)
        yield upstream
    finally:
        container.remove(force=True, v=True)


def ask(client: openai.OpenAI, **more: Any) -> Any:
    wanted = {"model": "tiny", "messages": [{"role": "user", "content": "Hello?"}]}
    return client.chat.completions.create(**wanted | more)


def rows_by(here: Installation, by: str) -> dict[str, list[int]]:
    """From the command line: requests, failures, prompt and completion tokens."""
    names = ("requests", "failures", "prompt_tokens", "completion_tokens")
    found = json.loads(here.cli("usage", "--by", by, "--json"))
    return {row["name"]: [row[name] for name in names] for row in found}


def in_group(here: Installation, alias: str, group: str) -> str:
    """A key of a group of LiteLLM's."""
    manager = here.manager()
    api = manager.keys.gateway(manager.state())
    team = api._call("POST", "/team/new", json={"team_alias": group})["team_id"]
    made = api._call("POST", "/key/generate", json={"key_alias": alias, "team_id": team})
    return str(made["key"])


def test_every_token_is_counted_once(here: Installation, far: Upstream) -> None:
    ada, bob = here.openai(here.create_key("Ada")), here.openai(in_group(here, "Bob", "the lab"))
    for _ in range(3):
        ask(ada)
    for client in (ada, bob):
        assert (
            "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True))
            == "answer of far"
        )
    far.order(fail=400)
    for client in (ada, ada, bob):
        with pytest.raises(openai.BadRequestError):
            ask(client)
    far.order()
    with pytest.raises(openai.AuthenticationError):
        ask(here.openai("sk-nobody-has-this-key"))
    with pytest.raises(openai.BadRequestError):
        ask(ada, model="no-such-model")
    ask(bob)
    wait_until(lambda: rows_by(here, "key")["total"][0] == 10, "all is written", 90)
    found = rows_by(here, "key")
    # The upstream says that each answer had 3 tokens and its prompt 3, of streams too. LiteLLM
    # counts a prompt that was refused upstream by itself, at 14; of a stranger nothing is kept.
    total = [10, 4, 18 + 3 * 14, 18]
    assert found == {"Ada": [7, 3, 40, 12], "Bob": [3, 1, 20, 6], "total": total}
    totals = {by: rows_by(here, by)["total"] for by in lm.get_args(lm.Grouping)}
    assert all(total == found["total"] for total in totals.values()), totals
    assert rows_by(here, "group")["the lab"] == found["Bob"]
    assert here.cli("usage", "--attention") == "Nothing needs attention.\n"
    here.cli("key", "revoke", "Ada")
    assert rows_by(here, "key")["Ada"] == found["Ada"], "what it used stays accounted for"


def test_no_name_of_a_tool_is_stored(here: Installation, far: Upstream) -> None:
    tess = here.openai(here.create_key("Tess"))
    database = here.container("llm-postgres")

    def kept_of(name: str) -> list[str]:
        """The tables that have it, once a request that offers and calls it is accounted for."""
        before = rows_by(here, "key").get("Tess", [0])[0]
        function = {"name": name, "parameters": {"type": "object", "properties": {}}}
        tools = [{"type": "function", "function": function}]
        (called,) = ask(tess, tools=tools).choices[0].message.tool_calls
        assert called.function.name == name
        wait_until(lambda: rows_by(here, "key").get("Tess", [0])[0] > before, "it is written", 90)
        time.sleep(12)  # LiteLLM writes the tools every ten seconds
        dump = database.exec_run(["pg_dump", *lm.PSQL[1:], "--data-only", "--inserts"]).output
        return re.findall(rf'INTO public\."(\w+)" .*{name}', dump.decode())

    def psql(sql: str) -> None:
        assert database.exec_run([*lm.PSQL, "-c", sql]).exit_code == 0

    assert kept_of("get_secret_weather") == []
    gateways = [c for name, c in here.containers().items() if name.startswith("llm-litellm")]
    log = b"".join(c.logs() for c in gateways).decode()
    assert "ERROR LiteLLM Proxy utils.py" not in log, "LiteLLM is content with the database"
    places = ("LiteLLM_ToolTable", "LiteLLM_SpendLogToolIndex", "LiteLLM_DailyToolSpend")
    try:
        for place in places:
            psql(f'ALTER TABLE "{place}" DISABLE TRIGGER USER')
        assert set(kept_of("get_other_weather")) == set(places), "the check can fail"
    finally:
        psql(lm.WITHHOLDING)
        for place in places:
            psql(f'ALTER TABLE "{place}" ENABLE TRIGGER USER')
    assert kept_of("get_third_weather") == []
    said = database.exec_run([*lm.PSQL, "-tAc", 'SELECT count(*) FROM "LiteLLM_ToolTable"'])
    assert said.output.strip() == b"0", "what was kept from before is gone"


@pytest.mark.browser
def test_the_page_shows_who_used_what_and_gives_it_as_a_file(
    here: Installation, far: Upstream, page: Page
) -> None:
    ask(here.openai(here.create_key("Grace")))
    wait_until(lambda: "Grace" in rows_by(here, "key"), "it is written", 60)
    with serving(here) as url:
        open_console(page, url)
        open_tab(page, "Keys & usage")
        open_tab(page, "Usage")
        expect(cell(page, "Grace")).to_be_visible()
        expect(page.locator(".vega-embed canvas, .vega-embed svg").first).to_be_visible()
        page.get_by_label("Added up by").click()
        page.get_by_role("option", name="model").click()
        expect(cell(page, "tiny")).to_be_visible()
        with page.expect_download() as download:
            page.get_by_role("link", name="Download usage-by-model").click()
        read = csv.DictReader(download.value.path().read_text().splitlines())
        prompts = {row["model"]: int(row["prompt_tokens"]) for row in read}
        assert prompts["openai/tiny"] > 0
        page.get_by_role("button", name="Statements of a month").click()
        button(page, "Make statements").click()
        expect(page.get_by_role("link", name=re.compile("statement-.*html"))).to_be_visible()
    here.container("llm-postgres").stop()
    try:
        assert "PostgreSQL is down" in here.run("usage").stderr
    finally:
        here.cli("apply")


def figures_sort_as_numbers(page: Page) -> None:
    sort_by(page, "Prompt tokens", "ascending")
    used = page.get_by_role("grid").filter(has=page.get_by_role("columnheader", name="Prompt"))
    prompts = used.get_by_role("row").locator("[role=gridcell]:nth-child(4)")
    expect(prompts.first).not_to_have_text("")
    figures = [int(text.replace(",", "")) for text in prompts.all_inner_texts()]
    assert len(figures) > 5
    assert figures == sorted(figures)


@pytest.mark.browser
def test_a_thousand_keys_are_found_sorted_and_accounted_for(here: Installation, page: Page) -> None:
    with serving(here) as url:
        open_console(page, url)
        open_tab(page, "Keys & usage")
        open_tab(page, "Usage")
        expect(page.get_by_role("link", name="Download usage-by-key")).to_be_visible()
        before = resident_mib(here)
        with database_of(here) as connection:
            fill(connection, keys=1000, rows=20_000, days=20, last=lm.utc_now().date())
        page.reload()
        open_console(page, url)
        open_tab(page, "Keys & usage")
        expect(cell(page, "key 100")).to_be_visible()
        sort_by(page, "For", "descending")
        expect(cell(page, "key 999")).to_be_visible()
        page.get_by_placeholder("Filter...").first.fill("key 777")
        expect(cell(page, "key 777")).to_be_visible()
        expect(cell(page, "key 999")).to_have_count(0)
        open_tab(page, "Usage")
        figures_sort_as_numbers(page)
        with page.expect_download() as download:
            page.get_by_role("link", name="Download usage-by-key").click()
        rows = [*csv.DictReader(download.value.path().read_text().splitlines())]
        assert len(rows) == lm.USAGE_ROWS
        assert {"key 1", "key 1000"} <= {row["key"] for row in rows}
        assert resident_mib(here) - before < 150, "of pages and tables nothing stays"
