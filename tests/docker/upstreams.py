"""An OpenAI-compatible server that fails and delays on command; it needs Python and nothing else.

Run in a container: `python3 upstreams.py NAME [PORT]`. What it answers names it (`answer of NAME`).
`POST /control` takes the behaviour of the next requests, `GET /control` what was seen:

    fail    status of a refusal, "context", "drop" (close unanswered) or "break" (in mid-stream)
    message text of the refusal
    delay   seconds before the answer
    gap     seconds between two chunks of a stream
    hold    answer nothing until the next order
    times   how many requests all that is for, then the server is well again; absent: for good
"""

from __future__ import annotations

import json
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# vLLM 0.32's own words, with status 400.
CONTEXT = (
    "This model's maximum context length is 512 tokens. However, you requested 640 tokens "
    "(600 in the messages, 40 in the completion). Please reduce the length of the messages "
    "or completion."
)
WELL: dict[str, Any] = {
    "fail": None, "message": "on command", "delay": 0, "gap": 0, "hold": False, "times": None,
}  # fmt: skip


class Upstream(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, name: str, port: int) -> None:
        self.name, self.lock = name, threading.Lock()
        self.behaviour, self.released, self.in_flight = dict(WELL), threading.Event(), 0
        self.forget()
        super().__init__(("0.0.0.0", port), Handler)  # noqa: S104 - in a container

    def forget(self) -> None:
        self.served, self.peak, self.paths = 0, self.in_flight, []

    def command(self, order: dict[str, Any]) -> None:
        """A new behaviour; what it does not name is as in a healthy server. Counters start anew."""
        with self.lock:
            self.behaviour = WELL | order
            self.forget()
            self.released.set()
            self.released = threading.Event()

    def enter(self, path: str) -> dict[str, Any]:
        """How this request is to be treated."""
        with self.lock:
            now = self.behaviour | {"released": self.released}
            if now["times"] is not None:
                self.behaviour["times"] -= 1
                if self.behaviour["times"] <= 0:
                    self.behaviour = dict(WELL)
            self.served, self.in_flight = self.served + 1, self.in_flight + 1
            self.peak = max(self.peak, self.in_flight)
            self.paths = [*self.paths[-99:], path]
            return now

    def leave(self) -> None:
        with self.lock:
            self.in_flight -= 1

    def seen(self) -> dict[str, Any]:
        with self.lock:
            names = ("name", "served", "in_flight", "peak", "paths", "behaviour")
            return {name: getattr(self, name) for name in names}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def do_GET(self) -> None:
        match self.path:
            case "/control":
                self.send(200, self.server.seen())
            case "/health":
                self.send(200, {})
            case "/v1/models":
                self.send(200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]})
            case "/api/tags":
                self.send(200, {"models": [{"name": "tiny:latest", "model": "tiny:latest"}]})
            case _:
                self.send(404, {"error": {"message": "no such path"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or "{}")
        if self.path == "/control":
            self.server.command(body)
            self.send(200, {})
            return
        now = self.server.enter(self.path)
        try:
            self.treat(body, now)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            self.server.leave()

    def treat(self, body: dict[str, Any], now: dict[str, Any]) -> None:
        time.sleep(now["delay"])
        if now["hold"]:
            now["released"].wait()
        match now["fail"]:
            case int(status):
                self.refuse(status, now["message"])
            case "context":
                self.refuse(400, CONTEXT)
            case "drop":
                self.close_connection = True
            case _ if self.path == "/v1/embeddings":
                self.send(200, embedding(body))
            case _ if body.get("stream"):
                self.stream(body, now)
            case _:
                self.send(200, completion(body, f"answer of {self.server.name}"))

    def refuse(self, status: int, message: str) -> None:
        self.send(status, {"error": {"message": message, "type": "on_command", "code": status}})

    def send(self, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def stream(self, body: dict[str, Any], now: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        words = f"answer of {self.server.name}".split(" ")
        for number, word in enumerate(words):
            if number == 1 and now["fail"] == "break":
                self.close_connection = True
                return
            self.chunk(
                delta(body, {"role": "assistant", "content": f"{word} " if number < 2 else word})
            )
            time.sleep(now["gap"])
        self.chunk(delta(body, {}, "stop"))
        if (body.get("stream_options") or {}).get("include_usage"):
            self.chunk(head(body, "chat.completion.chunk") | {"choices": [], "usage": USAGE})
        self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def chunk(self, event: dict[str, Any]) -> None:
        text = f"data: {json.dumps(event)}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Nothing: the tests ask /control."""


USAGE = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


def head(body: dict[str, Any], kind: str) -> dict[str, Any]:
    # LiteLLM drops the accounting row of an id that it knows.
    identifier = f"upstream-{uuid.uuid4().hex}"
    return {"id": identifier, "object": kind, "created": int(time.time()), "model": body["model"]}


def completion(body: dict[str, Any], text: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if tools := body.get("tools"):
        called = {"name": tools[0]["function"]["name"], "arguments": "{}"}
        call = {"id": f"call-{uuid.uuid4().hex}", "type": "function", "function": called}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return head(body, "chat.completion") | {"choices": [choice], "usage": USAGE}


def delta(body: dict[str, Any], part: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": part, "finish_reason": reason}
    return head(body, "chat.completion.chunk") | {"choices": [choice]}


def embedding(body: dict[str, Any]) -> dict[str, Any]:
    given = body["input"] if isinstance(body["input"], list) else [body["input"]]
    rows = [{"object": "embedding", "index": i, "embedding": [0.5, 0.5]} for i in range(len(given))]
    return {"object": "list", "model": body["model"], "data": rows, "usage": USAGE}


if __name__ == "__main__":
    Upstream(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 8000).serve_forever()
