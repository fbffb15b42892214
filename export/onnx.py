"""Writes one graph of a bundle: `<name>.onnx` and its weights in `<name>.bin`, one tensor in memory at a time.

Knows files and recipes; `graphs.py` makes the graph, `quantize.py` the recipes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vlrt.bundle import Table
from vlrt.export.quantize import Recipe

ALIGN_BYTES = 4096  # a page: what the ONNX specification advises for memory-mapped external data
Fetch = Callable[[str], NDArray[np.float32]]
Progress = Callable[[int], None]


def write_graph(model: ir.Model, directory: Path, recipes: dict[str, Recipe], fetch: Fetch, progress: Progress) -> None:
    """Write the weights of a model as its recipes say, then the model.

    Args:
        model: lowered; its initializers are named and have shapes.
        directory: where `<graph name>.onnx` and `.bin` go.
        recipes: one for each initializer, in order.
        fetch: tensors of the checkpoint by name, float32.
        progress: told the bytes written after each tensor.
    """
    name = str(model.graph.name)
    source, tensor = "", None
    with (directory / f"{name}.bin").open("wb") as file:
        for initializer, recipe in recipes.items():
            if recipe.source != source or tensor is None:
                source, tensor = recipe.source, fetch(recipe.source)
            value = model.graph.initializers[initializer]
            assert value.shape is not None
            made = np.ascontiguousarray(recipe.make(tensor)).reshape(value.shape.numpy())
            offset = _append(file, made)
            value.const_value = ir.ExternalTensor(
                f"{name}.bin",
                offset,
                made.nbytes,
                recipe.dtype,
                shape=ir.Shape(made.shape),
                name=initializer,
                base_dir=directory,
            )
            progress(made.nbytes)
    (directory / f"{name}.onnx").write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def share_table(model: ir.Model, initializer: str, table: Table, directory: Path) -> None:
    """Let an initializer [rows, columns] be the file of a table, so that a bundle holds its values once."""
    model.graph.initializers[initializer].const_value = ir.ExternalTensor(
        table.file,
        0,
        table.rows * table.columns * 4,
        ir.DataType.FLOAT,
        shape=ir.Shape((table.rows, table.columns)),
        name=initializer,
        base_dir=directory,
    )


def _append(file: BinaryIO, array: NDArray[np.generic]) -> int:
    """Write an array's bytes at the next aligned offset and return it."""
    offset = -(-file.tell() // ALIGN_BYTES) * ALIGN_BYTES
    file.seek(offset)
    array.tofile(file)
    return offset
