"""What tests measured, printed at the end of the run, also where they ran in other processes."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import pytest

TIMINGS = pytest.StashKey[list[tuple[str, float]]]()
SHOWN = pytest.StashKey[list[str]]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of pytest-xdist hands its part to the one that prints."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["timings"] = session.config.stash.get(TIMINGS, [])
        output["shown"] = session.config.stash.get(SHOWN, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    output = getattr(node, "workeroutput", {})  # none of a process that died
    stash = node.config.stash
    stash.setdefault(TIMINGS, []).extend(map(tuple, output.get("timings", ())))
    stash.setdefault(SHOWN, []).extend(output.get("shown", ()))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    timings = config.stash.get(TIMINGS, [])
    long = [(file, seconds) for file, seconds in seconds_by_file(terminalreporter) if seconds >= 30]
    if long:
        terminalreporter.section("files that take long (LONGEST_FIRST in conftest.py)")
        for file, seconds in long:
            terminalreporter.line(f"{seconds:7.1f} s  {file}")
    if timings:
        terminalreporter.section("steps on real containers")
        for title, seconds in timings:
            terminalreporter.line(f"{seconds:7.1f} s  {title}")
    for text in config.stash.get(SHOWN, []):
        terminalreporter.section(text.splitlines()[0])
        terminalreporter.write_line("\n".join(text.splitlines()[1:]))


def seconds_by_file(reporter: pytest.TerminalReporter) -> list[tuple[str, float]]:
    """How long the tests of each file took, the longest first."""
    seconds = defaultdict[str, float](float)
    for report in itertools.chain.from_iterable(reporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid.partition("::")[0]] += report.duration
    return sorted(seconds.items(), key=lambda one: -one[1])
