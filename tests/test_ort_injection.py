"""libvlrt_ort: the latent injection against the reference at every SIMD level, and in a bundle against its body."""

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.bundles import QUICK
from tests.closeness import assert_close
from tests.ort_ops import EPS, doubled, level, load, run
from vlrt.backends import ort_library
from vlrt.backends.ort import OrtBackend
from vlrt.bundle import Bundle
from vlrt.kernels import reference

__all__ = ["level"]
NAMES = ("h", "norm_in", "fc1", "fc2", "q_proj", "memory_k", "memory_v", "alpha", "norm_out", "rho")
CONSTANTS = ("fc1", "fc2", "q_proj")


def make_inputs(
    rows: int = 1, steps: int = 8, width: int = 64, inner: int = 96, batch: int = 1
) -> dict[str, torch.Tensor]:
    """Random inputs of `latent_injection`, of such sizes that no part of the sum drowns the others."""
    generator = torch.Generator().manual_seed(rows + steps + width + inner)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(shape, generator=generator)

    return {
        "h": random(batch, rows, width, scale=30.0),
        "norm_in": 1 + random(width, scale=0.1),
        "fc1": random(inner, width, scale=3 * width**-0.5),
        "fc2": random(width, inner, scale=inner**-0.5),
        "q_proj": random(width, width, scale=2 * width**-0.5),
        "memory_k": random(batch, steps, width, scale=2.0),
        "memory_v": random(batch, steps, width),
        "alpha": torch.tensor(0.8),
        "norm_out": 1 + random(width, scale=0.1),
        "rho": torch.tensor(0.03),
    }


def session(
    library: ort_library.Library, given: dict[str, torch.Tensor], num_heads: int, simd: str = "auto", threads: int = 2
) -> Any:
    """A graph of the op with the matrices of `given`, other sizes free."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"{name}{i}" for i in range(given[name].ndim)])
        for name in NAMES
        if name not in CONSTANTS
    ]
    node = helper.make_node("LatentInjection", NAMES, ["z"], domain="vlrt", num_heads=num_heads, eps=EPS)
    held = [numpy_helper.from_array(given[name].numpy(), name) for name in CONSTANTS]
    out = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "latent", values, [out], held)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("vlrt", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return load(library, model, {ort_library.SIMD: simd}, threads)


def inject(made: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return run(made, *(tensor for name, tensor in given.items() if name not in CONSTANTS))[0]


def expected(given: dict[str, torch.Tensor], num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference in fp64, and in fp32."""
    wide = doubled(tuple(given.values()))
    return (
        reference.latent_injection(*wide, num_heads, EPS),
        reference.latent_injection(*given.values(), num_heads, EPS),
    )


@pytest.mark.parametrize(
    ("width", "inner", "num_heads"), [(64, 96, 4), (18, 7, 3), (10, 33, 1), (896, 896, 14), (72, 1500, 9)]
)
@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (1, 8), (3, 2), (8, 17), (13, 300)])
def test_it_is_the_reference(library, level, rows, steps, width, inner, num_heads):
    """Catches the rest of a row that no vector holds, rows, heads and tasks that are mixed up, a lost gate."""
    given = make_inputs(rows, steps, width, inner)
    exact, plain = expected(given, num_heads)
    assert_close(inject(session(library, given, num_heads, level), given), exact, plain)


def test_samples_see_their_own_video(library, level):
    """Catches the memory of another sample."""
    given = make_inputs(5, 6, batch=3)
    exact, plain = expected(given, 4)
    assert_close(inject(session(library, given, 4, level), given), exact, plain)


@pytest.mark.parametrize("size", [1e-20, 1e4])
def test_extremes_stay_right(library, level, size):
    """Catches exponents beyond those of a float, and a norm whose eps is lost."""
    given = make_inputs(3)
    given["h"] *= size
    given["fc1"] *= 1e3  # silu of thousands, on both sides
    given["memory_k"] *= 1e3
    exact, plain = expected(given, 4)
    assert_close(inject(session(library, given, 4, level), given), exact, plain)


def test_what_is_no_number_stays_so(library, level):
    """Catches a NaN that a maximum or a bound swallows: only the row that it is in is lost."""
    given = make_inputs(6)
    given["h"][0, 4, 7] = torch.nan
    out = inject(session(library, given, 4, level), given)
    assert out[0, 4].isnan().all()
    assert not out[0, [0, 1, 2, 3, 5]].isnan().any()
    given["memory_v"][0, 3, 5] = torch.nan
    assert inject(session(library, given, 4, level), given).isnan().all()


def test_threads_change_nothing(library):
    """Catches a task that writes what another one reads."""
    given = make_inputs(8, 30, 896, 896)
    ones, fours = (inject(session(library, given, 14, threads=n), given) for n in (1, 4))
    assert torch.equal(ones, fours)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm_in": torch.zeros(63)}, r"norm_in is \[63\], expected \[64\]"),
        ({"norm_out": torch.zeros(65)}, r"norm_out is \[65\], expected \[64\]"),
        ({"h": torch.zeros(1, 2, 60)}, r"fc1 is \[96, 64\], expected \[96, 60\]"),
        ({"h": torch.zeros(1, 2, 62)}, "4 heads do not divide a width of 62"),
        ({"memory_k": torch.zeros(2, 8, 64)}, r"memory_k is \[2, 8, 64\], expected \[1, 8, 64\]"),
        ({"memory_k": torch.zeros(1, 0, 64)}, r"memory_k is \[1, 0, 64\]"),
        ({"memory_v": torch.zeros(1, 7, 64)}, r"memory_v is \[1, 7, 64\], expected \[1, 8, 64\]"),
        ({"fc2": torch.zeros(96, 64)}, r"fc2 is \[96, 64\], expected \[64, 96\]"),
        ({"q_proj": torch.zeros(32, 64)}, r"q_proj is \[32, 64\], expected \[64, 64\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_words(library, change, words):
    """Catches a read behind the end of an array."""
    given = make_inputs() | change
    with pytest.raises(Exception, match=words):
        inject(session(library, given, 4), given)


def test_a_bundle_takes_it(library, make_bundle, monkeypatch):
    """Catches a graph whose body runs although the library has a kernel, and one that gives other latents."""
    monkeypatch.setattr(ort_library, "DIRECTORY", library.path.parent)
    bundle = Bundle.open(make_bundle("fp32", overrides=QUICK))
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library.path))
    before = ort_library.num_kernels(library)
    onnxruntime.InferenceSession(bundle.path / "latent.onnx", options, providers=["CPUExecutionProvider"])
    assert ort_library.num_kernels(library) == before + 1
    rng = np.random.default_rng(0)
    hidden, pooled = (rng.standard_normal((n, bundle.model.decoder.hidden_size)).astype(np.float32) for n in (4, 3))
    backends = [OrtBackend(bundle, 1, library=use) for use in (True, False)]
    ours, theirs = (backend.inject(hidden, backend.remember(pooled)) for backend in backends)
    assert_close(ours, theirs)
