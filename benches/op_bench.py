"""One case of one op: verified, then timed next to its rivals, and its rates set against what the machine can do.

Each `bench_<op>.py` yields cases; this file runs them. Knows no op by name but in tables of what they share.
"""

import argparse
import functools
import json
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benches import timing
from benches.closeness import assert_close
from benches.inputs import Arguments, Setting, expected, outputs, poisoned, with_own_caches

Call = Callable[[], Any]
COUNTED = "+rotary"  # ending of a rival's name that does all the work that ours does
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        name: of the sizes, such as "S=2048".
        op: name of the op.
        given: its arguments.
        flops: useful floating-point operations: what is masked or padded does not count.
        num_bytes: bytes that must move: each input read once, each output written once.
        rivals: other ways to the same numbers, by name; one that does not run here is reported with its reason.
        exactly: compare all of the output with fp64; of video_attention_ whose fp64 scores take too much memory, False
            compares the last rows.
        seconds: about how long to time each.
    """

    name: str
    op: str
    given: Arguments
    flops: float
    num_bytes: float
    rivals: Mapping[str, Call] = field(default_factory=dict)
    exactly: bool = True
    seconds: float = 0.2


def verify(op: str, run: Callable[..., Any], given: Arguments) -> None:
    """Hold an op against its reference in fp64, with poisoned memory.

    Raises:
        AssertionError: it errs by more than `tests.closeness` allows.
    """
    exact, plain = expected(op, given)
    with poisoned():
        outs = outputs(op, run, with_own_caches(op, given))
    for out, exact_out, plain_out in zip(outs, exact, plain, strict=True):
        assert_close(out, exact_out, plain_out)


def verify_end(run: Callable[..., Any], given: Arguments, num_rows: int = 128) -> None:
    """Hold the last rows of a long video_attention_ against the reference, on the cache that the op has written.

    Raises:
        AssertionError: they err by more than `tests.closeness` allows.
    """
    q, k, v, cos, sin, _, _, past = own = with_own_caches("video_attention_", given)
    start = q.shape[1] - num_rows
    with poisoned(), torch.inference_mode():
        out = run(*own)[:, start:]
    end = [q[:, start:], k[:, start:], v[:, start:], cos, sin, own[5], own[6], past + start]
    exact, plain = expected("video_attention_", end)
    assert_close(out, exact[0], plain[0])


def run_case(case: Case, setting: Setting) -> dict[str, Any]:
    """Verify and time one case; return a row."""
    run = setting.op(case.op)
    if case.exactly:
        verify(case.op, run, case.given)
    else:
        verify_end(run, case.given)
    own = with_own_caches(case.op, case.given)
    with torch.inference_mode():
        ours = timing.measure(lambda: run(*own), setting.device, seconds=case.seconds)
        rivals = {name: _time_rival(call, case, setting) for name, call in case.rivals.items()}
    row = {"case": case.name, "op": case.op, "seconds": ours, "rivals": rivals}
    row |= {"flops": case.flops, "bytes": case.num_bytes}
    row |= {"flops_per_second": case.flops / ours["median"], "bytes_per_second": case.num_bytes / ours["median"]}
    times = {name: found["median"] for name, found in rivals.items() if "median" in found}
    for kind, names in (
        ("alone", [name for name in times if COUNTED not in name]),
        ("counted", [name for name in times if COUNTED in name]),
    ):
        if names:
            fastest = min(names, key=lambda name: times[name])
            row[f"fastest_{kind}"] = {"rival": fastest, "speedup": times[fastest] / ours["median"]}
    return row


def _time_rival(call: Call, case: Case, setting: Setting) -> dict[str, Any]:
    try:
        return timing.measure(call, setting.device, seconds=case.seconds)
    except Exception as error:
        if setting.device == "cuda":
            torch.cuda.synchronize()  # a broken context must not pass for a rival that is not supported
        return {"unavailable": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def run_cases(cases: Iterable[Case], setting: Setting, expired: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Run cases until time is up; a case that fails is reported, and the next one runs."""
    rows: list[dict[str, Any]] = []
    for case in cases:
        if expired():
            rows.append({"case": case.name, "op": case.op, "skipped": "out of time"})
            continue
        try:
            rows.append(run_case(case, setting))
        except Exception:
            rows.append({"case": case.name, "op": case.op, "error": traceback.format_exc()})
            if timing.device_is_lost(setting.device):
                break
    return {"rows": rows}


def sdpa_rivals(
    q: Tensor, k: Tensor, v: Tensor, setting: Setting, *, causal: bool, prepare: Callable[[], Any] | None = None
) -> dict[str, Call]:
    """Return PyTorch's attention by every backend: q [B, H, S, D], k and v [B, H_kv, K, D], heads grouped.

    Args:
        q: rotated, contiguous.
        k: likewise.
        v: likewise.
        setting: the CPU has "math" alone.
        causal: aligned at the first key; with one query, all keys are seen and this must be False.
        prepare: what else counts, such as rotary and the write to a cache; run before the attention.
    """
    groups = q.shape[1] // k.shape[1]
    wide = [x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v)]

    def attention(backend: SDPBackend, keys: Tensor, values: Tensor, grouped: bool) -> Call:
        def call() -> Tensor:
            if prepare is not None:
                prepare()
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, keys, values, is_causal=causal, enable_gqa=grouped
                )

        return call

    names = ("flash", "cudnn", "efficient") if setting.device == "cuda" else ("math",)
    ending = COUNTED if prepare is not None else ""
    calls = {f"sdpa_{name}{ending}": attention(BACKENDS[name], *wide, False) for name in names}
    if groups > 1:  # some backends read grouped heads as they are, others want them repeated: that is not timed
        calls |= {f"sdpa_{name}_grouped{ending}": attention(BACKENDS[name], k, v, True) for name in names}
    return calls


def compiled(function: Callable[..., Any], given: Arguments, setting: Setting) -> dict[str, Call]:
    """Return a function by torch.compile as a rival; on the CPU none, which has no compiler to rely on."""
    if setting.device != "cuda":
        return {}
    fast = compile_once(function, setting)
    return {"torch_compile": lambda: fast(*given)}


@functools.cache
def compile_once(function: Callable[..., Any], setting: Setting) -> Callable[..., Any]:
    """Return a function by torch.compile, compiled anew for a second size alone; on the CPU as it is."""
    return torch.compile(function) if setting.device == "cuda" else function


def main(op: str, cases: Callable[[Setting], Iterator[Case]]) -> None:
    """Run the cases of one op and print their rows."""
    parser = argparse.ArgumentParser(prog=f"benches.bench_{op}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="sizes for a trial run")
    args = parser.parse_args()
    setting = Setting(args.device, args.tiny or args.device == "cpu")
    for row in run_cases(cases(setting), setting)["rows"]:
        print(json.dumps(row, indent=1) if "error" not in row else row["error"])
