"""Triton's interpreter, which runs kernels on the CPU, made to work with the versions at hand. Knows no kernel."""

import os
from typing import Any

MENDED_IN = (3, 9)  # of Triton


def start() -> None:
    """Have Triton interpret every kernel of this process; to be called before anything imports triton.

    Triton 3.6 makes the bounds of a loop by `int` of arrays [1], which NumPy 2.4 and later refuse.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import triton
    from triton.runtime import interpreter

    if tuple(map(int, triton.__version__.split(".")[:2])) >= MENDED_IN:
        return
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
