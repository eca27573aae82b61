"""PostgreSQL is down: who says so, what still works, and what is there when it is back."""

from __future__ import annotations

import time

import httpx
import openai
import pytest
from installation import Install, Installation
from test_usage_tables import far, here, ask, rows_by
from test_routing import wait_until

import llm_manager as lm

pytestmark = pytest.mark.docker


def test_explore(here: Installation, far) -> None:
    ada = here.openai(here.create_key("Ada"))
    ask(ada)
    manager = here.manager(); state = manager.state()
    gw = next(c for n, c in here.containers().items() if "litellm" in n)
    gw.reload()
    ip = list(gw.attrs["NetworkSettings"]["Networks"].values())[0]["IPAddress"]
    master = openai.OpenAI(base_url=f"http://{ip}:4000/v1", api_key=state.secrets.master_key.get_secret_value(), max_retries=0, timeout=30)
    import threading
    def attempt(what, f):
        t = time.time()
        try:
            r = f(); r = r.choices[0].message.content
        except Exception as e:
            r = f"{type(e).__name__} {str(e)[:300]}"
        print(f"{time.time()-t0:6.1f} {what}: {r} in {time.time()-t:.1f}s", flush=True)
    t0 = time.time()
    attempt("master", lambda: ask(master))
    here.container("llm-postgres").stop()
    t0 = time.time()
    for i in range(9):
        attempt("ada", lambda: ask(ada))
        attempt("master", lambda: ask(master))
        attempt("stranger", lambda: ask(here.openai("sk-stranger")))
        time.sleep(12)
    for cmd in (("status",), ("doctor",), ("plan",), ("key", "list"), ("usage",), ("key", "why", "sk-xyz"), ("key","create","Bob")):
        r = here.run(*cmd)
        print(cmd, r.returncode, r.stdout[-1500:], r.stderr[-600:], flush=True)
    here.container("llm-postgres").start()
    t0 = time.time()
    for i in range(4):
        attempt("ada", lambda: ask(ada)); time.sleep(10)
    print(rows_by(here, "key"))
    assert 0
