"""The whole model against transformers: prompts of images and videos, states, logits, and greedy answers.

Positions are passed in to both: where text continues after a video is Qwen's own rule here, not transformers'. Those
positions are held against a restatement of the rule in test_positions.py.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tests.closeness import assert_close
from tests.oracle import oracles
from vlrt import generate, positions
from vlrt.backends.reference import ReferenceBackend
from vlrt.generate import Writer
from vlrt.prompt import Prompt, Span

FAMILIES = ["qwen2_vl", "qwen2_5_vl"]
IMAGE, VIDEO = True, False
# media of a prompt, in order: is_image, grid_thw in patches, seconds per temporal patch
PROMPTS = {
    "text": [],
    "one video": [(VIDEO, (4, 6, 10), 0.7)],
    "one token": [(VIDEO, (1, 2, 2), 1.0)],
    "more times than rows": [(VIDEO, (12, 2, 6), 1.0)],  # where the two rules of text positions part
    "one image": [(IMAGE, (1, 10, 14), 0.0)],
    "two videos": [(VIDEO, (3, 2, 10), 1 / 3), (VIDEO, (2, 10, 2), 2.0)],
    "images and videos in turn": [
        (IMAGE, (1, 4, 4), 0.0),
        (VIDEO, (2, 6, 6), 0.5),
        (IMAGE, (1, 2, 18), 0.0),
        (VIDEO, (5, 4, 2), 4.1),
    ],
}


@dataclass
class Asked:
    """A prompt and its patches, drawn from a seed."""

    prompt: Prompt
    pixels: list[np.ndarray]
    positions: np.ndarray
    next_position: int

    @property
    def media(self):
        return [
            (span.is_image, span.grid_thw, torch.from_numpy(x))
            for span, x in zip(self.prompt.spans, self.pixels, strict=True)
        ]


def ask(model, media, *, seed=0, text=7):
    random, tokens = np.random.default_rng(seed), model.tokens
    ids, spans, pixels = list(random.integers(0, 250, text)), [], []
    for is_image, grid, seconds in media:
        num_tokens = int(np.prod(grid)) // model.vision.spatial_merge_size**2
        ids.append(tokens.vision_start_token_id)
        spans.append(Span(is_image, len(ids), num_tokens, grid, seconds))
        ids += [tokens.image_token_id if is_image else tokens.video_token_id] * num_tokens
        ids += [tokens.vision_end_token_id, *random.integers(0, 250, text)]
        pixels.append(random.standard_normal((int(np.prod(grid)), model.vision.patch_dim)).astype(np.float32))
    prompt = Prompt(np.array(ids, np.int64), tuple(spans), "")
    where = positions.mrope_positions(prompt.ids, spans, tokens_per_second=model.vision.tokens_per_second)
    return Asked(prompt, pixels, *where)


def read(backend, asked):
    tokens = [backend.encode(x, span.grid_thw) for span, x in zip(asked.prompt.spans, asked.pixels, strict=True)]
    return generate.read(backend, asked.prompt, backend.join(tokens) if tokens else backend.embed(np.arange(0)))


def read_by(oracle, asked):
    return oracle.read(torch.from_numpy(asked.prompt.ids), torch.from_numpy(asked.positions), asked.media)


@pytest.mark.parametrize("media", PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_state_and_logit_equals_transformers(make_checkpoint, family, media):
    """Catches video tokens in the wrong places or order, and any position that the two read differently."""
    checkpoint = make_checkpoint(family=family)
    backend, asked = ReferenceBackend(checkpoint), ask(checkpoint.model, PROMPTS[media])
    context = read(backend, asked)
    np.testing.assert_array_equal(context.positions, asked.positions)
    tables = positions.mrope_cos_sin(context.positions, checkpoint.model.decoder)
    hidden = backend.decode(backend.prepare(len(context.embeds)), context.embeds, *tables)
    plain, exact = (read_by(oracle, asked) for oracle in oracles(checkpoint))
    assert_close(hidden, exact[0], plain[0])
    assert_close(backend.logits(hidden), exact[1], plain[1])


def greedy(oracle, asked, count):
    """What transformers says, token by token."""
    logits, found = read_by(oracle, asked)[1][-1], []
    while len(found) < count:
        found.append(int(logits.argmax()))
        logits = oracle.step(found[-1], asked.next_position + len(found) - 1)
    return found


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("media", PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_transformers(make_checkpoint, family, media, seed):
    """Catches a cache or a position that goes astray after the prompt, one token at a time."""
    checkpoint = make_checkpoint(family=family)
    backend, asked = ReferenceBackend(checkpoint), ask(checkpoint.model, PROMPTS[media], seed=seed)
    writer = Writer(backend, read(backend, asked), 20)
    found = list(writer.answer(max_tokens=20, min_tokens=0, eos=()))
    assert found == greedy(oracles(checkpoint)[0], asked, 20)


@pytest.mark.parametrize("media", PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_given_tokens_equal_transformers(make_checkpoint, family, media):
    """Catches what greedy answers of an untrained model hide when they repeat one token: a step fed twice or not."""
    checkpoint = make_checkpoint(family=family)
    backend, asked = ReferenceBackend(checkpoint), ask(checkpoint.model, PROMPTS[media])
    given = np.random.default_rng(3).integers(0, 250, 16).tolist()
    writer = Writer(backend, read(backend, asked), 16)
    out = np.concatenate([backend.logits(writer.feed_tokens([token_id])) for token_id in given])
    steps = []
    for oracle in oracles(checkpoint):
        read_by(oracle, asked)
        steps.append(torch.stack([oracle.step(token_id, asked.next_position + i) for i, token_id in enumerate(given)]))
    assert_close(out, steps[1], steps[0])


@pytest.mark.parametrize("chunk", [1, 63])
def test_prefill_in_chunks_equals_transformers(make_checkpoint, chunk):
    """Catches a chunk that begins or ends within a video and loses its past or its places."""
    checkpoint = make_checkpoint()
    backend, asked = ReferenceBackend(checkpoint), ask(checkpoint.model, PROMPTS["images and videos in turn"])
    backend.prefill_chunk = chunk
    writer = Writer(backend, read(backend, asked), 0)
    plain, exact = (read_by(oracle, asked)[0][-1:] for oracle in oracles(checkpoint))
    assert_close(writer.last_hidden, exact, plain)


@pytest.mark.parametrize("how", [{"layout": "nested"}, {"tie": True}, {"shard_bytes": 300_000}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_spellings_of_a_checkpoint_say_the_same(make_checkpoint, family, how):
    """Catches a spelling whose tensors land in other places than transformers puts them."""
    checkpoint = make_checkpoint(family=family, **how)
    backend, asked = ReferenceBackend(checkpoint), ask(checkpoint.model, PROMPTS["one video"])
    writer = Writer(backend, read(backend, asked), 16)
    found = list(writer.answer(max_tokens=16, min_tokens=0, eos=()))
    assert found == greedy(oracles(checkpoint)[0], asked, 16)


def test_a_video_in_parts_reads_as_one(tiny_checkpoint):
    """Catches a runtime that encodes a long video in parts and joins them in another order than one pass would."""
    backend, asked = ReferenceBackend(tiny_checkpoint), ask(tiny_checkpoint.model, PROMPTS["one video"])
    pixels, rows = asked.pixels[0], 6 * 10
    parts = [backend.encode(pixels[i * rows : (i + 2) * rows], (2, 6, 10)) for i in (0, 2)]
    context = generate.read(backend, asked.prompt, backend.join(parts))
    plain, exact = (read_by(oracle, asked)[0][-1:] for oracle in oracles(tiny_checkpoint))
    assert_close(Writer(backend, context, 0).last_hidden, exact, plain)
