"""Accelerators that a program can be compiled for without having one: their names, memory and peak speeds.

    named("v5e-16") -> Slice -> devices(slice) -> a mesh to lower and compile for

A slice of TPU chips is written as the compiler names it, `v5e:4x4`, or as Google Cloud does, `v5e-16`,
`v5litepod-16`, `v6e-256`, `v5p-128`. The number after v5p counts TensorCores, of which a chip has two.
"""

import dataclasses
import math
import os
from typing import Any

import jax
from jax.experimental import topologies

from alice_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is known of one chip; speeds are those of its data sheet, 0 where only its memory is of use here.

    Attributes:
      name: generation, as in a topology's name.
      memory_bytes: that a program may have.
      shapes: slices by their number of chips.
      flops: floating-point operations a second, bfloat16.
      memory_rate: bytes a second between memory and chip.
      link_rate: bytes a second that a chip sends to its neighbours over all links, half of the bidirectional figure.
      unit: side of its matrix unit.
      cores: as which Google Cloud's names count a chip.
    """

    name: str
    memory_bytes: int
    shapes: dict[int, str]
    flops: float = 0.0
    memory_rate: float = 0.0
    link_rate: float = 0.0
    unit: int = 128
    cores: int = 1


SQUARES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
# Memory is what libtpu 0.0.50 gives a program; speeds are those of https://docs.cloud.google.com/tpu/docs/v5e,
# /v5p-training and /v6e, read in November 2026.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", int(15.75 * 2**30), SQUARES, 197e12, 819e9, 200e9),
        Chip("v5p", int(95.73 * 2**30), CUBES, 459e12, 2765e9, 600e9, cores=2),
        Chip("v6e", int(31.24 * 2**30), SQUARES, 918e12, 1638e9, 400e9, unit=256),
    )
}
OTHER_NAMES = {"v5litepod": "v5e"}
SWEEP = ("v5e-16", "v5e-32", "v5e-64", "v5e-128", "v5e-256", "v5p-128", "v6e-256")


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that train together."""

    chip: Chip
    shape: str

    @property
    def chips(self) -> int:
        return math.prod(int(side) for side in self.shape.split("x"))

    @property
    def name(self) -> str:
        """As the compiler has it.

        >>> named("v5litepod-16").name, named("v5p-128").name, named("v6e:8x8").name
        ('v5e:4x4', 'v5p:4x4x4', 'v6e:8x8')
        """
        return f"{self.chip.name}:{self.shape}"


def named(text: str) -> Slice:
    """The slice of that name; a `UserError` that lists the names if there is none."""
    generation, _, shape = text.partition(":")
    if generation in CHIPS and shape in CHIPS[generation].shapes.values():
        return Slice(CHIPS[generation], shape)
    generation, _, count = text.partition("-")
    chip = CHIPS.get(OTHER_NAMES.get(generation, generation))
    if chip and count.isdecimal() and int(count) % chip.cores == 0 and int(count) // chip.cores in chip.shapes:
        return Slice(chip, chip.shapes[int(count) // chip.cores])
    known = "; ".join(f"{chip.name}: {', '.join(chip.shapes.values())}" for chip in CHIPS.values())
    raise UserError(
        f"--topology {text}: no such slice of TPU chips; give generation:shape of {known}, or Google Cloud's name, "
        "such as v5e-16, v5litepod-16, v5p-128 or v6e-256"
    )


USABLE = 0.9  # of a GPU's memory; the rest is for the driver, libraries and gaps between arrays
H200 = Slice(Chip("h200", int(USABLE * 141e9), {1: "1"}), "1")
# What the compiler asks about that device, from its data sheet.
H200_DESCRIPTION = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  l2_cache_size: 52428800 memory_bandwidth: 4800000000000 device_memory_size: 151397597184
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""


def devices(of: Slice) -> list[jax.Device]:
    """The chips of a slice that need not be there: programs compile for them, but do not run."""
    if of == H200:
        return _described("cuda", target_config=H200_DESCRIPTION, topology="1x1x1")
    # Without these libtpu looks for a TPU's metadata server, and refuses a second process on the same computer.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return _described("tpu", topology_name=of.name)


def _described(platform: str, **description: Any) -> list[jax.Device]:
    try:
        return topologies.get_topology_desc(platform=platform, **description).devices
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"no compiler for {platform} here: pip install 'alice_jax[{platform}]' in an environment of its own "
            f"({str(error).splitlines()[0]})"
        ) from error
