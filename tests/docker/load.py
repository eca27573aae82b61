"""A steady load of whole conversations through the edge, and what became of each of them.

Clients of HTTP/1.1 with kept-alive connections and with a new one each time, plain and streamed,
by the gateway and by a direct route, and of HTTP/2. HTTP/2 is curl's: httpx (0.28) gives up what
runs on a connection when the server takes leave of it, although HTTP/2 has that run to its end.

A server may close an HTTP/1.1 connection at any moment between two answers, and Caddy does so when
it loads a Caddyfile: whoever has just connected, or sends at that very moment, gets no byte (Go
1.26 drops what it reads after `Shutdown`). Clients ask again then, on a new connection, as OpenAI's
do; so do these, once, and it is counted apart.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import shutil
import ssl
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import httpx

PATIENCE = 60.0  # seconds for one answer
UNHEARD = "not a byte of an answer: "
PLAIN_PAUSE = 0.5
STREAMED_WORDS = (10, 25)  # 2 to 5 s at the pace of slow_engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A way in, and a colleague's key for it."""

    url: str  # of the OpenAI API, up to and with /v1
    key: str
    model: str
    authority: Path  # the PEM file that the edge's certificate is checked against

    def body(self, words: int, *, streamed: bool) -> dict[str, object]:
        message = {"role": "user", "content": "Count."}
        return {"model": self.model, "messages": [message], "max_tokens": words,
                "stream": streamed}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request: by which client, when (of `time.monotonic`), and what was wrong with it."""

    client: str
    streamed: bool
    begun: float
    ended: float
    fault: str
    again: bool = False  # it was asked a second time: the first met a closed connection


def fault_of(status: int, text: str, words: int, *, streamed: bool) -> str:
    """What is wrong with an answer; nothing where it is whole, to its last word."""
    if status != httpx.codes.OK:
        return f"status {status}: {text[:200]}"
    if streamed and "data: [DONE]" not in text:
        return f"the stream broke off after {text.count('data: ')} events"
    try:
        said = _streamed_words(text) if streamed else _plain_words(json.loads(text))
    except (ValueError, LookupError):
        return f"not an answer: {text[-200:]}"
    return "" if said == [f"w{n}" for n in range(words)] else f"{len(said)} of {words} words"


def _plain_words(answer: dict[str, list[dict[str, dict[str, str]]]]) -> list[str]:
    return answer["choices"][0]["message"]["content"].split()


def _streamed_words(text: str) -> list[str]:
    events = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices).split()


@dataclass
class Load:
    """Colleagues who ask and ask, about seven requests a second, between enter and exit."""

    target: Target
    direct: Target
    outcomes: list[Outcome] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._enough = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._ask_all()), name="load")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join()

    def everyone_again(self) -> float:
        """When every client has asked again and got a whole answer."""
        since = time.monotonic()
        while True:
            again = {o.client for o in tuple(self.outcomes) if o.begun > since and not o.fault}
            if again >= set(self._clients()):
                return time.monotonic()
            if time.monotonic() > since + 2 * PATIENCE:
                missing = sorted(set(self._clients()) - again)
                raise TimeoutError(f"no answer any more: {', '.join(missing)}")
            time.sleep(0.1)

    def _clients(self) -> Sequence[str]:
        kept = [f"kept-alive {kind} {n}" for kind in ("plain", "stream") for n in range(2)]
        fresh = ["new connection plain", "new connection stream"]
        direct = ["direct kept-alive plain", "direct kept-alive stream"]
        return (*kept, *fresh, *direct, *(["HTTP/2"] if shutil.which("curl") else []))

    async def _ask_all(self) -> None:
        context = ssl.create_default_context(cafile=str(self.target.authority))
        await asyncio.gather(
            *(self._over_http2(name) if name == "HTTP/2" else self._over_http1(name, context)
              for name in self._clients())
        )  # fmt: skip

    def _note(
        self, client: str, begun: float, fault: str, *, streamed: bool, again: bool = False
    ) -> None:
        self.outcomes.append(Outcome(client, streamed, begun, time.monotonic(), fault, again))

    # --- HTTP/1.1 ---

    async def _over_http1(self, client: str, context: ssl.SSLContext) -> None:
        limits = httpx.Limits(
            max_keepalive_connections=int("kept-alive" in client), keepalive_expiry=None
        )
        target = self.direct if client.startswith("direct") else self.target
        streamed = "stream" in client
        async with httpx.AsyncClient(
            verify=context, limits=limits, timeout=PATIENCE, trust_env=False
        ) as http:
            while not self._enough.is_set():
                begun = time.monotonic()
                again, fault = False, await self._ask(http, target, streamed=streamed)
                if fault.startswith(UNHEARD):
                    again, fault = True, await self._ask(http, target, streamed=streamed)
                self._note(client, begun, fault, streamed=streamed, again=again)
                if fault or not streamed:  # a stream follows a stream without a pause
                    await asyncio.sleep(PLAIN_PAUSE)

    async def _ask(self, http: httpx.AsyncClient, target: Target, *, streamed: bool) -> str:
        words = random.randint(*STREAMED_WORDS) if streamed else 5  # noqa: S311 - no secret
        url, headers = f"{target.url}/chat/completions", {"Authorization": f"Bearer {target.key}"}
        body = target.body(words, streamed=streamed)
        told = UNHEARD
        try:
            async with http.stream("POST", url, json=body, headers=headers) as answer:
                told = "broken off: "
                await answer.aread()
        except httpx.HTTPError as error:
            return f"{told}{type(error).__name__}: {error}"
        return fault_of(answer.status_code, answer.text, words, streamed=streamed)

    # --- HTTP/2 ---

    async def _over_http2(self, client: str) -> None:
        """Again and again a connection for three requests, plain and streamed in turn."""
        streamed = False
        while not self._enough.is_set():
            streamed = not streamed
            words = STREAMED_WORDS[0] if streamed else 5
            begun = time.monotonic()
            async for status, version, text in self._curl(words, streamed=streamed):
                fault = fault_of(status, text, words, streamed=streamed)
                if not fault and version != "2":
                    fault = f"answered over HTTP/{version}"
                self._note(client, begun, fault, streamed=streamed)
                begun = time.monotonic()
            await asyncio.sleep(PLAIN_PAUSE)

    async def _curl(self, words: int, *, streamed: bool) -> AsyncIterator[tuple[int, str, str]]:
        settings = {
            "header": f"Authorization: Bearer {self.target.key}",
            "json": json.dumps(self.target.body(words, streamed=streamed)),
            "cacert": self.target.authority,
            "max-time": PATIENCE,
            "write-out": r"\n#end %{http_code} %{http_version} %{errormsg}\n",
        }
        lines = [f'url = "{self.target.url}/chat/completions"'] * 3
        lines += [f"{name} = {json.dumps(str(value))}" for name, value in settings.items()]
        run = await asyncio.create_subprocess_exec(
            *("curl", "--disable", "--silent", "--http2", "--no-buffer", "--config", "-"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert run.stdin is not None
        assert run.stdout is not None
        run.stdin.write("\n".join(lines).encode())
        run.stdin.close()
        text = ""
        async for line in run.stdout:
            if not line.startswith(b"#end "):
                text += line.decode()
                continue
            _, status, version, *error = line.decode().split(maxsplit=3)
            yield int(status), version, text if status == "200" else "".join(error) or text
            text = ""
        await run.wait()


COLUMNS = f"{'requests':>9}{'streams':>9}{'failed':>8}{'asked again':>13}{'slowest plain':>15}"


def summary(outcomes: Sequence[Outcome]) -> str:
    """A row of COLUMNS."""
    failed, again = sum(bool(o.fault) for o in outcomes), sum(o.again for o in outcomes)
    slowest = max((o.ended - o.begun for o in outcomes if not o.streamed), default=0)
    streams = sum(o.streamed for o in outcomes)
    return f"{len(outcomes):9d}{streams:9d}{failed:8d}{again:13d}{slowest:13.1f} s"


def faults(outcomes: Sequence[Outcome]) -> list[str]:
    """The reasons of failure, with how many clients met each."""
    return [f"{n} x {why}" for why, n in Counter(
        f"{re.sub(r' [0-9]$', '', o.client)}: {o.fault}" for o in outcomes if o.fault
    ).most_common()]  # fmt: skip
