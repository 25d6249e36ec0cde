"""Accelerators that programs can be compiled for where they are absent: their data sheets, and their devices in JAX."""

import dataclasses
import math
import os
import re

import numpy as np
from jax.experimental import topologies

from autocontext_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One device, from its maker's data sheet.

    Attributes:
      platform: of its plug-in, `cuda` or `tpu`.
      memory: bytes that programs can use.
      bandwidth: of that memory, bytes a second.
      peak: dense FLOP a second of matrix units, by type; float32 is TF32 on NVIDIA's, as XLA's convolutions use.
      link: bytes a second that leave it for the other devices of its machine, one direction.
    """

    platform: str
    memory: int
    bandwidth: float
    peak: dict[str, float]
    link: float

    @property
    def usable(self) -> float:
        """Bytes that JAX takes unless told otherwise: on GPUs three quarters (XLA_PYTHON_CLIENT_MEM_FRACTION)."""
        return self.memory * (0.75 if self.platform == "cuda" else 1)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA needs to know of an NVIDIA GPU: its data sheet and the CUDA guide's table of compute capabilities.

    Sizes are bytes; shared memory and threads are of one multiprocessor.
    """

    title: str
    capability: tuple[int, int]
    multiprocessors: int
    clock_ghz: float
    lanes: int
    threads: int
    shared_memory: int
    l2_cache: int


MIB = 2**20
EXTRAS = {"cuda": "cuda13", "tpu": "tpu"}  # of pyproject.toml
TPU_AXES = {"v5e": 2, "v5p": 3, "v6e": 2}  # of a slice
ACCELERATORS = {
    "h100": Accelerator("cuda", 81559 * MIB, 3.352e12, {"bf16": 989e12, "f16": 989e12, "f32": 494e12}, 450e9),
    "h200": Accelerator("cuda", 143771 * MIB, 4.8e12, {"bf16": 989e12, "f16": 989e12, "f32": 494e12}, 450e9),
    "a100": Accelerator("cuda", 81920 * MIB, 2.039e12, {"bf16": 312e12, "f16": 312e12, "f32": 156e12}, 300e9),
    "l4": Accelerator("cuda", 23034 * MIB, 0.3e12, {"bf16": 121e12, "f16": 121e12, "f32": 60e12}, 32e9),
    "rtx4090": Accelerator("cuda", 24564 * MIB, 1.008e12, {"bf16": 165e12, "f16": 165e12, "f32": 82.6e12}, 32e9),
    "v5e": Accelerator("tpu", 16 * 10**9, 0.819e12, {"bf16": 197e12}, 200e9),
    "v5p": Accelerator("tpu", 95 * 10**9, 2.765e12, {"bf16": 459e12}, 600e9),
    "v6e": Accelerator("tpu", 32 * 10**9, 1.6e12, {"bf16": 918e12}, 400e9),
}
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 128, 2048, 228 * 1024, 50 * MIB),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 1.98, 128, 2048, 228 * 1024, 50 * MIB),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 64, 2048, 164 * 1024, 40 * MIB),
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 2.04, 128, 1536, 100 * 1024, 48 * MIB),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 2.52, 128, 1536, 100 * 1024, 72 * MIB),
}

GPU_TEXT = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_memory}
  threads_per_core_limit: {gpu.threads}
  core_count: {gpu.multiprocessors}
  fpus_per_core: {gpu.lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {gpu.l2_cache}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu.title}"
"""


def split_name(name: str) -> tuple[str, int]:
    """Splits a target's name: `h100` -> (h100, 1); `h100x8` -> (h100, 8); `v5e-4` -> (v5e, 4).

    Raises:
      UserError: there is no such accelerator, or not this number of them.
    """
    several = re.fullmatch(r"(.+)[x-](\d+)", name)
    device, count = several.groups() if several and name not in ACCELERATORS else (name, "1")
    if device not in ACCELERATORS or int(count) not in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        known = ", ".join(ACCELERATORS)
        raise UserError(
            f"unknown device {name!r}: expected one of {known}, or a power of two of them, such as h100x8 or v5e-4"
        )
    return device, int(count)


def accelerator_and_count(name: str) -> tuple[Accelerator, int]:
    """A target's accelerator and how many of them there are, from its name; errors as `split_name`."""
    device, count = split_name(name)
    return ACCELERATORS[device], count


def gpu_text(name: str) -> str:
    """XLA's description of a GPU."""
    gpu, accelerator = GPUS[name], ACCELERATORS[name]
    major, minor = gpu.capability
    return GPU_TEXT.format(
        gpu=gpu,
        major=major,
        minor=minor,
        # sm_90a: the matrix units' own instructions
        feature="feature_extension: ACCELERATED_FEATURES" if major >= 9 else "",
        optin=gpu.shared_memory - 1024,
        bandwidth=int(accelerator.bandwidth),
        memory=accelerator.memory,
    )


def absent_devices(name: str) -> np.ndarray:
    """The devices of a target as JAX knows them, [count]: to compile for, not to run on.

    Call `runtime.compile_for_absent_devices` before.

    Raises:
      UserError: the name is unknown, or the compiler for this platform is not installed.
    """
    device, count = split_name(name)
    platform = ACCELERATORS[device].platform
    try:
        if platform == "cuda":
            text = gpu_text(device)
            hosts = max(1, count // 8)
            found = topologies.get_topology_desc(
                name, "cuda", topology=f"1x{hosts}x{count // hosts}", target_config=text
            )
        else:
            # Without these names libtpu asks the network what machine this is.
            os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE=f"{device}-{count}")
            os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
            rows = 2 ** (int(math.log2(count)) // 2)
            shape = (rows, count // rows, 1)
            few = {"chips_per_host_bounds": shape} if count < 4 else {}
            title = "x".join(str(side) for side in shape[: TPU_AXES[device]])
            found = topologies.get_topology_desc(f"{device}:{title}", "tpu", **few)
    except RuntimeError as error:  # what JAX raises where a platform's plug-in is missing
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the compiler for {name} is missing: pip install -e '.[{EXTRAS[platform]}]' ({reason})"
        ) from None
    return np.array(found.devices)
