"""Hardware views: cards, slices, links and restores as the operator reads them."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

from builders import GPU_0, GPU_1, NOW, a_model, a_state, as_wished, but, ended, on_gpus, the

import llm_manager as lm

SLICES: tuple[lm.Slice, ...] = (("1g.5gb", 0), ("3g.20gb", 4))


def some_gpus() -> lm.SimulatedGpus:
    """An A100 that is cut, and one that is whole."""
    gpus = lm.SimulatedGpus([lm.simulated_card("A100 40 GB"), lm.simulated_card("A100 40 GB")])
    gpus.set_mig_mode(GPU_0, enabled=True)
    for wanted in SLICES:
        gpus.create_slice(GPU_0, wanted)
    gpus.links = {frozenset({GPU_0, GPU_1}): lm.Link("NVLink", 12)}
    return gpus


def on_slice(wanted: lm.Slice = SLICES[1]) -> lm.MigPlacement:
    return lm.MigPlacement(gpu_uuid=GPU_0, profile=wanted[0], start=wanted[1])


def a_wish(*models: lm.Model) -> lm.State:
    return a_state(*models, mig_layouts=(lm.MigLayout(gpu_uuid=GPU_0, slices=SLICES),))


def a_snapshot(state: lm.State, **changes: object) -> lm.Snapshot:
    hardware = some_gpus().read()
    observed = as_wished(state, hardware=hardware)
    given = {"taken_at": NOW, "state": state, "observed": observed, "plan": None}
    return lm.Snapshot(**{**given, "hardware": hardware, **changes})  # type: ignore[arg-type]


def looks(blocks: list[lm.Block]) -> list[tuple[float, float, str, str]]:
    return [(block.start, block.size, block.look, f"{block.title} {block.text}".strip())
            for block in blocks]  # fmt: skip


def test_a_cut_card_is_drawn_from_its_first_slice_to_its_last() -> None:
    state = a_wish(a_model(placement=on_slice()))
    snapshot = a_snapshot(state)
    (gpu, _) = snapshot.hardware.gpus
    assert looks(lm.card_blocks(gpu, state, partial(lm.standing, snapshot))) == [
        (0, 1 / 8, "empty", "1g.5gb empty"),
        (1 / 8, 3 / 8, "free", "not cut"),
        (4 / 8, 4 / 8, "ready", "3g.20gb chat: ready"),
    ]


def test_a_whole_card_is_drawn_by_the_shares_of_its_models() -> None:
    state = a_wish(
        a_model("idle", placement=on_gpus(GPU_1), wish="stopped"),
        a_model("chat", placement=on_gpus(GPU_1, memory_fraction=0.5)),
        a_model("embed", placement=on_gpus(GPU_1, memory_fraction=0.2)),
    )
    snapshot = a_snapshot(state)
    observed = snapshot.observed
    assert observed is not None
    failed = but(observed, ended(the(observed, "llm-model-embed-0"), 1))
    stands = partial(lm.standing, replace(snapshot, observed=failed))
    drawn = looks(lm.card_blocks(snapshot.hardware.gpus[1], state, stands))
    assert [(round(start, 6), round(size, 6), *rest) for start, size, *rest in drawn] == [
        (0, 0.5, "ready", "50% chat: ready"),
        (0.5, 0.2, "failed", "20% embed: failed"),
        (0.7, 0.3, "free", "free"),
    ]


def test_no_text_of_an_operator_or_a_process_becomes_html() -> None:
    state = a_wish(a_model(placement=on_slice()))
    gpus = some_gpus()
    gpus.open(GPU_1, "<img src=x onerror=alert(1)>")
    hardware = gpus.read()
    odd = replace(hardware.gpus[1], name="<b>A100</b>")
    hardware = replace(hardware, gpus=(hardware.gpus[0], odd))
    drawn = lm.cards_html(a_snapshot(state, hardware=hardware))
    assert "&lt;img src=x" in drawn
    assert "&lt;b&gt;A100" in drawn
    assert {*re.findall(r"<(\w+)", drawn)} == {"div", "b", "span"}


def test_what_the_picture_cannot_show_is_said_below_it() -> None:
    gpus = some_gpus()
    gpus.open(GPU_1, "train.py")
    gpus.open(GPU_1, "nvidia-persistenced", computes=False)
    hardware = gpus.read()
    state = a_wish()
    observed = as_wished(state, hardware=hardware)
    note = lm.card_note(replace(hardware.gpus[1], xids=(79, 79)), state, observed)
    assert re.fullmatch(
        r"also here: train\.py \(process \d+\); held open by nvidia-persistenced "
        r"\(process \d+, the persistence daemon\); driver errors: Xid 79", note,
    )  # fmt: skip
    assert lm.card_note(hardware.gpus[0], state, observed) == ""
    unwished = lm.card_note(hardware.gpus[0], a_state(), observed)
    assert unwished == "cut by somebody else; its slices do not survive a reboot"
    other = a_state(mig_layouts=(lm.MigLayout(gpu_uuid=GPU_0, slices=SLICES[1:]),))
    assert lm.card_note(hardware.gpus[0], other, observed) == "wished: 3g.20gb at 4"


def test_a_planned_card_shows_models_on_their_new_slices() -> None:
    state = a_wish(a_model(placement=on_slice()))
    hardware = some_gpus().read()
    change = lm.cutting_as_typed(state, hardware.gpus[0], "chat=9")
    drawn = lm.planned_card(change, state, hardware)
    after = re.findall(r"<b>(\dg[^<]+)</b><span>([^<]*)", drawn.partition(">now<")[2])
    assert after == [("2g.10gb", "chat")]
    assert drawn.index(">now<") < drawn.index("after the change")
    assert "GPU 1" not in drawn


def test_what_the_driver_does_not_tell_is_unknown_and_never_zero() -> None:
    bare = lm.Hardware(gpus=(lm.Gpu(uuid=GPU_0),))
    ((title, *cells),) = lm.gpu_rows(None, bare)
    assert title == "GPU 0"
    assert cells == [*["unknown"] * 5, "cannot be cut", ""]
    assert "0" not in lm.card_html(bare.gpus[0], []).partition("<b>GPU 0</b>")[2].split("<div")[0]


def test_figures_that_the_driver_keeps_are_not_listed_one_by_one() -> None:
    bare = lm.Gpu(uuid=GPU_0)
    assert "the driver tells no figures" in lm.card_html(bare, [])
    shown = lm.card_html(replace(bare, memory_mib=81920, power_w=301.2), [])
    assert "<span>80.0 GiB · 301 W</span>" in shown


def test_where_no_link_is_known_there_is_no_matrix_of_unknowns() -> None:
    unlinked = replace(some_gpus().read(), links={})
    assert "does not tell" in lm.topology_text(a_snapshot(a_state(), hardware=unlinked))


def test_only_what_can_be_cut_or_joined_is_offered() -> None:
    hardware = some_gpus().read()
    bare = a_snapshot(a_state(), hardware=lm.Hardware())
    full = a_snapshot(a_wish(a_model(placement=on_slice())), hardware=hardware)
    assert (lm.planner_view(bare)["visible"], lm.topology_view(bare)["visible"]) == (False, False)
    assert (lm.planner_view(full)["visible"], lm.topology_view(full)["visible"]) == (True, True)
    assert lm.gpu_boxes(bare)["choices"] == [("the processor", lm.PROCESSOR)]
    (first, _), *_ = lm.gpu_boxes(full)["choices"]
    assert first.endswith("· chat, cut")


def test_slices_are_listed_with_who_wishes_them_and_who_is_on_them() -> None:
    state = a_state(
        a_model(placement=on_slice()),
        mig_layouts=(lm.MigLayout(gpu_uuid=GPU_0, slices=(("2g.10gb", 2), SLICES[1])),),
    )
    rows = lm.slice_rows(state, some_gpus().read())
    seen = [[row[1], row[2], row[3], row[4][:7], row[5]] for row in rows]
    assert seen == [
        ["1g.5gb at 0", "4.8 GiB", "no", "MIG-" + rows[0][4][4:7], ""],
        ["2g.10gb at 2", "9.6 GiB", "yes", "missing", ""],
        ["3g.20gb at 4", "19.5 GiB", "yes", "MIG-" + rows[2][4][4:7], "chat"],
    ]


def test_the_matrix_of_links_reads_as_nvidia_smi_prints_it() -> None:
    hardware = replace(some_gpus().read(), links={frozenset({GPU_0, GPU_1}): lm.Link("NVLink", 12)})
    assert lm.topology_rows(hardware) == [["GPU 0", "X", "NV12"], ["GPU 1", "NV12", "X"]]
    apart = replace(hardware, links={})
    assert lm.topology_rows(apart)[0] == ["GPU 0", "X", "unknown"]
    assert "| GPU 0 | X | NV12 |" in lm.topology_text(a_snapshot(a_wish(), hardware=hardware))


def test_a_reboot_is_told_step_by_step_with_the_last_times() -> None:
    state = a_wish(a_model(placement=on_slice()), a_model("embed", wish="stopped"))
    seconds = {"llm-model-chat-0": 93.0, "llm-postgres": 4.0, "llm-litellm-b": 11.0}
    observed = as_wished(state, hardware=some_gpus().read(), start_seconds=seconds)
    assert lm.reboot_rows(state, observed) == [
        ["1 MIG layout", "GPU 0: 1g.5gb at 0, 3g.20gb at 4", ""],
        ["2 PostgreSQL", "keys and usage", "4 s"],
        ["3 chat", "3g.20gb at 4 of GPU 0", "1 min 33 s"],
        ["4 LiteLLM", "https://localhost/v1", "11 s"],
        ["5 Caddy", "https://localhost/v1", "unknown"],
    ]
    on = dict.fromkeys(lm.BOOT_UNITS, True)
    assert lm.reboot_warnings(state, observed, on) == []
    assert lm.reboot_text(state, observed, on).startswith("Safe to reboot")


def test_every_doubt_about_a_reboot_is_said() -> None:
    state = a_wish(a_model(placement=on_slice()))
    gpus = some_gpus()
    gpus.destroy_slice(GPU_0, SLICES[0])
    gpus.set_mig_mode(GPU_1, enabled=True)
    gpus.create_slice(GPU_1, ("7g.40gb", 0))
    hardware = replace(gpus.read(), mig_manager=True)
    observed = as_wished(state, hardware=hardware)
    observed = but(observed, ended(the(observed, "llm-model-chat-0"), 1))
    off = {"llm-manager.service": False, "docker.service": None}
    warnings = lm.reboot_warnings(state, observed, off)
    unwished = "GPU 1 is cut, and no layout is wished for it: its slices would be gone. "
    for doubt in (
        "llm-manager.service does not start at boot. Run `llm_manager.py install`.",
        f"{unwished}Keep them with `mig apply 1 keep`.",
        "GPU 0 has 3g.20gb at 4; a reboot would bring what is wished: 1g.5gb at 0, 3g.20gb at 4.",
        "chat is not ready now, so nobody knows whether it would be then.",
    ):
        assert doubt in warnings
    assert any("nvidia-mig-manager" in line for line in warnings)
    assert len(warnings) == 5
    text = lm.reboot_text(state, observed, off)
    assert text.startswith("Not everything would come back:\n- ")


def test_a_restore_is_judged_by_looking_and_a_failure_keeps_its_reason() -> None:
    state = a_wish(a_model(placement=on_slice()), a_model("embed"))
    observed = as_wished(state, hardware=some_gpus().read(), start_seconds={"llm-caddy": 2.0})
    observed = but(observed, ended(the(observed, "llm-model-embed-0"), 1))
    fault = lm.ManagerError("It ran out of memory.", advice="Choose a smaller model.")
    rows = lm.restore_rows(state, observed, {"model embed": fault})
    assert rows == [
        ["1 MIG layout of GPU 0", "as wished: 1g.5gb at 0, 3g.20gb at 4"],
        ["2 PostgreSQL", "ready"],
        ["3 chat", "ready"],
        ["3 embed", "failed: It ran out of memory. Choose a smaller model."],
        ["4 LiteLLM", "ready"],
        ["5 Caddy", "ready (its last start took 2 s)"],
        ["6 monitoring", "off"],
    ]


def test_only_free_wished_slices_are_offered_to_a_new_model() -> None:
    state = a_wish(a_model(placement=on_slice()))
    offered = lm.slice_choices(a_snapshot(state))["choices"]
    assert offered == [("GPU 0: 1g.5gb at 0 (4.8 GiB)", f"{GPU_0}:1g.5gb:0")]


def test_trouble_with_the_driver_needs_the_operator() -> None:
    upgraded = lm.Hardware(kernel_version="550.54.15", library_version="560.35.03")
    lost = lm.Hardware(lost=("GPU 1 does not answer: GPU is lost.",))
    for hardware, said in ((upgraded, "Reboot pending: "), (lost, "GPU 1 does not answer")):
        matters = lm.attention(a_snapshot(a_state(), hardware=hardware))
        assert any(m.text.startswith(said) and m.tab == "Hardware" for m in matters)
    assert lm.attention(a_snapshot(a_state(), hardware=lm.Hardware())) == []
