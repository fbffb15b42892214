"""Which backend runs a bundle on this machine. Imports an engine only when it is chosen."""

import importlib.util

from vlrt.backends.base import Backend
from vlrt.bundle import Bundle
from vlrt.errors import BackendUnavailable, ConfigError

BACKENDS = ("ort",)


def load(bundle: Bundle, backend: str = "auto", threads: int | None = None) -> Backend:
    """Load a bundle into the backend of that name; "auto" takes the one that the bundle was written for.

    Raises:
        ConfigError: there is no such backend.
        BackendUnavailable: it cannot run here, or not this bundle.
        BundleError: the bundle is damaged.
    """
    if backend not in ("auto", *BACKENDS):
        raise ConfigError(f"backend is {backend!r}; accepted: auto, {', '.join(BACKENDS)}")
    if (reason := unavailable("ort")) is not None:
        raise BackendUnavailable(f"backend ort cannot run here: {reason}")
    from vlrt.backends.ort import OrtBackend

    return OrtBackend(bundle, threads)


def unavailable(backend: str) -> str | None:
    """Return why a backend cannot run on this machine, as a sentence, or None if it can."""
    assert backend in BACKENDS
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed (pip install onnxruntime)"
    try:
        import onnxruntime
    except ImportError as error:  # built for another system: a library or a symbol that this one lacks
        return f"onnxruntime is installed but cannot be imported ({error}); install one that is built for this system"

    if "CPUExecutionProvider" not in onnxruntime.get_available_providers():
        return f"this onnxruntime ({onnxruntime.__version__}) has no CPU provider"
    return None
