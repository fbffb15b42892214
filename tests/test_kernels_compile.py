"""Every Triton kernel, compiled for every target in what it ships, and what the machine code takes.

A kernel file takes part by a function `compilations(arch)`. No GPU: Triton's wheel holds the assembler.
"""

import importlib
import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlrt.kernels import configs, schema

TARGETS = (80, 87, 89, 90, 110, 120)  # A100, Orin, L4 and RTX 40, H100, Thor, RTX 50
# Registers that an attention kernel may spill per thread: beyond, it waits for its own memory. The others spill none.
MAX_STACK_BYTES = 64
SMALL_SHARED_BYTES = 48 * 1024  # of the others: every card gives it without being asked, so that programs share an SM
KERNELS = Path(__file__).parent.parent / "kernels"
MODULES = [path.stem for path in sorted(KERNELS.glob("*.py")) if "\ndef compilations(" in path.read_text()]
ATTENTION = [name for name in MODULES if name.endswith("_attention")]
SMALL = [name for name in MODULES if name not in ATTENTION]
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def shipped(module, arch):
    return list(importlib.import_module(f"vlrt.kernels.{module}").compilations(arch))


def cases():
    """Return module and compilation; small kernels in dtypes other than bf16 for one target each, in turn."""
    return [
        pytest.param(module, case, id=case.name)
        for module in MODULES
        for turn, arch in enumerate(TARGETS)
        for number, case in enumerate(shipped(module, arch))
        if module in ATTENTION or "*bf16" in case.signature.values() or number % len(TARGETS) == turn
    ]


def compiled(case, **constants):
    """Compile a case, some of its arguments as constants."""
    constexprs = case.constexprs | constants
    signature = case.signature | dict.fromkeys(constants, "constexpr")
    names = [name for name in case.aligned if name not in constants]
    attrs = {(case.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names}
    source = ASTSource(case.kernel, signature, constexprs, attrs)
    return triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=case.options)


def test_every_op_is_compiled_for_every_target():
    """Catches a target that no config names, a kernel file that the list above misses, and two cases of one name."""
    assert set(schema.LAUNCHERS.values()) | {"decode_attention", "slots"} == set(MODULES)
    for module in MODULES:
        for arch in TARGETS:
            names = [case.name for case in shipped(module, arch)]
            assert names
            assert len(names) == len(set(names))


@pytest.mark.parametrize(("module", "case"), cases())
def test_kernels_compile_and_fit(module, case, tmp_path):
    """Catches what compiles on one architecture only, blocks that no card can launch, and accumulators that spill."""
    kernel = compiled(case)
    limit = configs.SHARED_BYTES[case.arch] if module in ATTENTION else SMALL_SHARED_BYTES
    assert kernel.metadata.shared <= limit
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [CUOBJDUMP, "--dump-resource-usage", cubin]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    limit = MAX_STACK_BYTES if module in ATTENTION else 0
    assert stack <= limit, f"{stack} bytes of stack per thread: {usage}"


OPTIONAL = {  # pointers that a launcher may leave out, together
    "expand_kernel": [("p_q_proj", "p_q")],
    "mix_kernel": [("p_k", "p_v", "p_alpha", "p_q", "p_scores"), ("p_start",)],
    "slots_kernel": [("p_start",)],
}


@pytest.mark.parametrize("left_out", [0, 1])
@pytest.mark.parametrize("module", SMALL)
def test_sizes_of_one_and_absent_inputs_compile(module, left_out):
    """Catches code that a constant breaks: at a launch Triton makes constants of integers that are 1, and of None."""
    bf16 = [case for case in shipped(module, 90) if "*bf16" in case.signature.values()]
    for case in {case.kernel: case for case in reversed(bf16)}.values():  # one tile of each kernel is enough
        sizes = [key for key, kind in case.signature.items() if kind == "i32" and not key.startswith("num_")]
        absent = OPTIONAL.get(case.kernel.__name__, [])[left_out : left_out + 1]
        compiled(case, **dict.fromkeys(sizes, 1), **{key: None for keys in absent for key in keys})


@pytest.mark.parametrize("module", MODULES)
def test_signatures_name_every_parameter_in_order(module):
    """Catches a configuration that is compiled ahead with its arguments in other places than at the launch."""
    for case in shipped(module, 90):
        assert list(case.signature) == case.kernel.arg_names
        assert all(value is None or key.isupper() for key, value in case.constexprs.items())
        assert {key for key, kind in case.signature.items() if kind == "constexpr"} == set(case.constexprs)


def test_the_dtypes_that_ship_are_those_that_launchers_take():
    """Catches a dtype that `supported` says yes to and nothing is compiled for."""
    for module in SMALL:
        found = {kind for case in shipped(module, 90) for kind in case.signature.values()}
        assert {f"*{configs.FLOATS[dtype]}" for dtype in (torch.bfloat16, torch.float16, torch.float32)} <= found
