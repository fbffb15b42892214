"""The stages of a bundle on ONNX Runtime's CPU provider.

The KV cache is bound as input and output of the same graph run, so that nothing of it is copied. Knows graphs by
names.py and tables by the manifest; no video, no text.
"""

import contextlib
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from vlrt import config, host_memory, memory_plan, names, positions, processor
from vlrt.backends import ort_library
from vlrt.backends.base import Floats, Ids
from vlrt.backends.greedy import HostWords
from vlrt.bundle import Bundle, Table, widen
from vlrt.errors import BackendUnavailable, BundleError
from vlrt.kv_cache import KVCache, Spare

# Without VNNI, x86 adds pairs of products of unsigned and signed bytes in 16 bits, and saturates. This has ONNX Runtime
# take kernels that do not; where there is VNNI it would take them too, and they are several times slower.
EXACT_INT8 = ("session.x64quantprecision", "1")

FEW_ROWS = 64  # positions of a decoder pass that is not worth freeing after: latents, answers, most questions

_NO_BIAS = np.zeros((1, 1, 0, 0), np.float32)
# Each session has threads of its own. After a pass they go on spinning for the next one of their session, and take the
# cores from the other sessions, which run in turn: a written token took twice as long.
STOP_SPINNING = ("session.force_spinning_stop", "1")

_DTYPES = {"tensor(float)": "float32", "tensor(int32)": "int32", "tensor(int64)": "int64"}


class BoundCache(KVCache):
    """A KV cache with the I/O binding that hands it to the decoder graph."""

    binding: Any


class OrtBackend:
    """See `base.Backend`. Arrays are NumPy float32.

    Args:
        bundle: an opened bundle; every file of it is verified first.
        threads: threads of one graph run; None: one per core that this process may use.
        library: whether to take kernels of `libvlrt_ort` where it is there; else the bodies that the bundle holds.

    Attributes:
        kernels: what runs our ops: "libvlrt_ort, avx512" by its SIMD level, or why it is the bodies of the bundle.
            Bundles that are not in fp32 may take a level whose products are in bf16: theirs are rounded more anyway.
        has_lanes: False for bundles of version 0.1.0 and before.

    Raises:
        BundleError: a file is damaged, or a graph does not load or breaks the contract of names.py.
    """

    prefill_chunk, vision_chunk = memory_plan.PREFILL_CHUNK, memory_plan.VISION_CHUNK
    keeps_spare = True

    def __init__(self, bundle: Bundle, threads: int | None = None, *, library: bool = True) -> None:
        self.model, self._files, self._spare = bundle.model, bundle.watched(), Spare()
        self._library = _usable_library(bundle.model) if library else "it was not asked for"
        self._level = ort_library.AUTO if bundle.precision == "fp32" else ort_library.AUTO_BF16
        before = self._num_kernels()
        self.threads = threads or num_usable_cores()
        manifest = bundle.manifest
        self._int8 = bundle.precision != "fp32"  # the tower, in int4 too
        graphs = {f"{name}.onnx" for name in manifest.graphs} - set(manifest.files)  # which it refuses
        largest_first = sorted(manifest.files, key=lambda name: -manifest.files[name].num_bytes)
        bundle.verify([*graphs, *largest_first], self.threads)
        self._embed = bundle.table(manifest.embed, verified=True)
        self._head = self._embed if manifest.head is None else bundle.table(manifest.head, verified=True)
        self._queries = self._read(bundle, manifest.queries)
        windowed = self.model.vision.window_size > 0
        self._vision = self._load(bundle, names.vision(windowed=windowed))
        num_layers = self.model.decoder.num_layers
        self.has_lanes = manifest.graphs.get("decoder") != names.decoder(num_layers, biased=False)
        self._decoder_graph = names.decoder(num_layers, biased=self.has_lanes)
        self._decoder = self._load(bundle, self._decoder_graph)
        self._lm_head = self._load(bundle, names.LM_HEAD)
        injection = self.model.latent.injection if self.model.latent else "identity"
        self._looks_at_video = injection == "mlp_xattn"
        self._latent = self._latent_memory = None
        if injection != "identity":
            self._latent = self._load(bundle, names.latent(looks_at_video=self._looks_at_video))
        if self._looks_at_video:
            self._latent_memory = self._load(bundle, names.LATENT_MEMORY)
        self.kernels = self._name_kernels(self._num_kernels() - before)
        self._files.check()  # nothing was written between a hash and what was loaded

    def frame_upload(self) -> None:
        """See `base.Backend`."""

    def encode(self, pixels: Floats, grid_thw: tuple[int, int, int], *, last: bool = True) -> Floats:
        """See `base.Backend`."""
        vision = self.model.vision
        cos, sin = positions.vision_cos_sin(grid_thw, vision)
        feeds: dict[str, NDArray[Any]] = {
            names.PIXELS.name: pixels,
            names.VISION_COS.name: cos,
            names.VISION_SIN.name: sin,
            names.CU_SEQLENS.name: positions.frame_seqlens(grid_thw),
        }
        if vision.window_size:
            order, bounds = positions.window_index(grid_thw, vision)
            feeds[names.WINDOW_INDEX.name] = order
            feeds[names.WINDOW_REVERSE.name] = np.argsort(order)
            feeds[names.CU_WINDOW_SEQLENS.name] = bounds
        with _running("vision"):
            out: Floats = self._vision.run(None, feeds, _freeing() if last else None)[0]
        if last:
            host_memory.give_back()
        return out

    def plan_memory(self, shape: memory_plan.Shape) -> memory_plan.Plan:
        """See `base.Backend`."""
        library = isinstance(self._library, ort_library.Library)
        return memory_plan.predict(self.model, shape, int8=self._int8, library=library)

    def embed(self, ids: Ids) -> Floats:
        """See `base.Backend`.

        Raises:
            BundleError: a file of the bundle was written to since it was opened.
        """
        self._files.check()  # here, since every step comes by
        return widen(self._embed[ids])

    def prepare(self, capacity: int) -> BoundCache:
        """See `base.Backend`."""
        cache = BoundCache(self.model.decoder, capacity, self._spare if self.keeps_spare else None)
        binding = self._decoder.io_binding()
        graph = self._decoder_graph
        fixed = [cache.cos, cache.sin, cache.past_length, *cache.keys, *cache.values]
        for tensor, array in zip(graph.inputs[1:], fixed, strict=not self.has_lanes):
            binding.bind_input(tensor.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for tensor, array in zip(graph.outputs[1:], [*cache.keys, *cache.values], strict=True):
            binding.bind_output(tensor.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        cache.binding = binding
        return cache

    def decode(
        self, cache: KVCache, inputs_embeds: Floats, cos: Floats, sin: Floats, lanes: NDArray[np.int32] | None = None
    ) -> Floats:
        """See `base.Backend`."""
        assert isinstance(cache, BoundCache), "the cache must come from this backend's prepare"
        assert self.has_lanes or lanes is None, "the caller asks whether there are lanes"
        cache.place(cos, sin, 0 if lanes is None else lanes)
        given = np.ascontiguousarray(inputs_embeds, np.float32)[None]
        hidden = np.empty_like(given)
        binding = cache.binding
        for bind, name, array in (
            (binding.bind_input, names.INPUTS_EMBEDS.name, given),
            (binding.bind_output, names.LAST_HIDDEN_STATE.name, hidden),
        ):
            bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        if self.has_lanes:
            bias = _NO_BIAS if lanes is None else cache.bias(len(lanes))
            binding.bind_input(names.ATTENTION_BIAS.name, "cpu", 0, np.float32, bias.shape, bias.ctypes.data)
        long = len(inputs_embeds) > FEW_ROWS
        with _running("decoder"):
            self._decoder.run_with_iobinding(binding, _freeing() if long else None)
        if long:
            host_memory.give_back()
        cache.advance(len(inputs_embeds))
        out: Floats = hidden[0]
        return out

    def logits(self, hidden: Floats) -> Floats:
        """See `base.Backend`."""
        with _running("lm_head"):
            out: Floats = self._lm_head.run(None, {names.HIDDEN.name: hidden})[0]
        return out

    def words(self, seen: Sequence[int] = (), penalty: float = 1.0) -> HostWords:
        """See `base.Backend`."""
        return HostWords(self.logits, seen, penalty)

    def row_logits(self, hidden: Floats, ids: Ids) -> Floats:
        """See `base.Backend`."""
        out: Floats = widen(self._head[ids]) @ hidden[0]
        return out

    def remember(self, pooled: Floats) -> list[Floats]:
        """See `base.Backend`."""
        if self._latent_memory is None:
            return []
        with _running("latent_memory"):
            memory: list[Floats] = self._latent_memory.run(None, {names.POOLED.name: pooled[None]})
        return memory

    def inject(self, hidden: Floats, memory: list[Floats]) -> Floats:
        """See `base.Backend`."""
        if self._latent is None:
            return hidden
        feeds = {names.LATENT_HIDDEN.name: hidden[None]}
        if self._looks_at_video:
            feeds[names.MEMORY_K.name], feeds[names.MEMORY_V.name] = memory
        with _running("latent"):
            out: Floats = self._latent.run(None, feeds)[0][0]
        return out

    def queries(self) -> Floats | None:
        """See `base.Backend`."""
        return self._queries

    def join(self, parts: list[Floats]) -> Floats:
        """See `base.Backend`."""
        return np.concatenate(parts)

    def lift(self, rows: Floats) -> Floats:
        """See `base.Backend`."""
        return rows

    def lower(self, rows: Floats) -> Floats:
        """See `base.Backend`."""
        return rows

    def give_back(self) -> None:
        """See `base.Backend`."""
        self._spare.let_go()

    def close(self) -> None:
        """See `base.Backend`."""
        self._spare.let_go()
        del self._vision, self._decoder, self._lm_head, self._latent, self._latent_memory, self._embed, self._head

    def _load(self, bundle: Bundle, graph: names.Graph) -> ort.InferenceSession:
        """Load a graph, and hold its inputs and outputs against the contract."""
        if bundle.manifest.graphs.get(graph.name) != graph:
            raise BundleError(
                f"{bundle.path} lacks graph {graph.name!r}, or it has other inputs or outputs than this version of "
                "vlrt knows; export it again"
            )
        path = bundle.path / f"{graph.name}.onnx"
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.add_session_config_entry(*STOP_SPINNING)
        options.enable_mem_pattern = False  # else the second pass of a shape takes its memory once more, and keeps it
        if processor.may_saturate(platform.machine(), processor.describe()["features"]):
            options.add_session_config_entry(*EXACT_INT8)
        options.log_severity_level = 4  # errors are raised; warnings about fusions are no concern of the caller
        try:
            if isinstance(self._library, ort_library.Library):
                for entry in (ort_library.SIMD, ort_library.FP32):
                    options.add_session_config_entry(entry, self._level)
                options.register_custom_ops_library(str(self._library.path))
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a class of its own per status code, all below Exception
            raise BundleError(f"{path} does not load in onnxruntime {ort.__version__}: {error}") from error
        _check_contract(path, session, graph, config.dimensions(self.model))
        if isinstance(self._library, ort_library.Library) and self._library.packs(bundle.precision):
            host_memory.let_go(path.with_suffix(".bin").resolve())
        return session

    def _num_kernels(self) -> int:
        return ort_library.num_kernels(self._library) if isinstance(self._library, ort_library.Library) else 0

    def _name_kernels(self, num_kernels: int) -> str:
        if not isinstance(self._library, ort_library.Library):
            return f"bodies of the bundle: {self._library}"
        if not num_kernels:  # which it may, and then the answers are the same
            return f"bodies of the bundle: onnxruntime {ort.__version__} prefers them to libvlrt_ort"
        return f"libvlrt_ort, {self._library.levels[self._level]}"

    @staticmethod
    def _read(bundle: Bundle, table: Table | None) -> Floats | None:
        return None if table is None else widen(bundle.table(table, verified=True))


def _freeing() -> ort.RunOptions:
    """Return options for a long pass: what it took is freed at its end, else each session keeps its largest pass."""
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


@contextlib.contextmanager
def _running(graph: str) -> Iterator[None]:
    """Turn what onnxruntime raises while it runs a graph into our own error: most often it has run out of memory."""
    try:
        yield
    except Exception as error:  # a class of its own per status code, all below Exception
        raise BackendUnavailable(
            f"onnxruntime cannot run the graph {graph!r} here: {error}; where memory ran out, ask with fewer or "
            "smaller frames"
        ) from error


def num_usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _usable_library(model: config.Model) -> ort_library.Library | str:
    """Return the library, or why it cannot run this model."""
    head_dim = max(model.decoder.head_dim, model.vision.head_dim)
    if head_dim > ort_library.MAX_HEAD_DIM:
        return f"libvlrt_ort takes head dims up to {ort_library.MAX_HEAD_DIM}, this model has {head_dim}"
    return ort_library.find()


def _check_contract(path: Path, session: ort.InferenceSession, graph: names.Graph, fixed: dict[str, int]) -> None:
    """Refuse a graph whose inputs and outputs are not those of the contract, at the sizes that the config fixes."""
    have = (*session.get_inputs(), *session.get_outputs())
    want = (*graph.inputs, *graph.outputs)
    if (len(session.get_inputs()), len(session.get_outputs())) != (len(graph.inputs), len(graph.outputs)):
        raise BundleError(f"{path} has other inputs or outputs than this version of vlrt knows; export it again")
    for given, tensor in zip(have, want, strict=True):
        shape = [fixed.get(d, d) if isinstance(d, str) else d for d in tensor.shape]
        known = [(size, wanted) for size, wanted in zip(given.shape, shape, strict=False) if isinstance(wanted, int)]
        same = all(size == wanted for size, wanted in known) and len(given.shape) == len(shape)
        if (given.name, _DTYPES.get(given.type)) != (tensor.name, tensor.dtype) or not same:
            raise BundleError(
                f"{path} has a tensor {given.name} {given.type} {given.shape}, expected {tensor.name} {tensor.dtype} "
                f"{shape}; export the bundle again"
            )
