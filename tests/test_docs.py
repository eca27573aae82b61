"""The pages cannot lie: what README.md and docs/ name is held against the program."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import a_state

import llm_manager as lm

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
REFERENCE = PAGES["reference.md"]
TREE = ast.parse((ROOT / "llm_manager.py").read_text())
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
PROGRAM = re.compile(r"^(?:sudo )?(?:python3 (?:\S*/)?llm_manager\.py|llm)(?:\s+|$)")
# Options of other programs than this one and its engines.
FOREIGN = {"--fast", "--filter", "--update-golden"}


def rows(heading: str, page: str = REFERENCE) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    table = page.partition(f"\n{heading}\n")[2]
    lines = re.search(r"(?:^\|.*\n)+", table, re.MULTILINE)
    assert lines, heading
    cells = (re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[0].splitlines()[2:])
    return [[cell.strip().replace("\\|", "|") for cell in line] for line in cells]


def coded(heading: str, column: int = 0) -> list[str]:
    """What is written as code in a column of that table."""
    return [code for row in rows(heading) for code in CODE.findall(row[column])]


def parsers(
    parser: argparse.ArgumentParser, name: str = ""
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command, those of a group as `group verb`."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        yield name, parser
    for group in groups:
        for verb, sub in group.choices.items():
            yield from parsers(sub, f"{name} {verb}".strip())


COMMANDS = dict(parsers(lm.build_parser()))
OPTIONS = {name: {*sub._option_string_actions} for name, sub in COMMANDS.items()}


def strings() -> list[str]:
    """Every text of the program, parts of f-strings included."""
    nodes = (node for node in ast.walk(TREE) if isinstance(node, ast.Constant))
    return [node.value for node in nodes if isinstance(node.value, str)]


# --- commands --------------------------------------------------------------------


def test_the_reference_lists_every_command_and_no_other() -> None:
    found: set[str] = set()
    for command in coded("## Commands"):
        name, *rest = command.split()
        verbs = rest[0].split("|") if rest and "|" in rest[0] else []
        found |= {f"{name} {verb}" for verb in verbs} or {name}
    assert found == {*COMMANDS}


def test_every_command_and_option_says_in_the_help_what_it_does() -> None:
    silent = [
        f"{name} {action.option_strings}"
        for name, sub in COMMANDS.items()
        for action in sub._actions
        if action.option_strings and not action.help and action.dest != "json"
    ]
    groups = [lm.build_parser()]
    for parser in groups:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                groups += action.choices.values()
                told = {choice.dest for choice in action._choices_actions if choice.help}
                silent += [f"{parser.prog} {verb}" for verb in action.choices.keys() - told]
    assert len(groups) > len(COMMANDS)
    assert not silent


def commands_in_blocks() -> Iterator[tuple[str, list[str]]]:
    """Each call of the program in a block of shell, with its page."""
    for page, text in PAGES.items():
        for language, block in FENCE.findall(text):
            joined = block.replace("\\\n", " ") if language == "sh" else ""
            for line in joined.splitlines():
                if PROGRAM.match(line):
                    call = re.split(r" (?:\||>|&&|#) ?", line)[0]
                    yield page, shlex.split(PROGRAM.sub("", call))


def test_every_command_in_a_block_is_one_that_the_program_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused: list[str] = []
    calls = [call for call in commands_in_blocks() if call[1]]
    parser = lm.build_parser()
    for page, call in calls:
        try:
            parser.parse_args(lm.join_values(call))
        except SystemExit:
            refused.append(f"{page}: {shlex.join(call)}: {capsys.readouterr().err}")
    assert len(calls) > 60
    assert not refused


def test_every_command_in_a_sentence_is_one_of_the_program_with_its_options() -> None:
    wrong: list[str] = []
    for page, text in PAGES.items():
        for code in CODE.findall(FENCE.sub("", text)):
            if not PROGRAM.match(code) or not (words := PROGRAM.sub("", code).split()):
                continue
            name = next((n for n in (" ".join(words[:2]), words[0]) if n in COMMANDS), None)
            options = {word.partition("=")[0] for word in words if word.startswith("--")}
            if name is None and words[0].isupper():
                continue  # `llm COMMAND --help`
            if name is None or options - OPTIONS[name]:
                wrong.append(f"{page}: {code}")
    assert not wrong


def test_every_option_that_a_page_names_is_one_of_the_program_or_of_an_engine() -> None:
    engines = lm.parse_engine_options((ROOT / "recipes" / "vllm.yaml").read_text())
    known = set().union(*OPTIONS.values()) | FOREIGN | {"--log-json"}
    known |= set().union(*engines.values())
    named = {
        (page, option)
        for page, text in PAGES.items()
        for code in CODE.findall(FENCE.sub("", text))
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", code)
    }
    assert len(named) > 50
    assert not {(page, option) for page, option in named if option not in known}


def test_the_exit_statuses_are_those_of_the_reference_and_of_the_help() -> None:
    text = " ".join(REFERENCE.split())
    assert "0 done, 1 failed, 2 wrong usage, 3 there is something to do" in text
    assert "0 done, 1 failed, 2 wrong usage, 3 there is something to do" in lm.FIRST_STEPS
    assert (lm.DONE, lm.FAILED, lm.WRONG_USAGE, lm.TO_DO) == (0, 1, 2, 3)


# --- settings, environment, ports, names ------------------------------------------


def settings(cls: type, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every setting of the state by its path, with its default."""
    hints = typing.get_type_hints(cls, vars(lm))
    for field in dataclasses.fields(cls):
        parts = dataclasses_in(hints[field.name])
        many = "[]" if typing.get_origin(hints[field.name]) is tuple else ""
        for part in parts:
            yield from settings(part, f"{prefix}{field.name}{many}.")
        made = field.default_factory is not dataclasses.MISSING
        if not parts:
            yield f"{prefix}{field.name}", field.default_factory() if made else field.default


def dataclasses_in(hint: object) -> list[type]:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return [hint]
    return [cls for part in typing.get_args(hint) for cls in dataclasses_in(part)]


def as_written(default: object) -> set[str]:
    """How the table may write a default."""
    match default:
        case dataclasses.MISSING:
            return {"", "drawn"}
        case None | ():
            return {"none", "all"}
        case bool():
            return {"yes"} if default else {"no", "off"}
        case tuple():
            return {", ".join(default)}
        case float():
            return {f"{default:g}"}
        case _:
            return {str(default)}


def test_the_reference_lists_every_setting_with_its_default() -> None:
    known: dict[str, set[str]] = {}
    for path, default in settings(lm.State):
        # Of the kinds of a union the first is written, as the others' cannot be a default.
        known.setdefault(path, as_written(default))
    told = {row[0].strip("`"): row[1] for row in rows("## Settings")}
    assert told.keys() == known.keys()
    assert {path: text for path, text in told.items() if text not in known[path]} == {}


def test_what_sets_a_setting_is_a_command_or_an_option() -> None:
    named = set(coded("## Settings", column=2))
    options = {name for name in named if name.startswith("--")}
    assert options <= set().union(*OPTIONS.values())
    assert {" ".join(n.split()[:2]) for n in named - options} <= {*COMMANDS}


class Asked(dict[str, str]):
    """An environment that remembers what it was asked for."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return False

    def get(self, name: str, default: object = None) -> typing.Any:
        self.names.add(name)
        return default


def is_environ(node: ast.expr) -> bool:
    return ast.unparse(node) == "os.environ"


def test_the_reference_lists_every_variable_that_the_program_reads() -> None:
    builds = Asked()
    lm.build_arguments(builds)
    read = builds.names | {*lm.PASSED_ON}
    for node in ast.walk(TREE):
        match node:
            case ast.Call(func=ast.Attribute(value=value, attr="get"), args=[ast.Constant(v), *_]):
                read |= {str(v)} if is_environ(value) else set()
            case ast.Subscript(value=value, slice=ast.Constant(v)):
                read |= {str(v)} if is_environ(value) else set()
            case _:
                pass
    # Everybody's, or set by systemd and sudo.
    usual = {"PATH", "LANG", "TMPDIR", "HOME", "LD_LIBRARY_PATH", "JOURNAL_STREAM", "SUDO_USER"}
    assert {*coded("## Environment")} == {name.upper() for name in read} - usual


def test_the_ports_are_those_of_the_program() -> None:
    edge, cache = lm.Edge(), lm.reveal(lm.cache_url(a_state()))
    of_program = {
        edge.https_port, edge.http_port, lm.CONSOLE_PORT, lm.MonitoringSettings().metrics_port,
        lm.ENGINE_PORT, lm.GATEWAY_PORT, lm.DATABASE_PORT, lm.PROMETHEUS_PORT,
        lm.ALERTMANAGER_PORT, int(re.findall(r":(\d+)/", cache)[0]),
        *(answers.port for answers in lm.MONITOR_HEALTH.values()),
    }  # fmt: skip
    told = {int(port) for row in rows("## Ports") for port in row[0].split(", ")}
    assert told == of_program


def test_containers_and_volumes_are_named_as_the_program_names_them() -> None:
    state = dataclasses.replace(a_state(), name_prefix="", monitoring=True)
    roles = typing.get_args(lm.MonitorRole)
    containers = {
        lm.edge_name(state), lm.database_name(state), lm.cache_name(state),
        *(lm.gateway_name(state, slot) for slot in ("a", "b")),
        *(lm.monitor_name(state, role) for role in roles),
    }  # fmt: skip
    told = {name for name in coded("## Containers and volumes") if name.startswith("llm-")}
    assert told - {"llm-model-NAME-0"} == containers
    volumes = {n for n in coded("## Containers and volumes", 2) if n.startswith("llm-")}
    assert volumes == {*lm.volume_names(state)}
    assert f"`{lm.network_name(state)}`" in REFERENCE


def files_of_the_home() -> set[str]:
    """What the program joins to its home, by name."""
    found = {lm.ENERGY_FILE, lm.FIRST_RUN_OVER}
    for node in ast.walk(TREE):
        match node:
            case ast.BinOp(left=left, op=ast.Div(), right=ast.Constant(value=str(name))):
                found |= {name} if ast.unparse(left).split(".")[-1] == "home" else set()
            case _:
                pass
    return found


def test_the_reference_lists_every_file_of_the_home() -> None:
    names = files_of_the_home() - {".llm-manager", "hub"}
    assert {row[0].strip("`/") for row in rows("## Files")} == {
        "lock*" if name.startswith("lock") else name for name in names
    }


def test_recipes_have_the_keys_of_the_reference() -> None:
    keys = {field.name for field in dataclasses.fields(lm.Recipe)} - {"name"}
    assert {*coded("## Recipes")} == keys


def test_the_rest_api_is_the_one_of_the_reference() -> None:
    paths = lm.build_api(None, None).openapi()["paths"]  # type: ignore[arg-type]
    there = {(method.upper(), path) for path, ways in paths.items() for method in ways}
    assert {(row[0], row[1].strip("`")) for row in rows("## REST API")} == there
    asked = {
        re.sub(r"\bID\b", "{job_id}", path)
        for path in re.findall(r'^api "?([\w/-]+)', PAGES["guide.md"], re.MULTILINE)
    }
    assert len(asked) > 4
    assert {f"{lm.API}/{path}" for path in asked} <= paths.keys()


def test_the_columns_are_those_of_the_exports() -> None:
    tables = [lm.SAMPLE_COLUMNS, lm.SESSION_COLUMNS]
    tables += [tuple(lm.energy_columns(by)) for by in lm.ENERGY_TABLES.values()]
    assert {*coded("## Columns of the CSVs")} == {column for table in tables for column in table}


def test_what_the_troubleshooting_quotes_is_said_by_the_program() -> None:
    table = rows("## When something is wrong", PAGES["operations.md"])
    quoted = [text for row in table for text in re.findall(r'"([^"]+)"', row[0])]
    said = strings()
    assert len(quoted) > 8
    assert [text for text in quoted if not any(text in each for each in said)] == []


def test_sections_that_the_pages_name_exist() -> None:
    titles = set(re.findall(r"^  §\d+ +(.+?) {2,}", ast.get_docstring(TREE) or "", re.MULTILINE))
    part = PAGES["development.md"].partition("## How the file is built")[2].partition("\n## ")[0]
    named = set(re.findall(r"\*([A-Z][\w ]+)\*(?!\*)", part.replace("**", "")))
    assert len(named) > 6
    assert named <= titles


# --- links and pictures -------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Of its headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_link_within_the_pages_leads_somewhere() -> None:
    dead: list[str] = []
    links = 0
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", page.read_text())):
            if target.startswith("https://"):
                continue
            links += 1
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            if not file.is_file() or (anchor and anchor not in anchors(file.read_text())):
                dead.append(f"{page.name}: {target}")
    assert links > 40
    assert not dead


def test_paths_of_the_repository_that_the_pages_name_are_there() -> None:
    named = {
        code
        for text in PAGES.values()
        for code in CODE.findall(text)
        if re.match(r"^(tests|docs|\.ci)/", code) and "*" not in code
    }
    assert len(named) > 5
    assert {code for code in named if not (ROOT / code).exists()} == set()


def test_every_picture_is_shown_small_and_as_wide_as_a_page() -> None:
    pictures = {path.name: path.read_bytes() for path in ROOT.glob("docs/*.png")}
    shown = {
        Path(target).name
        for text in PAGES.values()
        for target in re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    }
    assert shown == pictures.keys()
    assert {name for name, png in pictures.items() if len(png) > 150_000} == set()
    assert {int.from_bytes(png[16:20]) for png in pictures.values()} == {1280}
