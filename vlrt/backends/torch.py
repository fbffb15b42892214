"""The stages of a bundle in PyTorch: on a GPU with hand-written kernels and CUDA graphs, on the CPU with the reference.

Weights, activations and the cache are in the bundle's precision; rotary tables are float32. On a GPU all work is put
into one queue, and the host waits for it only where it needs numbers: a word's id, the logits of choices; never
between latents. Frames are sent beside it (`uploads.py`).
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlrt import config, ops, positions
from vlrt.backends.captured import Captured, LastUsed
from vlrt.backends.device_cache import DeviceCache, LentAttention, Pool, Storage
from vlrt.backends.device_words import DeviceWords
from vlrt.backends.fused_decoder import FusedDecoder
from vlrt.backends.uploads import Cutter, FrameUpload, upload
from vlrt.bundle import Bundle, Table
from vlrt.errors import BackendUnavailable, BundleError
from vlrt.kv_cache import KVCache
from vlrt.memory_plan import Shape
from vlrt.models import registry

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
MAX_CAPTURED_ROWS = 32  # positions of a decoder pass that is replayed: latents, answers, choices
MAX_GRIDS = 4  # vision towers that are kept recorded
SIZES = {"cpu": (512, 4096), "cuda": (16_384, 32_768)}  # positions, and patches, per pass
LEAST_PREFILL = 2048  # positions: from there on products, not weights, are what takes time
PREFILL_SHARE = 1 / 16  # of a card's memory that a pass's activations may take


class TorchBackend:
    """See `base.Backend`. Arrays are torch tensors on the device.

    Args:
        bundle: an opened bundle, written for this backend; every file that is loaded is verified first.
        device: "cpu", "cuda", or "auto": a GPU where there is one.
        threads: of PyTorch on the CPU, in the whole process; None: as they are.

    Raises:
        BackendUnavailable: the device is not there, or has no kernels for the model.
        BundleError: a file is damaged, or weights are missing.
    """

    has_lanes = keeps_spare = False

    def __init__(self, bundle: Bundle, device: str = "auto", threads: int | None = None) -> None:
        where = _device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        table = _table(bundle, bundle.manifest.embed)
        head = table if bundle.manifest.head is None else _table(bundle, bundle.manifest.head)
        self._build(bundle.model, weights(bundle), table, head, bundle.precision, where)

    @classmethod
    def from_weights(
        cls, model: config.Model, fetch: Callable[[str], Tensor], precision: str = "bf16", device: str = "auto"
    ) -> "TorchBackend":
        """Build a backend without a bundle: for benches, and for weights that are in memory already.

        Args:
            model: its config.
            fetch: hands out every tensor of `checkpoint.expected_tensors` by its name, on any device.
            precision: of DTYPES; with "fp8", `fetch` hands out what `fused_decoder.linear` expects.
            device: "cpu", "cuda", or "auto".

        Raises:
            BackendUnavailable: the device is not there, or has no kernels for the model.
        """
        made = cls.__new__(cls)
        table = fetch("model.embed_tokens.weight")
        head = table if model.decoder.tie_word_embeddings else fetch("lm_head.weight")
        made._build(model, fetch, table, head, precision, _device(device))
        return made

    def _build(
        self,
        model: config.Model,
        fetch: Callable[[str], Tensor],
        table: Tensor,
        head: Tensor,
        precision: str,
        device: torch.device,
    ) -> None:
        if device.type == "cuda" and (reason := unfit(model, DTYPES[precision])):
            raise BackendUnavailable(f"device 'cuda' cannot run this model: {reason}; pass device='cpu'")
        self.model, self.device = model, device
        self.precision, self._dtype = precision, DTYPES[precision]
        self.prefill_chunk, self.vision_chunk = SIZES[device.type]
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
            self.prefill_chunk = longest_prefill(model.decoder, precision, memory)
        self._table = table.to(device, self._dtype)
        self._head = self._table if head is table else head.to(device, self._dtype)
        self._module = registry.build(model)
        for name, part in (("visual", self._module.visual), ("latent_injection", self._module.latent_injection)):
            if part is not None:
                registry.load(part, fetch, prefix=f"{name}.", dtype=self._dtype)
                part.to(device)
        self._decoder = FusedDecoder(model.decoder, fetch, self._dtype, device)
        self._pool = Pool(model.decoder, self._dtype, device)
        self._towers = LastUsed(MAX_GRIDS)
        self._grid_inputs = functools.lru_cache(MAX_GRIDS)(self._make_grid_inputs)
        self._cutter = Cutter(model.vision, model.video, self._dtype, device)
        self._recording = threading.Lock()

    def frame_upload(self) -> FrameUpload | None:
        """See `base.Backend`."""
        return FrameUpload(self._cutter) if self.device.type == "cuda" else None

    @torch.inference_mode()
    def encode(self, pixels: Any, grid_thw: tuple[int, int, int], *, last: bool = True) -> Tensor:
        """See `base.Backend`."""
        patches = pixels if isinstance(pixels, Tensor) else self._upload(pixels)
        given = (patches.to(self._dtype), *self._grid_inputs(grid_thw))
        if self.device.type != "cuda":
            out: Tensor = self._module.visual(*given)
            return out
        with self._recording:
            return self._towers(grid_thw, self._module.visual, given)

    @torch.no_grad()  # no inference mode: callers write video tokens into what it returns
    def embed(self, ids: Any) -> Tensor:
        """See `base.Backend`."""
        return self._table[self._upload(np.asarray(ids))]

    def prepare(self, capacity: int) -> DeviceCache:
        """See `base.Backend`."""
        return self._pool.lend(capacity)

    @torch.inference_mode()
    def decode(self, cache: KVCache, inputs_embeds: Tensor, cos: Any, sin: Any, lanes: Any = None) -> Tensor:
        """See `base.Backend`."""
        assert isinstance(cache, DeviceCache), "the cache must come from this backend's prepare"
        cache.place(cos, sin)
        hidden = self._pass(cache.storage, inputs_embeds)
        cache.advance(len(inputs_embeds))
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Any:
        """See `base.Backend`."""
        return self.lower(hidden @ self._head.t())

    def words(self, seen: Sequence[int] = (), penalty: float = 1.0) -> DeviceWords:
        """See `base.Backend`."""
        return DeviceWords(self._head, seen, penalty)

    @torch.inference_mode()
    def row_logits(self, hidden: Tensor, ids: Any) -> Any:
        """See `base.Backend`."""
        return self.lower(self._head[self._upload(np.asarray(ids))] @ hidden[0])

    @torch.inference_mode()
    def remember(self, pooled: Tensor) -> Any:
        """See `base.Backend`."""
        injection = self._module.latent_injection
        if injection is None or not injection.looks_at_video:
            return None
        return injection.memory(pooled[None])

    @torch.inference_mode()
    def inject(self, hidden: Tensor, memory: Any) -> Tensor:
        """See `base.Backend`."""
        assert self._module.latent_injection is not None, "a bundle without latents injects none"
        out: Tensor = self._module.latent_injection(hidden[None], memory)[0]
        return out

    def queries(self) -> Tensor | None:
        """See `base.Backend`."""
        return getattr(self._module.latent_injection, "queries", None)

    def join(self, parts: list[Tensor]) -> Tensor:
        """See `base.Backend`."""
        return torch.cat(parts)

    def lift(self, rows: Any) -> Tensor:
        """See `base.Backend`."""
        return self._upload(rows).to(self._dtype)

    def lower(self, rows: Tensor) -> Any:
        """See `base.Backend`."""
        return rows.float().cpu().numpy()

    def plan_memory(self, shape: Shape) -> None:
        """See `base.Backend`."""

    def give_back(self) -> None:
        """See `base.Backend`."""

    def close(self) -> None:
        """See `base.Backend`."""
        del self._module, self._decoder, self._table, self._head, self._pool, self._towers, self._cutter
        del self._grid_inputs

    def _pass(self, storage: Storage, inputs_embeds: Tensor) -> Tensor:
        """Run the decoder over positions [S, C] behind what the storage holds."""

        def run(x: Tensor) -> Tensor:
            return self._decoder(x[None], LentAttention(storage))[0]

        size = len(inputs_embeds)
        if self.device.type != "cuda" or size > MAX_CAPTURED_ROWS:
            return run(inputs_embeds)
        if size not in storage.graphs:
            with self._recording:
                storage.graphs[size] = Captured(run, (inputs_embeds,))
        replay: Callable[..., Tensor] = storage.graphs[size]
        return replay(inputs_embeds)

    def _make_grid_inputs(self, grid_thw: tuple[int, int, int]) -> list[Tensor]:
        """Return what the vision tower reads beside patches: tables and bounds, the same for all videos of a grid."""
        vision = self.model.vision
        inputs: list[Any] = [*positions.vision_cos_sin(grid_thw, vision), positions.frame_seqlens(grid_thw)]
        if vision.window_size:
            order, bounds = positions.window_index(grid_thw, vision)
            inputs += [order, np.argsort(order), bounds]
        return [self._upload(x) for x in inputs]

    def _upload(self, array: Any) -> Tensor:
        return upload(array, self.device)


def unfit(model: config.Model, dtype: torch.dtype) -> str | None:
    """Return why the kernels of a GPU cannot run a model, as a sentence, or None."""
    decoder, vision = model.decoder, model.vision
    for op, shape in (
        ("video_attention_", (1, 1, decoder.num_heads, decoder.head_dim)),
        ("segment_attention", (1, vision.num_heads, vision.head_dim)),
        ("rms_norm", (1, decoder.hidden_size)),
    ):
        if reason := ops.supported(op, "cuda", dtype, shape):
            return reason
    return None


def longest_prefill(decoder: config.Decoder, precision: str, memory_bytes: int) -> int:
    """Return how many positions a decoder pass on a card may have.

    Every pass reads all weights, so that 8,192 video tokens and a question should go through in one. What bounds a pass
    are its activations: at the widest gate, up and their product, and what flows around them; where products are fp8,
    also two copies in float32 and one in fp8 of what goes into the last.

    Args:
        decoder: its sizes.
        precision: of the bundle.
        memory_bytes: of the card.
    """
    size = DTYPES[precision].itemsize
    wide = size * (3 * decoder.intermediate_size + 4 * decoder.hidden_size)
    wide += 9 * decoder.intermediate_size if precision == "fp8" else 0
    fitting = int(memory_bytes * PREFILL_SHARE / wide)
    return min(max(fitting // 1024 * 1024, LEAST_PREFILL), SIZES["cuda"][0])


def weights(bundle: Bundle) -> Callable[[str], Tensor]:
    """Return what hands out the weights of a bundle by their Hugging Face names, memory-mapped, as they are stored.

    Raises:
        BundleError: a file is damaged, or, when it is asked for, a weight is missing.
    """
    opened: dict[str, Any] = {}
    for name in bundle.manifest.files:
        if name.endswith(".safetensors"):
            path = bundle.file(name)
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise BundleError(f"{path} cannot be read: {error}; export the bundle again") from error
            names: list[str] = file.keys()  # type: ignore[no-untyped-call]  # a method of Rust
            opened |= dict.fromkeys(names, file)

    def fetch(name: str) -> Tensor:
        if name not in opened:
            raise BundleError(f"{bundle.path} lacks the weight {name!r}; export it again")
        tensor: Tensor = opened[name].get_tensor(name)
        return tensor

    return fetch


def _table(bundle: Bundle, table: Table) -> Tensor:
    """Return a verified table, memory-mapped."""
    bundle.table(table)  # verifies it
    path, dtype = str(bundle.path / table.file), getattr(torch, table.dtype)
    mapped = torch.from_file(path, shared=False, size=table.rows * table.columns, dtype=dtype)
    return mapped.view(table.rows, table.columns)


def unavailable(device: str) -> str | None:
    """Return why a device cannot be used on this machine, as a sentence, or None if it can."""
    if device == "cuda" and not torch.cuda.is_available():
        built = "has no GPU that it can use" if torch.version.cuda else "was built without CUDA"
        return f"PyTorch {torch.__version__} {built}"
    return None


def _device(given: str) -> torch.device:
    if given == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (reason := unavailable(given)) is not None:
        raise BackendUnavailable(f"device {given!r} cannot be used: {reason}; accepted here: 'cpu'")
    return torch.device(given)
