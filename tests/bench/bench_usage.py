#!/usr/bin/env python3
"""How long usage takes to read where there is much of it; run by hand (about four minutes).

    python tests/bench/bench_usage.py [--keys 1000] [--rows 1000000] [--days 90]

A real PostgreSQL with LiteLLM's own schema, filled by SQL, and the daily tables rolled up from the
same rows; so every sum is known from two sources, and they are compared. That a range is found by
an index, and not by reading everything, is asserted; the times are only told.
"""

from __future__ import annotations

import argparse
import sys
import time
import tracemalloc
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT.parent), str(ROOT), str(ROOT / "docker")]

import docker
from installation import DOCKER_URL
from pydantic import SecretStr
from usage_rows import LAST, PASSWORD, fill, litellm_database, own_connection

import llm_manager as lm

TARGET_SECONDS = 2.0
# What is written here is not worth keeping.
SETTINGS = ("fsync=off", "full_page_writes=off", "synchronous_commit=off", "max_wal_size=4GB")


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - this is what it is for


def timed(what: str, work: Callable[[], object]) -> None:
    """The better of two: the first may have to read from the disk."""
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    verdict = "" if min(taken) <= TARGET_SECONDS else "  TOO SLOW"
    say(f"{min(taken) * 1000:8.0f} ms ({max(taken) * 1000:.0f} before)  {what}{verdict}")


def plan_of(tables: lm.UsageTables, query: lm.UsageQuery) -> str:
    asked = lm.usage_sql(query)
    return "\n".join(line for (line,) in tables.rows(lm.Sql(f"EXPLAIN {asked.text}", asked.values)))


def measure(tables: lm.UsageTables, days: int) -> None:
    """Every way to add up a range: its time with the table and the CSV, and its sums."""

    def report(query: lm.UsageQuery) -> lm.UsageReport:
        return lm.parse_usage(query, tables.rows(lm.usage_sql(query)))

    def shown(query: lm.UsageQuery) -> None:
        found = report(query)
        lm.usage_rows(found)
        lm.usage_csv(found)

    totals = set()
    for by in lm.get_args(lm.Grouping):
        if by == "hour" and days > lm.HOURS_DAYS:
            continue
        query = lm.UsageQuery(first=LAST - timedelta(days=days - 1), last=LAST, by=by)
        timed(f"by {by}, {days} days", lambda query=query: shown(query))  # type: ignore[misc]
        total = report(query).total
        totals.add((total.requests, total.failures, total.prompt_tokens, total.cached_tokens,
                    total.completion_tokens))  # fmt: skip
        if days == 1:
            plan = plan_of(tables, query)
            assert ("hours_pkey" if by == "hour" else "Spend_date_idx") in plan, plan
    assert len(totals) == 1, "the daily tables and the spend logs say the same"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--days", type=int, default=90)
    given = parser.parse_args()
    client = docker.DockerClient(base_url=DOCKER_URL, timeout=120)
    with litellm_database(client, *SETTINGS) as address:
        start = time.monotonic()
        with own_connection(address) as connection:
            fill(connection, keys=given.keys, rows=given.rows, days=given.days)
        say(f"{given.rows:,} requests of {given.keys:,} keys: {time.monotonic() - start:.0f} s")
        tables = lm.UsageTables(address, SecretStr(PASSWORD), SecretStr("of-a-reader"))
        tracemalloc.start()
        for days in sorted({1, 7, min(30, given.days), given.days}):
            measure(tables, days)
        timed("who is close to a limit, unused keys",
              lambda: lm.standing_rows(lm.parse_standings(tables.rows(lm.STANDINGS_SQL)),
                                       lm.utc_now()))  # fmt: skip
        since = lm.utc_now() - timedelta(days=7)
        engine = lm.ContainerName("engine-model-1")
        timed("an engine's accounts", lambda: tables.rows(lm.tally_sql({engine: since})))
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        say(f"{peak:8.1f} MiB  at most, in this program")


if __name__ == "__main__":
    main()
