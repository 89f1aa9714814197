"""The Triton kernels as the compiler leaves them: they need no GPU for it."""

import json
import os

import compile_report
import pytest
import torch
from compile_report import Variant, compile_kernels, programs_per_processor
from packaging.version import Version

triton = pytest.importorskip("triton")
compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
# 3.3 spills 72 bytes on sm_80, and needs ROCm's own linker for gfx942
fits = pytest.mark.skipif(Version(triton.__version__) < Version("3.8"), reason="the registers are those of Triton 3.8")
KEYS = {"kernel", "arch", "dtype", "variant", "registers", "spills", "shared_bytes", "programs_per_sm", "tensor_cores"}


@pytest.mark.parametrize("arch", ("sm_80", "sm_90", "gfx942"))
@pytest.mark.parametrize(
    "variant, dtype",
    [
        (Variant(), torch.bfloat16),
        (Variant(affine=True, mask=True, groups=True), torch.bfloat16),
        (Variant(affine=True), torch.float32),
        (Variant(affine=True, mask=True, groups=True, depthwise=True), torch.bfloat16),
    ],
    ids=str,
)
@compiles
@fits
def test_every_kernel_fits_the_registers(arch, variant, dtype):
    records = compile_kernels(arch, dtype, variant)
    assert len(records) == 3 and all(set(record) >= KEYS for record in records)
    for record in records:
        assert record["spills"] == 0 and record["programs_per_sm"] >= 1, record
        if variant.depthwise:
            assert record["tensor_cores"] == 0
        elif dtype == torch.bfloat16:
            assert record["tensor_cores"] > 0, record


@pytest.mark.parametrize("affine", (False, True))
@compiles
@fits
def test_two_forward_programs_share_a_hopper_processor(affine):
    record = compile_kernels("sm_90", torch.bfloat16, Variant(affine, mask=True), backward=False)[0]
    assert record["programs_per_sm"] >= 2 and record["warps"] == 8, record


def test_occupancy():
    assert programs_per_processor("sm_90", 128, 24576, 8) == 2
    assert programs_per_processor("sm_90", 129, 24576, 8) == 1  # the registers of a warp come in steps of 256
    assert programs_per_processor("sm_90", 32, 0, 8) == 8  # 64 warps
    assert programs_per_processor("sm_80", 32, 80 * 1024, 4) == 2  # shared memory
    assert programs_per_processor("gfx942", 128, 8192, 8) == 2
    assert programs_per_processor("gfx942", 129, 8192, 8) == 1


@compiles
def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compile_report, "VARIANTS", [Variant(depthwise=True)])
    monkeypatch.setattr(compile_report, "POINTERS", {torch.float16: "fp16", torch.float32: "fp32"})
    output = tmp_path / "compile.json"
    monkeypatch.setattr("sys.argv", ["compile_report.py", "--arch", "sm_80", "--output", str(output)])
    compile_report.main()
    records = json.loads(output.read_text())
    assert {record["kernel"][:9] for record in records} == {"depthwise"} and len(records) == 6
    assert capsys.readouterr().out.count("spills=0") == 6
