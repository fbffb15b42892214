"""Every kernel against its reference in fp64: odd sizes, all dtypes, far strides, graph replay, poisoned memory.

And the backend's own ways against the host's (`backend_checks.py`). On the CPU the kernels are interpreted, in sizes
that take that no time.
"""

import functools
import itertools
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benches import timing
from benches.closeness import assert_close
from benches.gpu import backend_checks
from benches.inputs import Arguments, Setting, Source, expected, outputs, poisoned, with_own_caches
from benches.op_bench import verify

FAR = 2**31 + 8  # elements: beyond what an int32 can count
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Make = Callable[[Source], Arguments]
Check = tuple[str, str, Make]  # name, op, arguments


def run(item: str, setting: Setting, expired: Callable[[], bool], out: Path) -> dict[str, Any]:
    """Return one row per check of an op: its name, and `error` where it failed."""
    setting = Setting(setting.device, setting.tiny, interpret=setting.device == "cpu")
    rows = []
    for name, check in backend_checks.checks(setting) if item == "backend" else _checks(item, setting):
        begun = time.monotonic()
        row: dict[str, Any] = {"check": name}
        if expired():
            row["skipped"] = "out of time"
        else:
            try:
                check()
            except Exception:
                row["error"] = traceback.format_exc()
        rows.append(row | {"seconds": time.monotonic() - begun})
        if timing.device_is_lost(setting.device):
            rows[-1].setdefault("error", "the kernel broke the context of its process")
            break
        if setting.device == "cuda":
            torch.cuda.empty_cache()
    failed = [row["check"] for row in rows if "error" in row]
    return {"rows": rows, "num_checks": len(rows), "failed": failed}


def _checks(item: str, setting: Setting) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the checks of an op, those first that matter most where time is short."""
    dtypes = setting.pick(DTYPES, (torch.float32, torch.bfloat16))
    yield from _shape_checks(item, setting, dtypes[0])
    for name, op, make, dtype, places in _far(item, setting):
        far = Source(setting.device, dtype)
        yield f"{op} far {name}", functools.partial(_verify_far, op, setting, make, far, places)
    if setting.device == "cuda":
        for op, makes in _replayed(item).items():
            yield f"{op} replay", functools.partial(_verify_replay, op, setting, *makes)
        for op in {"rms_norm": ("rms_norm", "add_rms_norm"), "swiglu": ("swiglu",)}.get(item, ()):
            yield f"{op} more than 2**31 elements", functools.partial(_verify_large, op, setting)
    for dtype in dtypes[1:]:
        yield from _shape_checks(item, setting, dtype)


def _shape_checks(item: str, setting: Setting, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    for name, op, make in _shapes(item, setting, dtype):
        source = Source(setting.device, dtype)

        def check(op: str = op, make: Make = make, source: Source = source) -> None:
            verify(op, setting.op(op), make(source))

        yield f"{op} {name} {str(dtype).removeprefix('torch.')}", check


def _shapes(item: str, setting: Setting, dtype: torch.dtype) -> Iterator[Check]:
    """Yield odd sizes. Few per dtype: every new specialisation of a kernel is compiled once more."""
    if item in ("video_attention", "decode_attention"):
        yield from _video_shapes(item, setting, dtype)
    elif item == "segment_attention":
        lengths = setting.pick((1, 63, 123, 64, 64, 777, 1024), (1, 19, 7))
        for head_dim in setting.pick((80, 72, 128), (80,)) if dtype == torch.bfloat16 else (80,):
            sizes = {"lengths": lengths, "num_heads": setting.pick(5, 1), "head_dim": head_dim}
            yield f"D={head_dim}", item, functools.partial(Source.segment_attention, **sizes)
    elif item == "latent_injection":
        full = ((1, 3584, 33, 28), (8, 3584, 128, 28), (17, 896, 1, 14), (8, 896, 129, 1))
        for length, width, steps, heads in setting.pick(full, ((1, 48, 3, 2), (3, 48, 5, 3))):
            sizes = {"length": length, "width": width, "steps": steps, "num_heads": heads, "batch": 2}
            name = f"L={length} C={width} T={steps} heads={heads}"
            yield name, item, functools.partial(Source.latent_injection, **sizes)
    elif item in ("rms_norm", "swiglu"):
        for rows, width in setting.pick(((1, 3584), (123, 777), (63, 18_944)), ((3, 77),)):
            for op in ("rms_norm", "add_rms_norm") if item == "rms_norm" else ("swiglu",):
                make = functools.partial(getattr(Source, op), rows=rows, width=width)
                yield f"rows={rows} width={width}", op, make
    else:
        for frames, height, width in setting.pick(((2, 28, 28), (6, 252, 308)), ((2, 28, 56),)):
            make = functools.partial(Source.patchify, num_frames=frames, height=height, width=width)
            yield f"{frames}x{height}x{width}", item, make


def _video_shapes(item: str, setting: Setting, dtype: torch.dtype) -> Iterator[Check]:
    if item == "decode_attention":
        sizes = setting.pick(((0, 1), (63, 1), (777, 2), (2047, 1), (1000, 9), (3, 32)), ((5, 1), (19, 3)))
    else:
        sizes = setting.pick(((0, 63), (0, 777), (123, 129), (1000, 33), (777, 1024)), ((0, 37), (5, 33)))
    heads = setting.pick((28, 4), (4, 2))
    for past, num_new in sizes:
        others = (64, 80) if dtype == torch.bfloat16 and past in (777, 123) else ()
        for head_dim in setting.pick((128, *others), (64,)):
            given = {"past": past, "num_new": num_new, "heads": heads, "head_dim": head_dim, "batch": 2, "spare": 9}
            name = f"past={past} S={num_new} D={head_dim}"
            yield name, "video_attention_", functools.partial(Source.video_attention, **given)


def _far(item: str, setting: Setting) -> Iterator[tuple[str, str, Make, torch.dtype, tuple[int, ...]]]:
    """Yield arguments, and which of them get a first stride that puts the last entry beyond FAR."""
    dtype, rows = setting.pick(torch.bfloat16, torch.float32), setting.pick(1001, 17)
    if item in ("video_attention", "decode_attention"):
        num_new = {"video_attention": 130, "decode_attention": 2}[item] if not setting.tiny else 2
        yield (
            "batches",
            "video_attention_",
            lambda s: s.video_attention(50, num_new, heads=(4, 2), head_dim=128, batch=2, spare=7),
            dtype,
            (0, 1, 2, 5, 6),
        )
    elif item == "segment_attention":
        lengths = setting.pick([500, 523], [9, 8])
        yield (
            "tokens",
            item,
            lambda s: s.segment_attention(lengths, num_heads=2, head_dim=80),
            dtype,
            (0, 1, 2),
        )
    elif item == "latent_injection":
        yield "batches", item, lambda s: s.latent_injection(3, 64, 5, 2, batch=2), dtype, (0, 5, 6)
    elif item == "rms_norm":
        yield "rows", item, lambda s: s.rms_norm(rows, 96), dtype, (0,)
        yield "rows", "add_rms_norm", lambda s: s.add_rms_norm(rows, 96), dtype, (0, 1)
    elif item == "swiglu":
        yield "rows", item, lambda s: s.swiglu(rows, 96), dtype, (0, 1)
    else:
        yield "frames", item, lambda s: s.patchify(4, 28, 56), dtype, (0,)


def _verify_far(op: str, setting: Setting, make: Make, source: Source, places: tuple[int, ...]) -> None:
    given, far = make(source), setting.pick(FAR, 2**14)
    exact, plain = expected(op, with_own_caches(op, given))
    for place, x in zip(places, spread([given[place] for place in places], far), strict=True):
        given[place] = x
    with poisoned():
        outs = outputs(op, setting.op(op), given)
    for out, exact_out, plain_out in zip(outs, exact, plain, strict=True):
        assert_close(out, exact_out, plain_out)


def spread(tensors: Sequence[Tensor], far: int) -> list[Tensor]:
    """Return tensors with a first stride that puts their last entries at least `far` elements from their first.

    They share one buffer, between whose values NaN stands.
    """
    sizes = [-(-x[0].numel() // 16) * 16 for x in tensors]
    steps = len(tensors[0]) - 1
    stride = max(far // steps, sum(sizes)) // 16 * 16 + 16
    buffer = torch.empty(stride * steps + sum(sizes), dtype=tensors[0].dtype, device=tensors[0].device)
    buffer.fill_(torch.nan if buffer.is_floating_point() else 77)
    views = []
    for x, offset in zip(tensors, itertools.accumulate([0, *sizes]), strict=False):
        views.append(buffer.as_strided(x.shape, (stride, *x[0].contiguous().stride()), offset).copy_(x))
    return views


def _replayed(item: str) -> dict[str, tuple[Make, Make]]:
    """Return op -> the arguments that are recorded, and those of the same shapes that are replayed."""

    def video(num_new: int) -> tuple[Make, Make]:
        return (
            lambda s: s.video_attention(100, num_new, heads=(28, 4), head_dim=128, spare=40),
            lambda s: s.video_attention(133, num_new, heads=(28, 4), head_dim=128, spare=7),
        )

    makes: dict[str, dict[str, tuple[Make, Make]]] = {
        "video_attention": {"video_attention_": video(65)},
        "decode_attention": {"video_attention_": video(1)},
        "segment_attention": {
            "segment_attention": (
                lambda s: s.segment_attention([64, 64, 63], num_heads=3, head_dim=80),
                lambda s: s.segment_attention([1, 127, 63], num_heads=3, head_dim=80),
            )
        },
        "latent_injection": {"latent_injection": (lambda s: s.latent_injection(8, 256, 5, 4),) * 2},
        "rms_norm": {"add_rms_norm": (lambda s: s.add_rms_norm(33, 777),) * 2},
        "swiglu": {"swiglu": (lambda s: s.swiglu(33, 777),) * 2},
        "patchify": {"patchify": (lambda s: s.patchify(4, 56, 84),) * 2},
    }
    return makes[item]


def _verify_replay(op: str, setting: Setting, recorded: Make, replayed: Make) -> None:
    """Record with one set of values, replay twice with others: nothing may be read when it is recorded."""
    run = setting.op(op)
    held = recorded(Source(setting.device, torch.bfloat16, seed=1))
    with torch.inference_mode():
        for _ in range(2):
            run(*held)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with poisoned(), torch.cuda.graph(graph):
            out = run(*held)
    for seed in (2, 3):
        given = replayed(Source(setting.device, torch.bfloat16, seed=seed))
        exact, plain = expected(op, with_own_caches(op, given))
        for mine, other in zip(held, given, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(other)
        graph.replay()
        outs = list(out) if isinstance(out, tuple) else [out]
        for own, exact_out, plain_out in zip(outs, exact, plain, strict=False):  # caches are compared elsewhere
            assert_close(own, exact_out, plain_out)


def _verify_large(op: str, setting: Setting) -> None:
    """Compare the last rows of a dense tensor of more than 2**31 elements."""
    width = 4096
    small = getattr(Source(setting.device, torch.bfloat16), op)(64, width)
    rows = FAR // width + 100
    large = []
    for x in small:
        if isinstance(x, Tensor) and x.dim() == 2:
            wide = torch.zeros(rows, width, dtype=x.dtype, device=x.device)
            wide[-64:] = x
            large.append(wide)
        else:
            large.append(x)
    exact, plain = expected(op, small)
    outs = outputs(op, setting.op(op), large)
    for out, exact_out, plain_out in zip(outs, exact, plain, strict=True):
        assert_close(out[-64:], exact_out, plain_out)
