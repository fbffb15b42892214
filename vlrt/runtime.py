"""Opens a bundle and answers questions about videos: decode -> preprocess -> vision -> prefill -> latents -> answer.

The one place where all stages meet. Knows no engine from within: `backends` run the stages.
"""

import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlrt import preprocess, prompt
from vlrt.answer import Answer, Clock, Stream, Usage, peak_host_memory_bytes
from vlrt.backends import select
from vlrt.backends.base import Array, Backend
from vlrt.bundle import Bundle
from vlrt.errors import ConfigError
from vlrt.generate import Replace, Writer, check_length, read
from vlrt.latent import ABLATIONS, ablate
from vlrt.video import Frames, load

Source = str | os.PathLike[str] | bytes | Sequence[str | os.PathLike[str]] | Frames

ANSWER_TAG = "<answer>"  # where a chain of thought turns into the answer
ANSWER_END = "</answer>"  # what ends it
MAX_THREADS = 1024  # more is a slip, and the engine takes minutes to start them
DEFAULT_MAX_TOKENS: Mapping[str, int] = {"latent": 128, "direct": 128, "cot": 1024}


@dataclass(frozen=True)
class _Request:
    """A checked question."""

    question: str
    reasoning: prompt.Reasoning
    choices: tuple[str, ...]
    choice_ids: tuple[tuple[int, ...], ...]  # each ends in an end token; after a chain, behind the closing tag
    max_tokens: int
    min_tokens: int
    latents: NDArray[np.float32] | str | None


class Runtime:
    """A loaded model. One serves several threads: each call has a KV cache of its own, graphs are shared."""

    def __init__(self, backend: Backend, tokenizer: prompt.Tokenizer) -> None:
        """Wrap a loaded backend. `Runtime.open` makes one from a bundle."""
        self.model = backend.model
        self.tokenizer = tokenizer
        self._backend: Backend | None = backend

    @classmethod
    def open(
        cls, path: str | Path, *, backend: str = "auto", device: str = "auto", threads: int | None = None
    ) -> "Runtime":
        """Load a bundle; each file's hash is checked when it is loaded.

        Args:
            path: a directory that `vlrt export` wrote.
            backend: "ort", "torch", or "auto": the one that the bundle was written for.
            device: "cpu", "cuda" (backend "torch" alone), or "auto": a GPU where there is one that the backend can use.
            threads: of one graph run; None: one per core that this process may use. Of PyTorch: in the whole process.

        Raises:
            BundleError: not a bundle, or damaged.
            BackendUnavailable: the backend cannot run here, or not this bundle.
            ConfigError: a setting is out of range.
        """
        if threads is not None and not (isinstance(threads, int) and 1 <= threads <= MAX_THREADS):
            raise ConfigError(f"threads is {threads!r}; accepted: a whole number from 1 to {MAX_THREADS}")
        bundle = Bundle.open(path)
        for name in prompt.FILES:
            if (bundle.path / name).exists():
                bundle.file(name)
        return cls(select.load(bundle, backend, device, threads), prompt.Tokenizer.open(bundle.path))

    def ask(
        self,
        video: Source,
        question: str,
        *,
        choices: Sequence[str] | None = None,
        reasoning: prompt.Reasoning | None = None,
        max_tokens: int | None = None,
        min_tokens: int = 0,
        num_frames: int | None = None,
        fps: float | None = None,
        latents: NDArray[np.float32] | str | None = None,
    ) -> Answer:
        """Answer a question about a video.

        Args:
            video: what `vlrt.video.load` takes: path or bytes of a video or image, a list of image paths, or Frames.
            question: any text; control tokens in it are read as plain text.
            choices: the answers to choose from, scored as the model's next words; None: the model writes freely.
            reasoning: "latent", "direct" or "cot"; None: "latent" where the model has latents, else "direct".
            max_tokens: end the answer (a chain of thought included) after so many; None: 128, or 1,024 for "cot".
            min_tokens: do not end it before so many.
            num_frames: sample so many frames; None: the bundle's setting. Frames are taken as they are.
            fps: sample so many frames per second; None: the bundle's setting. Frames are taken as they are.
            latents: for ablations: [L, C] float32 to inject in place of the model's own (L may be 0), or "dummy" or
                "noise" (`latent.ablate`).

        Raises:
            VideoError: the video cannot be used.
            ConfigError: a setting is out of range, or the prompt is longer than the model's positions.
        """
        request = self._check(question, choices, reasoning, max_tokens, min_tokens, latents)
        pieces = self._answer(video, request, num_frames, fps)
        while True:
            try:
                next(pieces)
            except StopIteration as stop:
                answer: Answer = stop.value
                return answer

    def stream(
        self,
        video: Source,
        question: str,
        *,
        reasoning: prompt.Reasoning | None = None,
        max_tokens: int | None = None,
        min_tokens: int = 0,
        num_frames: int | None = None,
        fps: float | None = None,
    ) -> Stream:
        """Answer as `ask` does, giving out the text as it is written; nothing runs before the first piece is taken.

        Raises:
            ConfigError: a setting is out of range; `ask`'s other errors come with the first piece.
        """
        request = self._check(question, None, reasoning, max_tokens, min_tokens, None)
        return Stream(self._answer(video, request, num_frames, fps))

    def close(self) -> None:
        """Let the model go, once answers under way in other threads have ended. Later calls raise ConfigError."""
        self._backend = None

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(
        self,
        question: str,
        choices: Sequence[str] | None,
        reasoning: prompt.Reasoning | None,
        max_tokens: int | None,
        min_tokens: int,
        latents: NDArray[np.float32] | str | None,
    ) -> _Request:
        """Refuse what cannot be asked before any work is done."""
        how: prompt.Reasoning = reasoning or ("latent" if self.model.latent else "direct")
        if how not in DEFAULT_MAX_TOKENS:
            raise ConfigError(f"reasoning is {how!r}; accepted: {', '.join(DEFAULT_MAX_TOKENS)}")
        if how == "latent" and self.model.latent is None:
            raise ConfigError("reasoning is 'latent', but this model has no latents; accepted: 'direct', 'cot'")
        prompt.check_text("question", question)
        most = DEFAULT_MAX_TOKENS[how] if max_tokens is None else max_tokens
        if not (isinstance(most, int) and isinstance(min_tokens, int)) or most < 1 or not 0 <= min_tokens <= most:
            raise ConfigError(
                f"max_tokens is {most} and min_tokens {min_tokens}; accepted: whole numbers, max_tokens of 1 or more, "
                "min_tokens from 0 to max_tokens"
            )
        given = tuple(choices) if isinstance(choices, Iterable) and not isinstance(choices, str) else ()
        if choices is not None and len(given) < 2:
            raise ConfigError(f"choices are {choices!r}; accepted: a list of two or more answers")
        if not all(isinstance(c, str) and c for c in given) or len(set(given)) < len(given):
            raise ConfigError(f"choices are {list(given)!r}; accepted: different answers, none of them empty")
        for choice in given:
            prompt.check_text("choice", choice)
        closing = self.tokenizer.encode(ANSWER_END) if how == "cot" else []
        ids = tuple((*self.tokenizer.encode(c), *closing, self.model.tokens.eos_token_ids[0]) for c in given)
        if len(set(ids)) < len(ids):
            raise ConfigError(f"choices are {list(given)!r}; accepted: answers that differ to the tokenizer as well")
        return _Request(question, how, given, ids, most, min_tokens, self._check_latents(how, latents))

    def _check_latents(self, how: str, latents: Any) -> NDArray[np.float32] | str | None:
        if latents is None:
            return None
        width = self.model.decoder.hidden_size
        named = isinstance(latents, str) and latents in ABLATIONS and latents != "shuffled"
        shaped = isinstance(latents, np.ndarray) and latents.ndim == 2 and latents.shape[1] == width
        if how != "latent" or not (named or (shaped and latents.dtype.kind in "fiu" and np.isfinite(latents).all())):
            raise ConfigError(
                f"latents are {getattr(latents, 'shape', latents)!r} with reasoning {how!r}; accepted with 'latent': "
                f"an array [L, {width}] of finite numbers, 'dummy' or 'noise'"
            )
        return latents if named else np.asarray(latents, np.float32)

    def _answer(
        self, video: Source, request: _Request, num_frames: int | None, fps: float | None
    ) -> Generator[str, None, Answer]:
        """Run all stages; yield text as it is written and return the Answer."""
        backend = self._backend
        if backend is None:
            raise ConfigError("this Runtime is closed; open the bundle again")
        clock = Clock()
        with clock("decode"):
            frames = load(video, self.model.video, self.model.vision, num_frames=num_frames, fps=fps)
        with clock("preprocess"):
            shown = preprocess.resized(frames, self.model.video, self.model.vision)
            media = self._media(shown)
        with clock("prefill"):
            built = prompt.build(self.tokenizer, self.model, request.question, [media], reasoning=request.reasoning)
            room = self._room(request)
            # before the vision tower, which may take minutes
            check_length(self.model, len(built.ids), room, self._frames_that_fit(built, room))
        tokens = self._encode(backend, shown, media.grid_thw, clock)
        with clock("prefill"):
            context = read(backend, built, tokens)
            writer = Writer(backend, context, room)
        latents = None
        if request.reasoning == "latent":
            with clock("latents"):
                latents = backend.lower(writer.reason(context, self._replacement(backend, request)))
        written: list[int] = []
        lead: list[int] = []
        if not request.choices or request.reasoning == "cot":
            lead = yield from self._write(writer, request, built.ids.tolist(), written, clock)
        log_scores = None
        if request.choices:
            with clock("answer"):
                log_scores = writer.score(request.choice_ids, lead)
        return self._finish(request, frames, built, latents, written, log_scores, clock)

    def _write(
        self, writer: Writer, request: _Request, seen: list[int], written: list[int], clock: Clock
    ) -> Generator[str, None, list[int]]:
        """Write freely, yielding text.

        Before choices, stop where the answer's tag is complete, and return the ids that are missing to make it so: a
        token that runs on beyond the tag is taken back.
        """
        decoder = self.tokenizer.decoder()
        ids = writer.answer(
            max_tokens=request.max_tokens,
            min_tokens=request.min_tokens,
            eos=self.model.tokens.eos_token_ids,
            seen=seen,
            penalty=self.model.repetition_penalty,
        )
        text = ""
        while True:
            with clock("answer"):
                token_id = next(ids, None)
                piece = decoder.finish() if token_id is None else decoder.push(token_id)
            before, text = text, text + piece
            if request.choices and ANSWER_TAG in text and not text.endswith(ANSWER_TAG) and token_id is not None:
                writer.take_back()
                return self.tokenizer.encode(ANSWER_TAG[_overlap(before, ANSWER_TAG) :])
            if token_id is not None:
                written.append(token_id)
            if piece:
                yield piece
            if request.choices and text.endswith(ANSWER_TAG):
                return []
            if token_id is None:
                return self.tokenizer.encode(ANSWER_TAG)

    def _finish(
        self,
        request: _Request,
        frames: Frames,
        built: prompt.Prompt,
        latents: NDArray[np.float32] | None,
        written: list[int],
        log_scores: list[float] | None,
        clock: Clock,
    ) -> Answer:
        """Put the answer together."""
        text, thought, choice, scores = self.tokenizer.decode(written), None, None, None
        usage = Usage(
            num_frames=len(frames.data),
            video_tokens=sum(span.num_tokens for span in built.spans),
            prompt_tokens=len(built.ids),
            latents=0 if latents is None else len(latents),
            answer_tokens=len(written),
            peak_host_memory_bytes=peak_host_memory_bytes(),
        )
        if request.reasoning == "cot":
            thought, text = prompt.split_cot(text)
        if log_scores is not None:
            best = int(np.argmax(log_scores))
            text = choice = request.choices[best]
            scores = dict(zip(request.choices, np.exp(log_scores).tolist(), strict=True))
            written = self.tokenizer.encode(choice)
        return Answer(
            text=text,
            token_ids=tuple(written),
            choice=choice,
            scores=scores,
            finished=choice is not None or usage.answer_tokens < request.max_tokens,
            reasoning=request.reasoning,
            thought=thought,
            latents=latents,
            usage=usage,
            timings=clock.timings(),
            warnings=frames.warnings,
        )

    def _media(self, frames: Frames) -> prompt.Media:
        """Say how many tokens resized frames will have, and when."""
        vision = self.model.vision
        seconds = preprocess.seconds_per_temporal_patch(frames, vision)
        return prompt.Media(frames.is_image, preprocess.grid_of(frames, vision), seconds)

    def _encode(self, backend: Backend, frames: Frames, grid: tuple[int, int, int], clock: Clock) -> Array:
        """Run the vision tower over chunks of whole temporal patches; return video tokens [N_v, C]."""
        cfg, parts = self.model, []
        step = max(1, backend.vision_chunk // (grid[1] * grid[2]))
        for start in range(0, grid[0], step):
            with clock("preprocess"):
                patches = preprocess.patchify(frames, cfg.video, cfg.vision, start, min(start + step, grid[0]))
            with clock("vision"):
                parts.append(backend.encode(patches.pixels, patches.grid_thw))
        return backend.join(parts)

    def _frames_that_fit(self, built: prompt.Prompt, room: int) -> str:
        """Return the advice how many frames of this size fit the model's positions; "" where not even two do."""
        (span,) = built.spans
        per_step = span.num_tokens // span.grid_thw[0]
        left = self.model.decoder.max_positions - room - (len(built.ids) - span.num_tokens)
        frames = left // per_step * self.model.vision.temporal_patch_size
        return f"; {frames} frames of this size fit (num_frames={frames})" if frames > 0 else ""

    def _room(self, request: _Request) -> int:
        """Slots that the sequence may take beyond its prompt."""
        room, plan, given = 0, self.model.latent, request.latents
        if request.reasoning == "latent" and plan is not None:
            room += 1 + max(plan.num_latents, len(given) if isinstance(given, np.ndarray) else 0)
        if not request.choices or request.reasoning == "cot":
            room += request.max_tokens
        if request.choices:
            room += max(map(len, request.choice_ids)) + len(self.tokenizer.encode(ANSWER_TAG))
        return room

    def _replacement(self, backend: Backend, request: _Request) -> Replace | None:
        """Return what an ablation puts in place of the model's own latents."""
        given, plan = request.latents, self.model.latent
        if given is None or plan is None:
            return None
        if isinstance(given, np.ndarray):
            return lambda own: given
        pad = backend.lower(backend.embed(np.array([plan.pad_token_id], np.int64)))
        return lambda own: ablate("dummy" if given == "dummy" else "noise", own, pad_embed=pad)


def _overlap(text: str, tag: str) -> int:
    """Return how many characters of a tag the end of a text already has."""
    return next(n for n in range(len(tag), -1, -1) if text.endswith(tag[:n]))
