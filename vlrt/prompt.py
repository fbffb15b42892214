"""Questions and media to token ids: the chat template's text, each medium's pad expanded to its tokens.

Knows how many tokens a medium has, not what they hold: the vision tower fills them. Knows no weights. Text that users
write never becomes control tokens, see `tokenizer.py`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from vlrt.config import Model
from vlrt.errors import ConfigError
from vlrt.tokenizer import FILES, TextDecoder, Tokenizer

__all__ = ["FILES", "Media", "Prompt", "Reasoning", "Span", "TextDecoder", "Tokenizer", "build", "split_cot"]

Reasoning = Literal["latent", "direct", "cot"]

MAX_TEXT_CHARS = 4_000_000  # of a system prompt or a question: far beyond any context, refused before it is tokenized

# The written reasoning that Video-R1 (arXiv 2503.21776) trains: a thought, then an answer, each in its tags.
COT_INSTRUCTIONS = (
    "Think the question through first, as a person would who watches closely: follow what happens, weigh the "
    "evidence, question your first idea and correct it. Write this reasoning between <think> and </think>. "
    "Then give the final answer alone between <answer> and </answer>."
)

_THINK = re.compile(r"<\s*think\s*>", re.IGNORECASE)
_THINK_END = re.compile(r"<\s*/\s*think\s*>", re.IGNORECASE)
_ANSWER = re.compile(r"<\s*answer\s*>(.*?)(?:<\s*/\s*answer\s*>|\Z)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Media:
    """One image or video of a question, before its tokens have a place."""

    is_image: bool
    grid_thw: tuple[int, int, int]  # patches
    seconds_per_temporal_patch: float  # fractional; 0 for images


@dataclass(frozen=True)
class Span:
    """The tokens of one image or video in a prompt."""

    is_image: bool
    start: int  # index of the first pad token
    num_tokens: int
    grid_thw: tuple[int, int, int]  # patches
    seconds_per_temporal_patch: float


@dataclass(frozen=True)
class Prompt:
    """What is fed to the decoder before it reasons: `ids` with one pad token per vision token, and where those are."""

    ids: npt.NDArray[np.int64]  # [S]
    spans: tuple[Span, ...]
    text: str  # as rendered: one pad per medium, for people to read


def build(
    tokenizer: Tokenizer,
    model: Model,
    question: str,
    media: Sequence[Media],
    *,
    reasoning: Reasoning,
    system: str | None = None,
) -> Prompt:
    """Return the prompt of one question about some media: [system][user: media, question][assistant header].

    Args:
        tokenizer: the model's.
        model: gives token ids, the merge size and the vocabulary.
        question: what the user asks; never read as control tokens.
        media: images and videos in the order in which they stand before the question.
        reasoning: "latent" ends the prompt with the latent start token; "cot" asks for a written thought before the
            answer (as Video-R1 does); "direct" asks for the answer alone.
        system: the system turn; None: the template's own.

    Raises:
        ConfigError: the question is empty or not text, the model has no latents, or tokenizer, template and model do
            not fit each other.
    """
    if reasoning not in get_args(Reasoning):
        raise ConfigError(f"reasoning is {reasoning!r}; accepted: {', '.join(map(repr, get_args(Reasoning)))}")
    if reasoning == "latent" and model.latent is None:
        raise ConfigError("reasoning is 'latent' but the model has no latents; accepted: 'direct', 'cot'")
    asked = check_text("question", question)
    asked = f"{asked}\n{COT_INSTRUCTIONS}" if reasoning == "cot" else asked
    kinds = ["image" if medium.is_image else "video" for medium in media]
    content = [*({"type": kind, kind: ""} for kind in kinds), {"type": "text", "text": asked}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": check_text("system", system)})
    ids, text = tokenizer.encode_chat(messages)
    ids, spans = _expand(ids, media, model)
    if reasoning == "latent" and model.latent is not None:
        ids.append(model.latent.start_token_id)
    if max(ids) >= model.decoder.vocab_size:
        raise ConfigError(
            f"the tokenizer gives id {max(ids)}; accepted: below the vocab_size {model.decoder.vocab_size}"
        )
    return Prompt(np.array(ids, dtype=np.int64), spans, text)


def split_cot(text: str) -> tuple[str, str]:
    """Return the thought and the answer of a written reasoning, stripped, whatever tags the model forgot.

    Without an <answer> the answer is what follows </think>; without any tag it is the whole text. An unfinished thought
    has the answer "".
    """
    thought_ends = _THINK_END.search(text)
    found = _ANSWER.search(text, thought_ends.end() if thought_ends else 0) or _ANSWER.search(text)
    before = text[: found.start()] if found else text
    opened, closed = _THINK.search(before), _THINK_END.search(before)
    start = opened.end() if opened and not (closed and closed.start() < opened.start()) else 0
    thought = before[start : closed.start()] if closed else before[start:] if opened or found else ""
    answer = found[1] if found else before[closed.end() :] if closed else "" if opened else text
    return thought.strip(), answer.strip()


def _expand(ids: list[int], media: Sequence[Media], model: Model) -> tuple[list[int], tuple[Span, ...]]:
    """Replace each medium's one pad by as many as it has tokens; return the ids and the spans."""
    pads = {True: model.tokens.image_token_id, False: model.tokens.video_token_id}
    places = [i for i, token in enumerate(ids) if token in pads.values()]
    if [ids[place] for place in places] != [pads[medium.is_image] for medium in media]:
        raise ConfigError(
            f"the chat template writes {len(places)} pads ({model.tokens.image_token_id}: image, "
            f"{model.tokens.video_token_id}: video) for {len(media)} media; accepted: one of its kind for each"
        )
    expanded: list[int] = []
    spans, end = [], 0
    for place, medium in zip(places, media, strict=True):
        expanded += ids[end:place]
        size = num_tokens(medium.grid_thw, model.vision.spatial_merge_size)
        seconds = float(medium.seconds_per_temporal_patch)
        spans.append(Span(medium.is_image, len(expanded), size, medium.grid_thw, seconds))
        expanded += [ids[place]] * size
        end = place + 1
    return expanded + ids[end:], tuple(spans)


def num_tokens(grid_thw: tuple[int, int, int], merge: int) -> int:
    """Return how many tokens a grid of patches has.

    Raises:
        ConfigError: it does not divide into them.
    """
    time, height, width = grid_thw
    if min(grid_thw) < 1 or height % merge or width % merge:
        raise ConfigError(f"grid_thw is {list(grid_thw)}; accepted: height and width multiples of {merge}, all above 0")
    return time * height * width // merge**2


def check_text(name: str, text: str) -> str:
    """Return a text that people wrote, if it is one.

    Raises:
        ConfigError: it is empty, too long, no text, or holds half a surrogate pair.
    """
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"the {name} is {text!r}; accepted: text that is not empty")
    if len(text) > MAX_TEXT_CHARS:
        raise ConfigError(f"the {name} has {len(text)} characters; accepted: at most {MAX_TEXT_CHARS}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the {name} is not valid Unicode: {error}") from error
    return text
