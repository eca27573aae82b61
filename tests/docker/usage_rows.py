"""LiteLLM's tables filled as by a year's work, in its own schema; for a test and a benchmark."""

from __future__ import annotations

from datetime import date
from string import Template

import psycopg

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
          JOIN (SELECT token, team_id, substring(key_alias FROM 5)::int AS number
                  FROM "LiteLLM_VerificationToken") AS tokens ON number = k) AS asked;
"""
ROLL_UP = """
INSERT INTO "LiteLLM_Daily{of}Spend" (id, {id}, date, api_key, model, model_group,
       custom_llm_provider, endpoint, mcp_namespaced_tool_name, updated_at, prompt_tokens,
       completion_tokens, cache_read_input_tokens, api_requests, successful_requests,
       failed_requests, spend, total_response_time_ms, timed_requests)
SELECT gen_random_uuid(), {value}, to_char("startTime", 'YYYY-MM-DD'), api_key, model, model,
       'hosted_vllm', '/chat/completions', '', now(), sum(prompt_tokens), sum(completion_tokens),
       sum((metadata #>> '{{usage_object,prompt_tokens_details,cached_tokens}}')::int), count(*),
       count(*) FILTER (WHERE status = 'success'), count(*) FILTER (WHERE status = 'failure'),
       sum(spend), coalesce(sum(request_duration_ms) FILTER (WHERE status = 'success'), 0),
       count(*) FILTER (WHERE status = 'success')
  FROM "LiteLLM_SpendLogs" WHERE {value} IS NOT NULL
 GROUP BY 2, to_char("startTime", 'YYYY-MM-DD'), api_key, model;
"""


def fill(connection: psycopg.Connection, *, keys: int, rows: int, days: int) -> None:
    """Keys of twenty groups and of none, and their requests until the end of `LAST`."""
    filled = Template(FILL).substitute(keys=keys, rows=rows, days=days, last=LAST)
    rolled_up = [
        ROLL_UP.format(of="User", id="user_id", value="'default'"),
        ROLL_UP.format(of="Team", id="team_id", value="team_id"),
    ]
    for statement in (filled, *rolled_up):
        connection.execute(statement.encode())
    connection.commit()
    connection.autocommit = True
    connection.execute("VACUUM ANALYZE")
