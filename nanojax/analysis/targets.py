"""GPUs that are not there, as XLA compiles for them: `nanojax plan --target h200` needs jax's CUDA plugin and no GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

from nanojax.errors import UserError

ALLOCATED = 0.75  # of a GPU's memory is what jax takes unless XLA_CLIENT_MEM_FRACTION says otherwise


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What its maker says of one of compute capability 9.0."""

    name: str
    multiprocessors: int
    memory: int
    """Bytes, as the driver reports them."""
    bandwidth: int
    """Of memory, bytes a second."""


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 132, 85_028_896_768, 3_352_000_000_000),
    "h200": Gpu("NVIDIA H200 141GB HBM3e", 132, 151_397_597_184, 4_800_000_000_000),
}


def describe(gpu: Gpu) -> str:
    """XLA's GpuTargetConfigProto as text; limits as in the table of compute capabilities of the CUDA C++ Programming Guide."""
    device: dict[str, Any] = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 49152, "shared_memory_per_core": 233472,
        "threads_per_core_limit": 2048, "core_count": gpu.multiprocessors, "fpus_per_core": 128, "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535, "block_dim_limit_z": 65535, "memory_bandwidth": gpu.bandwidth, "l2_cache_size": 50 * 2**20,
        "clock_rate_ghz": 1.98, "device_memory_size": gpu.memory, "shared_memory_per_block_optin": 232448,
        "registers_per_core_limit": 65536, "registers_per_block_limit": 65536, "thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64, "device_vendor": '"NVIDIA Corporation"', "platform_version": '"Compute Capability 9.0a"',
        "device_address_bits": 64, "ecc_enabled": "true", "name": f'"{gpu.name}"', "driver_version": '"13.0.0"',
        "runtime_version": '"13.0.0"', "compile_time_toolkit_version": '"13.0.0"', "dnn_version": '"9.10.0"',
    }  # fmt: skip
    lines = [f"  {key}: {value}" for key, value in device.items()]
    lines.append("  cuda_compute_capability { major: 9 }")
    body = "\n".join(lines)
    return (
        f'gpu_device_info {{\n{body}\n}}\nplatform_name: "CUDA"\ndnn_version_info {{ major: 9 minor: 10 }}\n'
        f'device_description_str: "{gpu.name}"\n'
    )


def target_devices(name: str, topology: str) -> list[Any]:
    """GPUs that programs can be compiled for and not run on, as slices x hosts of a slice x devices of a host: 64x1x8.

    Raises UserError where jax cannot compile for GPUs.

    For a process that uses no GPU itself.
    """
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=describe(GPUS[name]), topology=topology)
    except Exception as error:  # what the plugin raises is not documented
        what = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"compiling for a GPU that is not there needs jax's CUDA plugin ({what:.100}); pip install 'nanojax[cuda]'"
        ) from error
    return list(found.devices)
