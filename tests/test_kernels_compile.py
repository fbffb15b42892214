"""Every Triton kernel, compiled for every target with its shipped configs, and what the machine code takes.

A kernel file takes part by a function `compilations(arch)`. No GPU: Triton's wheel holds the assembler.
"""

import importlib
import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlrt.kernels import configs

TARGETS = (80, 87, 89, 90, 110, 120)
MAX_STACK_BYTES = 64  # registers spilled per thread: beyond, a kernel waits for its own memory
KERNELS = Path(__file__).parent.parent / "kernels"
MODULES = [path.stem for path in sorted(KERNELS.glob("*.py")) if "\ndef compilations(arch" in path.read_text()]
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def cases():
    """Return each kernel and config for the first and the last target that it ships for, and for the one with wgmma."""
    alike = {}
    for arch in TARGETS:
        for module in MODULES:
            for case in importlib.import_module(f"vlrt.kernels.{module}").compilations(arch):
                key = repr((case.kernel, case.signature, case.constexprs, case.options))
                alike.setdefault(key, []).append(case)
    chosen = {
        case.name: case for same in alike.values() for case in same if case in (same[0], same[-1]) or case.arch == 90
    }
    return list(chosen.values())


def compiled(case):
    attrs = {(case.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(case.kernel, case.signature, case.constexprs, attrs)
    return triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=case.options)


def test_every_target_is_compiled_for():
    """Catches a target that no config names, and a kernel file that the list above misses."""
    assert {case.arch for case in cases()} == set(TARGETS)
    assert {"decode_attention", "segment_attention", "video_attention"} <= set(MODULES)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_kernels_compile_and_fit(case, tmp_path):
    """Catches what compiles on one architecture only, blocks that no card can launch, and accumulators that spill."""
    kernel = compiled(case)
    assert kernel.metadata.shared <= configs.SHARED_BYTES[case.arch]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [CUOBJDUMP, "--dump-resource-usage", cubin]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    assert stack <= MAX_STACK_BYTES, f"{stack} bytes of stack per thread: {usage}"
