"""The rollout of training: what inference does, for a batch of prompts of several lengths."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.closeness import assert_close
from vlrt import generate, positions
from vlrt.backends.reference import ReferenceBackend
from vlrt.generate import Writer
from vlrt.models import registry
from vlrt.prompt import Prompt, Span
from vlrt.train import rollout
from vlrt.train.rollout import BatchSteps

SPANS = (Span(False, 4, 18, (3, 4, 6), 0.7), Span(False, 2, 12, (2, 4, 6), 0.4))
LENGTHS = (31, 23)
PLANS = [
    {"rollout": "recurrent", "injection": "mlp_xattn"},
    {"rollout": "recurrent", "injection": "identity"},
    {"rollout": "parallel", "rounds": 2, "injection": "mlp"},
    {"rollout": "parallel", "rounds": 4, "injection": "mlp_xattn"},
]


@pytest.fixture(params=PLANS, ids=lambda plan: "-".join(map(str, plan.values())))
def checkpoint(request, make_checkpoint):
    return make_checkpoint(latent={"num_latents": 4, "num_heads": 4, **request.param})


def contexts(backend):
    width = backend.model.decoder.hidden_size
    for i, (span, length) in enumerate(zip(SPANS, LENGTHS, strict=True)):
        random = np.random.default_rng(i)
        tokens = torch.from_numpy(random.standard_normal((span.num_tokens, width)).astype(np.float32))
        yield generate.read(backend, Prompt(random.integers(0, 200, length), (span,), ""), tokens)


def batch_steps(model, found):
    """Pad contexts on the right with large values, which must not matter."""
    size = max(LENGTHS)
    embeds = torch.stack(
        [torch.cat([c.embeds, torch.full((size - len(c.embeds), c.embeds.shape[1]), 1e3)]) for c in found]
    )
    at = torch.stack([torch.from_numpy(np.pad(c.positions, ((0, 0), (0, size - c.positions.shape[1])))) for c in found])
    looks = model.latent_injection.looks_at_video
    pooled = [c.pooled for c in found] if looks else None
    return BatchSteps(model, embeds, at, LENGTHS, [c.next_position for c in found], pooled)


def test_a_batch_rolls_out_what_inference_does(checkpoint):
    """Catches padding that leaks into shorter prompts, positions that count padding, and a second rollout."""
    backend = ReferenceBackend(checkpoint)
    found = list(contexts(backend))
    model = registry.build(checkpoint.model)
    registry.load(model, checkpoint.weight)
    with torch.no_grad():
        out, _ = rollout.roll_out(model, batch_steps(model, found), checkpoint.model.latent)
    for latents, context in zip(out, found, strict=True):
        plan = checkpoint.model.latent
        ref = Writer(backend, context, plan.num_latents + 1).reason(context)
        exact = fp64_latents(checkpoint, context)
        assert_close(latents, exact, plain=ref)


def fp64_latents(checkpoint, context):
    """The same by the batch code in fp64, one prompt alone: what both are judged by."""
    model = registry.build(checkpoint.model)
    registry.load(model, checkpoint.weight, dtype=torch.float64)
    looks = model.latent_injection.looks_at_video
    steps = BatchSteps(
        model,
        context.embeds.double()[None],
        torch.from_numpy(context.positions)[None],
        [len(context.embeds)],
        [context.next_position],
        [context.pooled.double()] if looks else None,
    )
    with torch.no_grad():
        return rollout.roll_out(model, steps, checkpoint.model.latent)[0][0]


def test_the_rollout_is_differentiable_for_full_backpropagation(make_checkpoint):
    """Catches a detach on the way from the prompt through every latent to the last."""
    checkpoint = make_checkpoint(latent={"num_latents": 4, "num_heads": 4, "injection": "mlp_xattn"})
    model = registry.build(checkpoint.model)
    registry.load(model, checkpoint.weight)
    found = list(contexts(ReferenceBackend(checkpoint)))
    steps = batch_steps(model, found)
    leaf = torch.zeros(1, len(found), steps.start_hidden.shape[-1], requires_grad=True)
    steps.start_hidden = steps.start_hidden + leaf
    rollout.roll_out(model, steps, checkpoint.model.latent)[0][:, -1].sum().backward()
    assert leaf.grad.abs().amax(dim=(0, 2)).gt(0).all()


def test_fewer_latents_and_rounds_can_be_drawn(make_checkpoint):
    """Catches a rollout bound to the sizes of the config, from whose ranges training draws."""
    checkpoint = make_checkpoint(latent={"num_latents": 4, "rollout": "parallel", "rounds": 4, "injection": "mlp"})
    model = registry.build(checkpoint.model)
    registry.load(model, checkpoint.weight)
    found = list(contexts(ReferenceBackend(checkpoint)))
    plan = replace(checkpoint.model.latent, num_latents=2, rounds=1)
    with torch.no_grad():
        assert rollout.roll_out(model, batch_steps(model, found), plan)[0].shape[:2] == (2, 2)


def test_tables_are_those_of_inference(tiny_checkpoint):
    """Catches axes mixed up on the way from [B, 3, S] to the tables and back."""
    decoder = tiny_checkpoint.model.decoder
    at = torch.randint(0, 50, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    cos, sin = rollout.cos_sin(at, decoder, torch.zeros(1))
    for b in range(2):
        ref = positions.mrope_cos_sin(at[b].numpy(), decoder)
        assert torch.equal(cos[b], torch.from_numpy(ref[0]))
        assert torch.equal(sin[b], torch.from_numpy(ref[1]))
