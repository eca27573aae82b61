"""Recipes: engine images that this server builds, from the file to the pinned image."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import (
    GPU_0,
    NOW,
    Golden,
    a_model,
    a_site,
    a_state,
    an_engine,
    an_observed,
    as_wished,
    on_gpus,
    only,
    seen,
)
from fakes import Server
from hypothesis import given
from hypothesis import strategies as st

import llm_manager as lm

SHIPPED = Path(lm.__file__).with_name("recipes")
BASE = lm.Images().vllm_cpu
MINIMAL: dict[str, Any] = {"why": "a test", "types": ["chat"], "base": {"cpu": "vllm_cpu"}}
BOTH = MINIMAL | {"base": {"gpu": "vllm", "cpu": "vllm_cpu"}}


def a_recipe(name: str = "audio", **changes: Any) -> lm.Recipe:
    return lm.find_recipe(some_recipes({name: MINIMAL | changes}), name)


def some_recipes(files: Mapping[str, dict[str, Any]]) -> lm.Recipes:
    return lm.parse_recipes({name: yaml.safe_dump(raw) for name, raw in files.items()})


def refusal(recipes: lm.Recipes, name: str) -> str:
    with pytest.raises(lm.RefusedError) as refused:
        lm.find_recipe(recipes, name)
    return str(refused.value)


# --- the files ----------------------------------------------------------------------------------


def test_every_shipped_recipe_can_be_used_and_the_catalogues_are_none() -> None:
    recipes = lm.parse_recipes(lm.read_recipes(SHIPPED))
    assert [name for name in recipes if lm.find_recipe(recipes, name)] == ["whisper"]
    assert {path.stem for path in SHIPPED.glob("*.yaml")} == {*recipes} | lm.NOT_BUILT


def test_the_dockerfile_of_whisper(golden: Golden) -> None:
    recipe = lm.find_recipe(lm.parse_recipes(lm.read_recipes(SHIPPED)), "whisper")
    base = lm.recipe_base(recipe, "gpu", lm.Images())
    golden("whisper.Dockerfile", lm.render_dockerfile(recipe, base))


def test_a_dockerfile_has_everything_in_its_order(golden: Golden) -> None:
    full = a_recipe(
        packages=["soxr==1.1.0", "x[y]>=1,<2; python_version > '3'"],
        system_packages=["ffmpeg", "libsndfile1=1.2.0-1+b1"],
        environment={"B": 'say "$HOME" \\', "A": ""},
        run=["python3 -m compileall /opt", 'echo "done" && true'],
    )
    golden("recipe.Dockerfile", lm.render_dockerfile(full, BASE))


def test_a_recipe_of_the_home_takes_the_place_of_its_namesake(tmp_path: Path) -> None:
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    for folder, why in ((shipped, "shipped"), (own, "own")):
        folder.mkdir()
        (folder / "audio.yaml").write_text(yaml.safe_dump(MINIMAL | {"why": why}))
    (shipped / "other.yaml").write_text(yaml.safe_dump(MINIMAL))
    recipes = lm.parse_recipes(lm.read_recipes(shipped, own, tmp_path / "absent"))
    assert lm.find_recipe(recipes, "audio").why == "own"
    assert lm.find_recipe(recipes, "other").why == "a test"


def test_every_fault_of_a_recipe_is_named_by_its_path() -> None:
    bad = MINIMAL | {
        "types": ["chat", "talk"],
        "base": {"cpu": "caddy"},
        "packages": ["good==1", "--index-url=http://evil", "a\nRUN evil"],
        "system_packages": ["-o=x", "a && b"],
        "environment": {"A B": "x", "C": "two\nlines"},
        "run": ["--mount=x true", "goes on \\", "a\nb"],
        "rum": 1,
    }
    said = refusal(some_recipes({"bad": bad}), "bad")
    assert said.startswith("The recipe bad cannot be used: ")
    paths = ("types[1]: ", "base.cpu: ", "packages[1]: ", "packages[2]: ", "system_packages[0]: ",
             "system_packages[1]: ", "environment.A B", "environment.C: ", "run[0]: ", "run[1]: ",
             "run[2]: ", "rum: ")  # fmt: skip
    assert [path for path in paths if path not in said] == []
    assert "; packages[0]: " not in said


@pytest.mark.parametrize("text", ["", "- a list", "a: [", "just words", "\t"])
def test_a_broken_file_spoils_only_its_own_recipe(text: str) -> None:
    recipes = lm.parse_recipes({"broken": text, "fine": yaml.safe_dump(MINIMAL)})
    assert lm.find_recipe(recipes, "fine")
    assert refusal(recipes, "broken").startswith("The recipe broken ")


def test_an_unknown_recipe_is_told_which_there_are() -> None:
    said = refusal(some_recipes({"audio": MINIMAL, "video": MINIMAL}), "nothing")
    assert said == "There is no recipe called 'nothing'. There are: audio, video."


WORDS = st.text(max_size=12)


@given(st.lists(WORDS, max_size=2), st.dictionaries(WORDS, WORDS, max_size=2), WORDS, WORDS)
def test_no_text_of_a_recipe_becomes_another_instruction(
    packages: list[str], environment: dict[str, str], system: str, command: str
) -> None:
    given = {"packages": packages, "environment": environment}
    given |= {"system_packages": [system], "run": [command]}
    try:
        recipe = a_recipe(**given)
    except lm.RefusedError:
        return
    text = lm.render_dockerfile(recipe, BASE)
    joined = re.sub(r"\\[ \t]*\n", "", text)
    wanted = ["FROM", *["ENV"] * len(environment), "RUN", *["RUN"] * bool(packages), "RUN"]
    assert [line.split(" ")[0] for line in joined.split("\n")[1:-1]] == wanted
    assert len(text.splitlines()) == text.count("\n")


# --- the name of the image ----------------------------------------------------------------------


def test_equal_recipes_make_one_image_and_every_change_another() -> None:
    same = {
        lm.recipe_image(a_recipe(**changes), BASE)
        for changes in ({}, {"why": "else"}, {"types": ["vision"]}, {"options": "--x"})
    }
    (image,) = same
    assert re.fullmatch(r"llm-manager/audio:[0-9a-f]{12}", image)
    others = [
        lm.recipe_image(a_recipe(**changes), BASE)
        for changes in (
            {"packages": ["a==1"]}, {"packages": ["a==2"]}, {"system_packages": ["a1"]},
            {"run": ["true"]}, {"environment": {"A": "1"}}, {"environment": {"A": "2"}},
        )
    ]  # fmt: skip
    others += [lm.recipe_image(a_recipe(), "x/y:1"), lm.recipe_image(a_recipe("other"), BASE)]
    assert len({image, *others}) == len(others) + 1


# --- which models may use it --------------------------------------------------------------------


def test_a_model_is_checked_against_its_recipe() -> None:
    recipes = some_recipes({"audio": MINIMAL})
    lm.check_model(a_model(recipe="audio"), a_state(), {}, recipes)
    for changes, said in (
        ({"recipe": "nothing"}, "no recipe called 'nothing'"),
        ({"recipe": "audio", "type": "vision"}, "audio does not serve vision models. It serves c"),
        ({"recipe": "audio", "placement": on_gpus()}, "no image for the GPU. Place the model on "),
    ):
        with pytest.raises(lm.RefusedError, match=said):
            lm.check_model(a_model(**changes), a_state(), {}, recipes)


def test_an_engine_of_a_recipe_takes_its_bases_options_and_its_own() -> None:
    recipes = some_recipes({"audio": MINIMAL | {"options": "--more  --even-more"}})
    options = {BASE: frozenset({"--seed"})}
    for known in ("--seed", "--more", "--even-more"):
        model = a_model(recipe="audio", engine_arguments=(known, "1"))
        lm.check_model(model, a_state(), options, recipes)
    wrong = a_model(recipe="audio", engine_arguments=("--mor", "1"))
    with pytest.raises(lm.RefusedError, match=r"--mor is unknown to .+ Did you mean --more\?"):
        lm.check_model(wrong, a_state(), options, recipes)


# --- the pin ------------------------------------------------------------------------------------


def pinned(*models: lm.Model, recipes: lm.Recipes, **changes: Any) -> lm.State:
    """A state in which these models were registered while the recipes were as they are."""
    state = a_state(**changes)
    for model in models:
        state = lm.registering(model, recipes).edit(state)
    return state


def test_the_first_model_of_a_recipe_pins_it_for_its_device() -> None:
    recipes = some_recipes({"audio": BOTH})
    state = pinned(a_model(recipe="audio"), recipes=recipes)
    audio = lm.find_recipe(recipes, "audio")
    assert state.recipe_image("audio", "cpu") == lm.recipe_image(audio, BASE)
    assert state.recipe_image("audio", "gpu") is None
    move = {"placement": {"kind": "gpu", "gpu_uuids": [GPU_0]}}
    moved = lm.revising("chat", move, {}, recipes).edit(state)
    assert moved.recipe_image("audio", "gpu") == lm.recipe_image(audio, lm.Images().vllm)
    assert lm.engine_image(moved.model("chat"), moved) == moved.recipe_image("audio", "gpu")


def test_an_edited_recipe_changes_no_pin_and_no_container() -> None:
    before = pinned(a_model(recipe="audio"), recipes=some_recipes({"audio": BOTH}))
    edited = some_recipes({"audio": BOTH | {"run": ["true"]}})
    state = lm.registering(a_model("second", recipe="audio"), edited).edit(before)
    assert state.recipe_images == before.recipe_images
    plan = lm.plan_state(before, as_wished(before), replace(a_site(), recipes=edited))
    assert not plan


def test_a_recipe_is_pinned_once_for_a_device() -> None:
    pin = lm.RecipeImage(recipe="audio", device="cpu", image="llm-manager/audio:1")
    state = a_state(recipe_images=(pin, replace(pin, device="gpu"), replace(pin, recipe="b")))
    lm.check_state(state)
    doubled = replace(state, recipe_images=(pin, replace(pin, image="llm-manager/audio:2")))
    with pytest.raises(lm.RefusedError, match=r"recipe image 'audio \(cpu\)' is used twice"):
        lm.check_state(doubled)
    (other,) = a_state(recipe_images=(pin,)).with_recipe_image(
        replace(pin, image="llm-manager/audio:2")
    ).recipe_images  # fmt: skip
    assert other.image == "llm-manager/audio:2"


# --- the plan -----------------------------------------------------------------------------------

RECIPES = some_recipes({"audio": BOTH | {"run": ["true"]}})
SITE = replace(a_site(), recipes=RECIPES)
IMAGE = lm.recipe_image(lm.find_recipe(RECIPES, "audio"), BASE)
BUILD = f"build image {IMAGE} from the recipe audio: not on this server"


def steps_for(state: lm.State, observed: lm.Observed, site: lm.Site = SITE) -> list[str]:
    plan = lm.plan_state(state, observed, site, scope=only("chat"))
    return [lm.describe(step) for stage in plan.models for step in stage.steps]


def test_an_absent_image_is_built_before_anything_is_set_aside() -> None:
    state = pinned(a_model(recipe="audio", replicas=2), recipes=RECIPES)
    old = seen(an_engine(a_state(a_model(replicas=2))))
    steps = steps_for(state, an_observed(old))
    assert steps[0] == BUILD
    assert any(step.startswith("set aside llm-model-chat-0") for step in steps[1:])
    assert sum("build image" in step or "pull image" in step for step in steps) == 1


def test_the_base_is_pulled_first_where_it_is_absent() -> None:
    state = pinned(a_model(recipe="audio"), recipes=RECIPES)
    steps = steps_for(state, an_observed(images=frozenset()))
    assert steps[:2] == [f"pull image {BASE}: the recipe builds on it", BUILD]


def test_an_image_that_is_here_is_not_built() -> None:
    state = pinned(a_model(recipe="audio"), recipes=RECIPES)
    steps = steps_for(state, an_observed(images=frozenset({IMAGE})))
    assert steps[0] == f"create llm-model-chat-0 from {IMAGE}: not there"


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (some_recipes({"audio": BOTH}), "its recipe has changed since it was pinned. Run `image b"),
        (some_recipes({}), "There is no recipe called 'audio'"),
        (lm.parse_recipes({"audio": "["}), "The recipe audio is not YAML"),
    ],
    ids=["changed", "gone", "broken"],
)
def test_a_lost_image_that_the_recipe_no_longer_makes_is_refused(
    now: lm.Recipes, said: str
) -> None:
    state = pinned(a_model(recipe="audio"), recipes=RECIPES)
    (refused,) = steps_for(state, an_observed(), replace(SITE, recipes=now))
    assert refused.startswith("cannot be done: ")
    assert said in refused
    # What is here goes on serving.
    assert lm.plan_state(state, as_wished(state), replace(SITE, recipes=now)).stages == ()


def test_a_recipe_that_was_never_pinned_is_refused() -> None:
    """Only a hand-written state can be so; plain vLLM would start and answer nothing."""
    (refused,) = steps_for(a_state(a_model(recipe="audio")), an_observed())
    assert "No image is pinned for the recipe audio. Run `image build audio --cpu`." in refused


def test_a_models_own_image_wins_over_its_recipe() -> None:
    state = a_state(a_model(recipe="audio", image="x/y:1"))
    steps = steps_for(state, an_observed())
    assert steps[0] == "pull image x/y:1: not on this server"


# --- what a build says --------------------------------------------------------------------------


def a_log(*texts: str) -> lm.BuildLog:
    log = lm.BuildLog()
    for second, text in enumerate(texts):
        log.add(text, float(second))
    return log


def test_a_failed_command_is_named_with_its_last_error() -> None:
    log = a_log(
        "Step 1/2 : FROM x\n", " ---> 0123\n", "Step 2/2 : RUN exit 3\n", " ---> Running in 45\n",
        "\x1b[91mERROR: no luck.\n\x1b[0m", "bye\n", "Removing intermediate container 45\n",
        "The command '/bin/sh -c exit 3' returned a non-zero code: 3\n",
    )  # fmt: skip
    fault = log.fault("audio")
    assert fault is not None
    assert fault.fact == (
        "The recipe audio could not be built: step 2/2 `RUN exit 3` ended with status 3: "
        "ERROR: no luck."
    )
    assert fault.advice.endswith("logs/build-audio.log has all of it.")
    assert "\x1b" not in "".join(log.lines)


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("ERROR: No matching distribution found for a==9", "name or version in the recipe"),
        ("E: Unable to locate package nothing", "that system package's name"),
        ("Retrying: Temporary failure in name resolution\nERROR: No matching distribution found",
         "set PIP_INDEX_URL or HTTPS_PROXY"),
        ("error: failed\n  cause: invalid peer certificate: UnknownIssuer",
         "a mirror whose certificate the base image trusts"),
    ],
)  # fmt: skip
def test_a_known_cause_of_a_failed_build_comes_with_one_thing_to_do(said: str, advice: str) -> None:
    end = "The command '/bin/sh -c pip' returned a non-zero code: 1\n"
    fault = a_log(f"Step 2/2 : RUN pip_install a\n{said}\n{end}").fault("audio")
    assert fault is not None
    assert advice in fault.advice


def test_what_is_not_a_commands_fault_is_left_to_docker() -> None:
    assert a_log("Step 1/2 : FROM x\n", "no space left on device\n").fault("audio") is None
    assert a_log().fault("audio") is None


def test_every_step_is_shown_and_of_its_output_one_line_every_few_seconds() -> None:
    log = lm.BuildLog()
    shown = log.add("Step 1/3 : FROM x\n ---> 01\nStep 2/3 : RUN a; \\\n", 0.0)
    assert shown == ["  step 1/3 FROM x", "  step 2/3 RUN a; \\"]
    assert log.add("one\nt", 0.5) == []
    assert log.add("wo\nthree\n", 3.0) == ["  two"]
    assert log.add("Step 3/3 : RUN x=1;   y=2;   pip_install a==1\n", 3.1) == [
        "  step 3/3 pip_install a==1"
    ]
    assert log.lines[-4:-1] == ["one", "two", "three"]


# --- what builds may reach ----------------------------------------------------------------------


def test_a_build_reaches_the_network_as_the_server_does() -> None:
    here = {"HTTPS_PROXY": "http://proxy:3128", "no_proxy": "lan", "HOME": "/root", "TOKEN": "x"}
    assert lm.build_arguments(here) == {
        "HTTPS_PROXY": "http://proxy:3128", "no_proxy": "lan", "FTP_PROXY": "",
    }  # fmt: skip
    mirrors = {"PIP_INDEX_URL": "https://a/simple", "UV_DEFAULT_INDEX": "https://b/simple"}
    assert lm.build_arguments(mirrors)["FTP_PROXY"] == "https://a/simple"


# --- what nothing needs -------------------------------------------------------------------------


def an_image(name: str = "llm-manager/audio:1", **changes: Any) -> lm.ObservedImage:
    given: dict[str, Any] = {
        "image_id": f"sha256:{name}",
        "tags": (name,),
        "digests": (),
        "size_bytes": 1000,
        "created_at": NOW,
        "layers": ("base", name),
        "labels": {lm.LABEL_IMAGE_INSTANCE: "a1b2c3", lm.LABEL_IMAGE_HASH: "1"},
        "used_by": (),
    }
    return lm.ObservedImage(**given | changes)


BROKEN_OFF = {lm.LABEL_IMAGE_INSTANCE: "a1b2c3"}


@pytest.mark.parametrize(
    ("image", "unused"),
    [
        (an_image(), True),
        (an_image(tags=(), labels=BROKEN_OFF), True),
        (an_image(labels={}), False),
        (an_image(labels=BROKEN_OFF | {lm.LABEL_IMAGE_INSTANCE: "other"}), False),
        (an_image(used_by=("somebodys",)), False),
        (an_image("llm-manager/audio:pinned"), False),
        (an_image("llm-manager/audio:own"), False),
        (an_image("llm-manager/audio:role"), False),
        (an_image(tags=("llm-manager/audio:1", "lab/keep:1")), False),
        (an_image("lab/on-top-of-ours:1"), False),
        (an_image(tags=()), False),
    ],
    ids=["ours", "broken off", "unlabelled", "anothers", "used", "pinned", "a model's own",
         "a role's", "named by the operator too", "an operator's own on ours", "unnamed on ours"],
)  # fmt: skip
def test_only_what_was_built_here_and_nothing_needs_is_unused(
    image: lm.ObservedImage, unused: bool
) -> None:
    pin = lm.RecipeImage(recipe="audio", device="cpu", image="llm-manager/audio:pinned")
    state = a_state(
        a_model(image="llm-manager/audio:own", wish="stopped"),
        recipe_images=(pin,),
        images=replace(lm.Images(), vllm="llm-manager/audio:role"),
    )
    assert lm.unused_images(state, [image]) == ([image] if unused else [])


def test_removing_an_image_frees_what_no_other_one_has_of_it() -> None:
    base = an_image("base:1", layers=("base",), size_bytes=900)
    other = an_image("other:1", layers=("else",), size_bytes=950)
    image = an_image(layers=("base", "more"))
    assert lm.own_bytes(image, [base, other, image]) == 100
    assert lm.own_bytes(image, [image]) == 1000
    assert lm.own_bytes(image, [image, replace(image, image_id="sha256:retagged")]) == 0


# --- the use cases, over a simulated server -----------------------------------------------------

CHAT = {"name": "chat", "type": "chat", "source": {"kind": "hub", "repository": "a/b"}}
ON_CPU = CHAT | {"placement": {"kind": "cpu"}, "recipe": "audio"}


@pytest.fixture
def server(tmp_path: Path) -> Server:
    server = Server(tmp_path)
    (server.store.home / "recipes").mkdir()
    write(server, BOTH | {"run": ["true"]})
    return server


def write(server: Server, raw: dict[str, Any]) -> None:
    (server.store.home / "recipes" / "audio.yaml").write_text(yaml.safe_dump(raw))


def image_of(server: Server) -> str | None:
    """What the model's container was made from."""
    container = server.world.containers.get(lm.ContainerName("llm-model-chat-0"))
    return container.spec.image if container else None


def build(server: Server, device: lm.Device = "cpu") -> list[str]:
    return list(server.manager.images.build_recipe("audio", device).follow())


def test_deploying_a_model_of_a_recipe_builds_its_image(server: Server) -> None:
    server.manager.register(ON_CPU)
    assert BUILD in str(server.manager.plan(lm.deploying("chat")))
    server.do(lm.deploying("chat"))
    assert server.world.routed() == {"chat"}
    assert image_of(server) == IMAGE
    assert not server.manager.plan(lm.applying())


def test_a_changed_recipe_takes_effect_with_its_build_and_the_next_plan(server: Server) -> None:
    server.manager.register(ON_CPU)
    server.do(lm.deploying("chat"))
    write(server, BOTH | {"run": ["true", "true"]})
    assert not server.manager.plan(lm.applying())
    build(server)
    assert image_of(server) == IMAGE
    assert "set aside llm-model-chat-0" in str(server.manager.plan(lm.applying()))
    server.do(lm.applying())
    assert image_of(server) == server.manager.state().recipe_image("audio", "cpu") != IMAGE
    server.do(server.manager.returning(None))
    assert image_of(server) == IMAGE, "the way back has the old pin, and its image is still here"


def test_a_failed_build_leaves_the_pin_and_everything_that_runs(server: Server) -> None:
    server.manager.register(ON_CPU)
    server.do(lm.deploying("chat"))
    state, images = server.manager.state(), {*server.world.images}
    write(server, BOTH | {"run": ["exit 3"]})
    with pytest.raises(lm.ContainerFailedError, match="step 2/2 `RUN exit 3` ended with status 3"):
        build(server)
    assert server.manager.state() == state
    assert server.world.images == images
    assert server.world.routed() == {"chat"}
    assert not server.manager.plan(lm.applying())
    kept = server.store.kept_log(lm.ContainerName("build-audio"))
    assert kept.endswith("returned a non-zero code: 3\n")


def test_a_model_that_turns_to_a_broken_recipe_goes_on_as_it_was(server: Server) -> None:
    server.manager.register(ON_CPU | {"recipe": None})
    server.do(lm.deploying("chat"))
    write(server, BOTH | {"run": ["exit 3"]})
    server.manager.revise("chat", {"recipe": "audio"})
    with pytest.raises(lm.ContainerFailedError, match="The recipe audio could not be built"):
        server.do(lm.applying())
    assert server.world.routed() == {"chat"}
    assert image_of(server) == BASE


def test_an_unchanged_recipe_is_not_built_again(server: Server) -> None:
    assert any("step 2/2" in line for line in build(server))
    versions = server.store.versions()
    assert build(server) == [f"{IMAGE} is here already: the recipe has not changed."]
    assert server.store.versions() == versions


def test_deployments_go_on_while_an_image_is_built_and_its_pin_waits_for_them(
    server: Server,
) -> None:
    server.manager.register(ON_CPU | {"recipe": None})
    server.world.images |= {*asdict(server.manager.state().images).values()}
    server.world.weights[ON_CPU["source"]["repository"]] = frozenset({"main"})
    gate, reached = threading.Event(), threading.Event()

    def wait_here() -> None:
        reached.set()
        assert gate.wait(5)

    server.trouble.watch = wait_here
    change = server.manager.start(lm.deploying("chat"))
    assert reached.wait(5)
    server.restart()  # the build is another process
    lines = server.manager.images.build_recipe("audio", "cpu").follow()
    assert any("Another change is under way" in line for line in lines)
    assert server.manager.state().recipe_images == ()
    gate.set()
    list(change.follow())
    list(lines)
    assert server.manager.state().recipe_image("audio", "cpu") == IMAGE


def test_what_cannot_be_built_is_refused_before_a_job_begins(server: Server) -> None:
    write(server, MINIMAL)
    with pytest.raises(lm.RefusedError, match="no image for the GPU"):
        build(server, "gpu")
    write(server, MINIMAL | {"run": ["-x"]})
    with pytest.raises(lm.RefusedError, match=r"run\[0\]"):
        build(server)
    assert server.manager.jobs() == []


def test_pruning_removes_old_builds_and_says_so_before(server: Server) -> None:
    build(server)
    write(server, BOTH | {"run": ["true", "true"]})
    build(server)
    (row,) = server.manager.images.unused_rows()
    assert row[:2] == [IMAGE, "audio"]
    others = server.world.images - {IMAGE}
    lines = list(server.manager.images.prune().follow())
    assert lines[-1].startswith("1 images removed, about ")
    assert server.world.images == others
    assert server.manager.images.unused_rows() == []


def test_pruning_removes_what_was_compiled_in_images_that_nothing_runs_in(server: Server) -> None:
    server.manager.register(CHAT | {"name": "plain", "placement": {"kind": "cpu"}})
    wanted = lm.compile_folder(server.manager.state().images.vllm_cpu)
    for folder in (wanted, "0123456789ab"):
        compiled = server.store.home / "compiled" / folder / "vllm"
        compiled.mkdir(parents=True)
        (compiled / "kernel.so").write_bytes(bytes(2048))
    assert server.manager.images.unused_rows() == [["compiled/0123456789ab", "", "", "2.0 KiB"]]
    list(server.manager.images.prune().follow())
    assert {*server.store.compiled()} == {wanted}


def test_pulling_fetches_what_is_needed_and_absent(server: Server) -> None:
    server.manager.register(ON_CPU)
    server.manager.register(CHAT | {"name": "plain", "placement": {"kind": "cpu"}})
    images = server.manager.state().images
    server.world.images.add(images.caddy)
    lines = list(server.manager.images.pull().follow())
    assert server.world.images == {images.vllm_cpu, images.postgres, images.litellm, images.caddy}
    assert f"{images.caddy} is here already." in lines
    list(server.manager.images.pull("redis").follow())
    assert images.redis in server.world.images


def test_an_image_is_pinned_by_the_digest_of_what_is_here(server: Server) -> None:
    images = lm.Images(caddy="registry.lab:5000/caddy:2.11", redis="redis:7")
    state = a_state(images=images)
    digest = "registry.lab:5000/caddy@sha256:" + "ab" * 32
    here = an_image(tags=(images.caddy,), digests=("mirror/caddy@sha256:" + "cd" * 32, digest))
    after = lm.pinning_digest("caddy", state, [here]).edit(state)
    assert after.images == replace(images, caddy=digest)
    assert lm.pinning_digest("caddy", after, [here]).edit(after) == after
    with pytest.raises(lm.RefusedError, match=r"No registry's digest .+ `image pull redis`"):
        lm.pinning_digest("redis", state, [here])


def test_the_list_shows_every_role_and_every_recipe(server: Server) -> None:
    build(server)
    rows = {row[0]: row for row in server.manager.images.rows()}
    assert rows["caddy"][1:3] == [lm.Images().caddy, "not pulled"]
    assert rows["recipe audio (CPU)"][1:4] == [IMAGE, "here", "1.0 KiB"]
    assert rows["recipe audio (GPU)"][2] == "not built"
    write(server, BOTH)
    rows = {row[0]: row for row in server.manager.images.rows()}
    assert rows["recipe audio (CPU)"][2] == "here; the recipe has changed since: build it"
    write(server, {})
    rows = {row[0]: row for row in server.manager.images.rows()}
    assert rows["recipe audio (CPU)"][1] == IMAGE
    assert "cannot be built: `image build audio` says why" in rows["recipe audio (CPU)"][2]
    server.world.docker_answers = False
    assert {row[2] for row in server.manager.images.rows()} >= {"unknown"}
