"""A question, checked before any work is done for it. Knows settings and token ids; no video and no engine."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlrt import config, prompt
from vlrt.errors import ConfigError
from vlrt.latent import ABLATIONS

ANSWER_TAG = "<answer>"  # where a chain of thought turns into the answer
ANSWER_END = "</answer>"  # what ends it
DEFAULT_MAX_TOKENS: Mapping[str, int] = {"latent": 128, "direct": 128, "cot": 1024}


@dataclass(frozen=True)
class Request:
    """A checked question.

    Attributes:
        question: any text.
        reasoning: how the model gets to its answer.
        choices: the answers to choose from; empty: it writes freely.
        choice_ids: of each; they end in an end token, after a chain behind the closing tag.
        max_tokens: that it may write.
        min_tokens: before it may end.
        latents: to inject in place of the model's own, or the name of an ablation.
        early_exit: probability of a choice at which no more latents are made.
    """

    question: str
    reasoning: prompt.Reasoning
    choices: tuple[str, ...]
    choice_ids: tuple[tuple[int, ...], ...]
    max_tokens: int
    min_tokens: int
    latents: NDArray[np.float32] | str | None
    early_exit: float | None = None

    @property
    def writes(self) -> bool:
        """Whether it writes freely, if only before it chooses."""
        return not self.choices or self.reasoning == "cot"

    def room(self, model: config.Model, tokenizer: prompt.Tokenizer) -> int:
        """Slots that the sequence may take beyond its prompt."""
        room, plan, given = 0, model.latent, self.latents
        if self.reasoning == "latent" and plan is not None:
            room += 1 + max(plan.num_latents, len(given) if isinstance(given, np.ndarray) else 0)
        if self.writes:
            room += self.max_tokens
        if self.choices:
            room += sum(map(len, self.choice_ids)) + len(tokenizer.encode(ANSWER_TAG))
        return room


def check(
    model: config.Model,
    tokenizer: prompt.Tokenizer,
    question: str,
    *,
    choices: Sequence[str] | None = None,
    reasoning: prompt.Reasoning | None = None,
    max_tokens: int | None = None,
    min_tokens: int = 0,
    latents: NDArray[np.float32] | str | None = None,
    early_exit: float | None = None,
) -> Request:
    """Return a question that a model can be asked; the arguments are those of `Runtime.ask`.

    Raises:
        ConfigError: it cannot.
    """
    how: prompt.Reasoning = reasoning or ("latent" if model.latent else "direct")
    if how not in DEFAULT_MAX_TOKENS:
        raise ConfigError(f"reasoning is {how!r}; accepted: {', '.join(DEFAULT_MAX_TOKENS)}")
    if how == "latent" and model.latent is None:
        raise ConfigError("reasoning is 'latent', but this model has no latents; accepted: 'direct', 'cot'")
    prompt.check_text("question", question)
    most = DEFAULT_MAX_TOKENS[how] if max_tokens is None else max_tokens
    if not (isinstance(most, int) and isinstance(min_tokens, int)) or most < 1 or not 0 <= min_tokens <= most:
        raise ConfigError(
            f"max_tokens is {most} and min_tokens {min_tokens}; accepted: whole numbers, max_tokens of 1 or more, "
            "min_tokens from 0 to max_tokens"
        )
    given, ids = _check_choices(model, tokenizer, choices, how)
    if early_exit is not None:
        _check_early_exit(early_exit, how, given, latents)
    return Request(question, how, given, ids, most, min_tokens, _check_latents(model, how, latents), early_exit)


def _check_choices(
    model: config.Model, tokenizer: prompt.Tokenizer, choices: Sequence[str] | None, how: str
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    given = tuple(choices) if isinstance(choices, Iterable) and not isinstance(choices, str) else ()
    if choices is not None and len(given) < 2:
        raise ConfigError(f"choices are {choices!r}; accepted: a list of two or more answers")
    if not all(isinstance(c, str) and c for c in given) or len(set(given)) < len(given):
        raise ConfigError(f"choices are {list(given)!r}; accepted: different answers, none of them empty")
    for choice in given:
        prompt.check_text("choice", choice)
    closing = tokenizer.encode(ANSWER_END) if how == "cot" else []
    ids = tuple((*tokenizer.encode(c), *closing, model.tokens.eos_token_ids[0]) for c in given)
    if len(set(ids)) < len(ids):
        raise ConfigError(f"choices are {list(given)!r}; accepted: answers that differ to the tokenizer as well")
    return given, ids


def _check_early_exit(early_exit: Any, how: str, choices: tuple[str, ...], latents: Any) -> None:
    is_number = isinstance(early_exit, int | float) and not isinstance(early_exit, bool)
    if not (is_number and 0 < early_exit <= 1) or how != "latent" or not choices or latents is not None:
        raise ConfigError(
            f"early_exit is {early_exit!r} with reasoning {how!r} and {len(choices)} choices; accepted: a probability "
            "above 0, up to 1, with 'latent' and choices, and without latents of the caller's"
        )


def _check_latents(model: config.Model, how: str, latents: Any) -> NDArray[np.float32] | str | None:
    if latents is None:
        return None
    width = model.decoder.hidden_size
    named = isinstance(latents, str) and latents in ABLATIONS and latents != "shuffled"
    shaped = isinstance(latents, np.ndarray) and latents.ndim == 2 and latents.shape[1] == width
    if how != "latent" or not (named or (shaped and latents.dtype.kind in "fiu" and np.isfinite(latents).all())):
        raise ConfigError(
            f"latents are {getattr(latents, 'shape', latents)!r} with reasoning {how!r}; accepted with 'latent': "
            f"an array [L, {width}] of finite numbers, 'dummy' or 'noise'"
        )
    return latents if named else np.asarray(latents, np.float32)
