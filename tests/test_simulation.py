"""The month that `demo` imagines: its figures agree with each other, and with what it describes."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import pytest

import llm_manager as lm

SERVER = lm.parse_imagined((Path(lm.__file__).parent / "recipes/demo.yaml").read_text())
NOW = datetime(2026, 11, 19, 14, 23, 10, tzinfo=UTC)  # a Thursday
TODAY = NOW.date()
FIRST = TODAY - timedelta(days=SERVER.days)
KEYS = {p: sha256(p.encode()).hexdigest() for group in SERVER.groups for p in group.people}
GPUS = [f"GPU-{n}" for n in range(8)]
MODELS = {model.name: model for model in SERVER.models if model.use}


@pytest.fixture(scope="module", autouse=True)
def in_utc() -> Iterator[None]:
    """Working hours are those of the server's zone; here days are counted in UTC."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


@pytest.fixture(scope="module")
def use() -> lm.SimulatedUse:
    return lm.imagine_use(SERVER, NOW, KEYS)


@pytest.fixture(scope="module")
def path(use: lm.SimulatedUse, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of that month."""
    path = tmp_path_factory.mktemp("home") / lm.ENERGY_FILE
    lm.imagine_energy(SERVER, use, GPUS, path)
    return path


def anew(now: datetime = NOW, server: lm.ImaginedServer = SERVER) -> lm.SimulatedUse:
    return lm.imagine_use(server, now, KEYS)


def report(
    use: lm.SimulatedUse, by: lm.Grouping, first: date = FIRST, last: date = TODAY, **more: Any
) -> lm.UsageReport:
    query = lm.UsageQuery(first=first, last=last, by=by, **more)
    return lm.parse_usage(query, use.rows(lm.usage_sql(query)))


def figures(row: lm.UsageRow) -> tuple[int, ...]:
    return (
        row.requests, row.failures, row.prompt_tokens, row.cached_tokens, row.completion_tokens,
    )  # fmt: skip


def sums(rows: Any) -> tuple[int, ...]:
    return tuple(map(sum, zip(*rows, strict=True)))


# --- use -------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["key", "group", "model", "day"])
def test_use_is_the_same_in_all_however_it_is_added_up(
    use: lm.SimulatedUse, by: lm.Grouping
) -> None:
    found, by_model = report(use, by), report(use, "model")
    assert sums(map(figures, found.rows)) == figures(found.total) == figures(by_model.total)
    assert found.total.requests > 500_000
    assert found.total.latency_ms == pytest.approx(by_model.total.latency_ms)


def test_hours_add_up_to_their_days(use: lm.SimulatedUse) -> None:
    for day in (TODAY, TODAY - timedelta(days=4), FIRST):
        hours = report(use, "hour", day, day)
        assert figures(hours.total) == figures(report(use, "day", day, day).total)
        assert sums(map(figures, hours.rows)) == figures(hours.total)
    assert report(use, "hour", TODAY, TODAY).rows[-1].subject == "2026-11-19 14:00:00"


def test_statements_add_up_to_their_months(use: lm.SimulatedUse) -> None:
    month = date(2026, 11, 1)
    lines = lm.parse_statement(month, use.rows(lm.statement_sql(month)), lm.Prices()).lines
    told = sums(
        (line.requests, line.prompt_tokens, line.cached_tokens, line.completion_tokens)
        for line in lines
    )
    requests, _, *tokens = figures(report(use, "model", month, TODAY).total)
    assert told == (requests, *tokens)
    assert {line.group for line in lines} == {group.name for group in SERVER.groups}


@pytest.mark.parametrize("by", ["key", "group"])
def test_who_had_which_engine_work_agrees_with_the_day(use: lm.SimulatedUse, by: Any) -> None:
    day = TODAY - timedelta(days=1)
    found = lm.parse_uses(use.rows(lm.uses_sql(day, by)), by)
    tokens: Counter[str] = Counter()
    for used in found:
        tokens[used.name] += used.tokens
    rows = report(use, by, day, day).rows
    assert tokens == {row.name: row.tokens for row in rows if row.tokens}
    assert {used.model for used in found} <= MODELS.keys()


def test_what_a_limit_leaves_out_is_in_the_total(use: lm.SimulatedUse) -> None:
    found = report(use, "key", limit=3)
    assert (len(found.rows), found.left_out) == (3, len(report(use, "key").rows) - 3)
    assert figures(found.total) == figures(report(use, "key").total)
    assert [row.tokens for row in found.rows] == sorted(
        (r.tokens for r in found.rows), reverse=True
    )


def test_a_range_without_use_has_a_total_of_nothing(use: lm.SimulatedUse) -> None:
    found = report(use, "key", FIRST - timedelta(days=9), FIRST - timedelta(days=1))
    assert (found.rows, figures(found.total), found.total.latency_ms) == ((), (0,) * 5, None)


def test_a_statement_that_the_program_does_not_have_is_refused(use: lm.SimulatedUse) -> None:
    with pytest.raises(lm.DatabaseError, match=r"does not know this statement\. Teach it"):
        use.rows(lm.Sql("SELECT 1", {}))


def test_every_statement_of_the_usage_section_is_answered(use: lm.SimulatedUse) -> None:
    known = {name for name, made in vars(lm).items() if isinstance(made, lm.Sql)}
    known |= {name for name in vars(lm) if name.endswith("_sql")}
    of_keys = {"KEYS_SQL", "GROUPS_SQL"}  # which `SimulatedGateway` answers for
    usage = {"usage_sql", "uses_sql", "tally_sql", "statement_sql", "STANDINGS_SQL"}
    assert known == usage | of_keys
    asked = [lm.usage_sql(lm.UsageQuery(first=FIRST, last=FIRST, by=by))
             for by in get_args(lm.Grouping)]  # fmt: skip
    asked += [lm.uses_sql(TODAY, "key"), lm.uses_sql(TODAY, "group"), lm.STANDINGS_SQL]
    asked += [lm.tally_sql({lm.engine_of("qwen3-14b"): NOW}), lm.statement_sql(FIRST)]
    assert [query.text for query in asked if not use.rows(query)] == []


def test_the_same_seed_imagines_the_same_and_another_one_does_not(use: lm.SimulatedUse) -> None:
    query = lm.UsageQuery(first=FIRST, last=TODAY, by="hour")
    again, other = anew(), anew(server=replace(SERVER, seed=SERVER.seed + 1))
    assert again.rows(lm.usage_sql(query)) == use.rows(lm.usage_sql(query))
    assert other.rows(lm.usage_sql(query)) != use.rows(lm.usage_sql(query))


def test_an_hour_is_the_same_whenever_the_month_was_imagined(use: lm.SimulatedUse) -> None:
    later = anew(NOW + timedelta(days=2, hours=5))
    day = TODAY - timedelta(days=6)
    assert report(later, "key", day, day) == report(use, "key", day, day)


def test_nobody_uses_what_their_group_may_not(use: lm.SimulatedUse) -> None:
    used: dict[str, set[str]] = {}
    for n in range(10):
        for one in lm.parse_uses(
            use.rows(lm.uses_sql(TODAY - timedelta(days=n), "group")), "group"
        ):
            used.setdefault(one.subject, set()).add(one.model)
    written = {name for name, model in MODELS.items() if model.use and model.use.prompt}
    for group in SERVER.groups:
        assert used[group.name] == set(group.models or MODELS) & written


def test_who_is_blocked_has_used_nothing_and_is_told_of(use: lm.SimulatedUse) -> None:
    blocked = {p for g in SERVER.groups for p in g.people[len(g.people) - g.blocked :]}
    assert {row.name for row in report(use, "key").rows} == KEYS.keys() - blocked
    standings = lm.parse_standings(use.rows(lm.STANDINGS_SQL))
    unused = lm.unused_keys(standings, NOW - timedelta(days=lm.UNUSED_DAYS))
    assert {standing.name for standing in unused} == blocked
    assert {s.name for s in standings if s.kind == "group"} == {g.name for g in SERVER.groups}


def test_what_people_have_used_of_a_budget_is_their_tokens(use: lm.SimulatedUse) -> None:
    rows = report(use, "key").rows
    assert use.spent() == {row.name: row.tokens / 1e6 for row in rows}
    told = {(s.kind, s.name): s.budget for s in lm.parse_standings(use.rows(lm.STANDINGS_SQL))}
    assert told["key", "Ada Lovelace"] == (use.spent()["Ada Lovelace"], None)
    groups = {row.name: row.tokens / 1e6 for row in report(use, "group").rows}
    assert told["group", "physics"] == (pytest.approx(groups["physics"]), None)


def test_a_weekend_is_quieter_and_so_is_a_night(use: lm.SimulatedUse) -> None:
    asked = {row.name: row.requests for row in report(use, "day").rows}
    days = {date.fromisoformat(day): n for day, n in asked.items()}
    whole = {day: n for day, n in days.items() if FIRST < day < TODAY}
    rest = [n for day, n in whole.items() if day.isoweekday() > lm.FRIDAY]
    # A weekend of the server's zone lies within a day of one of UTC.
    work = [n for day, n in whole.items() if day.isoweekday() in {2, 3, 4}]
    assert max(rest) < min(work) / 2
    day = [row.requests for row in report(use, "hour", *(TODAY - timedelta(days=1),) * 2).rows]
    assert min(day) < max(day) / 10


def test_use_grows_while_the_demo_runs_and_never_shrinks() -> None:
    use, before = anew(), (0,) * 5
    for minutes in (0, 1, 20, 36, 37, 90, 190):
        use.advance(NOW + timedelta(minutes=minutes))
        now = figures(report(use, "key").total)
        assert all(map(int.__ge__, now, before))
        assert now == figures(report(use, "hour", FIRST, FIRST + timedelta(days=30)).total)
        before = now
    assert now > figures(report(anew(), "key").total)
    use.advance(NOW)  # a clock that was set back
    assert figures(report(use, "key").total) == before


def test_advancing_changes_nothing_of_the_past(use: lm.SimulatedUse) -> None:
    later, yesterday = anew(), (TODAY - timedelta(days=1),) * 2
    later.advance(NOW + timedelta(hours=30))
    assert report(later, "key", *yesterday) == report(use, "key", *yesterday)
    hours = [report(one, "hour", TODAY, TODAY).rows[: NOW.hour] for one in (later, use)]
    assert hours[0] == hours[1]


@pytest.mark.parametrize("now", [NOW.replace(hour=3), datetime(2026, 11, 22, 4, 59, tzinfo=UTC)])
def test_whoever_opens_the_demo_finds_somebody_at_work(now: datetime) -> None:
    use = anew(now)
    use.advance(now + timedelta(hours=1))
    rows = report(use, "hour", now.date(), now.date()).rows
    present = next(row for row in rows if row.subject == f"{now:%Y-%m-%d %H}:00:00")
    assert present.requests > 0.4 * max(row.requests for row in report(use, "hour").rows)


# --- what is counted -------------------------------------------------------------------------


def test_engines_count_what_litellm_accounts_for_but_for_the_last_seconds(
    use: lm.SimulatedUse,
) -> None:
    starts = {lm.engine_of(name): NOW - timedelta(days=3, minutes=11) for name in MODELS}
    for engine, accounted, broken_off, guessed in use.rows(lm.tally_sql(starts)):
        load, per_second = use.load(engine, starts[engine]), 200 * 1e6 / 86_400
        assert 0 <= load.tokens - accounted <= 15 * per_second
        assert broken_off * guessed >= 0
        assert guessed <= accounted


def test_engines_count_the_tokens_of_whole_days_as_the_tables_do(use: lm.SimulatedUse) -> None:
    """The tables have whole tokens of each person: of the present hour a few are in work."""
    begin = datetime(2026, 11, 12, tzinfo=UTC)
    told = {row.name: row for row in report(use, "model", begin.date(), TODAY).rows}
    for name, row in told.items():
        used = use.load(lm.engine_of(name), begin).used
        counted = (used.prompt, used.completion, used.cached, used.requests)
        tabled = (row.prompt_tokens, row.completion_tokens, row.cached_tokens,
                  row.requests - row.failures)  # fmt: skip
        assert all(0 <= c - t <= len(KEYS) for c, t in zip(counted, tabled, strict=True))


def test_a_page_sees_rates_and_waits_of_a_busy_engine() -> None:
    use, window = anew(), lm.RateWindow()
    engine = lm.engine_of("qwen3-235b")
    for seconds in range(0, 15, 3):
        use.advance(NOW + timedelta(seconds=seconds))
        window.feed(seconds, {engine: use.load(engine, NOW - timedelta(days=1)).counts})
    rates = lm.engine_rates(window.rise([engine]))
    assert (rates.prompt_tokens or 0) > (rates.generated_tokens or 0) > 10
    assert 0 < (rates.prefix_hit_part or 0) < 0.6
    begin = anew()
    loads = [
        begin.load(engine, NOW)
        for seconds in range(0, 600, 10)
        if begin.advance(NOW + timedelta(seconds=seconds)) is None
    ]
    assert max(load.running for load in loads) > 0
    assert all(0 <= load.kv_cache_part < 1 for load in loads)


def test_an_engine_of_a_model_that_nobody_described_is_idle(use: lm.SimulatedUse) -> None:
    load = use.load(lm.engine_of("brand-new"), NOW - timedelta(days=1))
    assert (load.running, load.waiting, load.tokens, load.cached) == (0, 0, 0, 0.0)
    assert load.used == lm.EngineCounts()


def test_the_gateway_counts_by_deployments_that_its_configuration_has(use: lm.SimulatedUse) -> None:
    told = use.figures()
    names = {key.partition("@")[0] for key in told.deployments}
    assert names == MODELS.keys() | {route["name"] for route in SERVER.routes}
    engines = {key.partition("@")[2] for key in told.deployments}
    assert engines == {lm.engine_of(name) for name in MODELS}
    successes = sum(one.successes for one in told.deployments.values())
    total = report(use, "key").total
    assert successes == pytest.approx(total.requests - total.failures, abs=100)
    assert ("assistant", "qwen3-14b") in told.fallbacks


# --- energy ----------------------------------------------------------------------------------


def energy(path: Path, use: lm.SimulatedUse) -> lm.Energy:
    tables: Any = use
    return lm.Energy(lm.EnergyReader(path), lambda: tables, lm.EnergySettings)


@pytest.mark.parametrize("by", ["day", "hour", "gpu", "key", "group"])
def test_energy_is_the_same_in_all_however_it_is_added_up(
    use: lm.SimulatedUse, path: Path, by: lm.EnergyGrouping
) -> None:
    found = energy(path, use)
    first = TODAY - timedelta(days=30)
    total = found.report(lm.EnergyQuery(first=first, last=TODAY, by=by)).total
    by_model = found.report(lm.EnergyQuery(first=first, last=TODAY, by="model")).total
    assert total.energy_mj == by_model.energy_mj
    assert total.unmeasured_seconds == by_model.unmeasured_seconds == 3600 * len(GPUS)
    assert total.costs["EUR"] == pytest.approx(by_model.kwh * 1.2 * 0.24)
    assert total.co2_grams == pytest.approx(by_model.kwh * 1.2 * 380)


def test_gpus_take_what_gpus_take(use: lm.SimulatedUse, path: Path) -> None:
    hours = energy(path, use).parts(lm.EnergyQuery(first=FIRST, last=TODAY, by="gpu"))
    for uuid in GPUS:
        kwh = sum(part.energy_mj for part in hours if part.subject == uuid) / lm.KWH_MJ
        assert SERVER.idle_watts < 1000 * kwh / 24 / SERVER.days < 450
    rows = energy(path, use).report(lm.EnergyQuery(first=FIRST, last=TODAY)).rows
    assert {row.name for row in rows} == MODELS.keys() | {lm.IDLE}
    largest = max(rows, key=lambda row: row.energy_mj)
    assert (largest.name, largest.estimated_mj) == ("qwen3-235b", 0)
    assert 1 < (largest.joules_per_output_token or 0) < 200


def test_shared_gpus_are_divided_by_the_method_that_fits_them(path: Path) -> None:
    text = b"".join(lm.EnergyReader(path).samples(TODAY, TODAY, lm.PLAIN)).decode()
    methods = {
        gpu: set(re.findall(rf"{gpu},(?!\(idle\)).*,([\w ]+)$", text, re.MULTILINE)) for gpu in GPUS
    }
    assert methods["GPU-0"] == {"whole GPU"}
    assert "process utilisation" in methods["GPU-5"]
    assert "MIG activity" in methods["GPU-6"]
    assert "MIG activity" not in methods["GPU-5"]


def test_sessions_have_the_tokens_of_their_engines(use: lm.SimulatedUse, path: Path) -> None:
    sessions = energy(path, use).sessions(FIRST, TODAY)
    assert {session.model for session in sessions} == MODELS.keys()
    assert len(sessions) == 2 * len(MODELS)
    for name in ("qwen3-235b", "gpt-oss-20b"):
        ours = [session for session in sessions if session.model == name]
        assert sum(session.completion_tokens for session in ours) == (
            use.load(
                lm.engine_of(name), datetime.fromtimestamp(use.work.start, UTC)
            ).used.completion
        )
        assert all(session.energy_mj for session in ours)
    whole = next(s for s in sessions if s.model == "qwen3-235b")
    assert (whole.gpu_uuids, whole.method) == (tuple(GPUS[:4]), "measured")


def test_tokens_are_counted_in_the_hour_that_had_them(use: lm.SimulatedUse, path: Path) -> None:
    day = TODAY - timedelta(days=5)
    counted = Counter()
    for used in lm.EnergyReader(path).uses(day, day, "hour"):
        counted[used.subject] += used.completion_tokens
    tabled = {row.subject[:-3]: row.completion_tokens for row in report(use, "hour", day, day).rows}
    assert counted == {hour: tokens for hour, tokens in tabled.items() if tokens}


def test_the_month_is_written_once(use: lm.SimulatedUse, path: Path) -> None:
    before = energy(path, use).parts(lm.EnergyQuery(first=FIRST, last=TODAY))
    lm.imagine_energy(SERVER, use, GPUS, path)
    assert energy(path, use).parts(lm.EnergyQuery(first=FIRST, last=TODAY)) == before


def test_what_the_product_rolls_up_changes_no_sum_of_the_month(
    use: lm.SimulatedUse, path: Path
) -> None:
    before = energy(path, use).parts(lm.EnergyQuery(first=FIRST, last=TODAY))
    records = lm.EnergyRecords(path, NOW.timestamp)
    records.close()
    assert records.trouble is None
    assert energy(path, use).parts(lm.EnergyQuery(first=FIRST, last=TODAY)) == before


# --- a GPU that is looked at -----------------------------------------------------------------


def test_a_gpu_takes_more_with_a_busy_model_than_without() -> None:
    use = anew()
    power = lm.SimulatedPower(SERVER, use.work)
    rests, works = power.watts(0, ()), power.watts(0, MODELS)
    assert rests == pytest.approx(SERVER.idle_watts, rel=0.05)
    assert rests + 50 < works < 500
    assert power.watts(0, MODELS) == works


def test_the_counter_of_a_gpu_is_the_sum_of_its_watts() -> None:
    use = anew()
    power = lm.SimulatedPower(SERVER, use.work)
    before, watts = power.look(4, MODELS), [power.watts(4, MODELS)]
    for seconds in range(1, 61):
        use.advance(NOW + timedelta(seconds=seconds))
        after = power.look(4, MODELS)
        watts.append(power.watts(4, MODELS))
    interval = lm.measure(before, after, 60)
    assert (interval.seconds, interval.method) == (60, "counter")
    mean = (interval.energy_mj or 0) / 1000 / 60
    assert min(watts) < mean < max(watts)


# --- benchmarks ------------------------------------------------------------------------------


def test_imagined_benchmarks_say_so_and_climb_as_benchmarks_do(tmp_path: Path) -> None:
    lm.imagine_benchmarks(SERVER, tmp_path, NOW)
    kept = lm.BenchmarkFiles(tmp_path / "benchmarks").read()
    assert {result.model for result in kept} == {"qwen3-14b", "gpt-oss-20b"}
    for result in kept:
        assert result.complete
        assert "imagined" in result.image
        assert result.rungs[-1].started_at < NOW
        made = [rung.output_tokens_per_second for rung in result.rungs]
        waits = [rung.first_answer.p95 for rung in result.rungs]
        assert (made, waits) == (sorted(made), sorted(waits))
    lm.imagine_benchmarks(SERVER, tmp_path, NOW + timedelta(hours=3))
    assert lm.BenchmarkFiles(tmp_path / "benchmarks").read() == kept


# --- the installation that demo shows ------------------------------------------------


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> lm.ImaginedInstallation:
    """Its time passes only when somebody waits."""
    installation = lm.ImaginedInstallation(SERVER, tmp_path_factory.mktemp("imagined"))
    installation.host.clock = lm.SimulatedClock()
    installation.go_on(lm.utc_now())
    return installation


def test_one_model_failed_and_all_others_serve(shown: lm.ImaginedInstallation) -> None:
    snapshot = shown.manager.snapshot()
    assert snapshot.faults == ()
    assert [matter.subject for matter in lm.attention(snapshot) if matter.verb == "log"] == [
        "llama-8b"
    ]
    answers = {model.name for model in SERVER.models if model.wish == "running"} - {"llama-8b"}
    assert answers <= shown.host.routed()
    assert all(shown.host.loads[lm.engine_of(name)].tokens >= 0 for name in answers)


def test_ways_in_are_answered_by_what_runs(shown: lm.ImaginedInstallation) -> None:
    tried = {
        name: shown.manager.traffic.try_out(name).reply.status
        for name in ("qwen3-14b", "assistant", "llama-8b", "qwen-image", "nobody")
    }
    assert tried == {
        "qwen3-14b": 200, "assistant": 200, "llama-8b": 404, "qwen-image": 404, "nobody": 404,
    }  # fmt: skip


def test_the_prober_finds_the_one_model_that_is_down(shown: lm.ImaginedInstallation) -> None:
    assert shown.manager.proofs.probe().wait(60)
    result = shown.manager.proofs.last_probe()
    assert result is not None
    assert len(result.requests) > 300
    assert [(wrong.path, wrong.answered) for wrong in result.wrong] == [
        ("/v1/chat/completions", 404)
    ]


def test_what_only_a_real_server_can_prove_is_refused_in_words(
    shown: lm.ImaginedInstallation,
) -> None:
    with pytest.raises(lm.ContainerFailedError, match="only imagined"):
        list(shown.manager.proofs.privacy().follow())
    job = shown.manager.weights.download(lm.HubSource(repository="a/b"))
    with pytest.raises(lm.HubError):
        list(job.follow())


def test_a_benchmark_measures_what_was_asked(shown: lm.ImaginedInstallation) -> None:
    name = lm.ModelName("qwen3-embedding")
    wish = lm.BenchmarkWish(models=(name,), ladder=(1, 8))
    list(shown.manager.benchmarks.start(wish).follow())
    result = shown.manager.benchmarks.results()[0]
    assert (result.model, [rung.concurrency for rung in result.rungs]) == (name, [1, 8])
    assert all(rung.output_tokens == 0 for rung in result.rungs)
    slow, busy = result.rungs
    assert busy.requests > slow.requests
    assert busy.end_to_end.p50 > slow.end_to_end.p50


def test_an_engine_that_nobody_routes_to_has_nothing_to_do(shown: lm.ImaginedInstallation) -> None:
    now = lm.utc_now()
    moments = [now + timedelta(seconds=4 * n) for n in range(20)]

    def at_work() -> bool:
        for moment in moments:
            shown.go_on(moment)
            if shown.host.loads[lm.engine_of("qwen3-235b")].running:
                return True
        return False

    (gateway,) = (c for c in shown.host.containers.values() if c.spec.role == "gateway")
    routed = gateway.loaded
    assert at_work()
    gateway.loaded = "model_list: []"
    moments = [moment + timedelta(minutes=5) for moment in moments]
    assert not at_work()
    gateway.loaded = routed
