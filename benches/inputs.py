"""Random arguments of every op, at any size; and the op itself: the registered one, or its launcher, interpreted.

An argument list is that of `vlrt.kernels.reference.<op>`. Norm weights, gates and tables have the sizes they have in
models, so that errors are those of real use.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vlrt.kernels import reference, schema

Arguments = list[Any]


@dataclass(frozen=True)
class Setting:
    """Where and how benches run.

    Attributes:
        device: "cuda" or "cpu".
        tiny: sizes that a CPU takes in no time.
        interpret: on the CPU, run the Triton kernels interpreted rather than the reference.
    """

    device: str = "cuda"
    tiny: bool = False
    interpret: bool = False

    def op(self, name: str) -> Callable[..., Any]:
        """Return an op."""
        if self.interpret:
            return getattr(importlib.import_module(f"vlrt.kernels.{schema.LAUNCHERS[name]}"), name)
        return getattr(torch.ops.vlrt, name)

    def pick(self, full: Any, tiny: Any) -> Any:
        """Return the size at hand."""
        return tiny if self.tiny else full


class Source:
    """Random tensors on a device, of one dtype, from a seed."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Return normal values of a standard deviation."""
        drawn = torch.randn(shape, generator=self._generator, device=self.device, dtype=torch.float32)
        return (drawn * scale).to(self.dtype)

    def tables(self, length: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """Return rotary tables [length, head_dim / 2] float32."""
        exponents = torch.arange(0, head_dim, 2, device=self.device, dtype=torch.float32) / head_dim
        angles = torch.arange(length, device=self.device, dtype=torch.float32)[:, None] * 10_000.0**-exponents
        return angles.cos(), angles.sin()

    def video_attention(
        self, past: int, num_new: int, *, heads: tuple[int, int], head_dim: int, batch: int = 1, spare: int = 0
    ) -> Arguments:
        """Queries, keys and values are thirds of one projection; slots that are not in use hold NaN."""
        num_heads, num_kv_heads = heads
        qkv = self.normal(batch, num_new, num_heads + 2 * num_kv_heads, head_dim)
        q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=2)
        capacity = past + num_new + spare
        caches = [torch.full((batch, num_kv_heads, capacity, head_dim), torch.nan).to(q) for _ in range(2)]
        for cache in caches:
            cache[:, :, :past] = self.normal(batch, num_kv_heads, past, head_dim)
        length = torch.tensor(past, dtype=torch.int32, device=self.device)
        return [q, k, v, *self.tables(capacity, head_dim), *caches, length]

    def segment_attention(self, lengths: Sequence[int], *, num_heads: int, head_dim: int) -> Arguments:
        """Queries, keys and values are thirds of one projection."""
        bounds = torch.tensor([0, *lengths], device=self.device).cumsum(0).to(torch.int32)
        total = sum(lengths)
        qkv = self.normal(total, 3 * num_heads * head_dim)
        q, k, v = (part.unflatten(-1, (num_heads, head_dim)) for part in qkv.chunk(3, dim=-1))
        return [q, k, v, *self.tables(total, head_dim), bounds]

    def latent_injection(self, length: int, width: int, steps: int, num_heads: int, *, batch: int = 1) -> Arguments:
        """Weights keep the variance; the inner width is the outer."""
        matrices = [self.normal(width, width, scale=width**-0.5) for _ in range(3)]
        memory = [self.normal(batch, steps, width) for _ in range(2)]
        norms = [1 + self.normal(width, scale=0.1) for _ in range(2)]
        alpha, rho = (torch.tensor(value, device=self.device, dtype=self.dtype) for value in (0.7, 0.02))
        h = self.normal(batch, length, width, scale=5.0)
        return [h, norms[0], *matrices, *memory, alpha, norms[1], rho, num_heads, 1e-6]

    def rms_norm(self, rows: int, width: int) -> Arguments:
        """As between two blocks of a decoder."""
        return [self.normal(rows, width), 1 + self.normal(width, scale=0.1), 1e-6]

    def add_rms_norm(self, rows: int, width: int) -> Arguments:
        """As between two blocks of a decoder."""
        x, weight, eps = self.rms_norm(rows, width)
        return [x, self.normal(rows, width), weight, eps]

    def swiglu(self, rows: int, width: int) -> Arguments:
        """Gate and up are halves of one projection."""
        return list(self.normal(rows, 2 * width).chunk(2, dim=-1))

    def patchify(self, num_frames: int, height: int, width: int, patch_size: int = 14) -> Arguments:
        """Frames of noise, with Qwen's mean and standard deviation."""
        shape = (num_frames, height, width, 3)
        frames = torch.randint(0, 256, shape, generator=self._generator, device=self.device, dtype=torch.uint8)
        moments = ([0.4815, 0.4578, 0.4082], [0.2686, 0.2613, 0.2758])
        return [frames, *(torch.tensor(m, device=self.device).to(self.dtype) for m in moments), patch_size, 2, 2]


def converted(given: Arguments, dtype: torch.dtype) -> Arguments:
    """Return arguments with floating tensors of another dtype, none of them shared."""
    return [x.to(dtype, copy=True) if isinstance(x, Tensor) and x.is_floating_point() else x for x in given]


def with_own_caches(op: str, given: Arguments) -> Arguments:
    """Return arguments of an op with copies of what it writes to; strides of the others are kept."""
    if op != "video_attention_":
        return list(given)
    return [*given[:5], *(cache.clone() for cache in given[5:7]), given[7]]


def outputs(op: str, run: Callable[..., Any], given: Arguments) -> list[Tensor]:
    """Return everything that an op makes; of an op in place, the slots it wrote as well.

    Args:
        op: its name.
        run: the op, or its reference.
        given: its arguments; caches are written.
    """
    with torch.inference_mode():
        out = run(*given)
        outs = list(out) if isinstance(out, tuple) else [out]
        if op == "video_attention_":
            past, num_new = int(given[7]), given[0].shape[1]
            outs += [cache[:, :, past : past + num_new] for cache in given[5:7]]
    return outs


def expected(op: str, given: Arguments) -> tuple[list[Tensor], list[Tensor]]:
    """Return what the reference makes in fp64, and in the arguments' own dtype."""
    run = functools.partial(outputs, op, getattr(reference, op))
    narrow = given[1].dtype if op == "patchify" else given[0].dtype
    return run(converted(given, torch.float64)), run(converted(given, narrow))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Let uninitialised memory hold NaN, or a large integer, as it may on a GPU: what stays unwritten is seen."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            return out.fill_(torch.nan if out.is_floating_point() else 77)

        return made

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        yield
