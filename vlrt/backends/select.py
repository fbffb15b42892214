"""Which backend runs a bundle on this machine. Imports an engine only when it is chosen."""

import importlib
import importlib.util

from vlrt.backends.base import Backend
from vlrt.bundle import Bundle
from vlrt.errors import BackendUnavailable, ConfigError

BACKENDS = ("ort", "torch")
DEVICES = ("auto", "cpu", "cuda")


def load(
    bundle: Bundle, backend: str = "auto", device: str = "auto", threads: int | None = None, *, library: bool = True
) -> Backend:
    """Load a bundle into the backend of that name; "auto" takes the one that the bundle was written for.

    `library`: whether the ort backend may take kernels of `libvlrt_ort`.

    Raises:
        ConfigError: there is no such backend or device.
        BackendUnavailable: it cannot run here, or not this bundle.
        BundleError: the bundle is damaged.
    """
    for name, given, accepted in (("backend", backend, ("auto", *BACKENDS)), ("device", device, DEVICES)):
        if given not in accepted:
            raise ConfigError(f"{name} is {given!r}; accepted: {', '.join(accepted)}")
    name = bundle.backend
    if backend not in ("auto", name):
        raise BackendUnavailable(
            f"{bundle.path} was written for the backend {name}; to run it in {backend}, export the checkpoint again: "
            f"vlrt export --backend {backend}"
        )
    if (reason := unavailable(name)) is not None:
        raise BackendUnavailable(f"backend {name} cannot run here: {reason}")
    if name == "torch":
        from vlrt.backends.torch import TorchBackend

        return TorchBackend(bundle, device, threads)
    if device == "cuda":
        raise BackendUnavailable("backend ort runs on the CPU alone; accepted: device 'cpu', or a bundle for torch")
    from vlrt.backends.ort import OrtBackend

    return OrtBackend(bundle, threads, library=library)


def unavailable(backend: str) -> str | None:
    """Return why a backend cannot run on this machine, as a sentence, or None if it can."""
    return {"ort": _ort, "torch": _torch}[backend]()


def _ort() -> str | None:
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed (pip install onnxruntime)"
    try:
        import onnxruntime
    except ImportError as error:  # built for another system: a library or a symbol that this one lacks
        return f"onnxruntime is installed but cannot be imported ({error}); install one that is built for this system"

    if "CPUExecutionProvider" not in onnxruntime.get_available_providers():
        return f"this onnxruntime ({onnxruntime.__version__}) has no CPU provider"
    return None


def _torch() -> str | None:
    missing = [name for name in ("torch", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (pip install 'vlrt[torch]')"
    try:
        importlib.import_module("torch")
    except (ImportError, OSError) as error:
        return f"torch is installed but cannot be imported ({error}); install one that is built for this system"
    return None
