"""The one closeness function of all tests: an error is judged by that of plain PyTorch, never by a test's own constant.

The rule is FlashAttention's: twice the error that plain PyTorch makes in the same dtype against fp64, and a few ulps.
"""

import numpy as np
import torch

FEW_ULPS = 8  # of the largest exact value: what a formula written another way may round differently


def assert_close(out, exact, plain=None, operands=None):
    """Fail unless `out` errs from `exact` by at most twice as much as `plain` does, and a few ulps of its own dtype.

    Args:
        out: what is tested: a floating tensor or array, all finite.
        exact: the same in fp64; or, without `plain`, the same arithmetic in any dtype.
        plain: the same by plain PyTorch (or transformers) in the dtype of `out`; None: only the ulps are allowed.
        operands: the coarser dtype that `plain`, like `out`, rounds what it multiplies to. The largest of their errors
            are chance then, so root mean squares are compared, which one wrong row exceeds. None: that of `out`.
    """
    out, exact = _tensor(out), _tensor(exact)
    assert out.shape == exact.shape, f"shape is {list(out.shape)}, expected {list(exact.shape)}"
    if not out.numel():
        return
    eps, exact = torch.finfo(out.dtype).eps, exact.double()
    scale = exact.abs().max().item()
    allowed = FEW_ULPS * eps * scale
    if plain is not None:
        plain = _tensor(plain)
        assert plain.dtype == out.dtype, f"plain is {plain.dtype}, out is {out.dtype}: errors of two dtypes"
        error_of_plain = _error(plain, exact, operands)
        # Else the two are not the same function, and the tolerance would let anything through.
        coarsest = torch.finfo(operands or out.dtype).eps
        assert error_of_plain <= coarsest**0.5 * scale, (
            f"plain errs by {error_of_plain:.3g} where values reach {scale:.3g}"
        )
        allowed += 2 * error_of_plain
    error = _error(out, exact, operands)
    assert error <= allowed, f"errs by {error:.3g}, allowed {allowed:.3g}, where values reach {scale:.3g}"


def _error(values, exact, operands):
    assert values.isfinite().all(), "not every value is finite"
    assert values.shape == exact.shape, f"shape is {list(values.shape)}, expected {list(exact.shape)}"
    error = values.double() - exact
    return (error.abs().max() if operands is None else error.square().mean().sqrt()).item()


def _tensor(values):
    return values.detach() if isinstance(values, torch.Tensor) else torch.from_numpy(np.asarray(values))
