"""Hub: searches, downloads and the cache, against a real server on loopback and real processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import SECRET_MARK, a_secret, a_state
from fake_hub import FakeHub, Repository, a_safetensors, an_index, blob_of, wait_for

import llm_manager as lm

CONFIG = '{"architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 4096}'
TOKEN = a_secret("hub")
ENV = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_HOME", "HF_HUB_CACHE")


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    for name in ENV:
        monkeypatch.delenv(name, raising=False)
    with FakeHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> lm.HubCache:
    return lm.HubCache(tmp_path / "home", free=lambda _: 2**40)


def a_client(cache: lm.HubCache, token: Any = None, **settings: float) -> lm.HuggingFace:
    return lm.HuggingFace(cache, lambda: token, **{"retry_seconds": 0.01, **settings})


def a_repository(hub: FakeHub, name: str = "acme/tiny", size: int = 300_000) -> Repository:
    """A chat model with one big file, a small one, and what no engine needs."""
    files: dict[str, str | bytes] = {
        "config.json": CONFIG,
        "model.safetensors": a_safetensors(size // 2),
        "pytorch_model.bin": b"the same again",
        "README.md": "# Tiny",
    }
    return hub.add(name, files, pipeline_tag="text-generation", cardData={"license": "mit"})


NEEDED = ("config.json", "model.safetensors")


class Watcher:
    """Follows a download; may cancel it when something became true."""

    def __init__(self, cancel_when: Callable[[], bool] = lambda: False) -> None:
        self.seen: list[lm.DownloadProgress] = []
        self._cancel_when = cancel_when

    def on_progress(self, progress: lm.DownloadProgress) -> None:
        self.seen.append(progress)

    def check(self) -> None:
        if self._cancel_when():
            raise lm.CancelledError("It was cancelled.", advice="Start it again.")

    @property
    def notes(self) -> str:
        return "\n".join(dict.fromkeys(progress.note for progress in self.seen))


def download(
    client: lm.HuggingFace,
    repository: str = "acme/tiny",
    revision: str | None = None,
    watcher: Watcher | None = None,
) -> str:
    watcher = watcher or Watcher()
    client.cache.home.mkdir(exist_ok=True)  # as the program does with a home of its own
    return client.download(
        repository, revision, on_progress=watcher.on_progress, check=watcher.check
    )


def transfers(home: Path) -> list[int]:
    """The processes that download into this cache."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (path / "cmdline").read_bytes()
            mine = f"HF_HOME={home}\0".encode() in (path / "environ").read_bytes()
            if lm.FETCH_WEIGHTS.encode() in command and mine:
                found.append(int(path.name))
    return found


def incomplete(cache: lm.HubCache) -> list[Path]:
    return list(cache.hub.rglob("*.incomplete"))


def test_a_search_finds_the_most_downloaded_first(hub: FakeHub, cache: lm.HubCache) -> None:
    half = {"parameters": {"BF16": 1000, "F32": 10}, "total": 1010}
    hub.add("acme/chat", {}, downloads=5, pipeline_tag="text-generation", safetensors=half)
    hub.add("acme/Chatty", {}, downloads=50, likes=3, gated="auto",
            lastModified="2026-01-02T03:04:05.000Z", pipeline_tag="text-generation")  # fmt: skip
    hub.add("acme/chat-embed", {}, downloads=500, pipeline_tag="feature-extraction")
    hub.add("acme/chat-alike", {}, downloads=900, pipeline_tag="sentence-similarity")
    client = a_client(cache)
    names = [hit.repository for hit in client.search("chat")]
    assert names == ["acme/chat-alike", "acme/chat-embed", "acme/Chatty", "acme/chat"]
    embedding = [hit.repository for hit in client.search("chat", kind="embedding")]
    assert embedding == ["acme/chat-alike", "acme/chat-embed"]
    first, second = client.search("chat", kind="chat")
    assert (first.gated, first.likes, first.weights_bytes) == (True, 3, None)
    assert f"{first.updated_at:%d.%m.%Y}" == "02.01.2026"
    assert (second.gated, second.weights_bytes) == (False, 2040)
    assert len(client.search("chat", limit=1)) == 1


def test_a_repository_is_known_before_its_download(hub: FakeHub, cache: lm.HubCache) -> None:
    repository = a_repository(hub)
    about = a_client(cache).inspect("acme/tiny")
    assert about.commit == repository.refs["main"]
    assert (about.architectures, about.context) == (("Qwen3ForCausalLM",), 4096)
    assert (about.licence, about.private, about.gated, about.readable) == (
        "mit",
        False,
        False,
        True,
    )
    assert tuple(file.path for file in about.needed) == NEEDED
    assert about.download_bytes == about.weights_bytes + len(CONFIG)
    assert lm.guess_type(about) == "chat"
    assert not cache.home.exists()


def test_a_branch_and_a_tag_are_resolved_to_their_commits(hub: FakeHub, cache: lm.HubCache) -> None:
    repository = a_repository(hub)
    tagged = repository.commit({"config.json": "{}"}, "refs/pr/1")
    client = a_client(cache)
    assert client.resolve("acme/tiny") == repository.refs["main"] != tagged
    assert client.resolve("acme/tiny", "refs/pr/1") == tagged
    assert client.inspect("acme/tiny", tagged).commit == tagged


def test_a_gated_repository_shows_its_facts_but_not_its_files(
    hub: FakeHub, cache: lm.HubCache
) -> None:
    a_repository(hub).troubles.gated = True
    about = a_client(cache).inspect("acme/tiny")
    assert (about.gated, about.readable, about.config) == ("manual", False, {})


REFUSALS: list[tuple[dict[str, Any], Any, lm.HubTrouble, str]] = [
    ({"absent": True}, None, "absent", "is not on 127.0.0.1"),
    ({"hidden": True}, None, "gated", "accept its terms, and set a token with `config token`"),
    ({"token": "the right one"}, TOKEN, "token", "refuses this server's Hugging Face token"),
    ({"token": "the right one"}, None, "absent", "or is private"),
    ({"forbidden": True}, TOKEN, "token", "set it with `config token`"),
    ({"busy_times": 1}, None, "rate", "wants fewer requests (status 429)"),
    ({"failing_times": 1}, None, "server", "in trouble itself (status 500)"),
    ({"babbling": True}, None, "server", "in trouble itself (its answer is no JSON)"),
]


@pytest.mark.parametrize(("troubles", "token", "kind", "words"), REFUSALS)
def test_every_refusal_is_said_in_plain_words(
    hub: FakeHub, cache: lm.HubCache, troubles: dict[str, Any], token: Any, kind: str, words: str
) -> None:
    repository = a_repository(hub)
    for name, value in troubles.items():
        setattr(repository.troubles, name, value)
    with pytest.raises(lm.HubError) as caught:
        a_client(cache, token).inspect("acme/tiny")
    assert (caught.value.kind, words in str(caught.value)) == (kind, True), str(caught.value)
    assert SECRET_MARK not in f"{caught.value!r} {caught.value}"


def test_a_revision_that_is_not_there_is_named(hub: FakeHub, cache: lm.HubCache) -> None:
    a_repository(hub)
    for name, asked in (("v9", 1), ("a/../../b", 1)):  # the second would be a path in the cache
        with pytest.raises(lm.HubError, match=f"acme/tiny has no revision '{name}'"):
            a_client(cache).resolve("acme/tiny", name)
        assert len(hub.requests) == asked


@pytest.mark.parametrize("name", ["", "a/b/c", "../etc", "a b/c", "a--b/c", "-x/y", "https://x/y"])
def test_what_is_no_name_is_refused_before_anything_is_asked(
    hub: FakeHub, cache: lm.HubCache, name: str
) -> None:
    with pytest.raises(lm.HubError, match="Write it like Qwen/Qwen3-8B"):
        a_client(cache).inspect(name)
    assert hub.requests == []


def test_a_hub_that_does_not_answer_is_named(
    cache: lm.HubCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        lm.HubError, match=r"127\.0\.0\.1:9 cannot be reached \(.*refused"
    ) as caught:
        a_client(cache).search("x")
    assert (caught.value.kind, "HF_ENDPOINT" in caught.value.advice) == ("unreachable", True)


def test_the_stored_token_goes_before_the_environments_and_none_is_sent_where_there_is_none(
    hub: FakeHub, cache: lm.HubCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_client(cache).search("x")
    monkeypatch.setenv("HF_TOKEN", "from the environment")
    a_client(cache).search("x")
    a_client(cache, TOKEN).search("x")
    assert hub.tokens == [None, "from the environment", TOKEN.get_secret_value()]
    assert hub.count("GET /api/models") == len(hub.requests)  # and nothing about us is asked


def test_a_download_fetches_what_an_engine_needs_and_once(hub: FakeHub, cache: lm.HubCache) -> None:
    repository = a_repository(hub)
    client, watcher = a_client(cache), Watcher()
    commit = download(client, watcher=watcher)
    snapshot = cache.folder("acme/tiny") / "snapshots" / commit
    assert sorted(path.name for path in snapshot.iterdir()) == [*NEEDED]
    for name in NEEDED:
        assert (snapshot / name).read_bytes() == repository.commits[commit][name]
    last = watcher.seen[-1]
    assert (last.bytes_done, last.files_done) == (last.bytes_total, 2)
    assert [cache.commit("acme/tiny"), cache.present("acme/tiny")] == [commit, True]
    assert download(client) == commit
    assert hub.count(r"GET .*/model\.safetensors") == 1
    assert (incomplete(cache), transfers(cache.home)) == ([], [])
    # An engine that is offline finds what it looks for: files left out are no missing files.
    assert offline_hf(
        cache.home, "acme/tiny", "--include=*.safetensors", "--include=*.bin"
    ).is_dir()


def hf(home: Path, *arguments: str, **environment: str) -> str:
    """Hugging Face's own command line, as somebody else would use it."""
    hf_home = {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [Path(sys.executable).with_name("hf"), "download", *arguments],
        env=os.environ | hf_home | environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def offline_hf(home: Path, *arguments: str) -> Path:
    said = hf(home, *arguments, "--quiet", HF_HUB_OFFLINE="1")
    return Path(said.split()[-1])


def test_what_somebody_else_downloaded_is_present_and_parts_of_it_are_not(
    hub: FakeHub, cache: lm.HubCache
) -> None:
    commit = a_repository(hub).refs["main"]
    hf(cache.home, "acme/tiny", "--include", "*.json")
    assert not cache.present("acme/tiny")
    hf(cache.home, "acme/tiny")
    assert cache.present("acme/tiny")
    assert cache.present("acme/tiny", commit)
    assert not cache.present("acme/tiny", "v9")
    (known,) = cache.read().revisions
    assert (known.refs, known.missing, known.files) == (("main",), (), 4)
    (cache.folder("acme/tiny") / "snapshots" / commit / "config.json").unlink()
    assert cache.read().revisions[0].missing == ("config.json",)


def test_all_that_is_whole_is_seen_beside_what_is_damaged(hub: FakeHub, cache: lm.HubCache) -> None:
    commit = a_repository(hub).refs["main"]
    hf(cache.home, "acme/tiny")
    assert cache.stored() == {"acme/tiny": frozenset({"main", commit})}
    odd = cache.hub / "models--a--odd"
    (odd / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (odd / "snapshots" / ("a" * 40) / "model.safetensors.index.json").write_text(
        '{"weight_map": null}'
    )
    (odd / "refs").mkdir()
    (odd / "refs" / "main").write_bytes(b"\xff\xfe")
    loop = cache.hub / "models--b--loop"
    (loop / "snapshots").mkdir(parents=True)
    (loop / "snapshots" / ("b" * 40)).symlink_to(loop / "snapshots" / ("b" * 40))
    assert cache.stored()["acme/tiny"] == {"main", commit}
    (looped,) = [known for known in cache.read().revisions if known.repository == "acme/tiny"]
    assert (looped.refs, looped.missing) == (("main",), ())
    assert not cache.present("a/odd")
    (cache.folder("acme/tiny") / "snapshots" / commit / "config.json").resolve().unlink()
    assert cache.stored()["acme/tiny"] == frozenset()


def test_a_home_that_is_not_mounted_is_not_made(hub: FakeHub, tmp_path: Path) -> None:
    a_repository(hub)
    absent = tmp_path / "disk" / "hf"
    adapter = lm.HuggingFace(lm.HubCache(absent), lambda: None)
    with pytest.raises(lm.ManagerError, match="Check that it is there"):
        adapter.download("acme/tiny", on_progress=lambda _: None, check=lambda: None)
    assert not absent.parent.exists()


def test_a_pinned_commit_that_is_here_needs_no_hub(
    hub: FakeHub, cache: lm.HubCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = a_repository(hub).refs["main"]
    hf(cache.home, "acme/tiny")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    adapter = lm.HuggingFace(cache, lambda: None)
    said: list[lm.DownloadProgress] = []
    found = adapter.download("acme/tiny", commit, on_progress=said.append, check=lambda: None)
    assert (found, said) == (commit, [])


@pytest.mark.parametrize(
    "odd", [[{"modelId": "a/b"}], [{"id": "a/b", "lastModified": 3}], ["a/b"]], ids=str
)
def test_a_mirror_that_answers_something_else_is_said_in_words(odd: list[Any]) -> None:
    wanted = lm.Wanted(endpoint="https://mirror", repository="a/b")
    with pytest.raises(lm.HubError, match="not understood"), lm.understood(wanted):
        [lm._hit(found) for found in odd]


def test_a_connection_that_breaks_off_costs_nothing(hub: FakeHub, cache: lm.HubCache) -> None:
    repository = a_repository(hub)
    repository.troubles.break_after = 100_000
    commit = download(a_client(cache))
    weights = cache.folder("acme/tiny") / "snapshots" / commit / "model.safetensors"
    assert weights.read_bytes() == repository.commits[commit]["model.safetensors"]
    assert weights.resolve().name == blob_of(weights.read_bytes())
    assert hub.count(r"GET .*/model\.safetensors") == 2


def test_a_cancelled_download_goes_on_from_the_files_it_has(
    hub: FakeHub, cache: lm.HubCache
) -> None:
    repository = a_repository(hub, size=600_000)
    repository.troubles.bytes_per_second = 100_000
    small = cache.folder("acme/tiny") / "blobs" / blob_of(CONFIG.encode())
    watcher = Watcher(lambda: small.exists() and bool(incomplete(cache)))
    with pytest.raises(lm.CancelledError):
        download(a_client(cache), watcher=watcher)
    assert (small.exists(), incomplete(cache), transfers(cache.home)) == (True, [], [])
    assert not cache.present("acme/tiny")
    assert cache.commit("acme/tiny") is None  # the branch moves when all is here
    repository.troubles.bytes_per_second = None
    asked = hub.count(r"GET .*/config\.json")
    commit = download(a_client(cache))
    assert hub.count(r"GET .*/config\.json") == asked + 1  # the look before, not the download
    weights = cache.folder("acme/tiny") / "snapshots" / commit / "model.safetensors"
    assert weights.read_bytes() == repository.commits[commit]["model.safetensors"]


KILLED = """
import sys
from pathlib import Path
import llm_manager as lm
client = lm.HuggingFace(lm.HubCache(Path(sys.argv[1])), lambda: None)
client.download("acme/tiny", on_progress=lambda _: None, check=lambda: None)
"""


def test_a_killed_manager_leaves_no_transfer_behind(hub: FakeHub, cache: lm.HubCache) -> None:
    a_repository(hub).troubles.bytes_per_second = 2_000
    home = cache.home
    home.mkdir()
    manager = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(home)], env=os.environ, cwd=lm.PROGRAM.parent
    )
    wait_for(lambda: incomplete(cache))
    assert len(transfers(home)) == 1
    assert cache.read().downloading == {"acme/tiny"}
    manager.send_signal(signal.SIGKILL)
    manager.wait()
    wait_for(lambda: not transfers(home))
    assert cache.read().downloading == frozenset()
    parts = len(incomplete(cache))  # nobody could clear up
    wait_for(lambda: len(cache.read().leftovers) == parts)  # its locks go last
    (removal,) = lm.orphans(cache.read(), a_state())
    assert {cache.hub / path for path in removal.leftovers} == set(incomplete(cache))
    cache.remove(removal)
    assert incomplete(cache) == []


def test_a_transfer_that_stands_still_is_restarted_without_xet(
    hub: FakeHub, cache: lm.HubCache
) -> None:
    repository = a_repository(hub)
    repository.troubles.stall_after = 100_000
    cache.home.mkdir()
    xet: list[str] = []

    def look(progress: lm.DownloadProgress) -> None:
        watcher.on_progress(progress)
        for pid in transfers(cache.home):
            with contextlib.suppress(OSError):
                settings = Path(f"/proc/{pid}/environ").read_text().split("\0")
                xet.extend(s for s in settings if s.startswith("HF_HUB_DISABLE_XET"))

    watcher = Watcher()
    client = a_client(cache, stall_seconds=6)  # a process that begins on a busy machine takes 3
    commit = client.download("acme/tiny", on_progress=look, check=watcher.check)
    assert "stood still (for 6 s" in watcher.notes
    assert "Trying again without Xet" in watcher.notes
    assert list(dict.fromkeys(xet)) == ["HF_HUB_DISABLE_XET=0", "HF_HUB_DISABLE_XET=1"]
    assert watcher.seen[-1].attempt >= 2
    weights = cache.folder("acme/tiny") / "snapshots" / commit / "model.safetensors"
    assert weights.read_bytes() == repository.commits[commit]["model.safetensors"]


def test_a_transfer_that_always_stands_still_is_given_up(hub: FakeHub, cache: lm.HubCache) -> None:
    troubles = a_repository(hub).troubles
    troubles.stall_after, troubles.stall_times = 1000, 1000
    watcher = Watcher()
    with pytest.raises(lm.HubError, match=r"acme/tiny stood still .*what is complete is kept"):
        download(a_client(cache, stall_seconds=0.3), watcher=watcher)
    assert watcher.seen[-1].attempt >= lm.STALLS
    assert (incomplete(cache), transfers(cache.home)) == ([], [])


def test_a_hub_in_trouble_is_asked_again(hub: FakeHub, cache: lm.HubCache) -> None:
    troubles = a_repository(hub).troubles
    troubles.failing_times, troubles.busy_times, troubles.retry_after = 1, 1, 2
    watcher = Watcher()
    download(a_client(cache), watcher=watcher)
    assert "status 500" in watcher.notes
    assert "wants fewer requests (status 429). Trying again in 2 s" in watcher.notes
    assert (watcher.seen[-1].attempt, cache.present("acme/tiny")) == (3, True)


def test_a_hub_that_stays_in_trouble_is_given_up(hub: FakeHub, cache: lm.HubCache) -> None:
    a_repository(hub).troubles.failing_times = 100
    watcher = Watcher()
    with pytest.raises(lm.HubError, match="status 500"):
        download(a_client(cache), watcher=watcher)
    assert hub.count("GET /api/models/acme/tiny") == lm.ATTEMPTS


def test_attempts_that_get_something_done_are_not_counted(hub: FakeHub, cache: lm.HubCache) -> None:
    class OneFileAtATime(lm.Download):
        done = 0

        def _attempt(self, look: Callable[[], int]) -> str:  # noqa: ARG002
            self.done += 1
            if self.done <= 2 * lm.ATTEMPTS:
                raise lm.HubError("stalled", self._wanted)
            return COMMIT

        def _complete(self) -> int:
            return self.done

    wanted = lm.Wanted(endpoint=hub.url, repository="acme/tiny")
    cache.home.mkdir()
    with cache.claims.claim("acme/tiny") as claim:
        slow = OneFileAtATime(a_client(cache), wanted, None, None, claim)
        assert slow.run(lambda _: None, lambda: None) == COMMIT


def test_a_repository_without_weights_is_refused(hub: FakeHub, cache: lm.HubCache) -> None:
    hub.add("acme/tiny", {"config.json": CONFIG, "README.md": "soon"})
    with pytest.raises(lm.RefusedError, match="acme/tiny holds no weights"):
        download(a_client(cache))


def test_a_gated_download_says_what_to_do_and_shows_no_token(
    hub: FakeHub, cache: lm.HubCache
) -> None:
    a_repository(hub).troubles.gated = True
    cache.home.mkdir()
    shown: list[str] = []

    def look(_: lm.DownloadProgress) -> None:
        for pid in transfers(cache.home):
            with contextlib.suppress(OSError):
                shown.extend(Path(f"/proc/{pid}/{of}").read_text() for of in ("cmdline", "environ"))

    with pytest.raises(lm.HubError, match="accept its terms") as caught:
        a_client(cache, TOKEN).download("acme/tiny", on_progress=look, check=lambda: None)
    assert caught.value.kind == "gated"
    assert shown
    assert SECRET_MARK not in f"{shown} {caught.value!r}"
    assert TOKEN.get_secret_value() in hub.tokens


def test_a_hub_that_says_nothing_does_not_hold_up_a_cancel(
    hub: FakeHub, cache: lm.HubCache
) -> None:
    a_repository(hub).troubles.silent = True
    watcher = Watcher(lambda: hub.count("GET /api/models/acme/tiny") > 0)
    with pytest.raises(lm.CancelledError):
        download(a_client(cache), watcher=watcher)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("hub-look")]
    assert cache.read().downloading == frozenset()


def test_a_mirror_may_name_contents_in_its_own_way(hub: FakeHub, cache: lm.HubCache) -> None:
    repository = a_repository(hub)
    repository.troubles.own_names = True
    watcher = Watcher()
    commit = download(a_client(cache), watcher=watcher)
    assert (watcher.seen[-1].files_done, cache.present("acme/tiny", commit)) == (2, True)
    assert not (cache.folder("acme/tiny") / "blobs" / blob_of(CONFIG.encode())).exists()


def test_no_download_begins_without_room_for_it(hub: FakeHub, tmp_path: Path) -> None:
    a_repository(hub)
    cache = lm.HubCache(tmp_path, free=lambda _: lm.DISK_MARGIN_BYTES + 299_999)
    with pytest.raises(lm.HubError, match=r"too full for acme/tiny \(293.2 KiB to come") as caught:
        download(a_client(cache))
    assert caught.value.kind == "disk"
    assert hub.count("GET .*/tree/.*") == 0


RESERVED = """
import sys
from pathlib import Path
import llm_manager as lm
cache = lm.HubCache(Path(sys.argv[1]))
with cache.claims.claim("acme/other") as claim:
    cache.claims.still_to_come(claim, 200_000)
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_downloads_of_all_processes_share_the_room(hub: FakeHub, tmp_path: Path) -> None:
    a_repository(hub)
    cache = lm.HubCache(tmp_path, free=lambda _: 400_000, margin_bytes=0)
    other = subprocess.Popen(
        [sys.executable, "-c", RESERVED, str(tmp_path)], cwd=lm.PROGRAM.parent,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(lm.HubError, match=r"195.3 KiB of that for other downloads"):
            download(a_client(cache))
        with pytest.raises(lm.BusyError, match="acme/other is being downloaded"):
            download(a_client(cache), "acme/other")
        other.kill()
    assert download(a_client(cache))


def test_one_download_of_a_repository_at_a_time(hub: FakeHub, cache: lm.HubCache) -> None:
    a_repository(hub).troubles.bytes_per_second = 20_000
    stop = threading.Event()
    first = threading.Thread(target=_until, args=(a_client(cache), stop))
    first.start()
    try:
        wait_for(lambda: incomplete(cache))
        with pytest.raises(lm.BusyError, match="being downloaded or removed already"):
            download(a_client(cache))
        everything = cache.read()
        assert (everything.downloading, everything.leftovers) == ({"acme/tiny"}, ())
        with pytest.raises(lm.BusyError):
            cache.remove(lm.Removal(repository="acme/tiny"))
    finally:
        stop.set()
        first.join()
    assert cache.read().downloading == frozenset()


def _until(client: lm.HuggingFace, stop: threading.Event) -> None:
    with contextlib.suppress(lm.CancelledError):
        download(client, watcher=Watcher(stop.is_set))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for 256 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_is_said_so(hub: FakeHub, small_disk: Path) -> None:
    a_repository(hub)
    cache = lm.HubCache(small_disk, free=lambda _: 2**40)
    with pytest.raises(lm.HubError, match="The disk is too full for acme/tiny") as caught:
        download(a_client(cache))
    assert "no model uses" in caught.value.advice
    assert incomplete(cache) == []


def test_without_network_the_cache_and_directories_are_enough(
    hub: FakeHub, cache: lm.HubCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    commit = stored(cache, {"config.json": CONFIG, "model.safetensors": a_safetensors(70)})
    client = a_client(cache)
    about = client.inspect("acme/tiny")
    assert (about.commit, about.parameters, about.context) == (commit, {"BF16": 70}, 4096)
    assert client.resolve("acme/tiny") == download(client) == commit
    for ask in (client.inspect, client.resolve, lambda name: download(client, name)):
        with pytest.raises(lm.HubError, match="HF_HUB_OFFLINE is set, and acme/none is not"):
            ask("acme/none")
    with pytest.raises(lm.HubError, match="HF_HUB_OFFLINE is set"):
        client.search("x")
    assert hub.requests == []


def test_a_local_directory_is_read_exactly(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    (tmp_path / "model-1.safetensors").write_bytes(a_safetensors(100))
    (tmp_path / "model-2.safetensors").write_bytes(a_safetensors(20, "F32"))
    about = lm.inspect_directory(tmp_path)
    assert about.parameters == {"BF16": 100, "F32": 20}
    assert about.weights_bytes == sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    assert (about.architectures, lm.guess_type(about)) == (("Qwen3ForCausalLM",), "chat")


WHOLE = a_safetensors(100)


@pytest.mark.parametrize("content", [WHOLE[:-1], b"", b"\xff" * 100, b"\2" + 7 * b"\0" + b"[]"])
def test_a_directory_with_half_a_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(lm.RefusedError, match=r"model\.safetensors is not whole"):
        lm.inspect_directory(tmp_path)


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lm.RefusedError, match="holds no files"):
        lm.inspect_directory(tmp_path / "none")


COMMIT = "1" * 40


def stored(
    cache: lm.HubCache,
    files: dict[str, str | bytes],
    commit: str = COMMIT,
    ref: str = "main",
    repository: str = "acme/tiny",
) -> str:
    """A revision as huggingface_hub leaves it in the cache."""
    folder = cache.folder(repository)
    for name, text in files.items():
        content = text.encode() if isinstance(text, str) else text
        blob, link = folder / "blobs" / blob_of(content), folder / "snapshots" / commit / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / ref).write_text(commit)
    return commit


def test_weights_are_present_only_when_an_engine_could_start(cache: lm.HubCache) -> None:
    shards = ("model-1.safetensors", "model-2.safetensors")
    index = {"config.json": CONFIG, "model.safetensors.index.json": an_index(*shards)}
    assert not cache.present("acme/tiny")
    stored(cache, {**index, shards[0]: a_safetensors(1)})
    assert not cache.present("acme/tiny")
    stored(cache, {shards[1]: a_safetensors(2)})
    assert cache.present("acme/tiny")
    (cache.folder("acme/tiny") / "blobs" / blob_of(a_safetensors(2))).unlink()
    assert not cache.present("acme/tiny")
    (known,) = cache.read().revisions  # what is damaged is shown
    assert known.missing == (shards[1],)
    assert not cache.present("../../etc", "../../passwd")


def test_a_look_at_the_cache_needs_no_library() -> None:
    script = (
        "import sys, llm_manager as lm; from pathlib import Path; c = lm.HubCache(Path('/none'));"
        "c.present('a/b'); c.read(); print([m for m in sys.modules if m.startswith('httpx2.')"
        " or m.startswith('huggingface_hub.')])"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], cwd=lm.PROGRAM.parent, capture_output=True, check=True
    )
    assert said.stdout == b"[]\n"


def sizes(cache: lm.HubCache) -> int:
    return sum(path.stat().st_size for path in cache.hub.rglob("blobs/*") if path.is_file())


def test_removing_a_revision_frees_what_was_promised_and_no_more(cache: lm.HubCache) -> None:
    old = stored(cache, {"config.json": CONFIG, "model.safetensors": a_safetensors(100)}, ref="v1")
    new = stored(cache, {"config.json": CONFIG, "model.safetensors": a_safetensors(50)}, "2" * 40)
    other = stored(cache, {"model.safetensors": a_safetensors(9)}, repository="acme/other")
    before, everything = sizes(cache), cache.read()
    assert everything.size_bytes == before
    removal = lm.plan_removal(everything, a_state(), "acme/tiny", "v1")
    assert (removal.commits, removal.shared_bytes) == ((old,), len(CONFIG))
    cache.remove(removal)
    assert before - sizes(cache) == removal.freed_bytes == len(a_safetensors(100))
    assert [cache.present("acme/tiny"), cache.commit("acme/tiny", "v1")] == [True, None]
    cache.remove(lm.plan_removal(cache.read(), a_state(), "acme/tiny", new))
    assert not cache.folder("acme/tiny").exists()
    assert cache.present("acme/other", other)


def test_what_is_being_written_is_no_leftover(cache: lm.HubCache) -> None:
    stored(cache, {"model.safetensors": a_safetensors(5)})
    blobs = cache.folder("acme/tiny") / "blobs"
    locks = cache.hub / ".locks" / "models--acme--tiny"
    locks.mkdir(parents=True)
    for name in ("dead.1234.incomplete", "live.1234.incomplete", "orphan"):
        (blobs / name).write_bytes(b"12345")
        (locks / f"{name.split('.')[0]}.lock").touch()
    with (locks / "live.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = cache.read()
        assert [Path(f.path).name for f in found.leftovers] == ["dead.1234.incomplete", "orphan"]
        (removal,) = [r for r in lm.orphans(found, a_state()) if r.leftovers]
        cache.remove(lm.Removal(repository="acme/tiny", leftovers=removal.leftovers))
    assert sorted(path.name for path in blobs.iterdir()) == [
        blob_of(a_safetensors(5)), "live.1234.incomplete"
    ]  # fmt: skip


def test_nothing_outside_the_cache_is_removed(cache: lm.HubCache, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "weights").write_text("precious")
    stored(cache, {"model.safetensors": a_safetensors(5)})
    folder = cache.folder("acme/tiny")
    (folder / "snapshots" / COMMIT / "outside").symlink_to(precious / "weights")
    (folder / "snapshots" / COMMIT / "directory").symlink_to(precious)
    (folder / "blobs" / "linked").symlink_to(precious / "weights")
    shutil.copytree(folder, cache.folder("acme/real"), symlinks=True)
    cache.folder("acme/link").symlink_to(cache.folder("acme/real"))
    stray = ("models--acme--real/blobs/../../../../precious/weights", "../../precious/weights")
    cache.remove(lm.Removal(repository="acme/link", commits=(COMMIT,)))
    cache.remove(lm.Removal(repository="acme/real", leftovers=stray))
    assert cache.present("acme/real", COMMIT)
    everything = cache.read()
    assert {known.repository for known in everything.revisions} == {"acme/tiny", "acme/real"}
    cache.remove(lm.plan_removal(everything, a_state(), "acme/tiny"))
    assert not folder.exists()
    assert (precious / "weights").read_text() == "precious"


@pytest.mark.parametrize("linked", [False, True], ids=["in its place", "on another disk"])
def test_a_blob_that_repositories_share_goes_with_the_last_of_them(
    cache: lm.HubCache, tmp_path: Path, linked: bool
) -> None:
    if linked:
        (tmp_path / "disk").mkdir()
        cache.home.mkdir()
        cache.hub.symlink_to(tmp_path / "disk")
    store = cache.hub / "blobs" / "ab" / "abcd"
    store.parent.mkdir(parents=True)
    store.write_bytes(a_safetensors(5))
    for name in ("acme/one", "acme/two"):
        stored(cache, {"model.safetensors": a_safetensors(5)}, repository=name)
        (blob,) = (cache.folder(name) / "blobs").iterdir()
        blob.unlink()
        blob.symlink_to("../../blobs/ab/abcd")
    cache.remove(lm.plan_removal(cache.read(), a_state(), "acme/one"))
    assert (store.exists(), cache.present("acme/two")) == (True, True)
    cache.remove(lm.plan_removal(cache.read(), a_state(), "acme/two"))
    assert not store.exists()
