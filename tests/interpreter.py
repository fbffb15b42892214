"""Runs tests of Triton kernels in a process of their own, in which Triton interprets kernels on the CPU.

Triton decides that when it is imported, which another test of this process may have done long ago. What a kernel or its
launcher leaves uninitialised is NaN there (floats) or the largest integer.
"""

import concurrent.futures
import functools
import importlib
import multiprocessing


def interpreted(test):
    """Return a test that runs in the interpreter's process; its arguments must pickle."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        _worker().submit(_call, test.__module__, test.__qualname__, args, kwargs).result()

    return run


@functools.cache
def _worker():
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit the modules that are loaded here
    return concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, initializer=_start)


def _start():
    from benches import interpreter

    interpreter.start()
    import torch

    torch.use_deterministic_algorithms(True)  # fills what is not initialised
    assert torch.empty(3).isnan().all()


def _call(module, name, args, kwargs):
    getattr(importlib.import_module(module), name).__wrapped__(*args, **kwargs)
