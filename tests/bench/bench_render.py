#!/usr/bin/env python3
"""How long all generated files of a large installation take to render; run by hand.

    python tests/bench/bench_render.py [--models 200] [--rounds 7] [--profile]

The baseline, measured in the same run, is what nobody can avoid with this library: one plain
`yaml.safe_dump` of a structure of the same size as LiteLLM's configuration.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT.parent), str(ROOT)]

import yaml
from builders import a_model, a_site, a_state

import llm_manager as lm

TARGET_MS = 100


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - this is what it is for


def milliseconds(work: Callable[[], object], rounds: int) -> float:
    """The median of several rounds, after one to warm up."""
    work()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        taken.append((time.perf_counter() - start) * 1000)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="what the time is spent on")
    given = parser.parse_args()
    names = [f"model-{n:03d}" for n in range(given.models)]
    arguments = ("--enforce-eager", "--max-model-len", "8192")
    state, site = a_state(*(a_model(n, engine_arguments=arguments) for n in names)), a_site()
    models = state.wished_models

    def litellm() -> str:
        return lm.render_litellm_config(state, lm.served_models(state, models))

    def caddyfile() -> str:
        return lm.render_caddyfile(state, "a", lm.served_models(state, models))

    def specs() -> list[str]:
        return [spec.hash for model in models for spec in lm.render_engines(state, model, site)]

    def everything() -> None:
        litellm()
        caddyfile()
        specs()

    plain = yaml.safe_load(litellm())
    works: dict[str, Callable[[], object]] = {
        "LiteLLM's YAML": litellm,
        "the Caddyfile": caddyfile,
        "container specs with their hashes": specs,
        "a whole plan, from nothing": lambda: lm.plan_state(state, lm.Observed(), site),
        "C dumper: the same YAML": lambda: yaml.dump(
            plain, Dumper=yaml.CSafeDumper, sort_keys=False
        ),
        "baseline: a plain yaml.safe_dump of it": lambda: yaml.safe_dump(plain, sort_keys=False),
        f"ALL FILES of {given.models} models": everything,
    }
    taken = {name: milliseconds(work, given.rounds) for name, work in works.items()}
    for name, spent in taken.items():
        say(f"{spent:8.1f} ms  {name}")
    *_, baseline, everyone = taken.values()
    verdict = "ok" if everyone <= TARGET_MS else "TOO SLOW"
    say(f"{everyone / baseline:8.2f}     ratio to the baseline; target {TARGET_MS} ms: {verdict}")
    if given.profile:
        with cProfile.Profile() as profile:
            everything()
        pstats.Stats(profile).sort_stats("tottime").print_stats(12)


if __name__ == "__main__":
    main()
