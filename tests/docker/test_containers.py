"""What the Docker adapter promises, on real Docker; the simulated one is held to the same."""

from __future__ import annotations

import dataclasses
import io
import itertools
import secrets
import socket
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import docker
import pytest
from builders import a_state
from cutter import Cutter
from docker.models.containers import Container
from fakes import a_world, some_tools
from installation import CADDY, DOCKER_URL, Install, Installation, free_ports, remove_labelled

import llm_manager as lm
from llm_manager import ContainerName, ContainerSpec

pytestmark = pytest.mark.docker
ABSENT = "llm-manager-test/absent:1"
SLEEP, NONSENSE = ("300",), ("nonsense",)
GOLDEN = Path(__file__).parent.parent / "golden"
HERE = lm.Site(generated="/absent", hugging_face_home="/absent", compile_caches="/absent")


@dataclass
class Bench:
    """An installation as the adapter sees it, with cheap containers that only sleep."""

    instance: str
    tools: lm.Tools

    @property
    def containers(self) -> lm.Containers:
        return self.tools.containers

    def spec(self, name: str = "sleeper", **changes: object) -> ContainerSpec:
        wanted = ContainerSpec(
            name=ContainerName(f"{self.instance}-{name}"),
            role="database",  # the one role that Docker's own health check makes ready
            image=CADDY,
            network=f"{self.instance}-network",
            entrypoint=("sleep",),
            command=SLEEP,
            labels={lm.LABEL_MODEL_NAME: "chat"},
            healthcheck="true",
            restart="no",
            stop_seconds=5,
            readiness=lm.DockerHealthy(),
        )
        return dataclasses.replace(wanted, **changes)  # type: ignore[arg-type]

    def observed(self) -> lm.Observed:
        return lm.observe(self.tools)

    def running(self) -> set[str]:
        return {c.name for c in self.observed().containers.values() if c.running}

    def apply(self, *wanted: ContainerSpec) -> list[str]:
        """Plan and apply; the report."""
        plans = [lm.plan_container(spec, self.observed()) for spec in wanted]
        steps = [step for plan in plans for step in plan.whole]
        said: list[str] = []
        stage = lm.Stage(title="test", steps=tuple(steps))
        lm.apply_stage(stage, self.tools, lm.Control(said.append))
        return said


@pytest.fixture
def real(docker_client: docker.DockerClient, tmp_path: Path) -> Iterator[Callable[[], Bench]]:
    """Makes installations with adapters of their own on real Docker."""
    made: list[str] = []
    numbers = itertools.count()

    def make() -> Bench:
        instance = secrets.token_hex(3)
        made.append(instance)
        store = lm.StateStore(tmp_path / str(next(numbers)))
        store.generated.mkdir(parents=True)
        engine = lm.DockerContainers(DOCKER_URL, instance)
        engine.create_network(f"{instance}-network")
        images = lm.DockerImages(DOCKER_URL, instance, {})
        weights = lm.HuggingFace(lm.HubCache(store.home / "huggingface"), lambda: None)
        database = lm.PostgresPrograms(engine.contents, store.home / "backups")
        doors = lm.Tools(
            engine, lm.HttpProbes(), store, lm.SystemClock(), lm.SimulatedGpus(), weights, images,
            database,
        )  # fmt: skip
        return Bench(instance, doors)

    yield make
    for instance in made:
        remove_labelled(docker_client, instance)


@pytest.fixture(params=["simulated", "real"])
def bench(request: pytest.FixtureRequest) -> Bench:
    """The contract's two sides."""
    if request.param == "real":
        return request.getfixturevalue("real")()
    world = a_world()
    world.images |= {CADDY}
    world.absent_images |= {ABSENT}
    world.broken |= {*NONSENSE}
    tools = some_tools(world)
    tools.containers.create_network("abc-network")
    return Bench("abc", tools)


# --- the contract ------------------------------------------------------------


def test_what_is_created_is_observed_with_its_hash_and_labels(bench: Bench) -> None:
    spec = bench.spec()
    bench.containers.create(spec)
    seen = bench.observed().containers[spec.name]
    assert seen.running
    assert (seen.spec_hash, seen.role, seen.image) == (spec.hash, spec.role, CADDY)
    assert seen.model_name == "chat"
    assert seen.address
    assert bench.containers.look(spec.name) is not None


def test_a_container_set_aside_comes_back_running(bench: Bench) -> None:
    spec = bench.spec()
    bench.containers.create(spec)
    bench.containers.set_aside(spec.name, 5)
    assert bench.containers.look(spec.name) is None
    assert {*bench.observed().containers} == {lm.aside(spec.name)}
    assert bench.running() == set()
    bench.containers.bring_back(spec.name)
    assert bench.running() == {spec.name}
    assert bench.observed().containers[spec.name].spec_hash == spec.hash


def test_a_stopped_container_says_how_it_ended_and_starts_again(bench: Bench) -> None:
    spec = bench.spec()
    bench.containers.create(spec)
    bench.containers.stop(spec.name, 5)
    seen = bench.containers.look(spec.name)
    assert seen is not None
    assert not seen.running
    assert seen.exit_code is not None
    bench.containers.start(spec.name)
    assert bench.running() == {spec.name}


def test_removing_is_done_once_and_harmless_twice(bench: Bench) -> None:
    spec = bench.spec()
    bench.containers.create(spec)
    bench.containers.remove(spec.name, 5)
    bench.containers.remove(spec.name, 5)
    assert bench.observed().containers == {}


def test_what_is_gone_is_refused_by_name(bench: Bench) -> None:
    absent = ContainerName(f"{bench.instance}-absent")
    for touch in (bench.containers.start, lambda name: bench.containers.logs(name, 10)):
        with pytest.raises(lm.ContainerGoneError):
            touch(absent)


def test_a_name_that_is_taken_is_refused_and_its_holder_runs_on(bench: Bench) -> None:
    bench.containers.create(bench.spec())
    with pytest.raises(lm.ContainerFailedError, match="another container has its name"):
        bench.containers.create(bench.spec(command=("301",)))
    assert bench.running() == {bench.spec().name}


def test_an_image_that_does_not_exist_is_one_sentence(bench: Bench) -> None:
    with pytest.raises(lm.ContainerFailedError, match="there is no such image"):
        bench.containers.create(bench.spec(image=ABSENT))
    # Without a way to its registry, Docker cannot know that there is no such image.
    reasons = "no such image|cannot be reached"
    with pytest.raises(lm.ContainerFailedError, match=reasons) as refusal:
        bench.containers.pull(ABSENT, lambda _: None)
    assert ABSENT in refusal.value.fact


def test_what_is_as_wished_is_left_alone(bench: Bench) -> None:
    bench.apply(bench.spec())
    before = bench.observed().containers
    assert bench.apply(bench.spec()) == []
    assert bench.observed().containers == before


def test_changed_settings_replace_the_container(bench: Bench) -> None:
    bench.apply(bench.spec())
    bench.apply(bench.spec(command=("301",)))
    assert bench.running() == {bench.spec().name} == {*bench.observed().containers}
    assert bench.apply(bench.spec(command=("301",))) == []


def test_a_failed_replacement_leaves_the_old_container_running(bench: Bench) -> None:
    old, new = bench.spec(), bench.spec(command=NONSENSE)
    bench.apply(old)
    with pytest.raises(lm.ContainerFailedError, match="before it was ready"):
        bench.apply(new)
    assert bench.running() == {old.name} == {*bench.observed().containers}
    assert bench.observed().containers[old.name].spec_hash == old.hash


def test_an_interrupted_replacement_is_taken_up_where_it_was_left(bench: Bench) -> None:
    old, new = bench.spec(), bench.spec(command=("301",))
    bench.apply(old)
    bench.containers.set_aside(old.name, 5)
    bench.apply(new)
    assert bench.running() == {new.name} == {*bench.observed().containers}
    assert bench.observed().containers[new.name].spec_hash == new.hash


# --- real Docker alone -------------------------------------------------------


@pytest.fixture
def foreign(docker_client: docker.DockerClient) -> Iterator[Callable[[str], Container]]:
    """Containers that somebody else started here."""
    made: list[Container] = []

    def start(name: str) -> Container:
        made.append(
            docker_client.containers.create(
                CADDY, ["300"], entrypoint=["sleep"], name=name, network_mode="none", init=True
            )
        )
        made[-1].start()
        return made[-1]

    yield start
    for container in made:
        container.remove(force=True)


def test_a_foreign_container_is_never_touched(
    real: Callable[[], Bench], foreign: Callable[[str], Container]
) -> None:
    bench = real()
    spec = bench.spec()
    other = foreign(spec.name)
    assert bench.observed().containers == {}
    with pytest.raises(lm.ContainerFailedError, match="another container has its name"):
        bench.apply(spec)  # and its undo must not remove what it did not make
    for touch in (bench.containers.stop, bench.containers.set_aside, bench.containers.remove):
        with pytest.raises(lm.ContainerFailedError, match="belongs to something else"):
            touch(spec.name, 5)
    other.reload()
    assert (other.name, other.status) == (spec.name, "running")


def test_two_installations_do_not_see_each_other(real: Callable[[], Bench]) -> None:
    one, two = real(), real()
    one.apply(one.spec())
    assert two.observed().containers == {}
    assert two.observed().networks == {f"{two.instance}-network"}
    with pytest.raises(lm.ContainerFailedError, match="belongs to something else"):
        two.containers.remove(one.spec().name, 5)
    state = a_state(instance=two.instance, name_prefix=f"{two.instance}-")
    plan = str(lm.plan_state(state, two.observed(), HERE))
    assert one.instance not in plan
    assert one.running() == {one.spec().name}


def test_the_volume_of_another_installation_is_refused(real: Callable[[], Bench]) -> None:
    one, two = real(), real()
    name = f"{one.instance}-data"
    one.containers.create_volume(name)
    one.containers.create_volume(name)
    with pytest.raises(lm.ContainerFailedError, match="belongs to another installation"):
        two.containers.create_volume(name)
    assert name in one.observed().volumes
    assert name not in two.observed().volumes


def test_a_container_gets_what_its_spec_says(
    real: Callable[[], Bench], docker_client: docker.DockerClient
) -> None:
    bench = real()
    spec = bench.spec(
        shm_mib=256, environment={"TOKEN": lm.pydantic.SecretStr("hidden")}, drop_capabilities=True
    )
    bench.containers.create(spec)
    container = docker_client.containers.get(spec.name)
    _, said = container.exec_run(["sh", "-c", "df -m /dev/shm | tail -1; echo $TOKEN; id -u"])
    assert said.split()[1] == b"256"
    assert b"hidden" in said
    settings = container.attrs["HostConfig"]
    assert settings["LogConfig"]["Config"] == {"max-file": "3", "max-size": "50m"}
    assert settings["CapDrop"] == ["ALL"]
    assert settings["RestartPolicy"]["Name"] == "no"
    assert "hidden" not in repr(spec) + str(bench.observed())


def test_logs_are_read_and_followed_whole(real: Callable[[], Bench]) -> None:
    bench = real()
    # 200 lines of a two-byte letter: a chunk of the stream may end inside one.
    say = "i=0; while [ $i -lt 200 ]; do echo zeile-$i-äöü; i=$((i+1)); done; sleep 1"
    spec = bench.spec(entrypoint=("sh",), command=("-c", say))
    bench.containers.create(spec)
    lines = [f"zeile-{i}-äöü" for i in range(200)]
    assert list(bench.containers.follow(spec.name)) == lines
    assert bench.containers.logs(spec.name, 2).split() == lines[-2:]


def test_the_log_of_the_last_run_is_told_from_that_of_the_runs_before(
    real: Callable[[], Bench],
) -> None:
    bench = real()

    def end() -> None:
        while (seen := bench.containers.look(spec.name)) is not None and seen.running:
            time.sleep(0.1)

    spec = bench.spec(entrypoint=("sh",), command=("-c", "echo starts; sleep 2; exit 3"))
    bench.containers.create(spec)
    end()
    once = bench.containers.logs(spec.name, 10, last_run=True)
    bench.containers.start(spec.name)
    end()
    assert bench.containers.logs(spec.name, 10, last_run=True) == once
    assert len(bench.containers.logs(spec.name, 10).split("starts")) == 3


# --- the edge ----------------------------------------------------------------


def an_edge(bench: Bench, **changes: object) -> lm.State:
    https, http = free_ports(2)
    images = dataclasses.replace(lm.Images(), caddy=CADDY)
    edge = lm.Edge(**{"https_port": https, "http_port": http} | changes)  # type: ignore[arg-type]
    prefix = f"{bench.instance}-"
    return a_state(instance=bench.instance, name_prefix=prefix, images=images, edge=edge)


def site_of(bench: Bench) -> lm.Site:
    assert isinstance(bench.tools.files, lm.StateStore)
    return lm.Site(
        generated=str(bench.tools.files.generated),
        hugging_face_home="/absent",
        compile_caches="/absent",
    )


def own_certificate(folder: Path) -> lm.OwnCertificate:
    """A chain and key as an operator has them, under the names of the golden file."""
    certificate, key = folder / "certs" / "our chain.pem", folder / "private" / "our.key"
    for path in (certificate, key):
        path.parent.mkdir()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=llm.test",
         "-addext", "subjectAltName=DNS:localhost,DNS:llm.test"],
        check=True, capture_output=True,
    )  # fmt: skip
    return lm.OwnCertificate(certificate_path=str(certificate), key_path=str(key))


@pytest.mark.parametrize("name", ["Caddyfile", "Caddyfile.own-certificate", "Caddyfile.acme"])
def test_caddy_takes_the_golden_caddyfile_of_every_kind_of_certificate(
    real: Callable[[], Bench], tmp_path: Path, name: str
) -> None:
    bench = real()
    state = an_edge(bench)
    seen = lm.read_certificate(dataclasses.replace(state.edge, tls=own_certificate(tmp_path)))
    assert seen is not None
    bench.tools.files.write_generated(lm.CERTIFICATE, seen.pem)
    bench.containers.check_caddyfile(
        lm.render_edge(state, site_of(bench)), (GOLDEN / name).read_text()
    )
    assert bench.observed().containers == {}, "nothing is left of the check"


def test_a_rejected_caddyfile_changes_nothing(real: Callable[[], Bench], tmp_path: Path) -> None:
    bench = real()
    state = an_edge(bench, tls=own_certificate(tmp_path))
    spec, text = lm.render_edge(state, site_of(bench)), lm.render_caddyfile(state, "a", ())
    before = {lm.CADDYFILE: "before\n", lm.CERTIFICATE: "before\n"}
    for path, content in before.items():
        bench.tools.files.write_generated(path, content)
    write = lm.WriteFile(lm.CERTIFICATE, "no certificate\n", "before\n", "a test")
    load = lm.LoadCaddyfile(spec, text, "before\n", False, "a test")
    with pytest.raises(lm.ContainerFailedError, match="Caddy rejects the generated Caddyfile"):
        lm.apply_stage(lm.Stage(title="edge", steps=(write, load)), bench.tools, lm.Control(str))
    assert bench.tools.files.read_generated() == before
    assert bench.observed().containers == {}


def test_a_running_caddy_loads_a_good_file_and_survives_a_bad_one(
    real: Callable[[], Bench],
) -> None:
    bench = real()
    state = an_edge(bench)
    start_edge(bench, state, "a")
    assert bench.observed().edge == lm.LoadedCaddyfile(
        "a", lm.caddyfile_hash(lm.render_caddyfile(state, "a", ()))
    )
    turned = lm.render_caddyfile(state, "b", ())
    bench.tools.files.write_generated(lm.CADDYFILE, turned)
    bench.containers.reload_caddyfile(lm.edge_name(state))
    assert bench.observed().edge == lm.LoadedCaddyfile("b", lm.caddyfile_hash(turned))
    bench.tools.files.write_generated(lm.CADDYFILE, "nonsense {\n")
    with pytest.raises(lm.ContainerFailedError, match="did not load its new configuration"):
        bench.containers.reload_caddyfile(lm.edge_name(state))
    assert bench.observed().edge == lm.LoadedCaddyfile("b", lm.caddyfile_hash(turned))


def start_edge(bench: Bench, state: lm.State, slot: lm.Slot) -> None:
    """Network, volume, file and container of the edge, as a plan orders them."""
    spec, text = lm.render_edge(state, site_of(bench)), lm.render_caddyfile(state, slot, ())
    bench.containers.create_network(lm.network_name(state))
    for volume in lm.volume_names(replace(state, endpoint="running")):
        bench.containers.create_volume(volume)
    bench.containers.check_caddyfile(spec, text)
    bench.tools.files.write_generated(lm.CADDYFILE, text)
    bench.apply(spec)


def test_a_taken_port_is_named_and_the_container_undone(real: Callable[[], Bench]) -> None:
    bench = real()
    state = an_edge(bench)
    with socket.socket() as other:
        other.bind(("0.0.0.0", state.edge.https_port))  # noqa: S104
        other.listen()
        with pytest.raises(lm.ContainerFailedError, match="a port it publishes is taken"):
            start_edge(bench, state, "a")
    assert bench.observed().containers == {}
    bench.apply(lm.render_edge(state, site_of(bench)))
    assert bench.running() == {lm.edge_name(state)}


# --- Docker itself goes away -------------------------------------------------


def test_docker_that_goes_away_in_mid_change_is_one_sentence_and_healed(
    install: Install, tmp_path: Path
) -> None:
    here = install()
    with here.step("an endpoint, with Docker cut off three times"):
        wish_an_endpoint(here)
        for moment in ("create .*postgres", "wait until .*litellm", "check and write"):
            with Cutter(DOCKER_URL, tmp_path / "docker.sock") as cutter:
                complained = cut_at(here, cutter, moment)
            assert complained.startswith("Docker does not answer, so LLM Manager could not")
            assert complained.count("\n") == 1
        here.cli("apply")
        assert here.cli("plan") == "Nothing to do.\n"
        assert {*here.containers()} == {"llm-postgres", "llm-litellm-a", "llm-caddy"}


def wish_an_endpoint(here: Installation) -> None:
    """Without a model: no engine has to start for this."""

    def edit(state: lm.State) -> lm.State:
        return dataclasses.replace(state, endpoint="running")

    here.manager().save(lm.Change(title="Wish an endpoint", edit=edit))


def cut_at(here: Installation, cutter: Cutter, moment: str) -> str:
    """Run `apply` and cut its Docker off at a step; what it complains of."""
    with here.popen("apply", DOCKER_HOST=cutter.url) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        for line in running.stdout:
            if lm.re.match(moment, line):
                cutter.cut()
                break
        assert running.wait(60) == lm.FAILED
        return running.stderr.read()


def test_a_container_whose_gpu_hangs_holds_nobody_up(
    docker_client: docker.DockerClient, real: Callable[[], Bench]
) -> None:
    bench = real()
    bench.containers.create(bench.spec("a"))
    script = "#!/bin/sh\nexec sleep 600\n"
    docker_client.containers.get(bench.spec("a").name).put_archive("/usr/bin", archive(script))
    seen = bench.containers.look(bench.spec("a").name)
    assert seen is not None
    started = time.monotonic()
    assert bench.containers.visible_devices(seen) is None
    assert bench.containers.visible_devices(seen) is None  # the same question, not a second one
    assert time.monotonic() - started < 60, "the SDK itself would wait for ever"
    found = docker_client.containers.get(bench.spec("a").name).top()["Processes"]
    assert sum("sleep 600" in " ".join(row) for row in found) == 1


def archive(script: str) -> bytes:
    content, packed = script.encode(), io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        entry = tarfile.TarInfo("nvidia-smi")
        entry.size, entry.mode = len(content), 0o755
        tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()
