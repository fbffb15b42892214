"""Which engines there are, at which precisions, and how each starts. The checkpoint is that of `benches.material`."""

from dataclasses import dataclass
from pathlib import Path

from benches import material
from benches.engines import openvino_models
from benches.engines.client import Absent, Client
from vlrt.errors import VlrtError


@dataclass(frozen=True)
class Peer:
    """An engine at a precision.

    Attributes:
        engine: vlrt, transformers or openvino.
        weights: what is stored: the precision of a bundle, a dtype, or optimum-intel's weight format.
        precision: the class in which it is compared.
        computes_in: dtype of OpenVINO's products.
    """

    engine: str
    weights: str
    precision: str
    computes_in: str = ""


PEERS = {
    "vlrt-fp32": Peer("vlrt", "fp32", "fp32"),
    "hf-fp32": Peer("transformers", "float32", "fp32"),
    "openvino-fp32": Peer("openvino", "fp16", "fp32", "f32"),
    "hf-bf16": Peer("transformers", "bfloat16", "bf16"),
    "openvino-bf16": Peer("openvino", "fp16", "bf16", "bf16"),
    "vlrt-int8": Peer("vlrt", "int8", "int8"),
    "openvino-int8": Peer("openvino", "int8", "int8", "bf16"),
    "vlrt-int4": Peer("vlrt", "int4", "int4"),
    "openvino-int4": Peer("openvino", "int4", "int4", "bf16"),
}


def start(peer: Peer, shape: str, *, threads: int, log: Path, python: str | None = None) -> Client:
    """Start the process of an engine.

    Raises:
        Absent: it cannot run here.
    """
    if peer.engine == "vlrt":
        try:
            bundle = material.bundle(shape, peer.weights)
        except (VlrtError, ValueError) as error:  # a precision that this version does not export
            raise Absent(f"vlrt does not export it: {error}") from error
        return Client("vlrt_engine", {"bundle": str(bundle), "threads": threads}, threads=threads, log=log)
    checkpoint = material.checkpoint(shape)
    if peer.engine == "transformers":
        settings = {"checkpoint": str(checkpoint), "threads": threads, "dtype": peer.weights}
        return Client("transformers_engine", settings, threads=threads, log=log)
    out = material.cache() / f"{shape}-{peer.weights}.openvino"
    directory = openvino_models.model(checkpoint, peer.weights, out, python, log)
    settings = {"directory": str(directory), "threads": threads, "dtype": peer.computes_in}
    interpreter = openvino_models.python(python, openvino_models.RUNS)
    return Client("openvino_engine", settings, threads=threads, log=log, python=interpreter)
