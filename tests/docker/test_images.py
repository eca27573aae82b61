"""Recipes on a real Docker engine: what builds them, what breaks, and who goes on being served."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Self

import docker
import httpx
import pytest
import yaml
from docker.models.images import Image
from installation import ENGINE, Install, Installation

import llm_manager as lm

pytestmark = pytest.mark.docker
MODEL = "llm-model-embed-0"


def write(here: Installation, name: str, *commands: str, **more: object) -> None:
    """A recipe of the operator's own; its mark makes its images this installation's alone."""
    folder = here.home / "recipes"
    folder.mkdir(exist_ok=True)
    raw = {
        "why": "a test", "types": ["embedding"], "base": {"cpu": "vllm_cpu"},
        "environment": {"LLM_MANAGER_TEST": here.state().instance}, "run": list(commands),
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(raw | more))


def built_images(here: Installation) -> dict[str, Image]:
    """By tag, what carries this installation's label; what has no tag by its id."""
    mine = {"label": f"{lm.LABEL_IMAGE_INSTANCE}={here.state().instance}"}
    found = here.client.images.list(filters=mine)
    return {tag: image for image in found for tag in image.tags or [image.id]}


def pinned(here: Installation, recipe: str) -> str:
    image = here.state().recipe_image(recipe, "cpu")
    assert image is not None
    return image


@pytest.fixture(scope="module")
def served(install_for_module: Install, tiny_models: Path) -> Installation:
    """An installation whose one model runs on an image that it built itself."""
    here = install_for_module()
    write(here, "marked", "touch /made-by-a-recipe")
    here.add("embed", tiny_models / "tiny-embed", "embedding")
    here.cli("model", "set", "embed", "--recipe", "marked")
    with here.step("deploy a model of a recipe, build included"):
        said = here.cli("deploy", "embed")
    assert f"build image {pinned(here, 'marked')} from the recipe marked" in said
    assert "step 4/6 RUN touch /made-by-a-recipe" in said
    assert here.cli("plan") == "Nothing to do.\n"
    return here


@pytest.fixture(scope="module")
def colleague(served: Installation) -> httpx.Client:
    return served.http(served.create_key("Ada"))


def ask(colleague: httpx.Client) -> int:
    return colleague.post("/v1/embeddings", json={"model": "embed", "input": "a"}).status_code


class Asking:
    """A colleague who asks all the time."""

    def __init__(self, colleague: httpx.Client) -> None:
        self._colleague = colleague
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.statuses: list[int] = []

    def _ask(self) -> None:
        while not self._over.wait(0.05):
            self.statuses.append(ask(self._colleague))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def test_a_model_of_a_recipe_answers_from_the_image_built_here(
    served: Installation, colleague: httpx.Client
) -> None:
    container = served.container(MODEL)
    assert container.attrs["Config"]["Image"] == pinned(served, "marked")
    assert container.exec_run(["ls", "/made-by-a-recipe"]).exit_code == 0
    said = container.exec_run(["printenv", "LLM_MANAGER_TEST"]).output
    assert said.decode().strip() == served.state().instance
    assert ask(colleague) == 200
    labels = built_images(served)[pinned(served, "marked")].labels
    assert labels[lm.LABEL_IMAGE_RECIPE] == "marked"
    assert pinned(served, "marked").endswith(f":{labels[lm.LABEL_IMAGE_HASH]}")


def test_a_container_that_others_make_of_our_image_is_not_taken_for_ours(
    served: Installation,
) -> None:
    """Containers inherit the labels of their image, and ours are stopped when nobody wants them."""
    stranger = served.client.containers.create(
        pinned(served, "marked"), entrypoint=["sleep", "600"], network_mode="none"
    )
    try:
        assert stranger.name not in served.manager().observe().containers
        assert served.cli("plan") == "Nothing to do.\n"
    finally:
        stranger.remove(force=True)


def test_a_recipe_that_breaks_leaves_the_old_image_serving(
    served: Installation, colleague: httpx.Client
) -> None:
    before, pin = served.container(MODEL).id, pinned(served, "marked")
    write(served, "marked", "touch /made-by-a-recipe", "echo no luck today >&2; exit 3")
    assert served.cli("plan") == "Nothing to do.\n"
    with Asking(colleague) as asking, served.step("a recipe that cannot be built"):
        ended = served.run("image", "build", "marked", "--cpu")
    assert ended.returncode == lm.FAILED
    assert ended.stderr == (
        "The recipe marked could not be built: step 5/7 `RUN echo no luck today >&2; exit 3` ended "
        "with status 3: no luck today. Mend the recipe, then build it again; logs/build-marked.log "
        "has all of it.\n"
    )
    assert asking.statuses
    assert {*asking.statuses, ask(colleague)} == {200}
    assert served.container(MODEL).id == before
    assert pinned(served, "marked") == pin
    assert [tag for tag in built_images(served) if "marked" in tag] == [pin]
    assert served.cli("plan") == "Nothing to do.\n"
    kept = (served.home / "logs" / "build-marked.log").read_text()
    assert "no luck today\n" in kept
    assert running_builds(served.client, "no luck") == []


def test_an_unchanged_recipe_is_not_built_again(served: Installation) -> None:
    write(served, "marked", "touch /made-by-a-recipe")
    before = built_images(served)[pinned(served, "marked")].id
    versions = served.manager().returning(None).title
    said = served.cli("image", "build", "marked", "--cpu")
    assert "is here already: the recipe has not changed" in said
    assert built_images(served)[pinned(served, "marked")].id == before
    assert served.manager().returning(None).title == versions


def running_builds(client: docker.DockerClient, command: str) -> list[str]:
    """The builder's own containers that run, or ran, such a command."""
    return [
        str(container.name)
        for container in client.containers.list(all=True, ignore_removed=True)
        if command in json.dumps(container.attrs["Config"]["Cmd"])
    ]


def until(holds: object, seconds: float = 60) -> bool:
    """Whether it comes true; the limit is there to end a test that fails."""
    assert callable(holds)
    give_up = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.1)
    return True


def test_a_cancelled_build_stops_and_leaves_neither_container_nor_image(
    served: Installation,
) -> None:
    pause = f"sleep 6{served.state().instance.translate(str.maketrans('abcdef', '123456'))}"
    write(served, "slow", "touch /begun", pause)
    before = {*built_images(served)}
    process = served.popen("image", "build", "slow", "--cpu")
    try:
        assert until(lambda: running_builds(served.client, pause))
        process.send_signal(signal.SIGINT)
        with served.step("a cancelled build ends"):
            _, complained = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == lm.FAILED
    assert "It was cancelled." in complained
    assert "Traceback" not in complained
    assert until(lambda: not running_builds(served.client, pause))
    assert served.state().recipe_image("slow", "cpu") is None
    assert [tag for tag in {*built_images(served)} - before if "slow" in tag] == []
    # The next build of the same recipe finds no lock, and nothing half-done.
    write(served, "slow", "true")
    served.cli("image", "build", "slow", "--cpu")
    assert any(tag.startswith("sha256:") for tag in built_images(served)), "for the pruning below"


def test_the_address_of_a_package_index_is_in_no_image(served: Installation) -> None:
    """The package is in the base already: pip has nothing to ask an index for."""
    write(served, "indexed", packages=["httpx"])
    index = "https://ada:hidden@127.0.0.1:9/simple"
    ended = served.run("image", "build", "indexed", "--cpu", PIP_INDEX_URL=index)
    assert ended.returncode == lm.DONE, ended.stderr
    log = (served.home / "logs" / "build-indexed.log").read_text()
    assert "Requirement already satisfied: httpx" in log
    image = built_images(served)[pinned(served, "indexed")]
    everything = json.dumps([image.attrs, image.history()])
    assert "pip_install httpx" in everything
    assert "hidden" not in everything + ended.stdout + log


def test_pruning_removes_what_nothing_uses_and_nothing_else(
    served: Installation, colleague: httpx.Client
) -> None:
    serving = pinned(served, "marked")
    for command in ("touch /second", "touch /third"):
        write(served, "marked", command)
        served.cli("image", "build", "marked", "--cpu")
    third = pinned(served, "marked")
    (second,) = [tag for tag in built_images(served) if "marked:" in tag if tag not in
                 {serving, third}]  # fmt: skip
    all_before = {image.id for image in served.client.images.list()}
    shown = served.cli("image", "prune", "--plan", status=lm.TO_DO)
    assert second in shown
    assert "a broken-off build" in shown
    assert serving not in shown
    assert third not in shown
    assert {image.id for image in served.client.images.list()} == all_before
    said = served.cli("image", "prune")
    assert f"removed {second}: " in said
    pins = {pin.image for pin in served.state().recipe_images}
    assert {*built_images(served)} == {serving, *pins}
    assert served.client.images.get(ENGINE)
    assert ask(colleague) == 200
    assert served.cli("image", "prune", "--plan").strip() == "Nothing to do."
    rows = json.loads(served.cli("image", "list", "--json"))
    (row,) = [row for row in rows if row["part"] == "recipe marked (CPU)"]
    assert (row["image"], row["on_this_server"]) == (third, "here")
