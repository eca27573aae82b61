"""What GPUs took, in a real browser: two simulated GPUs, and nine days that were recorded."""

from __future__ import annotations

import csv
import math
import re
import time
from pathlib import Path

import nvml_standin
import pytest
from browsing import button, cell, choose, open_console, open_tab
from consoles import serving, without_docker
from installation import Installation
from nvml_standin import Server
from playwright.sync_api import Page, expect

import llm_manager as lm

pytestmark = pytest.mark.browser
LOOK_SECONDS = 600
RATES = lm.EnergyRates(price_per_kwh=0.31, co2_grams_per_kwh=381.0, overhead=1.4)


@pytest.fixture
def here(simulated_gpus: None, tmp_path: Path) -> Installation:
    server = Server(nvml_standin.library(tmp_path), tmp_path / "gpus", ["A100 40 GB", "H100 80 GB"])
    server.set(0, power_mw=251_000)
    here = without_docker(tmp_path / "home", **server.environment())
    record(here.home / lm.ENERGY_FILE, server.uuid(0), server.uuid(1))
    return here


def record(path: Path, whole: str, shared: str) -> None:
    """`chat` on a GPU of its own and `embed` on a part of another one, until an hour ago."""
    records = lm.EnergyRecords(path)
    end = time.time() - 3600
    start = at = end - 9 * 86400
    records.open_session("chat", 0, "c1", [whole], start)
    looks = 0
    while at < end:
        taken = round((250 + 120 * math.sin(at / 9000)) * LOOK_SECONDS) * 1000
        shares = [
            lm.EnergyShare(gpu_uuid=gpu, start=at, seconds=LOOK_SECONDS, model=model, replica=0,
                           energy_mj=energy_mj, method=method)
            for gpu, model, energy_mj, method in (
                (whole, "chat", taken, "whole GPU"),
                (shared, "embed", taken // 3, "process utilisation"),
                (shared, lm.NOBODY, 70_000 * LOOK_SECONDS, "process utilisation"),
            )
        ]  # fmt: skip
        records.add(shares, RATES)
        looks, at = looks + 1, at + LOOK_SECONDS
        records.count_tokens("c1", looks * 9000, looks * 5000, looks * 1000, looks * 20)
    records.close_session("c1", at)
    records.close()


def test_energy_is_told_live_by_model_and_by_session(here: Installation, page: Page) -> None:
    with serving(here) as url:
        open_console(page, url)
        open_tab(page, "Energy")
        expect(page.get_by_text("251 W", exact=True)).to_be_visible()
        expect(page.get_by_role("img", name="up to 251 W in this time")).to_be_visible()
        expect(cell(page, "embed")).to_be_visible()
        expect(page.get_by_text(re.compile(r"kWh, of these [\d.]+ idle"))).to_be_visible()
        expect(page.locator("canvas, svg.marks").filter(visible=True).first).to_be_visible()
        page.get_by_role("button", name="Sessions: each replica from ready to stopped").click()
        expect(cell(page, "chat 0")).to_be_visible()
        expect(cell(page, "measured")).to_be_visible()
        choose(page, "Added up by", "gpu")
        expect(page.get_by_role("columnheader", name="GPU").first).to_be_visible()


def test_files_are_written_for_a_german_spreadsheet(
    here: Installation, page: Page, tmp_path: Path
) -> None:
    with serving(here) as url:
        open_console(page, url)
        open_tab(page, "Energy")
        page.get_by_role("button", name="Files").click()
        page.get_by_label("German spreadsheets (; and ,)").check()
        link = page.get_by_role("link", name="models.csv")
        expect(link).to_have_attribute("href", re.compile("German"))
        with page.expect_download() as coming:
            link.click()
        coming.value.save_as(tmp_path / "models.csv")
        with (tmp_path / "models.csv").open(encoding="utf-8-sig", newline="") as file:
            rows = [*csv.DictReader(file, delimiter=";")]
        assert {row["model"] for row in rows} == {"chat", "embed", lm.IDLE}
        kwh = sum(float(row["energy_kwh"].replace(",", ".")) for row in rows)
        assert kwh > 9 * 24 * (0.130 + 0.043 + 0.070)


def test_a_price_holds_for_what_is_recorded_from_then_on(here: Installation, page: Page) -> None:
    with serving(here) as url:
        open_console(page, url)
        open_tab(page, "Energy")
        page.get_by_role("button", name="Price, CO₂ and how often").click()
        page.get_by_label("Price of a kWh").fill("0.31")
        page.get_by_label("Price of a kWh").blur()
        button(page, "Save").filter(visible=True).click()
        expect(page.get_by_text("Saved, for what is recorded from now on.")).to_be_visible()
    kept = here.state().energy
    assert (kept.price_per_kwh, kept.co2_grams_per_kwh, kept.overhead) == (0.31, None, 1.0)
