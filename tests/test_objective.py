"""The terms of latent self-forcing: by hand, by gradient, and by what must always hold."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.closeness import assert_close
from vlrt.train import objective
from vlrt.train.objective import Weights


def doubles(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_targets_weigh_each_part_by_its_likeness_to_the_question():
    """Catches a cut across parts, a softmax over the wrong axis, and a missing 1 / sqrt(C)."""
    video = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]], dtype=torch.float64)
    question = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)  # mean (1, 0, 0, 0)
    found = objective.targets(video, question, 2)  # parts: token 0; tokens 1 and 2
    assert_close(found[0], video[0])
    assert_close(found[1], (video[1] + video[2]) / 2)
    weight = math.exp(2 / 2) / (math.exp(2 / 2) + 1)  # <qbar, v_0> / sqrt(4) = 1 against 0
    assert_close(objective.targets(video[:2], question, 1)[0], weight * video[0] + (1 - weight) * video[1])


def test_uniform_targets_are_means():
    """Catches weights that stay where the option turns them off."""
    video = doubles(7, 3)
    found = objective.targets(video, None, 3)
    assert_close(found, torch.stack([video[0:2].mean(0), video[2:4].mean(0), video[4:7].mean(0)]))


@given(tokens=st.integers(1, 40), latents=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_every_part_has_tokens(tokens, latents):
    """Catches an empty part, whose mean is not a number, and parts out of order where there are more than tokens."""
    video = torch.arange(float(tokens))[:, None]
    found = objective.targets(video, None, latents)[:, 0]
    assert found.isfinite().all()
    assert (found.diff() >= 0).all()
    if tokens < latents:
        assert set(found.tolist()) <= set(range(tokens))


def test_alignment_by_hand():
    """Catches a norm left out, and a mean over the wrong axes."""
    latents = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
    aims = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert_close(objective.alignment(latents, aims), torch.tensor(1 - (1 + math.sqrt(0.5)) / 2))


def test_alignment_is_zero_for_equal_latents_whatever_their_length():
    aims = doubles(2, 5, 8)
    assert_close(objective.alignment(3 * aims, aims) + 1, torch.tensor(1.0, dtype=torch.float64))


def test_diversity_by_hand():
    """Catches the diagonal taking part, a missing square, and a mean over L^2 instead of L (L - 1)."""
    latents = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    aims = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    # cos(z): pairs 01: 1, 02: 0, 12: 0; cos(t): 01: sqrt(1/2), others below 0 and so 0. Both orders of 3 pairs.
    assert_close(objective.diversity(latents, aims), torch.tensor(2 * (1 - math.sqrt(0.5)) ** 2 / 6))


def test_diversity_never_fights_the_targets():
    """Latents that reached their targets pay nothing, however alike the targets are."""
    aims = doubles(3, 6, 4) + 2  # all much alike
    latents = (1.5 * aims).requires_grad_()
    loss = objective.diversity(latents, aims)
    (gradient,) = torch.autograd.grad(loss, latents)
    assert_close(loss + 1, torch.tensor(1.0, dtype=torch.float64))
    assert_close(gradient + 1, torch.ones_like(gradient))


def test_diversity_of_one_latent_is_zero_and_differentiable():
    """Catches 0 / 0, and a constant that backward refuses."""
    latents = doubles(2, 1, 4).requires_grad_()
    loss = objective.diversity(latents, doubles(2, 1, 4, seed=1))
    (gradient,) = torch.autograd.grad(loss, latents)
    assert not loss.item()
    assert not gradient.any()


@pytest.mark.parametrize("term", [objective.alignment, objective.diversity])
def test_gradients_are_right(term):
    """Catches a detached factor, by finite differences in fp64."""
    aims = doubles(2, 3, 5, seed=1)
    assert torch.autograd.gradcheck(lambda z: term(z, aims), doubles(2, 3, 5).requires_grad_())


@pytest.mark.parametrize("term", [objective.alignment, objective.diversity])
def test_no_gradient_reaches_the_targets(term):
    """Catches targets that learn to be easy."""
    aims = doubles(2, 3, 5, seed=1).requires_grad_()
    term(doubles(2, 3, 5).requires_grad_(), aims).backward()
    assert aims.grad is None


def test_targets_carry_no_gradient():
    video, question = doubles(6, 4).requires_grad_(), doubles(2, 4).requires_grad_()
    assert not objective.targets(video, question, 2).requires_grad


def test_cross_entropy_counts_labelled_positions_alone():
    """Catches a mean that padding and prompt dilute."""
    logits = doubles(2, 3, 5)
    labels = torch.tensor([[objective.IGNORED, 1, 2], [objective.IGNORED] * 2 + [4]])
    rows = torch.stack([logits[0, 1].log_softmax(0)[1], logits[0, 2].log_softmax(0)[2], logits[1, 2].log_softmax(0)[4]])
    assert_close(objective.cross_entropy(logits, labels), -rows.float().mean())


def test_combination_adds_weighted_terms_and_drops_those_without_weight():
    """Catches a swapped weight, and a term that is computed although it is switched off."""
    latents, aims, ce = doubles(1, 3, 4), doubles(1, 3, 4, seed=1), torch.tensor(2.0, dtype=torch.float64)
    align, diverse = objective.alignment(latents, aims), objective.diversity(latents, aims)
    whole = objective.combine(ce, latents, aims, Weights(0.1, 0.05))
    assert_close(whole.total, 2 + 0.1 * align + 0.05 * diverse)
    assert objective.combine(ce, latents, aims, Weights(0, 0)).total == ce
    assert objective.combine(ce, None, None, Weights()).total == ce
