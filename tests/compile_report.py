"""What the compiler makes of the Triton kernels, for GPUs that need not be there: registers, spills, occupancy.

    python tests/compile_report.py --arch sm_80 sm_90 gfx942 --output compile.json

The kernels are compiled as they are launched: `ops` does its whole work on tensors without values, and the launcher
that it is given compiles.
"""

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import torch

from timm_metricconv.ops.custom_op import Arguments, Gradients, empty_gradients, empty_output
from timm_metricconv.ops.triton_common import Launcher, triton
from timm_metricconv.ops.triton_fused import forward, gradients


class Processor(NamedTuple):
    """What programs share on one multiprocessor.

    Attributes:
        registers: What each of its four schedulers has, of 32 bits.
        granule: A warp gets a multiple of this.
        warps: The most for one scheduler.
        shared: Bytes of shared memory.
        reserved: Bytes of it that each program loses to the system.
        lanes: Threads of a warp.
    """

    registers: int
    granule: int
    warps: int
    shared: int
    reserved: int
    lanes: int


# CUDA C++ programming guide, technical specifications; AMD CDNA3 instruction set architecture, 3.6
PROCESSORS: Dict[str, Processor] = {
    "sm_80": Processor(16384, 256, 16, 164 * 1024, 1024, 32),
    "sm_86": Processor(16384, 256, 12, 100 * 1024, 1024, 32),
    "sm_89": Processor(16384, 256, 12, 100 * 1024, 1024, 32),
    "sm_90": Processor(16384, 256, 16, 228 * 1024, 1024, 32),
    "sm_100": Processor(16384, 256, 16, 228 * 1024, 1024, 32),
    "sm_120": Processor(16384, 256, 12, 100 * 1024, 1024, 32),
    "gfx90a": Processor(512 * 64, 8 * 64, 8, 64 * 1024, 0, 64),
    "gfx942": Processor(512 * 64, 8 * 64, 8, 64 * 1024, 0, 64),
    "gfx950": Processor(512 * 64, 8 * 64, 8, 160 * 1024, 0, 64),
}
SCHEDULERS = 4
POINTERS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
MATRIX_INSTRUCTIONS = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma|v_smfmac)"


@dataclass(frozen=True)
class Variant:
    """A call of the operator.

    Attributes:
        affine: The samples come as affine maps, not positions.
        mask: They are modulated.
        groups: The kernel has four groups and there are eight metric groups.
        depthwise: Every channel is a group.
    """

    affine: bool = False
    mask: bool = False
    groups: bool = False
    depthwise: bool = False

    def __str__(self) -> str:
        parts = "affine" if self.affine else "positions", "mask" * self.mask, "groups" * self.groups
        return "+".join(filter(None, parts))


VARIANTS = [Variant(*flags) for flags in itertools.product((False, True), repeat=4)]
CHANNELS, SIZE, BATCH, K = 128, 28, 8, 3


def programs_per_processor(arch: str, registers: int, shared_bytes: int, warps: int) -> int:
    """How many programs of `warps` warps fit a multiprocessor at once.

    Args:
        arch: A name from `PROCESSORS`.
        registers: Of a thread.
        shared_bytes: Of a program.
        warps: Of a program.
    """
    limit = PROCESSORS[arch]
    whole = -(-registers * limit.lanes // limit.granule) * limit.granule
    resident = SCHEDULERS * min(limit.registers // whole, limit.warps)
    return min(resident // warps, limit.shared // max(shared_bytes + limit.reserved, 1))


def _nvidia_usage(cubin: bytes) -> Tuple[int, int]:
    """Registers of a thread, and bytes that it spills to local memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(program), "-res-usage", str(path)]
        text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _amd_usage(assembly: str) -> Tuple[int, int]:
    """Registers of a thread (vector and accumulation registers share a file), and how many it spills."""
    registers, spills = (
        int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1]) for name in ("vgpr_count", "vgpr_spill_count")
    )
    return registers, spills


class Compiler(Launcher):
    """A launcher that compiles for `arch` and keeps a record of every kernel."""

    def __init__(self, arch: str):
        self.hip, self.arch, self.processors = arch.startswith("gfx"), arch, 132
        self.records: List[Dict[str, Any]] = []

    def __call__(self, kernel: Any, grid: Tuple[int, ...], *arguments: Any, **settings: Any) -> None:
        """Compiles `kernel` as a launch with these arguments would."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, attributes = {}, {}, {}
        values = dict(zip(kernel.arg_names, arguments, strict=False))
        values.update({name: settings.pop(name) for name in kernel.arg_names if name in settings})
        for i, parameter in enumerate(kernel.params):
            name, value = parameter.name, values[parameter.name]
            special = not (parameter.is_constexpr or parameter.do_not_specialize)
            if isinstance(value, torch.Tensor):
                # AMD's driver also says that a tensor is smaller than 2 GB
                within = [["tt.pointer_range", 32]] if self.hip else []
                signature[name], attributes[(i,)] = "*" + POINTERS[value.dtype], [["tt.divisibility", 16], *within]
            elif parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
                signature[name], constants[(i,)] = "constexpr", value
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
                if special and isinstance(value, int) and value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        if self.hip:
            target = GPUTarget("hip", self.arch, PROCESSORS[self.arch].lanes)
        else:
            target = GPUTarget("cuda", int(self.arch[3:]), 32)
        compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=settings)
        assembly = compiled.asm["amdgcn" if self.hip else "ptx"]
        registers, spills = _amd_usage(assembly) if self.hip else _nvidia_usage(compiled.asm["cubin"])
        shared = compiled.metadata.shared
        warps = compiled.metadata.num_warps
        self.records.append(
            {
                "kernel": kernel.__name__,
                "arch": self.arch,
                "registers": registers,
                "spills": spills,
                "shared_bytes": shared,
                "programs_per_sm": programs_per_processor(self.arch, registers, shared, warps),
                "tensor_cores": len(re.findall(MATRIX_INSTRUCTIONS, assembly)),
                "warps": warps,
                "tile": [value for name, value in values.items() if name.startswith("BLOCK_")],
            }
        )


def compile_kernels(arch: str, dtype: torch.dtype, variant: Variant, backward: bool = True) -> List[Dict[str, Any]]:
    """Compiles every kernel that a call launches.

    Args:
        arch: A name from `PROCESSORS`.
        dtype: Of the image and the kernel.
        variant: The call.
        backward: With the gradients of everything.

    Returns:
        A record for each kernel: kernel, arch, dtype, variant, registers and spills (of a thread), shared_bytes,
        programs_per_sm, tensor_cores (matrix instructions in its code), warps and tile.
    """
    metric_groups = 8 if variant.groups else 1
    groups = CHANNELS if variant.depthwise else 4 if variant.groups else 1

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    arguments = Arguments(
        empty(BATCH, CHANNELS, SIZE, SIZE, dtype=dtype),
        empty(BATCH, *((metric_groups * 6,) if variant.affine else (metric_groups * K * K, 2)), SIZE, SIZE),
        empty(CHANNELS, CHANNELS // groups, K, K, dtype=dtype),
        empty(CHANNELS, dtype=dtype),
        empty(BATCH, metric_groups * K * K, SIZE, SIZE) if variant.mask else None,
        [1, 1],
        [1, 1],
        [1, 1],
        groups,
        empty(K * K, 2) if variant.affine else None,
    )
    compiler = Compiler(arch)
    out = empty_output(arguments)
    forward(arguments, out, compiler)
    if backward:
        into = Gradients(*empty_gradients(arguments, True, True, True))
        gradients(arguments, out, into if variant.mask else into._replace(mask=None), compiler)
    described = {"dtype": str(dtype).removeprefix("torch."), "variant": str(variant)}
    prefix = "depthwise_" if variant.depthwise else ""
    return [{**record, "kernel": prefix + record["kernel"], **described} for record in compiler.records]


def main() -> None:
    """Compiles every kernel for the architectures, dtypes and variants, a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=PROCESSORS, default=["sm_80", "sm_90", "sm_100", "gfx942"])
    parser.add_argument("--output", type=Path, help="JSON file for the records")
    options = parser.parse_args()
    records = []
    for arch, dtype, variant in itertools.product(options.arch, POINTERS, VARIANTS):
        for record in compile_kernels(arch, dtype, variant):
            print(*(f"{key}={value}" for key, value in record.items()), flush=True)
            records.append(record)
    if options.output:
        options.output.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
