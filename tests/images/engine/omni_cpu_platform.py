"""A CPU platform for vLLM-Omni, which ships CUDA, ROCm, NPU, XPU and MUSA, as its plug-in."""

import psutil
import torch
from vllm.platforms.cpu import CpuPlatform
from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum


def plugin():
    return "omni_cpu_platform.CpuOmniPlatform"


class CpuOmniPlatform(OmniPlatform, CpuPlatform):
    _omni_enum = (
        OmniPlatformEnum.OOT if hasattr(OmniPlatformEnum, "OOT") else OmniPlatformEnum.UNSPECIFIED
    )
    device_type = "cpu"
    dist_backend = "gloo"

    @classmethod
    def get_default_stage_config_path(cls):
        return "vllm_omni/deploy"

    @classmethod
    def get_diffusion_attn_backend_cls(cls, selected_backend, head_size, allow_trtllm_default=True):
        # not at the top: that module asks which platform is the current one
        from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum  # noqa: PLC0415

        return DiffusionAttentionBackendEnum.TORCH_SDPA.get_path()

    @classmethod
    def supports_torch_inductor(cls):
        return False

    @classmethod
    def get_torch_device(cls, local_rank=None):
        return torch.device("cpu")

    @classmethod
    def get_device_count(cls):
        return 1

    @classmethod
    def get_device_version(cls):
        return None

    @classmethod
    def synchronize(cls):
        return None

    @classmethod
    def get_free_memory(cls, device=None):
        return psutil.virtual_memory().available

    @classmethod
    def get_device_memory(cls, device=None):
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    @classmethod
    def memory_reserved(cls, device=None):
        return 0

    @classmethod
    def supports_cpu_offload(cls):
        return False

    @classmethod
    def set_device(cls, device):
        return None

    # the bookkeeping of memory that GPU platforms get from torch.cuda
    @classmethod
    def reset_peak_memory_stats(cls, *a, **k):
        return None

    @classmethod
    def empty_cache(cls, *a, **k):
        return None

    @classmethod
    def max_memory_reserved(cls, *a, **k):
        return psutil.Process().memory_info().rss

    max_memory_allocated = memory_allocated = max_memory_reserved

    @classmethod
    def ipc_collect(cls, *a, **k):
        return None
