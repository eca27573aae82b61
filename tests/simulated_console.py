"""The real console over the simulated server, as a process of its own: `--port --home --models`.

A test may kill it and start it again: what is in the home is all that it keeps.
"""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}

import fastapi
import gradio as gr
import uvicorn
from builders import a_model
from fakes import a_world, some_tools

import llm_manager as lm

CARDS = 8
SITE = {"hugging_face_home": "/hub", "compile_caches": "/c"}


def a_console(home: Path, models: int) -> lm.Guard:
    """As many models as wished, all of them running, on a server with eight GPUs."""
    store = lm.StateStore(home)
    fresh = not store.config_path.exists()
    store.ensure(fixed_names=True)
    if fresh:
        state = store.load()
        for number in range(models):
            state = state.with_model(a_model(f"chat-{number:02}", wish="running"))
        store.save(state)
    site = lm.Site(generated=str(store.generated), **SITE)
    gpus = lm.SimulatedGpus([lm.SimulatedCard("NVIDIA H200", "Hopper", 143771)] * CARDS)
    world = a_world(store, gpus)
    manager = lm.Manager(store, some_tools(world), site, engine_options={})
    manager.start(lm.restoring()).wait(60)
    watch = lm.Watch(manager, records=manager.energy_records)
    lm.MetricsServer(manager, watch)  # as `serve` has it, too
    return lm.build_app(manager, watch)


def an_empty_page() -> fastapi.FastAPI:
    """What Gradio itself costs."""
    app = fastapi.FastAPI()
    with gr.Blocks(analytics_enabled=False) as page:
        gr.Markdown("Nothing")
    gr.mount_gradio_app(app, page, path="/")
    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--models", type=int, default=1)
    parser.add_argument("--empty", action="store_true")
    arguments = parser.parse_args()
    app = an_empty_page() if arguments.empty else a_console(arguments.home, arguments.models)
    listener = socket.create_server((lm.CONSOLE_HOST, arguments.port))
    print("listens", flush=True)  # noqa: T201
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
