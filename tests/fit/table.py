"""The KV-cache formula against published figures, as a Markdown table: `python tests/fit/table.py`.

Each JSON beside this file is one model: the keys of its config.json that matter, written down by
hand, and figures that its maker, a paper or vLLM's own log gives, each with its source.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import llm_manager as lm

GIB = 1024**3
WITHIN = 0.5  # percent; figures of two digits allow no better. A figure may say otherwise.
Entry = dict[str, Any]


def entries() -> list[Entry]:
    return [json.loads(path.read_text()) for path in sorted(HERE.glob("*.json"))]


def figures() -> Iterator[tuple[Entry, Entry]]:
    """Every figure with the model it belongs to."""
    for entry in entries():
        for figure in entry["figures"]:
            yield entry, figure


def computed(entry: Entry, figure: Entry) -> float:
    """The same figure by the formula."""
    architecture = lm.read_architecture(entry["config"])
    wish = lm.engine_wish(figure.get("arguments", []))
    if figure.get("cpu"):
        wish = replace(wish, async_scheduling=False)
    block = figure.get("block_tokens", lm.BLOCK_TOKENS)
    parallel = figure.get("tensor_parallel", 1)

    def layout(context: int) -> lm.KvBlocks:
        blocks = lm.kv_blocks(architecture, context, wish, parallel, block)
        assert blocks is not None
        return blocks

    context = figure.get("context", 1024 * 1024)
    cache = figure.get("cache_gib", 0) * GIB
    blocks = layout(context)
    smallest_group = min(layer.count for layer in architecture.layers or ())
    values: dict[str, Callable[[], float | None]] = {
        "KB per token": lambda: blocks.request_bytes / context / 1000,
        "KiB per token": lambda: blocks.request_bytes / context / 1024,
        "GiB": lambda: blocks.request_bytes / GIB,
        "GB": lambda: blocks.request_bytes / 1e9,
        "blocks": lambda: cache // blocks.size,
        "tokens": lambda: (blocks.concurrency(cache) or 0) * context,
        "concurrency": lambda: blocks.concurrency(cache),
        "longest": lambda: lm.largest_context(architecture, cache, layout),
        "tokens per block": lambda: tokens_per_block(layout),
        "bytes per block and layer": lambda: blocks.size / smallest_group,
    }
    return float(values[figure["what"]]() or 0)


def tokens_per_block(layout: Callable[[int], lm.KvBlocks]) -> int:
    """Where one token more takes one block more."""
    first = layout(1).per_request
    return next(n for n in range(1, 100_000) if layout(n + 1).per_request > first)


def error_percent(entry: Entry, figure: Entry) -> float:
    return 100 * (computed(entry, figure) / figure["published"] - 1)


def table() -> str:
    """All of it, one line per figure."""
    head = ["model", "attention", "figure", "published", "computed", "error", "source"]
    rows = [
        [
            entry["model"],
            entry["attention"],
            described(figure),
            f"{figure['published']:,}",
            f"{computed(entry, figure):,.{decimals(figure)}f}",
            f"{error_percent(entry, figure):+.2f} %",
            figure["source"],
        ]
        for entry, figure in figures()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def decimals(figure: Entry) -> int:
    """As many as were published."""
    return len(f"{figure['published']}".partition(".")[2])


def described(figure: Entry) -> str:
    given = [
        f"{figure['cache_gib']:.4g} GiB" if "cache_gib" in figure else "",
        f"{figure['context']:,} tokens" if "context" in figure else "",
        f"{figure['tensor_parallel']} GPUs" if "tensor_parallel" in figure else "",
        " ".join(figure.get("arguments", [])),
    ]
    return "; ".join(filter(None, [figure["what"], *given]))


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
