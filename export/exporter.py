"""`vlrt export`: a checkpoint directory in, a verified bundle out, or nothing.

Orders the work: check what was given, calibrate what is going to be rounded, write tables, graphs and text files into a
temporary directory, hold the result against PyTorch, put it in place.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

import vlrt
from vlrt import bundle, config, prompt
from vlrt.backends import fp8, select
from vlrt.backends.reference import ReferenceBackend
from vlrt.bundle import BackendName, Bundle, Manifest, Precision, Table
from vlrt.checkpoint import Checkpoint, expected_tensors
from vlrt.errors import CheckpointError, ConfigError, ExportError
from vlrt.export import calibrate, graphs, int4_check, onnx, quantize, smooth, torch_weights, verify
from vlrt.models import registry

Progress = Callable[[str, float], None]

_CALIBRATE_SHARE = 0.2  # of the progress bar, in int8 and int4
_WRITE_SHARE = 0.7  # of what is left; the gate has the rest
_TABLE_ROWS = 8192  # rows converted at a time


def export(
    checkpoint_path: str | Path,
    out: str | Path | None = None,
    *,
    backend: str = "ort",
    precision: str = "fp32",
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """Export a checkpoint to a bundle.

    Args:
        checkpoint_path: a Hugging Face directory of the Qwen2-VL or Qwen2.5-VL family.
        out: where the bundle goes; None: `<checkpoint name>.vlrt` in the working directory. A bundle there is replaced.
        backend: "ort", or "torch".
        precision: ort: "fp32", "int8" (linear layers: per-channel weights, per-token activations), or "int4" (weights
            of the decoder's linear layers in blocks, the rest int8). torch: "fp32", "bf16", "fp16", or "fp8" (linear
            layers of the decoder, the rest bf16).
        progress: told what is being done and which fraction of the whole is done.
        note: told what one should know about the bundle: layers that are not in its precision.

    Returns:
        The path of the bundle.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ExportError: the output path or the disk cannot be used, or the result differs from the PyTorch reference.
        ConfigError: backend or precision is unknown.
    """
    if backend not in get_args(bundle.BackendName):
        raise ConfigError(f"backend is {backend!r}; accepted: {', '.join(get_args(bundle.BackendName))}")
    engine: BackendName = "torch" if backend == "torch" else "ort"
    if precision not in bundle.PRECISIONS[engine]:
        raise ConfigError(
            f"precision is {precision!r}; accepted with the backend {engine}: {', '.join(bundle.PRECISIONS[engine])}"
        )
    kind = next(name for name in bundle.PRECISIONS[engine] if name == precision)
    tell = progress or (lambda label, fraction: None)
    checkpoint = Checkpoint.open(checkpoint_path)
    tokenizer = _tokenizer(checkpoint)
    _check_supported(checkpoint.model, engine, kind)
    target = Path(out) if out is not None else Path(f"{checkpoint.name}.vlrt")
    with bundle.writing(target) as directory:
        _check_disk(directory, checkpoint, kind)
        smoothing = smooth.NOTHING
        if kind in ("int8", "int4"):
            smoothing = _calibrate(checkpoint, tokenizer, kind, tell)
            tell = _after(tell, _CALIBRATE_SHARE)
        if smoothing.kept and note is not None:
            note(smoothing.describe())
        manifest = _write(checkpoint, directory, engine, kind, smoothing, tell)
        parity = verify.check(
            # What is judged is what is in the bundle: kernels of a library may be there or not where it is opened.
            select.load(Bundle.open(directory), backend, library=False),
            lambda: ReferenceBackend(checkpoint, streamed=True),
            tokenizer,
            kind,
            lambda done: tell("comparing with PyTorch", _WRITE_SHARE + (1 - _WRITE_SHARE) * done),
        )
        if kind == "int4":
            parity += (int4_check.check(directory / "decoder.onnx", smoothing.apply(_fetch(checkpoint))),)
        bundle.save_manifest(directory, dataclasses.replace(manifest, parity=parity))
        if failed := [row for row in parity if not row.ok]:
            raise ExportError(
                "the exported graphs differ from PyTorch, so no bundle was written: "
                + "; ".join(f"{r.name} {r.value:.3g} (limit {r.limit:.3g})" for r in failed)
                + (". Please report this checkpoint" if kind == "fp32" else ". Export with --precision fp32")
            )
    return target


def _calibrate(
    checkpoint: Checkpoint, tokenizer: prompt.Tokenizer, precision: Precision, tell: Progress
) -> smooth.Smoothing:
    """Run the reference, layer by layer, and choose by what its layers read."""
    cfg, half = checkpoint.model, _CALIBRATE_SHARE / 2
    layers = [site.layers[0] for site in smooth.sites(cfg)]
    seen = calibrate.observe(checkpoint, tokenizer, layers, lambda done: tell("calibrating", half * done))
    int4 = precision == "int4"
    return smooth.choose(
        cfg, seen, _fetch(checkpoint), int4=int4, progress=lambda done: tell("calibrating", half + half * done)
    )


def _after(tell: Progress, share: float) -> Progress:
    """Return what reports fractions of the work that is left once a share is done."""
    return lambda label, fraction: tell(label, share + (1 - share) * fraction)


def _write(
    checkpoint: Checkpoint,
    directory: Path,
    engine: BackendName,
    precision: Precision,
    smoothing: smooth.Smoothing,
    tell: Progress,
) -> Manifest:
    """Write every file of a bundle except what the gate adds; return its manifest."""
    cfg = checkpoint.model
    total, done = _weight_bytes(cfg, precision), 0

    def wrote(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        tell("writing weights", _WRITE_SHARE * min(done / total, 1.0))

    embed = _write_table(checkpoint, "model.embed_tokens.weight", "embed.bin", directory, precision, wrote)
    head = queries = None
    if not cfg.decoder.tie_word_embeddings:
        head = _write_table(checkpoint, "lm_head.weight", "lm_head_rows.bin", directory, precision, wrote)
    if cfg.latent is not None and cfg.latent.rollout == "parallel":
        queries = _write_table(checkpoint, "latent_injection.queries", "queries.bin", directory, "fp32", wrote)
    written = {}
    if engine == "torch":
        torch_weights.write(checkpoint, directory, precision, wrote)
    else:
        for graph, model in graphs.trace_all(registry.build(cfg)):
            tell(f"writing graph {graph.name}", _WRITE_SHARE * min(done / total, 1.0))
            recipes = quantize.lower_linears(model, precision, smoothing.kept)
            if quantize.HEAD in recipes and (head or embed).dtype == "float32":
                del recipes[quantize.HEAD]
                onnx.share_table(model, quantize.HEAD, head or embed, directory)
            onnx.write_graph(model, directory, recipes, smoothing.apply(_fetch(checkpoint)), wrote)
            written[graph.name] = graph
    for name in prompt.FILES:
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, directory / name)
    manifest = Manifest(
        schema_version=bundle.SCHEMA_VERSION,
        vlrt_version=vlrt.__version__,
        checkpoint=checkpoint.name,
        backend=engine,
        precision=precision,
        model=cfg,
        graphs=written,
        embed=embed,
        head=head,
        queries=queries,
        parity=(),
        files=bundle.hash_files(directory),
    )
    bundle.save_manifest(directory, manifest)
    return manifest


def _fetch(checkpoint: Checkpoint) -> onnx.Fetch:
    def floats(name: str) -> NDArray[np.float32]:
        array: NDArray[np.float32] = checkpoint.weight(name).float().numpy()
        return array

    return floats


def _write_table(
    checkpoint: Checkpoint,
    name: str,
    file: str,
    directory: Path,
    precision: Precision,
    wrote: Callable[[int], None],
) -> Table:
    """Write a matrix row after row: float32 in fp32 bundles, else in the checkpoint's own dtype."""
    import torch

    tensor = checkpoint.tensor(name)
    stored: dict[torch.dtype, bundle.TableDtype] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
    dtype = "float32" if precision == "fp32" else stored.get(tensor.dtype, "float32")
    with (directory / file).open("wb") as out:
        for start in range(0, len(tensor), _TABLE_ROWS):
            rows = tensor[start : start + _TABLE_ROWS].contiguous()
            array = rows.view(torch.uint16).numpy() if dtype == "bfloat16" else rows.to(getattr(torch, dtype)).numpy()
            array.tofile(out)
            wrote(array.nbytes)
    return Table(file, dtype, *tensor.shape)


def _tokenizer(checkpoint: Checkpoint) -> prompt.Tokenizer:
    """Read the tokenizer, and refuse one that cannot ask this model."""
    try:
        tokenizer = prompt.Tokenizer.open(checkpoint.path)
        verify.check_prompts(tokenizer, checkpoint.model)
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    return tokenizer


def _check_supported(cfg: config.Model, engine: BackendName, precision: Precision) -> None:
    """Refuse what ONNX Runtime's attention, or fp8 products, cannot run."""
    decoder = cfg.decoder
    heads, kv_heads = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    widths = decoder.hidden_size, heads, heads + 2 * kv_heads, decoder.intermediate_size
    if precision == "fp8" and (reason := fp8.unsupported(*widths)):
        raise ExportError(f"{reason}; export with --precision bf16")
    if engine == "ort" and cfg.decoder.head_dim % 16:
        raise ExportError(
            f"decoder.head_dim is {cfg.decoder.head_dim}; the ort backend's GroupQueryAttention takes multiples of 16"
        )


def _weight_bytes(cfg: config.Model, precision: Precision) -> int:
    """Estimate the bytes of a bundle's weights from above."""
    tensors = expected_tensors(cfg)
    count = {name: int(np.prod(shape)) for name, shape in tensors.items()}
    tables = sum(n for name, n in count.items() if name in ("model.embed_tokens.weight", quantize.HEAD))
    rest = sum(count.values()) - tables
    width = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}.get(precision)
    if width is not None:
        return width * (rest + tables)
    return (
        rest
        + 4 * tables
        + count["model.embed_tokens.weight"]
        + 4 * sum(n for name, n in count.items() if name.startswith("latent_injection."))
    )


def _check_disk(directory: Path, checkpoint: Checkpoint, precision: Precision) -> None:
    with contextlib.suppress(OSError):
        free, need = shutil.disk_usage(directory).free, _weight_bytes(checkpoint.model, precision)
        if free < need:
            raise ExportError(
                f"the bundle takes about {need / 1e9:.1f} GB, {directory.parent} has {free / 1e9:.1f} GB free; free "
                "space or choose another -o"
            )
