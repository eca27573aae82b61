#!/opt/venv/bin/python
"""`vllm` itself, but for `vllm serve`: that streams one token after another at a known pace."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator

FIRST_SECONDS, NEXT_SECONDS = 1.5, 1.0  # 5 % of them is more than a busy machine adds


def serve(port: int) -> None:
    # Here and not above: tests read the pace where these libraries need not be.
    import uvicorn  # noqa: PLC0415
    from starlette import responses  # noqa: PLC0415
    from starlette.applications import Starlette  # noqa: PLC0415
    from starlette.requests import Request  # noqa: PLC0415
    from starlette.routing import Route  # noqa: PLC0415

    async def health(_: Request) -> responses.Response:
        return responses.PlainTextResponse("")

    async def chat(_: Request) -> responses.Response:
        message = {"role": "assistant", "content": "Ready."}
        return responses.JSONResponse({"choices": [{"index": 0, "message": message}]})

    async def complete(request: Request) -> responses.Response:
        asked = await request.json()
        return responses.StreamingResponse(stream(asked), media_type="text/event-stream")

    routes = [
        Route("/health", health),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
    ]
    uvicorn.run(Starlette(routes=routes), host="0.0.0.0", port=port)  # noqa: S104


async def stream(asked: dict[str, int]) -> AsyncIterator[str]:
    for number in range(asked["max_tokens"]):
        await asyncio.sleep(NEXT_SECONDS if number else FIRST_SECONDS)
        yield event(choices=[{"index": 0, "text": "word "}])
    counted = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": asked["max_tokens"]}
    yield event(choices=[], usage=counted)
    yield "data: [DONE]\n\n"


def event(**fields: object) -> str:
    return f"data: {json.dumps(fields)}\n\n"


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[sys.argv.index("--port") + 1]))
    else:
        from vllm.entrypoints.cli.main import main

        main()
