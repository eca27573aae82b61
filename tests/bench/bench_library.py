#!/usr/bin/env python3
"""How long looks at the cache of weights and the sums of the form take; run by hand.

    python tests/bench/bench_library.py [--repositories 60] [--files 30] [--rounds 7]

Each figure stands beside a baseline of the same run: `huggingface_hub`'s own scan of the same
cache, drawing a sum without computing it, and the sums of the places found without finding them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT.parent), str(ROOT)]

from bench_render import milliseconds, say
from builders import a_model, a_state, on_gpus
from huggingface_hub import scan_cache_dir

import llm_manager as lm

DEEPSEEK_BYTES = 688_586_727_753  # its 163 shards on the hub
QWEN_BYTES = 16_381_516_776
DEEPSEEK, QWEN = (
    json.loads((ROOT / "fit" / name).read_text())["config"]
    for name in ("deepseek-v3.json", "qwen3-8b.json")
)
TYPED = ("--max-model-len", "32K", "--max-num-seqs", "64", "--enable-chunked-prefill")
Work = Callable[[], object]


def compare(title: str, work: Work, baselines: dict[str, Work], rounds: int) -> None:
    spent = milliseconds(work, rounds)
    say(f"{spent:9.2f} ms  {title}")
    for name, baseline in baselines.items():
        other = milliseconds(baseline, rounds)
        say(f"{other:9.2f} ms  baseline: {name}; ratio {spent / other:.2f}")


def fill(hub: Path, repositories: int, files: int) -> None:
    """A cache as `huggingface_hub` lays it out: shards with their index, and small files."""
    for number in range(repositories):
        folder = hub / lm.folder_name(f"acme/model-{number}")
        commit = hashlib.sha1(folder.name.encode(), usedforsecurity=False).hexdigest()
        snapshot, blobs = folder / "snapshots" / commit, folder / "blobs"
        for made in (snapshot, blobs, folder / "refs"):
            made.mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        shards = [f"model-{n:05d}-of-{files - 5:05d}.safetensors" for n in range(1, files - 4)]
        index = json.dumps({"weight_map": {f"layers.{n}": name for n, name in enumerate(shards)}})
        texts = {"config.json": json.dumps(DEEPSEEK), "model.safetensors.index.json": index}
        small = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
        for name in (*shards, *texts, *small):
            content = texts.get(name, name)
            blob = blobs / hashlib.sha256(content.encode()).hexdigest()
            blob.write_text(content)
            (snapshot / name).symlink_to(Path("../../blobs") / blob.name)


def look_at_the_cache(repositories: int, files: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as home:
        cache = lm.HubCache(Path(home))
        fill(cache.hub, repositories, files)
        assert len(cache.stored()) == len(scan_cache_dir(cache.hub).repos) == repositories
        title = f"{repositories} repositories of {files} files"
        scan = {"huggingface_hub's scan_cache_dir": lambda: scan_cache_dir(cache.hub)}

        def first() -> object:
            return lm.HubCache(Path(home)).stored()

        compare(f"HubCache.stored(), the first look: {title}", first, scan, rounds)
        compare("HubCache.stored(), each look after it", cache.stored, scan, rounds)
        compare(f"HubCache.read(), sizes and leftovers too: {title}", cache.read, scan, rounds)


def sum_per_keystroke(rounds: int) -> None:
    gpus = lm.Hardware(gpus=lm.SimulatedGpus([lm.simulated_card("H200 141 GB")] * 8).read().gpus)
    place = lm.place_of(on_gpus(*(gpu.uuid for gpu in gpus.gpus)), gpus)

    def computed() -> lm.Fit:
        architecture = lm.read_architecture(DEEPSEEK)
        return lm.estimate(DEEPSEEK_BYTES, architecture, lm.engine_wish(TYPED), place)

    fit = computed()
    compare(
        "a keystroke: config read, estimate, fit_html of DeepSeek-V3 on 8 GPUs",
        lambda: lm.fit_html(computed()), {"fit_html alone": lambda: lm.fit_html(fit)}, rounds,
    )  # fmt: skip


def find_places(rounds: int) -> None:
    """Eight GPUs of which two are cut, and one is somebody's."""
    simulated = lm.SimulatedGpus([lm.simulated_card("H100 80 GB")] * 8)
    for gpu in simulated.gpus[:2]:
        simulated.set_mig_mode(gpu.uuid, enabled=True)
        simulated.create_slice(gpu.uuid, ("3g.40gb", 4))
    hardware = simulated.read()
    state = a_state(a_model(placement=on_gpus(simulated.gpus[7].uuid)))
    architecture = lm.read_architecture(QWEN)
    wish = lm.engine_wish(TYPED)

    def found() -> list[lm.Candidate]:
        return lm.places_that_fit(QWEN_BYTES, architecture, wish, hardware, state)

    places = [candidate.fit.place for candidate in found()]

    def sums() -> list[lm.Fit]:
        return [lm.estimate(QWEN_BYTES, architecture, wish, place) for place in places]

    compare(
        f"places_that_fit: {len(places)} places on 8 GPUs, 2 of them cut",
        found, {f"the sums of these {len(places)} alone": sums}, rounds,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repositories", type=int, default=60)
    parser.add_argument("--files", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    look_at_the_cache(given.repositories, given.files, given.rounds)
    sum_per_keystroke(given.rounds)
    find_places(given.rounds)


if __name__ == "__main__":
    main()
