"""Whose energy it was: by key and group, on statements, in files, for programs and operators."""

from __future__ import annotations

import csv
import io
import json
import threading
import time
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from builders import a_model
from fakes import Server
from test_api import Program, problem
from test_cli import Run, run
from test_energy_records import DAY, GPU, NOON, RATES, a_share, begin

import llm_manager as lm

__all__ = ["run"]  # a fixture
NEXT = DAY + timedelta(days=1)
ADA, BOB = "ad" * 32, "b0" * 32


class FakeUses:
    """Ada and Bob used chat at noon, Ada of the group ML; nobody used it at one."""

    def rows(self, sql: lm.Sql) -> list[tuple[Any, ...]]:
        if "GROUP BY team" in sql.text:
            return [("ml", "ML", "chat-served", 2, 20, 0, 10), ("", "", "chat-served", 1, 10, 0, 0)]
        if sql.values["day"] != str(DAY):
            return []
        ada, bob = (("ml", "ML"), ("", "")) if "team_id AS subject" in sql.text else (
            (ADA, "=ada"), (BOB, "Bob"),
        )  # fmt: skip
        noon, engine = int(NOON), "http://a1b2c3-llm-model-chat-0:8000/v1"
        return [
            (noon, engine, *ada, 2, 20, 10),
            (noon, engine, *bob, 1, 10, 0),
            (noon, "https://api.example.org/v1", *bob, 1, 999, 0),
        ]


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Two hours of chat, the first with 400 J, an idle GPU, and a day later 7 J of another."""
    (tmp_path / "home").mkdir()
    path = tmp_path / "home" / lm.ENERGY_FILE
    records = begin(path)
    records.open_session("chat", 0, "c1", [GPU], NOON)
    records.add([a_share(NOON, 400_001), a_share(NOON, 50_000, "", "GPU-b")], RATES)
    records.count_tokens("c1", 30, 10, 0, 3)
    records.add([a_share(NOON + 3600, 90_000), a_share(NOON + 3600, None, "", "GPU-b")], RATES)
    records.close_session("c1", NOON + 3601)
    records.add([a_share(NOON + 86_400, 7_000, "vision", method="equal split")], RATES)
    records.close()
    return path


@pytest.fixture
def energy(recorded: Path) -> lm.Energy:
    return energy_in(recorded)


def energy_in(path: Path, period: float = 1.0) -> lm.Energy:
    settings = lm.EnergySettings(period_seconds=period)
    return lm.Energy(lm.EnergyReader(path), FakeUses, lambda: settings)  # type: ignore[arg-type]


def report(energy: lm.Energy, by: lm.EnergyGrouping) -> lm.EnergyReport:
    return energy.report(lm.EnergyQuery(first=DAY, last=NEXT, by=by))


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that this test slept; they take no time, and other threads sleep on."""
    taken: list[float] = []
    really_sleep, tester = time.sleep, threading.get_ident()

    def sleep(seconds: float) -> None:
        (taken.append if threading.get_ident() == tester else really_sleep)(seconds)

    monkeypatch.setattr(lm.time, "sleep", sleep)
    return taken


def noon_of_chat(energy: lm.Energy) -> int | None:
    start = datetime.fromtimestamp(NOON, UTC)
    return energy.between(lm.ModelName("chat"), 0, start, start + timedelta(seconds=1))


def test_what_a_replica_took_is_waited_for_until_a_look_that_covers_it_can_be_written(
    recorded: Path, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert noon_of_chat(energy_in(recorded, period=10)) == 400_001
    assert not naps
    written = recorded.rename(recorded.with_name("written"))
    begin(recorded).close()

    nap = lm.time.sleep

    def sleep(seconds: float) -> None:
        nap(seconds)
        if sum(naps) >= 10 + lm.COMMIT_SECONDS and written.exists():
            written.replace(recorded)

    monkeypatch.setattr(lm.time, "sleep", sleep)
    assert noon_of_chat(energy_in(recorded, period=10)) == 400_001


def test_where_nothing_is_recorded_nobody_waits_and_damage_loses_no_measurement(
    recorded: Path, naps: list[float]
) -> None:
    recorded.write_bytes(b"not a database" * 1000)
    assert noon_of_chat(energy_in(recorded)) is None
    recorded.unlink()
    assert noon_of_chat(energy_in(recorded)) is None
    assert not naps


def test_every_grouping_adds_up_to_what_was_measured(energy: lm.Energy) -> None:
    for by in lm.get_args(lm.EnergyGrouping):
        found = report(energy, by)
        assert found.total.energy_mj == 547_001
        assert found.total.idle_mj == 50_000
        assert found.total.unmeasured_seconds == 1
        assert sum(row.energy_mj for row in found.rows) == 547_001
        assert found.total.co2_grams == pytest.approx(547_001 / 3.6e9 * 1.2 * 400)


def test_keys_and_groups_pay_by_their_tokens_of_the_hour(energy: lm.Energy) -> None:
    keys = {row.name: row.energy_mj for row in report(energy, "key").rows}
    assert keys == {
        "=ada": 300_001,
        "Bob": 100_000,
        "(no tokens) chat": 90_000,
        "(idle)": 50_000,
        "(no tokens) vision": 7_000,
    }
    groups = {row.name: row for row in report(energy, "group").rows}
    assert groups["ML"].energy_mj == 300_001
    assert (groups["no group"].energy_mj, groups["no group"].prompt_tokens) == (100_000, 10)
    assert groups["ML"].joules_per_output_token == pytest.approx(30.0001)


def test_models_have_their_engines_tokens(energy: lm.Energy) -> None:
    chat = next(row for row in report(energy, "model").rows if row.name == "chat")
    assert (chat.requests, chat.prompt_tokens, chat.completion_tokens) == (3, 30, 10)
    assert chat.joules_per_token == pytest.approx(490.001 / 40)


def test_what_the_operator_reads_is_a_row_for_each_and_the_total(energy: lm.Energy) -> None:
    found = report(energy, "model")
    rows = lm.energy_rows(found)
    assert [row[0] for row in rows] == ["chat", "(idle)", "vision", "total"]
    assert {len(row) for row in rows} == {len(lm.energy_headers(found.query))}
    (total,) = lm.keyed(lm.energy_headers(found.query), rows[-1:])
    assert [total[of] for of in ("kwh", "idle_kwh", "unmeasured_(h)")] == [
        "0.0002", "0.0000", "0.00",
    ]  # fmt: skip
    assert "0.0002 kWh" in lm.energy_headline(found)
    (row,) = lm.session_rows(energy.sessions(DAY, DAY))
    assert row[:2] == ["chat 0", "2026-11-20 12:00 UTC, 2026-11-20 13:00 UTC"]
    assert len(row) == len(lm.SESSION_HEADERS)
    nothing = lm.EnergyQuery(first=date(2020, 1, 1), last=date(2020, 1, 1))
    assert "No energy was recorded" in lm.energy_headline(energy.report(nothing))


def test_bars_of_a_day_are_stacked_by_model(energy: lm.Energy) -> None:
    query = lm.EnergyQuery(first=DAY, last=NEXT, by="day")
    stack = lm.energy_stack([*energy.parts(query)], query)
    assert [(day, model, round(kwh * lm.KWH_MJ)) for day, model, kwh in stack] == [
        ("11-20", "(idle)", 50_000),
        ("11-20", "chat", 490_001),
        ("11-21", "vision", 7_000),
    ]


def test_an_amount_has_fewer_digits_after_the_point_the_more_are_before_it() -> None:
    shown = [lm.format_amount(amount) for amount in (0, 0.00012, 4.128, 26.7434, 1461.8553)]
    assert shown == ["0", "0.0001", "4.13", "26.74", "1,461.9"]


def test_of_many_models_those_that_took_least_are_one_part_of_the_bar() -> None:
    query = lm.EnergyQuery(first=DAY, last=DAY, by="day")
    parts = [
        lm.EnergyPart(start=0, subject=str(DAY), model=model, energy_mj=taken, estimated_mj=0,
                      unmeasured_ms=0, rates=lm.EnergyRates())
        for model, taken in [(lm.NOBODY, 1), *((f"m{n}", 10 * n) for n in range(1, 8))]
    ]  # fmt: skip
    stack = {model: round(kwh * lm.KWH_MJ) for _, model, kwh in lm.energy_stack(parts, query)}
    assert stack == {
        "(idle)": 1, "(others)": 30, "m3": 30, "m4": 40, "m5": 50, "m6": 60, "m7": 70,
    }  # fmt: skip
    assert lm.OTHERS not in {model for _, model, _ in lm.energy_stack(parts[:-1], query)}


@pytest.mark.parametrize("what", lm.get_args(lm.EnergyTable))
@pytest.mark.parametrize("style", [lm.PLAIN, lm.CsvStyle(separator=";", decimal=",")])
def test_each_export_is_read_by_pandas_and_adds_up(
    energy: lm.Energy, what: lm.EnergyTable, style: lm.CsvStyle
) -> None:
    text = b"".join(energy.export(what, DAY, NEXT, style))
    table = pd.read_csv(io.BytesIO(text), sep=style.separator, decimal=style.decimal)
    whole = 490.001 if what == "sessions" else 547.001
    assert table["energy_joules"].sum() == pytest.approx(whole, abs=1e-9)
    assert not any(column.startswith("Unnamed") for column in table.columns)


def test_a_name_that_a_spreadsheet_would_run_is_text(energy: lm.Energy) -> None:
    text = b"".join(energy.export("keys", DAY, NEXT, lm.PLAIN)).decode()
    first = next(csv.DictReader(io.StringIO(text)))
    assert first["key"] == "(idle)"
    ada = next(row for row in csv.DictReader(io.StringIO(text)) if row["key"] == ADA)
    assert (ada["key_name"], ada["day_utc"], ada["model"]) == ("'=ada", "2026-11-20", "chat")
    assert (ada["energy_joules"], ada["currency"]) == ("300.001", "EUR")


def test_a_cost_in_two_currencies_is_no_figure() -> None:
    part = lm.EnergyPart(
        start=0, subject="chat", model="chat", energy_mj=lm.KWH_MJ, estimated_mj=0,
        unmeasured_ms=0, rates=lm.EnergyRates(price_per_kwh=1),
    )  # fmt: skip
    other = replace(part, rates=lm.EnergyRates(price_per_kwh=2, currency="USD"))
    (row,) = lm.energy_csv_rows(DAY, "model", [part, other])
    cells = dict(zip(lm.energy_columns("model"), row, strict=True))
    assert (cells["cost_with_overhead"], cells["currency"]) == ("1.00 EUR + 2.00 USD", "several")


@pytest.mark.parametrize(
    ("by", "first", "last", "said"),
    [
        ("colour", "", "", "Nothing adds up by 'colour'"),
        ("day", "2026-11-21", "2026-11-20", "2026-11-20 is before 2026-11-21"),
        ("hour", "2026-10-01", "2026-11-21", "at most 31 days"),
        ("key", "2025-10-01", "2026-11-21", "at most 366 days"),
    ],
)
def test_a_range_that_cannot_be_told_is_refused(by: str, first: str, last: str, said: str) -> None:
    with pytest.raises(lm.RefusedError, match=said):
        lm.parse_energy_query(by, first, last, NEXT)


# --- with a server -------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path, recorded: Path) -> Program:
    found = Program(Server(tmp_path / "home"))
    found.manager.energy._tables = FakeUses  # type: ignore[assignment]
    found.manager.usage._tables = FakeUses  # type: ignore[method-assign,assignment]
    return found


def test_a_statement_has_the_energy_of_each_group_and_model(program: Program) -> None:
    store = program.manager._store
    model = a_model("chat", served_model_name="chat-served", wish="stopped")
    store.save(lm.registering(model).edit(store.load()))
    ml, nobody = program.manager.usage.statement(date(2026, 11, 1)).lines
    assert ml.kwh == pytest.approx(300_001 / 3.6e9)
    assert ml.co2_grams == pytest.approx(300_001 / 3.6e9 * 1.2 * 400)
    assert nobody.kwh == pytest.approx(100_000 / 3.6e9)
    assert program.manager.usage.statement(date(2026, 10, 1)).lines[0].kwh is None


def test_a_damaged_file_stops_no_statement(program: Program, recorded: Path) -> None:
    recorded.write_bytes(b"no database" * 1000)
    assert program.manager.usage.statement(date(2026, 11, 1)).lines[0].kwh is None
    assert "damaged" in problem(program.get("energy"), 503)


def test_programs_read_sums_sessions_and_files(program: Program) -> None:
    days = f"from={DAY}&to={NEXT}"
    told = program.get(f"energy?by=key&{days}").json()
    assert told["total"]["energy_mj"] == 547_001
    assert told["rows"][0]["name"] == "=ada"
    (session,) = program.get(f"energy/sessions?{days}").json()
    assert (session["model"], session["completion_tokens"]) == ("chat", 10)
    answer = program.get(f"energy/export/models?{days}&separator=%3B&decimal=,")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.text.splitlines()[1].startswith("2026-11-20;(idle);0,000013888889;50,0;")
    for path in (
        "energy?by=colour", "energy/export/all", "energy/export/keys?decimal=,",
        f"energy?from={NEXT}&to={DAY}",
    ):  # fmt: skip
        problem(program.get(path), 422)


def shown(run: Run, *arguments: str) -> Any:
    ended = run("energy", "show", "--from", str(DAY), "--to", str(NEXT), "--json", *arguments)
    assert (ended.status, ended.err) == (lm.DONE, "")
    return json.loads(ended.out)


def test_the_command_line_shows_and_exports(run: Run, recorded: Path, tmp_path: Path) -> None:
    assert [row["name"] for row in shown(run)] == ["chat", "(idle)", "vision", "total"]
    assert shown(run, "--by", "gpu")[0]["kwh"] == pytest.approx(497_001 / 3.6e9)
    (session,) = shown(run, "--by", "session")
    assert session["joules_per_output_token"] == pytest.approx(49.0001)
    assert "kWh, of these" in run("energy", "show", "--from", str(DAY), "--by", "day").out
    by_key = run("energy", "show", "--from", str(DAY), "--by", "key")
    assert "Docker does not answer" in by_key.refusal()
    target = tmp_path / "energy.csv"
    export = ("energy", "export", "samples", "--from", str(DAY), "--to", str(NEXT))
    german = ("--separator", ";", "--decimal", ",")
    assert run(*export, *german, "-o", str(target)).status == lm.DONE
    first = target.read_text().splitlines()[1]
    assert first.startswith("2026-11-20 12:00:00,000;1;GPU-a;chat;0;400,001")
    assert "are the same" in run(*export, "--decimal", ",").refusal()
    assert "could not write" in run(*export, "-o", str(tmp_path / "none" / "x")).refusal()
