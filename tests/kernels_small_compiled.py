"""The small kernels, compiled for every target without a GPU: ptxas accepts them, and they stay within its means.

`test_kernels_small.py` runs this file in a process without TRITON_INTERPRET, which would hide the compiler.
"""

import importlib
import subprocess

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MODULES = ["latent_injection", "slots", "rms_norm", "swiglu", "patchify"]
TARGETS = [80, 87, 89, 90, 110, 120]  # A100, Orin, L4 and RTX 40, H100, Thor, RTX 50
SHARED_BYTES = 48 * 1024  # every card gives it without being asked, so that several programs share an SM
UNALIGNED = {"L", "R", "S", "T", "num_window_rows", "num_window_columns", "p_start"}  # all else is a multiple of 16

CONFIGURATIONS = [
    (f"{module}-{i}", configuration)
    for module in MODULES
    for i, configuration in enumerate(importlib.import_module(f"vlrt.kernels.{module}").compilations())
]


def stack_bytes(cubin, path):
    """Bytes per thread that ptxas moved to local memory."""
    path.write_bytes(cubin)
    tool = f"{triton.__path__[0]}/backends/nvidia/bin/cuobjdump"
    report = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return int(report.split("STACK:")[1].split()[0])


def targets_of(i, signature):
    """All targets in bf16, the models' own dtype; another dtype takes them in turn, to spare minutes."""
    return TARGETS if "*bf16" in signature.values() else [TARGETS[i % len(TARGETS)]]


@pytest.mark.parametrize(
    ("target", "configuration"),
    [
        pytest.param(target, configuration, id=f"sm_{target}-{name}")
        for i, (name, configuration) in enumerate(CONFIGURATIONS)
        for target in targets_of(i, configuration[1])
    ],
)
def test_every_configuration_compiles(target, configuration, tmp_path):
    """Catches what a target's compiler refuses, tiles too large for its shared memory, and spills."""
    kernel, signature, constexprs, options = configuration
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and name not in UNALIGNED
    }
    source = ASTSource(kernel, signature, constexprs, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    assert compiled.metadata.shared <= SHARED_BYTES
    assert stack_bytes(compiled.asm["cubin"], tmp_path / "kernel.cubin") == 0


OPTIONAL = {  # pointers that a launcher may leave out, together
    "expand_kernel": [("p_q_proj", "p_q")],
    "mix_kernel": [("p_k", "p_v", "p_alpha", "p_q", "p_scores"), ("p_start",)],
    "slots_kernel": [("p_start",)],
}


@pytest.mark.parametrize("left_out", [0, 1])
@pytest.mark.parametrize("module", MODULES)
def test_sizes_of_one_and_absent_inputs_compile(module, left_out):
    """Catches code that a constant breaks: at a launch Triton makes constants of integers that are 1, and of None."""
    done = set()  # one tile of each kernel is enough
    for name, (kernel, signature, constexprs, options) in CONFIGURATIONS:
        if name.startswith(module) and "*bf16" in signature.values() and kernel.__name__ not in done:
            done.add(kernel.__name__)
            ones = {key: 1 for key, kind in signature.items() if kind == "i32" and not key.startswith("num_")}
            absent = OPTIONAL.get(kernel.__name__, [])[left_out : left_out + 1]
            constants = constexprs | ones | {key: None for keys in absent for key in keys}
            source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
            triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("module", MODULES)
def test_signatures_name_every_parameter_in_order(module):
    """Catches a configuration that is compiled ahead with its arguments in other places than at the launch."""
    for name, (kernel, signature, constexprs, _) in CONFIGURATIONS:
        if name.startswith(module):
            assert list(signature) == kernel.arg_names
            assert all(constexprs[key] is None or key.isupper() for key in constexprs)
            assert {key for key, kind in signature.items() if kind == "constexpr"} == set(constexprs)
