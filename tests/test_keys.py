"""Keys, groups and lists of people as values: what LiteLLM is told, and why a key fails."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from hashlib import sha256
from typing import Any

import pytest
from builders import NOW, a_model, a_state
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

import llm_manager as lm

TOMORROW = NOW + timedelta(days=1)


def settings(alias: str = "Ada", **changes: Any) -> lm.KeySettings:
    return lm.parse_key_settings({"alias": alias, **changes})


def a_key(
    alias: str = "Ada",
    *,
    secret: str = "sk-of-a-test",  # noqa: S107
    **changes: Any,
) -> lm.VirtualKey:
    own = {f: changes.pop(f) for f in ("blocked", "used", "resets_at") if f in changes}
    return lm.VirtualKey(
        key_hash=sha256(secret.encode()).hexdigest(),
        hint=f"sk-...{secret[-4:]}",
        settings=settings(alias, **changes),
        **own,
    )


# --- what LiteLLM is told ---


@pytest.mark.parametrize("alias", ["", "  ", "a\nb", "x" * 101, "a\0b", " Ada"])
def test_a_key_without_a_printable_name_is_refused(alias: str) -> None:
    with pytest.raises(lm.RefusedError, match="must be a printable name"):
        settings(alias)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rpm_limit": 0}, {"tpm_limit": -1}, {"parallel": 0}, {"budget": 0},
        {"budget": float("nan")},
        {"budget": float("inf")}, {"rpm_limit": 1.5}, {"rpm_limit": 2**31}, {"email": "a b@c"},
        {"period": "year", "budget": 1}, {"period": "day"}, {"colour": "red"}, {"note": "a\nb"},
    ],
    ids=str,
)  # fmt: skip
def test_what_no_key_can_have_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(lm.RefusedError):
        settings(**wrong)


def test_a_new_key_is_told_to_litellm_with_every_limit() -> None:
    wished = settings(
        models=("chat",), rpm_limit=3, budget=0.5, period="month", parallel=2, group="ML",
        email="ada@example.org", expires_at=TOMORROW,
    )  # fmt: skip
    assert lm.key_body(wished, NOW) == {
        "key_alias": "Ada",
        "models": ["chat"],
        "duration": "86400s",
        "rpm_limit": 3,
        "tpm_limit": None,
        "max_parallel_requests": 2,
        "max_budget": 0.5,
        "budget_duration": "1mo",
        "team_id": "ML",
        "metadata": {"email": "ada@example.org", "note": ""},
    }
    with pytest.raises(lm.RefusedError, match="ended already"):
        lm.key_body(wished, TOMORROW)


def test_a_change_names_only_what_differs_and_takes_limits_away() -> None:
    old = settings(rpm_limit=3, expires_at=TOMORROW)
    assert lm.key_changes(old, old, NOW) == {}
    assert lm.key_changes(old, replace(old, rpm_limit=None), NOW) == {"rpm_limit": None}
    assert lm.key_changes(old, replace(old, expires_at=None), NOW) == {"duration": None}
    # What has expired can be changed and given more time.
    later = TOMORROW + timedelta(days=9)
    assert lm.key_changes(old, replace(old, note="x"), later)["metadata"]["note"] == "x"
    longer = replace(old, expires_at=later + timedelta(hours=1))
    assert lm.key_changes(old, longer, later) == {"duration": "3600s"}


def test_what_litellm_lists_is_read_back() -> None:
    wished = settings(
        models=("chat",), rpm_limit=3, tpm_limit=4, budget=2.5, period="week", parallel=2,
        group="ML", email="ada@example.org", note="a note", expires_at=TOMORROW,
    )  # fmt: skip
    body = lm.key_body(wished, NOW)
    entry = body | {
        "token": "abc", "key_name": "sk-...1234", "spend": 1.25, "expires": TOMORROW.isoformat(),
        "blocked": None, "budget_reset_at": "2026-03-09T00:00:00Z", "last_active": None,
    }  # fmt: skip
    key = lm.read_key(entry)
    assert key.settings == wished
    assert (key.key_hash, key.used, key.blocked) == ("abc", 1.25, False)
    assert key.resets_at is not None
    assert lm.read_key({"token": "abc"}).settings.alias == ""


def test_a_group_is_told_and_read_back() -> None:
    group = lm.parse_group({"name": "ML", "budget": 5, "models": ["chat"], "note": "a course"})
    body = lm.group_body(group)
    assert (body["team_id"], body["max_budget"]) == ("ML", 5)
    known = lm.read_group(body | {"spend": 1.5, "blocked": True})
    assert known == lm.KnownGroup(settings=group, blocked=True, used=1.5)
    rows = lm.group_rows([known], [a_key(group="ML"), a_key("Bob")], NOW)
    assert rows == [["ML", "1", "chat", "blocked", "none", "1.5 of 5 million tokens", ""]]


def test_the_form_of_a_key_and_its_settings_say_the_same() -> None:
    wished = settings(models=("chat",), rpm_limit=3, budget=2.5, period="week", note="x",
                      expires_at=NOW + timedelta(days=3))  # fmt: skip
    names = ("alias", "email", "group", "models", "rpm_limit", "tpm_limit", "budget", "period",
             "parallel", "days", "note")  # fmt: skip
    held = lm.form_of_key(wished, NOW, names)
    fields = lm.key_fields(dict(zip(names, held, strict=True)), NOW)
    assert lm.parse_key_settings(fields) == wished
    empty = lm.key_fields(dict.fromkeys(names) | {"alias": " Ada "}, NOW)
    assert lm.parse_key_settings(empty) == settings()


def test_days_beyond_the_calendar_are_refused() -> None:
    assert lm.end_after(0, NOW) is None
    assert lm.end_after(1, NOW) == TOMORROW
    for days in (10**7, 10**12, float("inf"), float("nan")):
        with pytest.raises(lm.RefusedError, match="more than a calendar has"):
            lm.end_after(days, NOW)


def test_a_grace_is_at_most_a_year() -> None:
    assert lm.parse_grace(0) == timedelta(0)
    assert lm.parse_grace(36.5) == timedelta(hours=36.5)
    for hours in (-1, 8761, 1e300, float("inf"), float("nan")):
        with pytest.raises(lm.InvalidError, match="cannot work on for"):
            lm.parse_grace(hours)


def test_a_key_is_a_row_that_never_holds_its_secret() -> None:
    key = a_key(tpm_limit=9, expires_at=NOW, secret="sk-hush-hush-1234")  # noqa: S106
    (row,) = lm.key_rows([key], NOW)
    (shown,) = lm.keyed(lm.KEY_HEADERS, [row])
    assert (shown["for"], shown["key"], shown["models"]) == ("Ada", "sk-...1234", "all")
    assert (shown["state"], shown["limits"]) == ("expired", "9 tokens/min")
    facts = lm.key_facts(key, NOW)
    assert (facts["alias"], facts["tpm_limit"], facts["state"]) == ("Ada", 9, "expired")
    assert "hush" not in repr((row, facts))


def test_keys_are_counted_by_state_and_without_one_it_is_said_what_they_are_for() -> None:
    keys = [a_key(), a_key(), a_key(expires_at=NOW)]
    assert lm.keys_text(keys, NOW) == "**3 keys:** 2 active, 1 expired."
    assert lm.keys_text([], NOW) == lm.NO_KEYS


def test_a_replaced_key_leaves_its_name_and_ends_no_later_than_it_would() -> None:
    key = a_key("Ada " * 20 + "Lovelace", expires_at=TOMORROW)
    old = lm.retired(key, NOW + timedelta(days=9))
    assert old.expires_at == TOMORROW
    assert old.alias != key.settings.alias
    assert lm.parse_key_settings(asdict(old)) == old
    assert lm.retired(a_key(), TOMORROW).expires_at == TOMORROW


# --- many at once ---


def people(text: str, *keys: lm.VirtualKey, **template: Any) -> list[lm.KeySettings]:
    return lm.parse_people(text, settings("of the list", **template), keys)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_list_of_people_is_read_with_its_template(delimiter: str) -> None:
    text = "\ufeffName,Email,Group\r\nAda,ada@example.org,\r\n\r\nBob,,Physics\r\n"
    made = people(text.replace(",", delimiter), group="ML", rpm_limit=5)
    assert [(each.alias, each.email, each.group, each.rpm_limit) for each in made] == [
        ("Ada", "ada@example.org", "ML", 5),
        ("Bob", "", "Physics", 5),
    ]


def test_people_of_one_name_are_told_apart_by_their_addresses() -> None:
    made = people("name,email\nAda,a@x.org\nAda,b@x.org\nBob,\n", a_key("Eve"))
    assert [each.alias for each in made] == ["Ada (a@x.org)", "Ada (b@x.org)", "Bob"]
    assert [each.alias for each in people("name,email\nAda,a@x.org\n", a_key())] == [
        "Ada (a@x.org)"
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "does not name the columns"),
        ("Ada\n", "does not name the columns"),
        ("name,colour\nAda,red\n", "does not name the columns"),
        ("name\n", "names nobody"),
        ("name,email\nAda,\n,b@x.org\n", "line 3: "),
        ("name,email\nAda,\nBob,not an address\n", "line 3: .*e-mail"),
        ("name\nAda\nAda\n", "line 3: there is a key called 'Ada' already"),
        ("name\nEve\n", "line 2: there is a key called 'Eve' already"),
        ("name\n" + "x\n" * 2001, "more than 2000"),
    ],
)
def test_a_bad_list_names_its_lines_and_makes_nothing(text: str, said: str) -> None:
    with pytest.raises(lm.RefusedError, match=said):
        people(text, a_key("Eve"))


@given(st.text(max_size=200))
def test_no_list_is_more_than_refused(text: str) -> None:
    for each in (text, f"name,email,group\n{text}"):
        try:
            made = people(each)
        except lm.RefusedError:
            continue
        assert len({one.alias for one in made}) == len(made)


def test_the_secrets_are_a_table_without_formulas() -> None:
    made = [(settings("=1+1", email="ada@example.org"), SecretStr("sk-1"))]
    assert list(csv.reader(io.StringIO(lm.secrets_csv(made)))) == [
        ["name", "email", "group", "key"],
        ["'=1+1", "ada@example.org", "", "sk-1"],
    ]


# --- why a key does not work ---


def why(text: str, model: str = "", **changes: Any) -> str:
    keys = [a_key(secret="sk-of-ada-1234", **changes)]  # noqa: S106
    groups = [lm.KnownGroup(settings=lm.Group(name="ML", models=("embed",)), blocked=True)]
    state = a_state(a_model(), a_model("off", wish="stopped"), a_model("ended"))
    served = lm.served_models(state, [state.model("chat")])
    return lm.diagnosis_text(lm.diagnose(text, model, (keys, groups), state, served, NOW))


@pytest.mark.parametrize("text", ["sk-of-ada-1234", "Ada", "sk-...1234",
                                  sha256(b"sk-of-ada-1234").hexdigest()[:10]])  # fmt: skip
def test_a_key_is_found_by_whatever_there_is_of_it(text: str) -> None:
    assert why(text, "chat") == "The key of Ada (sk-...1234): nothing speaks against it."


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        ("", {"blocked": True}, "It is blocked: 401. Unblock it."),
        ("", {"expires_at": NOW}, "It expired on 2026-03-04"),
        ("", {"budget": 1, "used": 1.0, "period": "day"}, "The budget of 1 million tokens per day"),
        ("", {"group": "ML"}, "Its group ML is blocked"),
        ("chat", {"group": "ML"}, "Its group allows only embed: 403"),
        ("chat", {"models": ("off",)}, "The key allows only off: 403"),
        ("gpt", {}, "Nothing is served as gpt: 400"),
        ("off", {}, "Nobody answers for off now"),
        ("ended", {}, "Nobody answers for ended now. Look in Models"),
    ],
)
def test_each_reason_is_named_with_what_to_do(
    model: str, changes: dict[str, Any], said: str
) -> None:
    assert said in why("Ada", model, **changes)


def test_an_unknown_key_and_a_direct_one_are_told() -> None:
    assert "No key is like that" in why("sk-something-else")
    assert "Unknown key" in why("")
    key = lm.parse_direct_key({"name": "lab", "secret": "sk-direct-12345"})
    state = a_state(direct_keys=(key,))
    found = lm.diagnose("sk-direct-12345", "", ([], []), state, [], NOW)
    assert "opens /models, and not /v1" in found.title
    state = a_state(direct_keys=(replace(key, emergency=True),))
    found = lm.diagnose("sk-direct-12345", "", ([], []), state, [], NOW)
    assert "opens /models and /v1" in found.title


def test_limits_are_told_with_their_answer() -> None:
    said = why("Ada", "chat", rpm_limit=5, parallel=2)
    assert said.endswith("nothing speaks against it. Beyond 5 requests/min, 2 at a time: 429.")


def test_a_budget_that_is_due_again_refuses_nobody() -> None:
    used = a_key(budget=1, period="day", used=2.0, resets_at=NOW)
    assert lm.key_state(used, NOW) == "active"
    assert lm.key_state(replace(used, resets_at=TOMORROW), NOW) == "used up"


def test_a_pattern_and_an_alias_allow_what_they_stand_for() -> None:
    route = lm.Route(name="big", members=("chat",), aliases=("nick",))
    pattern = lm.Route(name="lab/*", members=("far/*",))
    far = lm.Provider(name="far", kind="openai", base_url="http://far.example")
    state = a_state(a_model(), routes=(route, pattern), providers=(far,))
    for allowed, asked in (("big", "nick"), ("lab/*", "lab/x")):
        key = a_key(models=(allowed,))
        served = lm.served_models(state, state.wished_models)
        assert not lm.diagnose("Ada", asked, ([key], []), state, served, NOW).faults


@pytest.mark.parametrize(
    ("used", "said"),
    [(0, "nothing"), (6e-6, "6 tokens"), (0.0042, "4,200 tokens"), (1.5, "1.5 million"),
     (104.2, "104 million"), (1234.5, "1,234 million")],
)  # fmt: skip
def test_what_was_used_is_said_in_figures_that_can_be_read(used: float, said: str) -> None:
    assert lm.used_text(settings("Ada"), used).startswith(said)
    assert lm.used_text(settings("Ada", budget=5), 6e-6) == "6 tokens of 5 million tokens"


def test_what_would_happen_to_a_group_is_said_before_it_does() -> None:
    yesterday = NOW - timedelta(days=1)
    keys = [a_key(expires_at=end) for end in (yesterday, TOMORROW, None)]
    asked = partial(lm.group_question, name="ML", keys=keys, now=NOW)
    week = NOW + timedelta(days=7)
    assert "the 3 keys of ML end: 2026-03-11?** Now 2 end sooner, 1 of them" in asked(
        "extend", until=week
    )
    assert "and 1 end later" in asked("extend", until=week)
    assert "end: never?** Now 2 end sooner" in asked("extend", until=None)
    assert "Block the group ML with its 3 keys?" in asked("block", until=None)
    assert "Revoke the group ML with its 3 keys?" in asked("revoke", until=None)
