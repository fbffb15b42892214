"""What launchers share: the dtypes they take, rows of a tensor, the device to launch on.

Knows no op. Not a kernel.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from vlrt.kernels.configs import FLOATS


def unsupported_dtype(op: str, dtype: torch.dtype) -> str | None:
    """Return why an op takes no tensors of a dtype on a GPU, or None."""
    if dtype in FLOATS:
        return None
    return f"{op} on 'cuda' takes {', '.join(map(str, FLOATS))}, not {dtype}"


def rows(x: Tensor) -> Tensor:
    """Return [rows, C] of x [..., C] with elements of a row side by side; a copy only where no view does it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def require(holds: bool, message: str) -> None:
    """Raise ValueError unless a launcher's condition holds."""
    if not holds:
        raise ValueError(message)


def require_alike(op: str, first: Tensor, others: Iterable[Tensor]) -> None:
    """Refuse tensors of another dtype or device than the first one."""
    for other in others:
        require(
            (other.dtype, other.device) == (first.dtype, first.device),
            f"{op} was given {first.dtype} on {first.device} and {other.dtype} on {other.device}; "
            "accepted: one dtype on one device",
        )


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Launch on the device of x: Triton launches on the current one."""
    device: AbstractContextManager[None] = torch.cuda.device_of(x)
    return device


def slots(h: Tensor, embeds: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor | None]:
    """Return where a kernel writes z, and the first row of that for it to read (None: 0).

    Args:
        h: [B, L, C].
        embeds: [B, S, C].
        start: first of the L rows of embeds; an int, which is checked, or an int32 scalar tensor on the device.

    Raises:
        ValueError: embeds is of another shape, dtype, device or layout; or the rows do not fit it.
    """
    require(h.dim() == 3 and embeds.dim() == 3, f"h is {list(h.shape)}, embeds {list(embeds.shape)}; both have 3 axes")
    require_alike("the latent slots", h, (embeds,))
    fits = embeds.shape[::2] == h.shape[::2] and embeds.stride(-1) == 1
    require(fits, f"embeds is {list(embeds.shape)}; accepted: [{h.shape[0]}, S, {h.shape[2]}], without gaps in a row")
    length = h.shape[1]
    if isinstance(start, Tensor):
        good = start.dtype == torch.int32 and start.numel() == 1 and start.device == h.device
        require(good, f"start is {start.dtype} {list(start.shape)} on {start.device}; accepted: an int32 scalar with h")
        return embeds, start
    good = 0 <= start <= embeds.shape[1] - length
    require(good, f"rows {start} to {start + length} were asked for; embeds has {embeds.shape[1]}")
    return embeds[:, start : start + length], None
