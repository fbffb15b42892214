"""What this machine can do: rates of matrix products and of memory, against which everything else is set."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benches import timing
from benches.inputs import Setting, Source
from vlrt.backends.fp8 import fp8_linear, to_fp8

# M, N, K: a cube, and the widest and the narrowest product of the 7B decoder's prefill.
PRODUCTS = ((8192, 8192, 8192), (8192, 37_888, 3584), (8192, 3584, 18_944))
TINY_PRODUCTS = ((16, 32, 64),)
COPY_BYTES = 4 * 1024**3


def run(item: str, setting: Setting, expired: Callable[[], bool], out: Path) -> dict[str, Any]:
    """Return one ceiling, `best`, and the cases that it is the best of."""
    return {"gemm_bf16": _bf16, "gemm_fp8": _fp8, "memory": _memory}[item](setting)


def _bf16(setting: Setting) -> dict[str, Any]:
    source = Source(setting.device, torch.bfloat16)

    def product(m: int, n: int, k: int) -> Callable[[], Tensor]:
        x, weight = source.normal(m, k), source.normal(n, k, scale=k**-0.5)
        return lambda: torch.nn.functional.linear(x, weight)

    return _products(setting, product)


def _fp8(setting: Setting) -> dict[str, Any]:
    """Time the whole of a fp8 layer as the backend runs it, activations quantised, and the product alone."""
    source = Source(setting.device, torch.bfloat16)

    def product(m: int, n: int, k: int) -> Callable[[], Tensor]:
        x, (weight, scale) = source.normal(m, k), to_fp8(source.normal(n, k, scale=k**-0.5))
        return lambda: fp8_linear(x, weight, scale, None)

    def alone(m: int, n: int, k: int) -> Callable[[], Tensor]:
        (x, of_x), (weight, scale) = (to_fp8(source.normal(rows, k)) for rows in (m, n))
        if setting.device != "cuda":
            return lambda: x.float() @ weight.float().t()
        return lambda: torch._scaled_mm(
            x, weight.t(), scale_a=of_x[:, None], scale_b=scale[None], out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return {**_products(setting, alone), "layer": _products(setting, product)}


def _products(setting: Setting, make: Callable[[int, int, int], Callable[[], Any]]) -> dict[str, Any]:
    cases = []
    for m, n, k in setting.pick(PRODUCTS, TINY_PRODUCTS):
        seconds = timing.measure(make(m, n, k), setting.device, seconds=0.4, cold=False)
        cases.append({"mnk": [m, n, k], "seconds": seconds, "flops_per_second": 2.0 * m * n * k / seconds["median"]})
    return {"best": max(case["flops_per_second"] for case in cases), "cases": cases}


def _memory(setting: Setting) -> dict[str, Any]:
    """Time a copy, counted as read and written, and a read of everything."""
    size = setting.pick(COPY_BYTES, 2**20)
    source, target = (torch.rand(size // 4, device=setting.device) for _ in range(2))
    copied = timing.measure(lambda: target.copy_(source), setting.device, cold=False)
    read = timing.measure(lambda: source.view(-1, 1024).amax(1), setting.device, cold=False)
    rates = {"copy": 2 * size / copied["median"], "read": size / read["median"]}
    return {"best": max(rates.values()), **rates, "seconds": {"copy": copied, "read": read}}
