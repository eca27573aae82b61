#!/usr/bin/env python3
"""Stands for `vllm serve`: w0 w1 w2 … at a steady pace, and vLLM's own (0.30) way to stop.

Told to stop, vLLM breaks off what it is at with the reason `abort` and status 200; what is asked
meanwhile fares the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import uuid
from typing import Any

PACE = 0.2  # seconds for a word of a stream
IDLE = float(os.environ.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "5"))


class Engine:
    def __init__(self) -> None:
        self._running = 0
        self.stopping = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, kept for as long as uvicorn keeps an idle one."""
        try:
            while True:
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), IDLE)
                path = head.split(b" ")[1].decode()
                size = [line.split(b":")[1] for line in head.lower().split(b"\r\n")
                        if line.startswith(b"content-length:")]  # fmt: skip
                body = await reader.readexactly(int(size[0])) if size else b""
                await self._answer(path, json.loads(body or b"{}"), writer)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, asked: Any, writer: asyncio.StreamWriter) -> None:
        if path == "/metrics":
            writer.write(whole(200, self._metrics(), "text/plain"))
            return await writer.drain()
        if path != "/v1/chat/completions":
            found = path in {"/health", "/v1/models"}
            writer.write(whole(200 if found else 404, json.dumps({"object": "list", "data": []})))
            return await writer.drain()
        self._running += 1
        try:
            await (self._stream if asked.get("stream") else self._plain)(asked, writer)
        finally:
            self._running -= 1

    async def _plain(self, asked: Any, writer: asyncio.StreamWriter) -> None:
        words = [] if self.stopping.is_set() else answer(asked)
        message = {"role": "assistant", "content": " ".join(words)}
        choice = {"index": 0, "message": message, "finish_reason": "stop" if words else "abort"}
        said = completion(asked, "chat.completion") | {"choices": [choice]}
        writer.write(whole(200, json.dumps(said)))
        await writer.drain()

    async def _stream(self, asked: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                     b"transfer-encoding: chunked\r\n\r\n")  # fmt: skip
        chunk = completion(asked, "chat.completion.chunk")
        for word in answer(asked):
            if self.stopping.is_set():
                break
            await event(writer, chunk, {"content": f"{word} "}, None)
            await asyncio.sleep(PACE)
        await event(writer, chunk, {}, "abort" if self.stopping.is_set() else "stop")
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()

    def _metrics(self) -> str:
        counted = {"num_requests_running": self._running, "num_requests_waiting": 0,
                   "prompt_tokens_total": 1, "generation_tokens_total": 1}  # fmt: skip
        return "".join(f'vllm:{name}{{engine="0"}} {n}.0\n' for name, n in counted.items())

    async def stop(self) -> None:
        await self.stopping.wait()
        while self._running:
            await asyncio.sleep(0.1)


def answer(asked: Any) -> list[str]:
    return [f"w{number}" for number in range(asked.get("max_tokens") or 1)]


def completion(asked: Any, kind: str) -> dict[str, Any]:
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    # LiteLLM drops usage rows whose id it knows.
    name = f"chatcmpl-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": 1, "model": asked["model"], "usage": usage}


def whole(status: int, text: str, kind: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(text)}\r\n\r\n"
    return (head + text).encode()


async def event(
    writer: asyncio.StreamWriter, chunk: Any, delta: dict[str, str], reason: str | None
) -> None:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    text = f"data: {json.dumps(chunk | {'choices': [choice]})}\n\n".encode()
    writer.write(f"{len(text):x}\r\n".encode() + text + b"\r\n")
    await writer.drain()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    arguments, _ = parser.parse_known_args()
    engine = Engine()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, engine.stopping.set)
    async with await asyncio.start_server(engine.serve, "0.0.0.0", arguments.port):  # noqa: S104
        await engine.stop()
        os._exit(0)  # kept-alive connections that nobody uses hold nothing up


if __name__ == "__main__":
    asyncio.run(main())
