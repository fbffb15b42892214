"""Latents: both rollouts against a loop that recomputes everything, the ablations, and the injection by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.closeness import assert_close
from tests.fakes import WIDTH, FakeBackend, fake_model
from vlrt import generate, latent, positions
from vlrt.backends.reference import ReferenceBackend
from vlrt.errors import ConfigError
from vlrt.fresh import DEFAULT_LATENT
from vlrt.generate import Writer
from vlrt.models import registry
from vlrt.models.decoder import FullAttention
from vlrt.prompt import Prompt, Span

MODES = ["identity", "rms", "mlp", "mlp_xattn"]
SPAN = Span(False, 4, 18, (3, 4, 6), 0.7)


def a_context(backend):
    """Text, a video of 3 temporal patches, text: 32 positions."""
    width = backend.model.decoder.hidden_size
    tokens = np.random.default_rng(1).standard_normal((18, width)).astype(np.float32)
    ids = np.random.default_rng(0).integers(0, 200, 32)
    return generate.read(backend, Prompt(ids, (SPAN,), ""), backend.lift(tokens))


def fake(**plan):
    return FakeBackend(fake_model(latent={**DEFAULT_LATENT, **plan}))


class FakeWithoutCache:
    """The fake model, every state computed from the whole sequence."""

    def __init__(self, backend):
        self.backend = FakeBackend(backend.model)
        self.plan = backend.model.latent
        self.context = a_context(self.backend)
        self.end = self.backend.embed(np.array([self.plan.end_token_id]))

    def states(self, rows):
        """Hidden states of the whole sequence, context and rows."""
        at = self.context.next_position + np.arange(len(rows))
        where = np.concatenate([self.context.positions, np.stack([at] * 3)], axis=1)
        tables = positions.mrope_cos_sin(where, self.backend.model.decoder)
        return self.decode(np.concatenate([self.context.embeds, rows]), *tables)

    def decode(self, embeds, cos, sin):
        return self.backend.decode(self.backend.prepare(len(embeds)), embeds, cos, sin)

    def inject(self, hidden):
        return self.backend.inject(hidden, self.backend.remember(self.context.pooled))

    def recurrent(self, count):
        """Return the latents, one pass over everything for each, and the state of the end token after them."""
        latents = self.end[:0]
        for _ in range(count):
            latents = np.concatenate([latents, self.inject(self.states(latents)[-1:])])
        return latents, self.after(latents)

    def parallel(self, queries, rounds):
        """Return the latents of R passes over all slots, and the state of the end token after them."""
        latents = queries
        for _ in range(rounds):
            latents = self.inject(self.states(latents)[-len(latents) - 1 : -1])
        return latents, self.after(latents)

    def after(self, latents):
        return self.states(np.concatenate([latents, self.end]))[-1:]


class TorchWithoutCache(FakeWithoutCache):
    """A checkpoint's modules with the attention of training, in any dtype."""

    def __init__(self, checkpoint, dtype):
        backend = ReferenceBackend(checkpoint)
        self.backend, self.plan, self.dtype = backend, checkpoint.model.latent, dtype
        self.context = a_context(backend)
        self.module = registry.build(checkpoint.model)
        registry.load(self.module, checkpoint.weight, dtype=dtype)
        self.context = replace(self.context, embeds=self.context.embeds.to(dtype).numpy())
        self.pooled = self.context.pooled.to(dtype)
        self.end = backend.embed(np.array([self.plan.end_token_id])).to(dtype).numpy()

    def decode(self, embeds, cos, sin):
        attend = FullAttention(*(torch.from_numpy(x).to(self.dtype) for x in (cos, sin)))
        return self.module.model(torch.from_numpy(embeds)[None], attend)[0].numpy()

    def inject(self, hidden):
        injection = self.module.latent_injection
        memory = injection.memory(self.pooled[None]) if injection.looks_at_video else None
        return injection(torch.from_numpy(hidden)[None], memory)[0].numpy()


def reason(backend, replacement=None):
    """Return latents and last hidden state as NumPy, and the writer."""
    context = a_context(backend)
    writer = Writer(backend, context, 80)
    latents = writer.reason(context, replacement)
    return np.asarray(latents), np.asarray(writer.last_hidden), writer


def same(found, expected):
    for out, ref in zip(found, expected, strict=False):
        np.testing.assert_array_equal(out, ref)


@pytest.mark.parametrize("count", [1, 4, 63])
def test_recurrent_equals_a_loop_without_cache(count):
    """Catches a latent made from the wrong state, fed twice or not at all, and an end token before the last latent."""
    backend = fake(num_latents=count)
    found = reason(backend)
    same(found, FakeWithoutCache(backend).recurrent(count))
    assert backend.decoded[1:] == [1] * (count - 1) + [2]  # as docs/latents.md counts: prefill + L passes
    assert found[2]._cache.length == 32 + count + 1


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_parallel_equals_a_loop_without_cache(rounds):
    """Catches slots that are not taken back between rounds, and states shifted by one slot."""
    backend = fake(rollout="parallel", rounds=rounds)
    found = reason(backend)
    same(found, FakeWithoutCache(backend).parallel(backend.queries(), rounds))
    assert backend.decoded[1:] == [4] * rounds + [5]
    assert found[2]._cache.length == 32 + 5


@pytest.mark.parametrize("count", [1, 2, 7])
def test_parallel_with_as_many_rounds_as_latents_is_recurrent(count):
    """Catches any difference between the rollouts: after pass r the first r latents are exact, after L all are."""
    exact, exact_hidden, _ = reason(fake(num_latents=count))
    for rounds in range(1, count + 1):
        latents, hidden, _ = reason(fake(num_latents=count, rollout="parallel", rounds=rounds))
        same([latents[:rounds]], [exact[:rounds]])
        if rounds < count:
            assert not np.array_equal(latents[rounds], exact[rounds])
    same([latents, hidden], [exact, exact_hidden])


@pytest.mark.parametrize("mode", MODES)
def test_rollouts_of_a_real_model_equal_the_loop_without_cache(make_checkpoint, mode):
    """Catches a cache, positions or a memory that differ between the backend and the plain modules."""
    recurrent = make_checkpoint(latent={**DEFAULT_LATENT, "injection": mode})
    plain, exact = (TorchWithoutCache(recurrent, dtype) for dtype in (torch.float32, torch.float64))
    expected = list(zip(exact.recurrent(4), plain.recurrent(4), strict=True))
    for out, (ref, rough) in zip(reason(ReferenceBackend(recurrent)), expected, strict=False):
        assert_close(out, ref, rough)
    # The two checkpoints share every weight: `fresh` draws each by its name alone.
    for rounds in (1, 3, 4):
        parallel = make_checkpoint(
            latent={**DEFAULT_LATENT, "injection": mode, "rollout": "parallel", "rounds": rounds}
        )
        latents, hidden, _ = reason(ReferenceBackend(parallel))
        assert_close(latents[:rounds], expected[0][0][:rounds], expected[0][1][:rounds])
        if rounds == 4:
            assert_close(hidden, *expected[1])
        else:
            assert not np.allclose(latents[rounds], expected[0][0][rounds])


def predictions(backend, count):
    """Token that the model would say after each latent of the recurrent rollout."""
    plain = FakeWithoutCache(backend)
    latents, _ = plain.recurrent(count)
    return [int(plain.backend.logits(plain.states(latents[: i + 1])[-1:]).argmax()) for i in range(count)]


@pytest.mark.parametrize("ended", [0, 1, 3])
def test_a_rollout_ends_where_the_model_says_so(ended):
    """Catches an end token that is looked for one latent too early or too late, or not at all."""
    said = predictions(fake(), 6)
    assert said.index(said[ended]) == ended, "the seed must give different predictions"
    backend = fake(num_latents=6, stop="end_token", end_token_id=said[ended])
    found = reason(backend)
    assert len(found[0]) == ended + 1
    same(found, FakeWithoutCache(backend).recurrent(ended + 1))
    assert found[2]._cache.length == 32 + ended + 1 + 1


def test_a_rollout_that_never_ends_stops_at_its_cap():
    """Catches an endless rollout, and lm_head being run where the number of latents is fixed."""
    said = predictions(fake(), 5)
    silent = next(i for i in range(384) if i not in said)
    backend = fake(num_latents=6, stop="end_token", end_token_id=silent)
    same(reason(backend), FakeWithoutCache(backend).recurrent(6))
    assert len(backend.full_reads) == 5  # nothing is asked after the last
    fixed = fake(num_latents=6, end_token_id=said[1])
    assert len(reason(fixed)[0]) == 6
    assert fixed.full_reads == []


class Certain:
    """Says yes when asked for the n-th time; keeps the states that it saw."""

    def __init__(self, at):
        self.at, self.seen = at, []

    def __call__(self, hidden):
        self.seen.append(np.array(hidden))
        return len(self.seen) == self.at


@pytest.mark.parametrize("at", [1, 3, 5, 99])
def test_a_rollout_that_is_certain_early_equals_a_shorter_one(at):
    """Catches an end token that stays in the cache after a no, and a state that is not that of a shorter plan."""
    backend, certain = fake(num_latents=6), Certain(at)
    context = a_context(backend)
    writer = Writer(backend, context, 80)
    latents = writer.reason(context, certain=certain)
    count = min(at, 6)
    same([latents, writer.last_hidden], FakeWithoutCache(backend).recurrent(count))
    assert writer._cache.length == 32 + count + 1
    assert backend.decoded[1:] == [2] * count  # asking costs a row, no pass
    for asked, hidden in enumerate(certain.seen, 1):
        same([hidden], [FakeWithoutCache(backend).recurrent(asked)[1]])


@pytest.mark.parametrize("at", [1, 2, 99])
def test_rounds_that_are_certain_early_equal_fewer(at):
    """Catches slots that are taken back once too often or not at all."""
    backend, certain = fake(rollout="parallel", rounds=4), Certain(at)
    context = a_context(backend)
    writer = Writer(backend, context, 80)
    latents = writer.reason(context, certain=certain)
    rounds = min(at, 4)
    same([latents, writer.last_hidden], FakeWithoutCache(backend).parallel(backend.queries(), rounds))
    assert writer._cache.length == 32 + 5
    assert backend.decoded[1:] == [4] + [5] * rounds


def test_the_end_token_is_looked_for_behind_a_latent_that_was_asked_about():
    """Catches the stop rule reading the state of the end token that was fed for the question."""
    said = predictions(fake(), 6)
    backend = fake(num_latents=6, stop="end_token", end_token_id=said[1])
    context = a_context(backend)
    writer = Writer(backend, context, 80)
    latents = writer.reason(context, certain=Certain(99))
    same([latents, writer.last_hidden], FakeWithoutCache(backend).recurrent(2))


def test_parallel_without_queries_is_refused():
    """Catches a crash in the engine where a checkpoint carries no queries."""
    plan = fake(rollout="parallel").model.latent
    with pytest.raises(ConfigError, match="learned queries"):
        latent.roll_out(plan, None, None, None)


@pytest.mark.parametrize("count", [0, 1, 4, 9])
@pytest.mark.parametrize("rollout", ["recurrent", "parallel"])
def test_given_latents_take_the_place_of_the_models_own(rollout, count):
    """Catches own latents left in the cache under given ones; L = 0 feeds the end token alone."""
    backend = fake(rollout=rollout)
    given = np.random.default_rng(5).standard_normal((count, WIDTH)).astype(np.float32)
    seen = []
    latents, hidden, writer = reason(backend, lambda own: seen.append(own) or given)
    same([latents, hidden, *seen], [given, FakeWithoutCache(backend).after(given), reason(fake(rollout=rollout))[0]])
    assert writer._cache.length == 32 + count + 1
    ids = list(writer.answer(max_tokens=3, min_tokens=0, eos=()))
    first = FakeBackend(backend.model).logits(hidden)[0].argmax()
    assert ids[0] == first


@pytest.mark.parametrize("count", [0, 1, 4])
def test_given_latents_in_a_real_model(tiny_checkpoint, count):
    """Catches arrays of the wrong library, or an empty one that an engine does not take."""
    plain, exact = (TorchWithoutCache(tiny_checkpoint, dtype) for dtype in (torch.float32, torch.float64))
    given = np.random.default_rng(5).standard_normal((count, 128)).astype(np.float32)
    latents, hidden, _ = reason(ReferenceBackend(tiny_checkpoint), lambda own: given)
    np.testing.assert_array_equal(latents, given)
    assert_close(hidden, exact.after(given.astype(np.float64)), plain.after(given))


OWN = np.random.default_rng(2).standard_normal((5, 63)).astype(np.float32) * np.arange(1, 6, dtype=np.float32)[:, None]


def test_dummy_is_the_pad_embedding_everywhere():
    """Catches a dummy of another length, or one that still holds the latents."""
    pad = OWN[:1] + 1
    out = latent.ablate("dummy", OWN, pad_embed=pad)
    assert out.shape == OWN.shape
    assert (out == pad).all()


def test_noise_has_the_norms_of_the_latents():
    """Catches noise of another strength: the answer would change by the norm, not by what the latents say."""
    out = latent.ablate("noise", OWN, seed=3)
    assert out.dtype == np.float32
    assert_close(np.linalg.norm(out, axis=1), np.linalg.norm(OWN, axis=1))
    cosines = (out * OWN).sum(1) / np.linalg.norm(OWN, axis=1) ** 2
    assert (np.abs(cosines) < 0.5).all()
    np.testing.assert_array_equal(out, latent.ablate("noise", OWN, seed=3))
    assert not np.array_equal(out, latent.ablate("noise", OWN, seed=4))
    assert latent.ablate("noise", OWN[:0]).shape == (0, 63)


def test_shuffled_is_another_samples():
    """Catches a shuffle that hands a sample's own latents back."""
    other = OWN[::-1].copy()
    np.testing.assert_array_equal(latent.ablate("shuffled", OWN, other=other), other)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("shuffled", {"other": OWN[:4]}, r"\(4, 63\); accepted: \(5, 63\)"),
        ("shuffled", {}, "lacks what it needs"),
        ("dummy", {}, "lacks what it needs"),
        ("zeros", {}, "'zeros' is unknown .* accepted: dummy, noise, shuffled"),
    ],
)
def test_ablations_that_cannot_be_are_refused(kind, given, message):
    """Catches an ablation that silently measures something else."""
    with pytest.raises(ConfigError, match=message):
        latent.ablate(kind, OWN, **given)


def by_hand(checkpoint, mode, hidden, pooled, dtype):
    """docs/latents.md's formula on a checkpoint's tensors."""

    def tensor(name):
        return checkpoint.tensor(f"latent_injection.{name}").to(dtype)

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + checkpoint.model.decoder.rms_norm_eps).sqrt()

    h, pooled, heads = hidden.to(dtype), pooled.to(dtype), checkpoint.model.latent.num_heads
    if mode == "identity":
        return h
    if mode == "rms":
        return tensor("rho") * norm(h)
    u = norm(h) * tensor("norm_in.weight")
    mixed = u + functional.silu(u @ tensor("fc1.weight").T) @ tensor("fc2.weight").T
    if mode == "mlp_xattn":
        q, k, v = (
            (x @ tensor(f"{name}_proj.weight").T).unflatten(-1, (heads, -1)).transpose(0, 1)
            for name, x in (("q", u), ("k", pooled), ("v", pooled))
        )
        looked_up = (q @ k.transpose(1, 2) / k.shape[-1] ** 0.5).softmax(-1) @ v
        mixed = mixed + tensor("alpha").tanh() * looked_up.transpose(0, 1).flatten(1)
    return tensor("rho") * norm(mixed) * tensor("norm_out.weight")


@pytest.mark.parametrize("sizes", [(1, 1), (4, 3), (63, 123)])
@pytest.mark.parametrize("settings", [{}, {"num_heads": 4, "intermediate_size": 63}])
@pytest.mark.parametrize("mode", MODES)
def test_injection_through_the_backend_equals_the_formula(make_checkpoint, mode, settings, sizes):
    """Catches tensors loaded into each other's places, heads of another number, and a mode that reads the video."""
    checkpoint = make_checkpoint(latent={**DEFAULT_LATENT, "injection": mode, **settings})
    backend = ReferenceBackend(checkpoint)
    random = torch.Generator().manual_seed(0)
    hidden, pooled = (30 * torch.randn(rows, 128, generator=random) for rows in sizes)
    out = backend.inject(hidden, backend.remember(pooled))
    plain, exact = (by_hand(checkpoint, mode, hidden, pooled, dtype) for dtype in (torch.float32, torch.float64))
    assert_close(out, exact, plain)


def test_no_video_is_neutral(make_checkpoint):
    """Catches a question without a video whose latents are moved by the look-up in nothing."""
    looking = ReferenceBackend(make_checkpoint())
    mlp = ReferenceBackend(make_checkpoint(latent={**DEFAULT_LATENT, "injection": "mlp"}))
    hidden = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    ids = np.arange(9)
    context = generate.read(looking, Prompt(ids, (), ""), torch.zeros(0, 128))
    assert context.pooled.shape == (1, 128)
    out = looking.inject(hidden, looking.remember(context.pooled))
    assert_close(out, mlp.inject(hidden, mlp.remember(context.pooled)))
    assert not torch.allclose(out, looking.inject(hidden, looking.remember(torch.ones(1, 128))))
