"""The README cannot lie about commands: its table is held against the program's parser."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import llm_manager as lm

README = Path(__file__).parent.parent / "README.md"


def commands_of(parser: argparse.ArgumentParser) -> set[str]:
    """Every command, those of a group as `group verb`."""
    found: set[str] = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                found |= {f"{name} {verb}" for verb in commands_of(sub)} or {name}
    return found


def documented() -> set[str]:
    found: set[str] = set()
    for row in re.findall(r"^\| (`.+?) \|", README.read_text(), re.MULTILINE):
        for command in re.findall(r"`([a-z][^`]*)`", row):
            name, *rest = command.replace("\\|", "|").split()
            verbs = rest[0].split("|") if rest and "|" in rest[0] else []
            found |= {f"{name} {verb}" for verb in verbs} or {name}
    return found


def test_the_readme_lists_every_command_and_no_other() -> None:
    files = {"config.json", "history/", "recipes/", "recipes/whisper.yaml", "generated/", "logs/"}
    files |= {"starts.json", "measured.json", "huggingface/", "compiled/", "proofs/", "backups/"}
    files |= {"audit.jsonl", "energy.sqlite", "benchmarks/", "idle.json"}
    assert documented() - files == commands_of(lm.build_parser())


def test_the_exit_statuses_are_those_of_the_readme() -> None:
    text = " ".join(README.read_text().split())
    assert "0 done, 1 failed, 2 wrong usage, 3 there is something to do" in text
    assert (lm.DONE, lm.FAILED, lm.WRONG_USAGE, lm.TO_DO) == (0, 1, 2, 3)
