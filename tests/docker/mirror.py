"""An upstream that answers with the request it got, as JSON; its log has one line for each.

What a body says is done: `hold` answers the head and a first event, and the rest when another
request brings `release`; `drip` sends no more, and notes when the client is gone; `drop` hangs
up; `busy` is answered with 429, and `away` with 503 and when to come again.
"""

from __future__ import annotations

import http.server
import json
import sys
import threading

RELEASED = threading.Event()
INSIDE = (
    "x-litellm-model-api-base", "x-litellm-version", "x-litellm-key-spend",
    "x-litellm-response-cost", "x-litellm-response-cost-original", "x-litellm-model-name",
    "llm_provider-server", "llm_provider-x-request-id",
)  # fmt: skip
KEPT = ("x-litellm-call-id", "x-litellm-model-id", "x-litellm-attempted-retries")


def note(line: str) -> None:
    sys.stdout.write(f"{line}\n")


class Mirror(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self.body()
        note(f"{self.command} {self.path}")
        if b"drop" in body:
            self.close_connection = True
        elif b"hold" in body or b"drip" in body:
            self.stream(endless=b"drip" in body)
        else:
            if b"release" in body:
                RELEASED.set()
            self.answer(len(body), 429 if b"busy" in body else 503 if b"away" in body else 200)

    do_POST = do_PUT = do_DELETE = do_OPTIONS = do_GET  # noqa: N815

    def body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, size: int, status: int) -> None:
        seen = {"method": self.command, "path": self.path, "size": size, "who": sys.argv[1]}
        text = json.dumps(seen | {"headers": [[k.lower(), v] for k, v in self.headers.items()]})
        self.send_response(status)
        if status == 503:
            self.send_header("retry-after", "77")
        for name in (*INSIDE, *KEPT):
            self.send_header(name, "x")
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def stream(self, *, endless: bool) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.event()
        if endless:
            self.rfile.read(1)  # there is none: it ends when the other side hangs up
            note("the client left")
        else:
            RELEASED.wait(60)
            RELEASED.clear()
            self.event()

    def event(self) -> None:
        self.wfile.write(b"data: {}\n\n")
        self.wfile.flush()


for port in map(int, sys.argv[2:]):
    server = http.server.ThreadingHTTPServer(("", port), Mirror)
    threading.Thread(target=server.serve_forever).start()
