"""Energy as it is kept in SQLite: nothing lost, nothing twice, whatever disk and clock do."""

from __future__ import annotations

import csv
import io
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llm_manager as lm

DAY = date(2026, 11, 20)
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC).timestamp()
RATES = lm.EnergyRates(price_per_kwh=0.5, co2_grams_per_kwh=400, overhead=1.2)
GPU, OTHER = "GPU-a", "GPU-b"


def a_share(
    at: float = NOON,
    energy_mj: int | None = 300_000,
    model: str = "chat",
    gpu: str = GPU,
    **more: Any,
) -> lm.EnergyShare:
    values = {"seconds": 1.0, "replica": 0, "method": "whole GPU" if model else "idle"} | more
    return lm.EnergyShare(gpu_uuid=gpu, start=at, model=model, energy_mj=energy_mj, **values)


def begin(path: Path) -> lm.EnergyRecords:
    """Records at noon of a day."""
    return lm.EnergyRecords(path, lambda: NOON)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / lm.ENERGY_FILE


@pytest.fixture
def records(path: Path) -> Iterator[lm.EnergyRecords]:
    kept = begin(path)
    yield kept
    kept.close()


def everything(
    path: Path, by: lm.EnergyGrouping = "model", first: date = date(2020, 1, 1)
) -> dict[str, lm.EnergySum]:
    reader, last = lm.EnergyReader(path), date(2030, 1, 1)
    return lm.add_up([*reader.parts(first, last, by), *reader.uses(first, last, by)])


def samples(
    path: Path, style: lm.CsvStyle = lm.PLAIN, first: date = date(2020, 1, 1), days: int = 3650
) -> list[dict[str, str]]:
    last = first + timedelta(days=days)
    text = b"".join(lm.EnergyReader(path).samples(first, last, style))
    return [*csv.DictReader(io.StringIO(text.decode()), delimiter=style.separator)]


def energy_of(rows: list[dict[str, str]]) -> int:
    return sum(round(1000 * float(row["energy_joules"])) for row in rows)


# --- sums ------------------------------------------------------------------------------------


def test_a_file_that_is_not_there_has_nothing(path: Path) -> None:
    assert everything(path) == {}
    assert [*lm.EnergyReader(path).sessions(DAY, DAY)] == []
    assert samples(path) == []
    assert not path.exists()


def test_what_was_added_is_told_by_model_gpu_day_and_hour(
    records: lm.EnergyRecords, path: Path
) -> None:
    for second in range(10):
        records.add([a_share(NOON + second), a_share(NOON + second, 50_000, "", OTHER)], RATES)
    records.add([a_share(NOON + 86_400, 7, method="equal split")], RATES)
    records.add([a_share(NOON + 10, None, "", OTHER, seconds=90.0)], RATES)
    records.flush()
    models = everything(path)
    assert {who: row.energy_mj for who, row in models.items()} == {
        "chat": 3_000_007,
        lm.IDLE: 500_000,
    }
    chat, idle = models["chat"], models[lm.IDLE]
    assert (chat.idle_mj, chat.estimated_mj, idle.idle_mj) == (0, 7, 500_000)
    assert (chat.unmeasured_seconds, idle.unmeasured_seconds) == (0, 90)
    assert chat.costs == {"EUR": pytest.approx(3_000_007 / 3.6e9 * 1.2 * 0.5)}
    assert chat.co2_grams == pytest.approx(3_000_007 / 3.6e9 * 1.2 * 400)
    assert {who: row.energy_mj for who, row in everything(path, "gpu").items()} == {
        GPU: 3_000_007,
        OTHER: 500_000,
    }
    days = everything(path, "day")
    assert {who: row.energy_mj for who, row in days.items()} == {
        "2026-11-20": 3_500_000,
        "2026-11-21": 7,
    }
    assert days["2026-11-20"].idle_mj == 500_000
    assert [*everything(path, "hour")] == ["2026-11-20 12:00", "2026-11-21 12:00"]


def test_a_gap_is_unmeasured_in_each_hour_that_it_lies_in(
    records: lm.EnergyRecords, path: Path
) -> None:
    records.add([a_share(NOON + 1800, None, "", seconds=7200.0)], RATES)
    records.flush()
    gaps = {who: row.unmeasured_seconds for who, row in everything(path, "hour").items()}
    assert gaps == {"2026-11-20 12:00": 1800, "2026-11-20 13:00": 3600, "2026-11-20 14:00": 1800}


def test_money_and_co2_are_at_the_rates_of_their_time(
    records: lm.EnergyRecords, path: Path
) -> None:
    kwh = lm.KWH_MJ
    records.add([a_share(NOON, kwh)], lm.EnergyRates())
    records.add([a_share(NOON + 1, kwh)], lm.EnergyRates(price_per_kwh=0.25))
    records.add([a_share(NOON + 2, kwh)], lm.EnergyRates(price_per_kwh=0.5, overhead=1.5))
    records.add([a_share(NOON + 3, kwh)], lm.EnergyRates(price_per_kwh=3, currency="USD"))
    records.add([a_share(NOON + 4, kwh)], lm.EnergyRates(price_per_kwh=0, co2_grams_per_kwh=300))
    records.flush()
    chat = everything(path)["chat"]
    assert chat.kwh == 5
    assert chat.costs == {"EUR": 1.0, "USD": 3.0}
    assert chat.unpriced_mj == kwh
    assert chat.co2_grams == 300


shares = st.builds(
    a_share,
    at=st.floats(NOON - 4 * 86_400, NOON + 4 * 86_400),
    energy_mj=st.one_of(st.none(), st.integers(0, 10**9)),
    model=st.sampled_from(["", "chat", "vision"]),
    gpu=st.sampled_from([GPU, OTHER]),
    seconds=st.floats(0, 60),
    method=st.sampled_from(["whole GPU", "equal split", "idle"]),
)
rates = st.sampled_from([RATES, lm.EnergyRates(), lm.EnergyRates(price_per_kwh=1, currency="USD")])


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(added=st.lists(st.tuples(st.lists(shares), rates)), until=st.floats(-5, 400))
def test_no_way_to_add_up_and_no_roll_up_changes_a_sum(
    tmp_path_factory: pytest.TempPathFactory,
    added: list[tuple[list[lm.EnergyShare], lm.EnergyRates]],
    until: float,
) -> None:
    path = tmp_path_factory.mktemp("energy") / lm.ENERGY_FILE
    kept = begin(path)
    for each, worth in added:
        kept.add(each, worth)
    kept.close()
    energy = sum(share.energy_mj or 0 for each, _ in added for share in each)
    sampled = partial(samples, path, first=DAY - timedelta(days=5), days=10)  # that is all of them
    before = {by: everything(path, by) for by in ("model", "gpu", "day", "hour")}
    assert all(sum(r.energy_mj for r in rows.values()) == energy for rows in before.values())
    assert energy_of(sampled()) == energy
    for _ in range(2):
        with sqlite3.connect(path) as db:
            lm.roll_up(db, NOON + until * 86_400)
        db.close()
        assert {by: everything(path, by) for by in before} == before
        assert energy_of(sampled()) == energy


def test_rolling_up_leaves_raw_samples_for_two_days_and_minutes_for_a_year(
    records: lm.EnergyRecords, path: Path
) -> None:
    for day in (0, 1, 3, 300, 500):
        records.add([a_share(NOON - 86_400 * day + second) for second in range(60)], RATES)
    records.flush()
    with sqlite3.connect(path) as db:
        lm.roll_up(db, NOON)
    db.close()
    found = samples(path)
    by_day = {row["start_utc"][:10]: row["duration_seconds"] for row in found}
    assert len(found) == 2 * 60 + 3
    assert [*by_day.values()] == ["60", "60", "60", "1", "1"]
    with sqlite3.connect(path) as db:
        (minutes,) = db.execute("SELECT count(*) FROM minutes").fetchone()
    db.close()
    assert minutes == 4


# --- who used it ---------------------------------------------------------------------------------


def a_part(start: int, model: str, energy_mj: int, unmeasured_ms: int = 0) -> lm.EnergyPart:
    return lm.EnergyPart(
        start=start, subject="", model=model, energy_mj=energy_mj, estimated_mj=0,
        unmeasured_ms=unmeasured_ms, rates=RATES,
    )  # fmt: skip


def a_use(start: int, subject: str, model: str, prompt: int, completion: int = 0) -> lm.TokenUse:
    return lm.TokenUse(
        start=start, subject=subject, model=model, requests=1, prompt_tokens=prompt,
        completion_tokens=completion,
    )  # fmt: skip


def test_an_hours_energy_goes_to_those_who_used_it_by_their_tokens() -> None:
    parts = [a_part(0, "chat", 100), a_part(3600, "chat", 40), a_part(0, "", 7)]
    uses = [a_use(0, "ada", "chat", 20, 10), a_use(0, "bob", "chat", 10), a_use(0, "ada", "x", 5)]
    found = lm.add_up(lm.split_by_use(parts, uses))
    assert {who: row.energy_mj for who, row in found.items()} == {
        "ada": 75,
        "bob": 25,
        "(no tokens) chat": 40,
        "(idle)": 7,
    }
    assert found["ada"].estimated_mj == 75


hours, models = st.sampled_from([0, 3600, 7200]), st.sampled_from(["", "chat", "vision"])


@given(
    parts=st.lists(st.builds(a_part, hours, models, st.integers(0, 10**12), st.integers(0, 9))),
    uses=st.lists(
        st.builds(a_use, hours, st.sampled_from(["ada", "bob", ""]), models, st.integers(0, 10**9))
    ),
)
def test_what_all_used_and_nobody_used_is_all_that_was_taken(
    parts: list[lm.EnergyPart], uses: list[lm.TokenUse]
) -> None:
    found = [*lm.split_by_use(parts, uses)]
    for name in ("energy_mj", "unmeasured_ms"):
        assert sum(getattr(p, name) for p in found) == sum(getattr(p, name) for p in parts)
    by_model = {
        model: sum(p.energy_mj for p in parts if p.model == model) for model in ("chat", "")
    }
    for model, energy in by_model.items():
        assert sum(p.energy_mj for p in found if p.model == model) == energy


# --- sessions ------------------------------------------------------------------------------------


def sessions(path: Path) -> list[lm.EnergySession]:
    return [*lm.EnergyReader(path).sessions(date(2020, 1, 1), date(2030, 1, 1))]


def test_a_session_has_the_energy_of_its_replica_from_ready_to_stopped(
    records: lm.EnergyRecords, path: Path
) -> None:
    records.add([a_share(NOON - 1)], RATES)
    records.open_session("chat", 0, "c1", [GPU, OTHER], NOON)
    for second, watts in enumerate((100, 400, 250)):
        looked = [a_share(NOON + second, 1000 * watts, gpu=gpu) for gpu in (GPU, OTHER)]
        records.add([*looked, a_share(NOON + second, 5, replica=1), a_share(NOON, 9, "")], RATES)
        records.count_tokens("c1", 40 * second, 10 * second, 5 * second, second)
    (open_,) = sessions(path)
    assert open_.end is None
    records.close_session("c1", NOON + 3)
    records.add([a_share(NOON + 3)], RATES)
    records.flush()
    (found,) = sessions(path)
    assert (found.model, found.replica, found.gpu_uuids) == ("chat", 0, (GPU, OTHER))
    assert found.end is not None
    assert (found.end - found.start).total_seconds() == 3
    assert found.energy_mj == 1_500_000
    assert found.mean_w == pytest.approx(500)
    assert found.peak_w == pytest.approx(800)
    assert (found.prompt_tokens, found.completion_tokens, found.cached_tokens) == (80, 20, 10)
    assert (found.requests, found.method) == (2, "measured")
    assert found.joules_per_output_token == 75
    assert found.joules_per_token == 15
    assert found.costs == {"EUR": pytest.approx(1_500_000 / 3.6e9 * 0.6)}
    chat = everything(path)["chat"]
    assert (chat.prompt_tokens, chat.completion_tokens, chat.requests) == (80, 20, 2)


def test_a_session_says_how_much_of_it_is_estimated(records: lm.EnergyRecords, path: Path) -> None:
    records.open_session("chat", 0, "c1", [GPU], NOON)
    records.add([a_share(method="equal split"), a_share(NOON + 1)], RATES)
    records.add([a_share(NOON + 2, None)], RATES)
    records.close_session("c1", NOON + 3)
    (found,) = sessions(path)
    assert (found.method, found.unmeasured_seconds) == ("50% estimated", 1)


def test_a_replica_in_another_container_is_another_session(
    records: lm.EnergyRecords, path: Path
) -> None:
    records.open_session("chat", 0, "c1", [GPU], NOON)
    records.add([a_share(NOON)], RATES)
    records.open_session("chat", 0, "c2", [GPU], NOON + 5)
    records.add([a_share(NOON + 5)], RATES)
    records.close_session("c1", NOON + 9)  # it was over
    new, old = sessions(path)
    assert (new.container_id, new.end) == ("c2", None)
    assert old.end == datetime.fromtimestamp(NOON + 1, UTC)


# --- disks, kills and clocks -------------------------------------------------------------------

KILLED = """
import sys, time
import llm_manager as lm
from test_energy_records import GPU, NOON, RATES, a_share, begin
lm.COMMIT_SECONDS = 0.05
records = begin(lm.Path(sys.argv[1]))
records.open_session("chat", 0, "c1", [GPU], NOON)
for second in range(10**9):
    records.add([a_share(NOON + second)], RATES)
    print(second, flush=True)
    time.sleep(0.001)
"""


def program(code: str, *arguments: object) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(lm.__file__).parent)])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )


def test_a_kill_loses_the_last_moments_and_breaks_nothing(path: Path) -> None:
    killed = program(KILLED, path)
    assert killed.stdout is not None
    told = 0
    while told < 500:
        told = int(killed.stdout.readline())
    killed.send_signal(signal.SIGKILL)
    told = max([told, *map(int, killed.stdout.read().split())])
    killed.wait()
    records = begin(path)
    assert records.trouble is None
    (session,) = sessions(path)
    written = everything(path)["chat"].energy_mj // 300_000
    assert 0 < written <= told + 1
    assert written >= told - 250, "more than a commit was lost"
    assert session.energy_mj == written * 300_000 == energy_of(samples(path))
    assert session.end == datetime.fromtimestamp(NOON + written, UTC), "it ends at its last record"
    records.close()


def test_a_clock_that_jumps_back_neither_doubles_nor_loses(
    records: lm.EnergyRecords, path: Path
) -> None:
    for at in (NOON, NOON + 1, NOON - 7200, NOON - 7199, NOON, 0.0):
        records.add([a_share(at)], RATES)
        records.flush()
    whole = {who: row.energy_mj for who, row in everything(path, "hour").items()}
    assert whole == {"2026-11-20 10:00": 600_000, "2026-11-20 12:00": 900_000}
    assert len(samples(path)) == 5
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM hours WHERE start = 0").fetchone() == (1,)
    db.close()


def test_a_clock_that_is_far_ahead_for_a_while_deletes_nothing(path: Path) -> None:
    records = begin(path)
    records.add([a_share(NOON + second) for second in range(60)], RATES)
    records.close()
    ahead = NOON + 60 * 366 * 86_400
    for hour in range(3):
        records = lm.EnergyRecords(path, lambda: ahead)  # which rolls up
        records.add([a_share(ahead + 3600 * hour)], RATES)
        records.close()
    for second in (60, 61):
        records = begin(path)
        records.add([a_share(NOON + second)], RATES)
        records.close()
    assert len(samples(path)) == 62


def test_a_session_tells_of_the_time_in_which_nobody_measured_its_gpu(
    records: lm.EnergyRecords, path: Path
) -> None:
    """As the sampler divides it: an interval without a measurement is nobody's."""
    interval = lm.Interval(seconds=8 * 3600, energy_mj=None, method="unmeasured")
    chat = lm.GpuTenant(model="chat")
    records.open_session("chat", 0, "c1", [GPU], NOON)
    records.add([a_share(NOON)], RATES)
    records.add(lm.attribute(interval, NOON + 1, GPU, [chat]), RATES)
    records.close_session("c1", NOON + 1 + 8 * 3600)
    (found,) = sessions(path)
    assert (found.unmeasured_seconds, found.measured_seconds) == (8 * 3600, 1)


def test_a_reader_that_takes_its_time_does_not_let_the_log_grow(
    records: lm.EnergyRecords, path: Path
) -> None:
    for second in range(2000):
        records.add([a_share(NOON + second)], RATES)
    records.flush()
    pieces = lm.EnergyReader(path).samples(DAY, DAY, lm.CsvStyle())
    begun = [next(pieces), next(pieces)]
    for second in range(2000, 2600):
        records.add([a_share(NOON + second)], RATES)
        records.flush()
    log = path.with_name(f"{path.name}-wal")
    assert log.stat().st_size < 8 * 2**20
    assert b"".join([*begun, *pieces]).count(b"\n") == 2601


def test_a_damaged_file_is_set_aside_and_a_new_one_begun(path: Path) -> None:
    path.write_bytes(b"this is no database" * 1000)
    records = begin(path)
    records.add([a_share()], RATES)
    records.close()
    assert "was damaged" in str(records.trouble)
    assert everything(path)["chat"].energy_mj == 300_000
    (aside,) = path.parent.glob("*.damaged-*")
    assert aside.name in str(records.trouble)
    assert aside.read_bytes().startswith(b"this is no database")


def test_a_file_that_is_damaged_while_it_is_used_is_set_aside(path: Path) -> None:
    first = begin(path)
    for at in range(5000):
        first.add([a_share(NOON + 61 * at)], RATES)
    first.close()
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(os.urandom(size - 8192 - 4096))
    with pytest.raises(lm.EnergyRecordsError, match="damaged"):
        everything(path)
    records = begin(path)
    assert "was damaged" in str(records.trouble)
    records.add([a_share()], RATES)
    records.close()
    assert everything(path)["chat"].energy_mj == 300_000


def test_a_file_of_a_newer_program_is_left_alone(path: Path) -> None:
    begin(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 2")
    db.close()
    records = begin(path)
    assert "newer" in str(records.trouble)
    records.add([a_share()], RATES)
    records.close()
    assert [each.name for each in path.parent.iterdir()] == [lm.ENERGY_FILE]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Two megabytes, mounted."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_on_a_full_disk_records_wait_and_are_written_when_there_is_room(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = begin(small_disk / lm.ENERGY_FILE)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1_500_000))
    added = 0
    while records.trouble is None:
        assert added < 100_000, "the disk never filled"
        for _ in range(1000):
            records.add([a_share(NOON + added)], RATES)
            added += 1
        records.flush()
    assert "disk is full" in str(records.trouble)
    for _ in range(50):
        records.add([a_share(NOON + added)], RATES)
        added += 1
        records.flush()
    ballast.unlink()
    records.flush()
    assert records.trouble is None
    records.close()
    assert everything(small_disk / lm.ENERGY_FILE)["chat"].energy_mj == 300_000 * added
    assert len([r for r in caplog.records if "disk is full" in r.message]) == 1


def test_what_waits_too_long_for_a_disk_is_told_as_unmeasured(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm, "MOST_WAITING", 100)
    records = begin(small_disk / lm.ENERGY_FILE)
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"")
    with suppress(OSError):
        ballast.write_bytes(bytes(3_000_000))
    for second in range(400):
        records.add([a_share(NOON + second), a_share(NOON + second, 9, "")], RATES)
        records.flush()
    assert records.trouble is not None
    ballast.unlink()
    records.close()
    kept = everything(small_disk / lm.ENERGY_FILE)
    seconds = kept["chat"].energy_mj / 300_000
    assert 0 < seconds < 100
    assert seconds + kept[lm.IDLE].unmeasured_seconds == pytest.approx(400)


# --- files -------------------------------------------------------------------------------------

GERMAN = lm.CsvStyle(separator=";", decimal=",")


@pytest.mark.filterwarnings("ignore:Could not infer format")  # of seconds with a comma
@pytest.mark.parametrize("style", [lm.PLAIN, GERMAN, lm.CsvStyle(separator="\t")])
def test_samples_are_read_by_pandas(
    records: lm.EnergyRecords, path: Path, style: lm.CsvStyle
) -> None:
    records.add([a_share(NOON + 0.25, 123_456, "qwen2.5"), a_share(NOON, None, "")], RATES)
    records.flush()
    text = b"".join(lm.EnergyReader(path).samples(DAY, DAY, style))
    table = pd.read_csv(
        io.BytesIO(text), sep=style.separator, decimal=style.decimal, parse_dates=["start_utc"]
    )
    assert tuple(table.columns) == lm.SAMPLE_COLUMNS
    first, gap = table.to_dict("records")
    assert first["start_utc"].timestamp() == NOON + 0.25
    assert (first["model"], first["energy_joules"]) == ("qwen2.5", 123.456)
    assert (first["mean_power_watts"], first["duration_seconds"]) == (123.4, 1)
    assert (gap["energy_joules"], gap["unmeasured_seconds"]) == (0, 1)
    assert pd.isna(gap["mean_power_watts"])


def test_a_german_spreadsheets_figures_have_commas(records: lm.EnergyRecords, path: Path) -> None:
    records.add([a_share(NOON + 0.25, 123_456)], RATES)
    records.flush()
    _, line = b"".join(lm.EnergyReader(path).samples(DAY, DAY, GERMAN)).decode().splitlines()
    assert line == "2026-11-20 12:00:00,250;1;GPU-a;chat;0;123,456;123,4;0;whole GPU"


@pytest.mark.parametrize(("separator", "decimal"), [(",", ","), ("|", "."), (";", "'"), ("", ".")])
def test_a_table_that_could_not_be_read_is_refused(separator: str, decimal: str) -> None:
    with pytest.raises(lm.InvalidError):
        lm.CsvStyle(separator=separator, decimal=decimal)
