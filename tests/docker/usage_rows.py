"""LiteLLM's tables filled as by a year's work, in its own schema; for a test and a benchmark."""

from __future__ import annotations

import contextlib
import io
import tarfile
import time
from collections.abc import Iterator
from datetime import date
from string import Template

import docker
import psycopg
from installation import Installation

POSTGRES, LITELLM = "llm-manager-test/postgres:latest", "llm-manager-test/litellm:latest"
PASSWORD = "of-a-test"  # noqa: S105

LAST = date(2026, 11, 20)
# Any key has used two of the models, some requests failed, some prompts were cached; times and
# amounts repeat in no simple pattern. Metadata is of the size that LiteLLM's own has.
FILL = """
INSERT INTO "LiteLLM_TeamTable" (team_id, team_alias, models)
SELECT 'team-' || n, 'group ' || n, '{}' FROM generate_series(0, 19) AS n;
INSERT INTO "LiteLLM_VerificationToken" (token, key_alias, team_id, models, max_budget, spend)
SELECT encode(sha256(n::text::bytea), 'hex'), 'key ' || n,
       CASE WHEN n % 10 > 0 THEN 'team-' || n % 20 END, '{}',
       CASE WHEN n % 4 = 0 THEN 100 END, n % 120
  FROM generate_series(1, $keys) AS n;
INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, api_key, team_id, model, model_group,
       custom_llm_provider, prompt_tokens, completion_tokens, total_tokens, "startTime", "endTime",
       request_duration_ms, status, spend, api_base, metadata)
SELECT 'request-' || n, 'acompletion', token, team_id, model, model, 'hosted_vllm',
       prompt, completion, prompt + completion, moment, moment + interval '1 second',
       n % 5000, CASE WHEN n % 50 = 0 THEN 'failure' ELSE 'success' END, prompt * 1e-6,
       'http://engine-' || model || ':8000/v1',
       jsonb_build_object('status', CASE WHEN n % 50 = 0 THEN 'failure' ELSE 'success' END,
         'usage_object', jsonb_build_object('prompt_tokens_details',
           jsonb_build_object('cached_tokens', prompt / 4)), 'more', repeat('metadata ', 90))
  FROM (SELECT n, token, team_id, 'model-' || (k + (n / 7) % 2) % 4 AS model,
               10 + n * 7919 % 3000 AS prompt,
               CASE WHEN n % 50 = 0 THEN 0 ELSE 1 + n * 104729 % 800 END AS completion,
               '$last'::date + interval '1 day'
                 - (n::float / $rows * $days) * interval '1 day' - interval '1 ms' AS moment
          FROM generate_series(1::bigint, $rows) AS n
          CROSS JOIN LATERAL (SELECT 1 + n * 31 % $keys AS k) AS chosen
          JOIN (SELECT token, team_id, substring(key_alias FROM '^key ([0-9]+)$$')::int AS number
                  FROM "LiteLLM_VerificationToken") AS tokens ON number = k) AS asked;
"""
ROLL_UP = """
INSERT INTO "LiteLLM_Daily{of}Spend" (id, {id}, date, api_key, model, model_group,
       custom_llm_provider, endpoint, mcp_namespaced_tool_name, updated_at, prompt_tokens,
       completion_tokens, cache_read_input_tokens, api_requests, successful_requests,
       failed_requests, spend, total_response_time_ms, timed_requests)
SELECT gen_random_uuid(), {value}, to_char("startTime", 'YYYY-MM-DD'), api_key, model, model,
       'hosted_vllm', '/chat/completions', '', now(), sum(prompt_tokens), sum(completion_tokens),
       coalesce(sum((metadata #>> '{{usage_object,prompt_tokens_details,cached_tokens}}')::int), 0),
       count(*),
       count(*) FILTER (WHERE status = 'success'), count(*) FILTER (WHERE status = 'failure'),
       sum(spend), coalesce(sum(request_duration_ms) FILTER (WHERE status = 'success'), 0),
       count(*) FILTER (WHERE status = 'success')
  FROM "LiteLLM_SpendLogs" WHERE {value} IS NOT NULL AND request_id LIKE 'request-%'
 GROUP BY 2, to_char("startTime", 'YYYY-MM-DD'), api_key, model;
"""


def fill(
    connection: psycopg.Connection, *, keys: int, rows: int, days: int, last: date = LAST
) -> None:
    """Keys of twenty groups and of none, and their requests until the end of that day."""
    filled = Template(FILL).substitute(keys=keys, rows=rows, days=days, last=last)
    rolled_up = [
        ROLL_UP.format(of="User", id="user_id", value="'default'"),
        ROLL_UP.format(of="Team", id="team_id", value="team_id"),
    ]
    for statement in (filled, *rolled_up):
        connection.execute(statement.encode())
    connection.commit()
    connection.autocommit = True
    connection.execute("VACUUM ANALYZE")


def empty(connection: psycopg.Connection) -> None:
    """Take back all that was filled in, and what was added up of it."""
    connection.execute(
        'TRUNCATE "LiteLLM_TeamTable", "LiteLLM_VerificationToken", "LiteLLM_SpendLogs", '
        '"LiteLLM_DailyUserSpend", "LiteLLM_DailyTeamSpend", llm_manager.hours, '
        "llm_manager.uses CASCADE"
    )


def database_of(here: Installation) -> psycopg.Connection:
    """An installation's, as the owner of everything."""
    networks = here.container("llm-postgres").attrs["NetworkSettings"]["Networks"]
    (network,) = networks.values()
    password = here.state().secrets.database_password.get_secret_value()
    return own_connection(str(network["IPAddress"]), password=password)


@contextlib.contextmanager
def litellm_database(client: docker.DockerClient, *settings: str) -> Iterator[str]:
    """The address of a PostgreSQL with LiteLLM's schema, out of LiteLLM's own image."""
    database = client.containers.create(
        POSTGRES,
        [part for setting in settings for part in ("-c", setting)],
        environment={"POSTGRES_USER": "litellm", "POSTGRES_PASSWORD": PASSWORD},
        shm_size="256m",
    )
    try:
        database.start()
        database.reload()
        address = str(database.attrs["NetworkSettings"]["IPAddress"])
        with own_connection(address) as connection:
            connection.autocommit = True
            for migration in migrations(client):
                # Several statements in one message are one transaction, which no such index can be.
                connection.execute(migration.replace(b"CONCURRENTLY", b""))
        yield address
    finally:
        database.remove(force=True, v=True)


def own_connection(
    address: str, seconds: float = 120, password: str = PASSWORD
) -> psycopg.Connection:
    """As the owner of everything, once PostgreSQL has started."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return psycopg.connect(
                host=address, user="litellm", dbname="litellm", password=password
            )
        except psycopg.OperationalError:
            assert time.monotonic() < deadline, f"PostgreSQL does not start within {seconds} s"
            time.sleep(0.2)


def migrations(client: docker.DockerClient) -> list[bytes]:
    """LiteLLM's, in their order."""
    image = client.containers.create(LITELLM)
    try:
        chunks, _ = image.get_archive("/app/migrations")
        content = io.BytesIO(b"".join(chunks))
    finally:
        image.remove(v=True)
    with tarfile.open(fileobj=content) as archive:
        names = sorted(n for n in archive.getnames() if n.endswith("migration.sql"))
        return [member.read() for n in names if (member := archive.extractfile(n))]
