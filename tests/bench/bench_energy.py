#!/usr/bin/env python3
"""What keeping energy costs, and how long its samples take to export.

    python tests/bench/bench_energy.py [--days 30] [--gpus 8]      (about three minutes)

Writing: a look a second at eight and at 64 GPUs, three of four a model's, against SQLite given the
same rows one transaction a look. Exporting: what is kept of the days (samples of two, minutes of
the rest), and a file that still has all of them raw; against the same rows in columns, written by
Python's csv. Each export is a process of its own, whose largest memory is told.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT.parent), str(ROOT)]

import llm_manager as lm

TARGET_SECONDS = 10.0
FIRST = date(2026, 11, 1)
START = datetime(2026, 11, 1, tzinfo=UTC).timestamp()
RATES = lm.EnergyRates(price_per_kwh=0.3, co2_grams_per_kwh=380, overhead=1.3)


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - this is what it is for


def a_look(second: int, gpus: int) -> list[lm.EnergyShare]:
    """All GPUs at once: every fourth is idle, the others have a model each."""
    return [
        lm.EnergyShare(
            gpu_uuid=f"GPU-{gpu:08x}-1b2c-4d5e-8f90-123456789abc",
            start=START + second + gpu / 1000,
            seconds=1.0,
            model="" if gpu % 4 == 3 else f"model-{gpu % 8}",
            replica=gpu // 8,
            energy_mj=60_000 + (second * 7919 + gpu * 104_729) % 640_000,
            method="idle" if gpu % 4 == 3 else "whole GPU",
        )
        for gpu in range(gpus)
    ]


def write(path: Path, seconds: int, gpus: int) -> float:
    """Seconds of a processor for as many looks, as the sampler hands them over in real time."""
    records = lm.EnergyRecords(path, lambda: START)
    looks = [a_look(second, gpus) for second in range(seconds)]
    begun = time.process_time()
    for second, look in enumerate(looks):
        records.add(look, RATES)
        if second % 5 == 4:  # COMMIT_SECONDS of the looks' own time
            records.flush()
    records.close()
    return time.process_time() - begun


def write_plainly(path: Path, seconds: int, gpus: int) -> float:
    """The same in columns, a transaction for each look."""
    looks = [a_look(second, gpus) for second in range(seconds)]
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(
            "CREATE TABLE samples (start REAL, gpu TEXT, model TEXT, replica INTEGER, "
            "energy_mj INTEGER, seconds REAL, method TEXT)"
        )
        begun = time.process_time()
        for look in looks:
            with db:
                db.executemany(
                    "INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?, ?)",
                    [(s.start, s.gpu_uuid, s.model, s.replica, s.energy_mj, s.seconds, s.method)
                     for s in look],
                )  # fmt: skip
        return time.process_time() - begun


def bench_writing(folder: Path) -> None:
    say("Writing ten minutes of looks at 1 Hz; processor time per look, and of one core:")
    for gpus in (8, 64):
        ours = write(folder / f"ours-{gpus}.sqlite", 600, gpus) / 600
        plain = write_plainly(folder / f"plain-{gpus}.sqlite", 600, gpus) / 600
        say(f"  {gpus:2} GPUs: {ours * 1000:5.2f} ms ({ours:.2%}); "
            f"plain rows {plain * 1000:5.2f} ms: {ours / plain:.2f} times that")  # fmt: skip


def fill(path: Path, gpus: int, days: int) -> int:
    """A day of looks, and the same again on each other day; how many samples there are then."""
    records = lm.EnergyRecords(path, lambda: START)
    for second in range(lm.DAY_SECONDS):
        records.add(a_look(second, gpus), RATES)
        if second % 5 == 4:
            records.flush()
    records.close()
    with closing(sqlite3.connect(path)) as db, db:
        for day in range(1, days):
            shift = day * lm.DAY_SECONDS
            there = str(FIRST + timedelta(days=day))
            db.execute(
                "INSERT INTO samples SELECT id + ? * 1000, CAST(replace(CAST(lines AS TEXT), ?, ?) "
                "AS BLOB) FROM samples WHERE id < ?",
                (shift, str(FIRST), there, (START + lm.DAY_SECONDS) * 1000),
            )
            for tier in lm.TIERS:
                db.execute(
                    f"INSERT INTO {tier} SELECT start + ?, subject, rates, energy_mj, ms, "  # noqa: S608
                    f"unmeasured_ms FROM {tier} WHERE start < ?",
                    (shift, START + lm.DAY_SECONDS),
                )
    return days * gpus * lm.DAY_SECONDS


class Measured:
    """This process from here on: seconds, seconds of a processor, and MiB that it grew by."""

    def __init__(self) -> None:
        self._largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._begun, self._worked = time.perf_counter(), time.process_time()

    def tell(self, size: int) -> None:
        taken, worked = time.perf_counter() - self._begun, time.process_time() - self._worked
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._largest
        say(f"{taken} {worked} {grown / 1024} {size}")


def export(path: Path, target: Path, days: int) -> None:
    style, last = lm.CsvStyle(separator=";", decimal=","), FIRST + timedelta(days=days - 1)
    measured = Measured()
    with target.open("wb") as file:
        for piece in lm.EnergyReader(path).samples(FIRST, last, style):
            file.write(piece)
        measured.tell(file.tell())


def export_plainly(path: Path, target: Path) -> None:
    """The same figures out of columns, by Python's csv."""
    measured = Measured()
    with closing(sqlite3.connect(path)) as db, target.open("w") as file:
        rows = db.execute("SELECT * FROM samples ORDER BY start")
        csv.writer(file, delimiter=";").writerows(plain_rows(rows))
        measured.tell(file.tell())


def plain_rows(rows: sqlite3.Cursor) -> Iterator[list[str]]:
    for start, gpu, model, replica, energy_mj, seconds, method in rows:
        moment = datetime.fromtimestamp(start, UTC)
        figures = (seconds, energy_mj / 1000, energy_mj / 1000 / seconds, 0)
        long, joules, watts, unmeasured = (f"{n:.3f}".replace(".", ",") for n in figures)
        yield [f"{moment:%Y-%m-%d %H:%M:%S,%f}", long, gpu, model, str(replica), joules, watts,
               unmeasured, method]  # fmt: skip


def in_a_process(*arguments: object) -> tuple[float, float, float, float]:
    said = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)], check=True, capture_output=True, text=True
    )
    seconds, worked, grown, size = map(float, said.stdout.split())
    return seconds, worked, grown, size / 2**20


def bench_exporting(folder: Path, gpus: int, days: int) -> bool:
    path, target = folder / lm.ENERGY_FILE, folder / "samples.csv"
    plain = folder / "plain.sqlite"
    rows, of_plain = fill(path, gpus, days), 3 * 3600 * gpus
    write_plainly(plain, 3 * 3600, gpus)
    whole = ("--export", path, target, "--days", days)
    mib = path.stat().st_size / 2**20
    say(f"Exporting {days} days of {gpus} GPUs; the file has {mib:,.0f} MiB:")
    seconds, worked, grown, mib = in_a_process(*whole)
    with target.open("rb") as file:
        lines = sum(piece.count(b"\n") for piece in iter(lambda: file.read(1 << 20), b""))
    assert lines == rows + 1, (lines, rows)
    ours = worked / rows
    say(f"  all raw: {rows:,} rows, {mib:,.0f} MiB in {seconds:.1f} s, {worked:.1f} s of them "
        f"worked: {ours * 1e6:.2f} us a row; memory grew by {grown:.0f} MiB")  # fmt: skip
    _, worked, _, _ = in_a_process("--export-plainly", plain, target)
    theirs = worked / of_plain
    say(f"  columns and csv: {theirs * 1e6:.2f} us a row, {theirs / ours:.1f} times the work")
    with closing(sqlite3.connect(path)) as db, db:
        lm.roll_up(db, START + days * lm.DAY_SECONDS)
    kept, worked, grown, mib = in_a_process(*whole)
    say(f"  as kept: {mib:,.0f} MiB in {kept:.1f} s, {worked:.1f} s of them worked; memory grew by "
        f"{grown:.0f} MiB")  # fmt: skip
    return seconds <= TARGET_SECONDS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--export", nargs=2, type=Path)
    parser.add_argument("--export-plainly", nargs=2, type=Path)
    arguments = parser.parse_args()
    if arguments.export:
        export(*arguments.export, arguments.days)
        return 0
    if arguments.export_plainly:
        export_plainly(*arguments.export_plainly)
        return 0
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_FOLDER")) as folder:
        bench_writing(Path(folder))
        kept = bench_exporting(Path(folder), arguments.gpus, arguments.days)
    say(f"{'Within' if kept else 'NOT within'} {TARGET_SECONDS:.0f} s.")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
