"""The graphs of a bundle: traces models/ into ONNX models whose weights are still names.

The model is on the "meta" device throughout, so that a graph of any size takes no memory for weights; `onnx.py` writes
them later, one tensor at a time. Knows models/ and names.py; no files.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from vlrt import config, names
from vlrt.export import translate
from vlrt.models.decoder import CachedAttention
from vlrt.models.registry import VideoLatent

_EXAMPLE_SIZES = {"N": 32, "N_v": 8, "T_1": 3, "W_1": 5, "S": 5, "M": 16, "L": 3, "T_v": 6, "S_bias": 7, "T_bias": 9}


class _Vision(nn.Module):
    def __init__(self, model: VideoLatent) -> None:
        super().__init__()
        self.visual = model.visual

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        return (self.visual(*inputs),)


class _Decoder(nn.Module):
    def __init__(self, model: VideoLatent) -> None:
        super().__init__()
        self.model = model.model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        inputs_embeds, cos, sin, past_length, *caches, bias = inputs
        half = len(caches) // 2
        attend = CachedAttention(cos, sin, past_length, caches[:half], caches[half:], bias)
        return (self.model(inputs_embeds, attend), *attend.keys, *attend.values)


class _LmHead(nn.Module):
    def __init__(self, model: VideoLatent) -> None:
        super().__init__()
        self.lm_head = model.lm_head

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        return (self.lm_head(inputs[0]),)


class _Latent(nn.Module):
    def __init__(self, model: VideoLatent) -> None:
        super().__init__()
        self.latent_injection = model.latent_injection

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        assert self.latent_injection is not None
        hidden, *memory = inputs
        return (self.latent_injection(hidden, tuple(memory) if memory else None),)


class _LatentMemory(nn.Module):
    def __init__(self, model: VideoLatent) -> None:
        super().__init__()
        self.latent_injection = model.latent_injection

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        assert self.latent_injection is not None
        memory: tuple[Tensor, ...] = self.latent_injection.memory(inputs[0])
        return memory


def trace_all(model: VideoLatent) -> Iterator[tuple[names.Graph, ir.Model]]:
    """Yield each graph of a model (on "meta") with its contract, one at a time.

    An identity injection has no graph: what is injected is the hidden state itself.
    """
    cfg, injection = model.cfg, model.latent_injection
    windowed = cfg.vision.window_size > 0
    todo: list[tuple[names.Graph, nn.Module]] = [
        (names.vision(windowed=windowed), _Vision(model)),
        (names.decoder(cfg.decoder.num_layers), _Decoder(model)),
        (names.LM_HEAD, _LmHead(model)),
    ]
    if injection is not None and injection.cfg.injection != "identity":
        todo.append((names.latent(looks_at_video=injection.looks_at_video), _Latent(model)))
        if injection.looks_at_video:
            todo.append((names.LATENT_MEMORY, _LatentMemory(model)))
    for graph, module in todo:
        yield graph, trace(graph, module, config.dimensions(cfg))


def trace(graph: names.Graph, module: nn.Module, fixed: dict[str, int]) -> ir.Model:
    """Export one module to an ONNX model with the inputs, outputs and free dimensions of its contract."""
    free = {d: torch.export.Dim.DYNAMIC for t in graph.inputs for d in t.shape if isinstance(d, str) and d not in fixed}
    known = {**_EXAMPLE_SIZES, **fixed}
    args = tuple(
        torch.zeros(
            [known[d] if isinstance(d, str) else d for d in t.shape], dtype=getattr(torch, t.dtype), device="meta"
        )
        for t in graph.inputs
    )
    dynamic = tuple({i: free[d] for i, d in enumerate(t.shape) if d in free} for t in graph.inputs)
    with _quiet():
        exported = torch.export.export(module.eval(), args, dynamic_shapes=(dynamic,))
        program: Any = torch.onnx.export(
            exported,
            custom_translation_table=translate.TABLE,
            opset_version=translate.OPSET,
            optimize=False,
            verbose=False,
            dynamo=True,
        )
    model: ir.Model = program.model
    _rename(model, graph)
    _strip(model)
    translate.attach_functions(model)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes about itself (torchvision absent, a deprecated treespec check) from our users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _rename(model: ir.Model, graph: names.Graph) -> None:
    """Give inputs and outputs the names, and free dimensions the letters, of the contract."""
    model.graph.name = graph.name
    for value, tensor in [
        *zip(model.graph.inputs, graph.inputs, strict=True),
        *zip(model.graph.outputs, graph.outputs, strict=True),
    ]:
        value.name = tensor.name
        value.dtype = ir.DataType[{"float32": "FLOAT", "int32": "INT32", "int64": "INT64"}[tensor.dtype]]
        dims = zip(value.shape or tensor.shape, tensor.shape, strict=True)
        value.shape = ir.Shape([have if isinstance(have, int) else want for have, want in dims])


def _strip(model: ir.Model) -> None:
    """Drop what depends on where and when the export ran, so that equal checkpoints give equal files."""
    model.producer_name, model.producer_version, model.doc_string = "vlrt", None, None
    for holder in (model, model.graph, *model.graph, *model.graph.inputs, *model.graph.outputs):
        holder.metadata_props.clear()
    for node in model.graph:
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
