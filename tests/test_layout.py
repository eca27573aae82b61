"""The file's constitution: outline, section order, purity, and who may talk to whom."""

from __future__ import annotations

import ast
import re
import symtable
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "llm_manager.py"
TEXT = SOURCE.read_text()
TREE = ast.parse(TEXT)
BANNER = re.compile(r"^# §(\d+) (.+?) — (pure|effects): .+$")
IMPURE = {
    "docker", "fcntl", "gr", "httpx", "log", "open", "os", "print", "psycopg", "pynvml", "random",
    "requests", "secrets", "shutil", "signal", "socket", "subprocess", "sys", "tarfile",
    "threading", "time", "utc_now", "uuid", "Path",
}  # fmt: skip
# Each library is spoken to in one section only, or in those named.
HOMES = {
    "fcntl": "Home", "docker": "Containers Images", "requests": "Containers",
    "tarfile": "Containers", "httpx": "Requests", "huggingface_hub": "Hub", "httpx2": "Hub",
    "psycopg": "Database", "pynvml": "Drivers Simulation", "gr": "Console", "pd": "Console",
    "grafana": "Monitoring", "grafana_queries": "Monitoring", "grafana_timeseries": "Monitoring",
    "grafana_encoder": "Monitoring", "grafana_models": "Monitoring",
    "fastapi": "Programs Console", "uvicorn": "Main", "argparse": "Main",
    "sqlite3": "Energy records",
    "rich_console": "Terminal", "rich_live": "Terminal", "rich_table": "Terminal",
    "rich_text": "Terminal",
}  # fmt: skip

BANNERS = [(n, m) for n, line in enumerate(TEXT.splitlines(), 1) if (m := BANNER.match(line))]
NAMES = [
    node for node in ast.walk(TREE) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
]


def section_at(line: int) -> int:
    return sum(start <= line for start, _ in BANNERS)


def title_at(line: int) -> str:
    return str(BANNERS[section_at(line) - 1][1][2])


def scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    for child in table.get_children():
        yield child
        yield from scopes(child)


def test_the_outline_lists_every_section() -> None:
    outline = re.findall(r"^  §(\d+) +(.+?) {2,}(pure|effects) ", TEXT, re.MULTILINE)
    assert outline == [m.groups() for _, m in BANNERS]
    assert [int(number) for number, _, _ in outline] == list(range(1, len(BANNERS) + 1))


def test_sections_only_look_upwards() -> None:
    home = {name: section_at(node.lineno) for node in TREE.body for name in defined_by(node)}
    downward = {
        f"{scope.get_name()} (line {scope.get_lineno()}) uses {symbol.get_name()}"
        for scope in scopes(symtable.symtable(TEXT, SOURCE.name, "exec"))
        for symbol in scope.get_symbols()
        if symbol.is_global() and home.get(symbol.get_name(), 0) > section_at(scope.get_lineno())
    }
    assert not downward


def test_pure_sections_touch_nothing_outside() -> None:
    pure = {i for i, (_, m) in enumerate(BANNERS, 1) if m[3] == "pure"}
    used = {
        f"{node.id} at line {node.lineno}"
        for node in NAMES
        if node.id in IMPURE and section_at(node.lineno) in pure and not is_annotation(node)
    }
    assert not used


def test_each_library_is_spoken_to_in_one_section() -> None:
    import_ends = BANNERS[1][0]  # the imports stand in §1
    astray = {
        f"{node.id} at line {node.lineno}"
        for node in NAMES
        if node.id in HOMES
        and node.lineno > import_ends
        and title_at(node.lineno) not in HOMES[node.id]
        and not is_annotation(node)
    }
    assert not astray


ANNOTATED = {
    id(name)
    for node in ast.walk(TREE)
    for part in (getattr(node, "annotation", None), getattr(node, "returns", None))
    if part is not None
    for name in ast.walk(part)
}


def is_annotation(node: ast.Name) -> bool:
    """`from __future__ import annotations`: never evaluated, so it touches nothing."""
    return id(node) in ANNOTATED


def defined_by(node: ast.stmt) -> Iterator[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AsyncFunctionDef(name=name):
            yield name
        case ast.Assign(targets=targets):
            yield from (t.id for t in targets if isinstance(t, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name)):
            yield name
        case _:
            pass
