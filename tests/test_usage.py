"""Usage: queries, reports, and what the operator reads; the figures' source is tried on Docker."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from builders import NOW, a_state
from fakes import Server
from hypothesis import given
from hypothesis import strategies as st

import llm_manager as lm

TODAY, DAY = date(2026, 11, 21), timedelta(days=1)
HASH = "f" * 64


def a_query(by: lm.Grouping = "key", **more: Any) -> lm.UsageQuery:
    return lm.UsageQuery(**{"first": TODAY - timedelta(days=6), "last": TODAY, "by": by, **more})


def a_report(*found: tuple[str, str, int, int], by: lm.Grouping = "key") -> lm.UsageReport:
    """Of subjects with a name, their prompt and completion tokens; each had two requests."""
    rows = [(s, name, 2, 1, p, p // 2, c, 12.4, len(found)) for s, name, p, c in found]
    sums = [sum(row[n] for row in rows) for n in range(2, 7)]
    total = ("", "", *sums, 12.4 if rows else None, len(found))
    return lm.parse_usage(a_query(by), [total, *rows])


# --- what is asked ---------------------------------------------------------------------------


def test_a_range_as_typed_has_usual_ends() -> None:
    parsed = lm.parse_usage_query("day", "2026-11-01", "", TODAY)
    assert (parsed.first, parsed.last) == (date(2026, 11, 1), TODAY)
    parsed = lm.parse_usage_query("key", "", "2026-10-31", TODAY)
    assert (parsed.first, parsed.last) == (date(2026, 10, 2), date(2026, 10, 31))
    parsed = lm.parse_usage_query("hour", "", "", TODAY)
    assert (parsed.first, parsed.last) == (date(2026, 11, 20), TODAY)


@pytest.mark.parametrize(
    ("by", "first", "last", "said"),
    [
        ("colour", "", "", "Nothing adds up by 'colour'"),
        ("key", "yesterday", "", "'yesterday' is no day"),
        ("key", "2026-11-31", "", "no day"),
        ("key", "2026-11-21", "2026-11-20", "2026-11-20 is before 2026-11-21"),
        ("hour", "2026-10-21", "2026-11-21", "at most 31 days"),
    ],
)
def test_a_range_that_cannot_be_is_refused(by: str, first: str, last: str, said: str) -> None:
    with pytest.raises(lm.RefusedError, match=said):
        lm.parse_usage_query(by, first, last, TODAY)


@pytest.mark.parametrize("by", ["key", "group", "model", "day", "hour"])
def test_what_the_operator_typed_is_no_part_of_a_statement(by: lm.Grouping) -> None:
    asked = lm.usage_sql(a_query(by))
    assert asked.values == {"first": "2026-11-15", "last": "2026-11-21", "limit": 1000}
    assert "2026" not in asked.text
    assert "{" not in asked.text.replace("{usage_object,prompt_tokens_details,cached_tokens}", "")


def test_no_sum_is_asked_of_the_spend_logs() -> None:
    asked = {by: lm.usage_sql(a_query(by)).text for by in lm.get_args(lm.Grouping)}
    assert [by for by, text in asked.items() if "LiteLLM_SpendLogs" in text] == []


def test_the_readers_password_is_its_own_and_the_same_each_time() -> None:
    state = a_state()
    reader = lm.reader_password(state)
    assert reader == lm.reader_password(state)
    others = {lm.cache_password(state).get_secret_value(), lm.reveal(state.secrets.salt_key)}
    assert reader.get_secret_value() not in others
    assert "*" in str(reader)


# --- what comes back -------------------------------------------------------------------------


def test_a_report_has_names_for_all_and_a_total_of_all() -> None:
    report = a_report((HASH, "Ada", 70, 30), ("e" * 64, "", 7, 3), ("master", "", 1, 0))
    assert [row.name for row in report.rows] == ["Ada", "eeeeeeee…", "master"]
    assert (report.total.name, report.total.tokens, report.total.requests) == ("total", 111, 6)
    assert report.left_out == 0


def test_what_a_limit_left_out_is_counted() -> None:
    total = ("", "", 9, 0, 90, 0, 0, None, 3)
    row = ("a", "a", 5, 0, 50, 0, 0, None, 3)
    report = lm.parse_usage(a_query(limit=1), [total, row])
    assert report.left_out == 2
    assert lm.usage_headline(report).endswith("2 more are in the total only.")


def test_use_by_nobodys_group_is_told_only_where_there_is_some() -> None:
    report = a_report(("t1", "lab", 7, 3), ("", "", 5, 0), by="group")
    assert [row.name for row in report.rows] == ["lab", "no group"]
    none = [("", "", 1, 0, 9, 0, 0, None, 2), ("t", "lab", 1, 0, 9, 0, 0, None, 2)]
    rows = [*none, ("", "", 0, 0, 0, 0, 0, None, 2)]
    assert [row.name for row in lm.parse_usage(a_query("group"), rows).rows] == ["lab"]


def test_the_operator_reads_figures_with_a_total_at_the_end() -> None:
    report = a_report((HASH, "Ada", 1_234_567, 30))
    assert lm.usage_headers(report.query)[0] == "Key"
    shown = ["2", "1", "1,234,567", "617,283", "30", "12"]
    rows = [[lm.format_figure(cell) for cell in row] for row in lm.usage_rows(report)]
    assert rows == [["Ada", *shown], ["total", *shown]]
    assert "2 requests, 1 of them failed; 1,234,567 tokens read" in lm.usage_headline(report)


def test_a_range_without_use_is_said_in_words() -> None:
    report = a_report()
    assert lm.usage_headline(report) == "Nothing was used from 2026-11-15 to 2026-11-21."
    assert lm.format_figure(lm.usage_rows(report)[0][-1]) == ""
    assert lm.usage_bars(report) == []


def test_where_nobody_asked_yet_it_is_said_how_use_comes_about() -> None:
    assert lm.NO_USAGE in lm.usage_html(a_report())
    assert "Download usage-by-key" in lm.usage_html(a_report(("k", "Ada", 1, 1)))


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("today and yesterday", "2026-02-28", "2026-03-01"),
        ("last 7 days", "2026-02-23", "2026-03-01"),
        ("last 30 days", "2026-01-31", "2026-03-01"),
        ("last 365 days", "2025-03-02", "2026-03-01"),
        ("this month", "2026-03-01", "2026-03-01"),
        ("last month", "2026-02-01", "2026-02-28"),
        (lm.OWN_DAYS, "2026-01-01", ""),
    ],
)
def test_days_are_chosen_by_a_name_or_one_by_one(name: str, first: str, last: str) -> None:
    assert name in lm.RANGES
    assert lm.days_of(name, "2026-01-01", None, date(2026, 3, 1)) == (first, last)


def test_bars_are_by_time_or_the_largest_first_and_a_day_has_its_year_where_it_must() -> None:
    by_day = a_report(("2026-11-20", "2026-11-20", 1, 1), by="day")
    assert lm.usage_plots(by_day) == (lm.usage_bars(by_day), [])
    assert {name for name, _, _ in lm.usage_bars(by_day)} == {"11-20"}
    by_key = a_report(("k", "2026-key", 1, 1))
    assert lm.usage_plots(by_key) == ([], lm.usage_bars(by_key))
    assert {name for name, _, _ in lm.usage_bars(by_key)} == {"2026-key"}
    over_new_year = replace(by_day.query, first=date(2025, 12, 31))
    assert lm.short_day("2026-11-20", over_new_year) == "2026-11-20"


def test_an_hour_is_shown_without_its_seconds() -> None:
    report = a_report(("2026-11-21 18:00:00", "2026-11-21 18:00:00", 1, 1), by="hour")
    assert lm.usage_rows(report)[0][0] == "2026-11-21 18:00"
    assert lm.usage_rows(report)[1][0] == "total"


def test_a_plot_shows_the_largest_of_many_but_every_day() -> None:
    many = [(f"{n:03}", f"{n:03}", n, n) for n in range(200)]
    assert len(lm.usage_bars(a_report(*many))) == 2 * lm.MOST_BARS
    assert len(lm.usage_bars(a_report(*many, by="day"))) == 400


def test_a_csv_has_plain_figures_and_no_total() -> None:
    report = a_report((HASH, 'Ada, "the first"', 1_234_567, 30))
    (row,) = csv.DictReader(io.StringIO(lm.usage_csv(report)))
    assert row["key"] == 'Ada, "the first"'
    assert (row["prompt_tokens"], row["completion_tokens"]) == ("1234567", "30")


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"])), min_size=1))
def test_no_cell_of_a_csv_is_a_formula_and_none_is_lost(cells: list[str]) -> None:
    text = lm.render_csv(["x"] * len(cells), [cells])
    _, read = csv.reader(io.StringIO(text))
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in read)
    assert [cell.removeprefix("'") for cell in read] == [cell.removeprefix("'") for cell in cells]


def test_what_is_downloaded_is_in_the_link_itself() -> None:
    shown = lm.usage_html(a_report((HASH, "<b>Ada</b>", 1, 1)))
    assert "<b>Ada" not in shown
    assert 'download="usage-by-key-2026-11-15-2026-11-21.csv"' in shown
    assert 'href="data:text/csv;base64,' in shown


# --- keys that need a look -------------------------------------------------------------------


def a_standing(name: str, **more: Any) -> lm.Standing:
    return lm.Standing(**{"kind": "key", "name": name, "created_at": NOW - 99 * DAY,
                          "used_at": NOW, **more})  # fmt: skip


def test_who_is_close_to_a_limit_comes_first_by_the_one_that_is_nearest() -> None:
    found = [
        a_standing("free", requests_per_minute=(999, None)),
        a_standing("far", budget=(7.9, 10.0)),
        a_standing("close", budget=(1.0, 10.0), requests_per_minute=(9, 10)),
        a_standing("over", tokens_per_minute=(150, 100)),
        a_standing("lab", kind="group", used_at=None, budget=(8.0, 10.0)),
    ]
    assert lm.standing_rows(found, NOW) == [
        ["key", "over", "150% of its tokens per minute"],
        ["key", "close", "90% of its requests per minute"],
        ["group", "lab", "80% of its budget"],
    ]


def test_a_key_is_unused_if_nobody_used_it_for_long_since_it_was_made() -> None:
    found = [
        a_standing("busy", used_at=NOW - 29 * DAY),
        a_standing("idle", used_at=NOW - 31 * DAY),
        a_standing("never", used_at=None),
        a_standing("new", used_at=None, created_at=NOW - DAY),
        a_standing("lab", kind="group", used_at=None),
    ]
    rows = lm.standing_rows(found, NOW)
    assert [name for _, name, _ in rows] == ["never", "idle"]
    assert rows[0][2].startswith("never used since it was made on ")


def test_a_tally_shows_what_no_key_accounts_for() -> None:
    since = {lm.ContainerName("llm-model-chat-0"): NOW, lm.ContainerName("llm-model-b-0"): NOW}
    asked = lm.tally_sql(since).values
    assert asked["addresses"] == ["http://llm-model-chat-0:8000/v1", "http://llm-model-b-0:8000/v1"]
    engine, *_ = since
    tally = lm.EngineTally(
        engine=engine, since=NOW, counted=1234, accounted=1200, broken_off=2, guessed=30
    )
    row = lm.tally_rows([tally])[0]
    assert row[2:] == ["1,234", "1,200", "2, at 30 tokens", "+34"]


def test_without_postgresql_that_is_what_is_said(tmp_path: Path) -> None:
    server = Server(tmp_path)
    for asked in (lambda: server.manager.usage.report(a_query()), server.manager.usage.standings):
        with pytest.raises(lm.DatabaseError, match="PostgreSQL is down"):
            asked()
    assert server.manager.usage.tallies() == [], "without an engine nothing is asked of it"


# --- statements ------------------------------------------------------------------------------


FREE = lm.Price(model="free", prompt=0, completion=0)
PRICES = lm.Prices(models=(lm.Price(model="chat", prompt=0.5, completion=2.0), FREE))
STATED = [
    ("t1", "lab <a>", "chat", 10, 2_000_000, 500_000, 1_000_000),
    ("t1", "lab <a>", "huge", 1, 7, 0, 3),
    ("", "", "free", 1, 9, 0, 1),
]


def a_statement(prices: lm.Prices = PRICES) -> lm.Statement:
    energy = {("t1", "chat"): (1.25, 400.0), ("t1", "huge"): (0.25, None)}
    return lm.parse_statement(date(2026, 10, 1), STATED, prices, energy)


def test_a_statement_is_of_the_last_month_if_none_is_named() -> None:
    assert lm.parse_month("", TODAY) == date(2026, 10, 1)
    assert lm.parse_month("", date(2026, 1, 31)) == date(2025, 12, 1)
    assert lm.parse_month("2026-02", TODAY) == date(2026, 2, 1)
    with pytest.raises(lm.RefusedError, match="no day"):
        lm.parse_month("October", TODAY)
    assert lm.statement_sql(date(2028, 2, 1)).values == {
        "first": "2028-02-01",
        "last": "2028-02-29",
    }


def test_a_statement_has_a_cost_where_there_is_a_price() -> None:
    assert [(line.group, line.cost) for line in a_statement().lines] == [
        ("lab <a>", 3.0), ("lab <a>", None), ("no group", 0.0),
    ]  # fmt: skip
    others = replace(PRICES, models=(*PRICES.models, lm.Price(model="*", prompt=1e6, completion=0)))
    assert a_statement(others).lines[1].cost == 7.0
    assert a_statement(lm.Prices()).lines[0].cost is None


def test_a_statement_sums_each_group_and_says_what_has_no_price() -> None:
    rows = lm.statement_rows(a_statement())
    assert [row[:2] for row in rows] == [
        ["lab <a>", "chat"], ["lab <a>", "huge"], ["lab <a>", "in all"],
        ["no group", "free"], ["no group", "in all"],
    ]  # fmt: skip
    assert rows[2][2:] == [
        "11", "2,000,007", "500,000", "1,000,003", "1.500", "400", "3.00 EUR and what has no price",
    ]  # fmt: skip
    assert rows[4][6:] == ["", "", "0.00 EUR"], "no energy was recorded of what it used"
    assert (rows[1][-1], rows[3][-1]) == ("", "0.00 EUR")


def test_a_statements_page_has_a_sheet_for_each_group_and_no_markup_of_theirs() -> None:
    page = lm.statement_page(a_statement())
    assert page.count("<section>") == page.count("October 2026") == 2
    assert "lab &lt;a&gt;" in page
    assert "<a>" not in page
    assert "Nothing was used." in lm.statement_page(replace(a_statement(), lines=()))


def test_a_statements_csv_adds_up_by_itself() -> None:
    rows = [*csv.DictReader(io.StringIO(lm.statement_csv(a_statement())))]
    assert sum(int(row["prompt_tokens"]) for row in rows) == 2_000_016
    assert [row["cost_eur"] for row in rows] == ["3.0", "", "0.0"]
    assert {row["month"] for row in rows} == {"2026-10"}
    assert [(row["kwh"], row["co2_grams"]) for row in rows] == [
        ("1.25", "400.0"), ("0.25", ""), ("", ""),
    ]  # fmt: skip


def test_prices_are_set_replaced_and_removed() -> None:
    raw = {"model": "chat", "prompt": 1, "completion": 2}
    state = lm.pricing(raw, "CHF").edit(lm.pricing(raw | {"prompt": 9}).edit(a_state()))
    assert state.prices == lm.Prices(
        currency="CHF", models=(lm.Price(model="chat", prompt=1, completion=2),)
    )
    assert lm.unpricing("chat").edit(state).prices == lm.Prices(currency="CHF")
    with pytest.raises(lm.RefusedError, match="'huge' has no price"):
        lm.unpricing("huge").edit(state)
    for wrong in ({"prompt": -1}, {"completion": float("nan")}, {"model": ""}):
        with pytest.raises(lm.RefusedError, match="price cannot be used"):
            lm.pricing(raw | wrong)
