"""The small kernels, interpreted, held against their specification in fp64. On GPUs: the cases of benches/."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.closeness import assert_close
from tests.interpreter import interpreted
from vlrt import config, preprocess
from vlrt.kernels import patchify, reference, rms_norm, swiglu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def doubled(given):
    return [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in given]


def assert_is_the_reference(run, ref, *given):
    """Judge `run` by `ref` in fp64, and by the errors of `ref` in the given dtype."""
    outs, exact, plain = run(*given), ref(*doubled(given)), ref(*given)
    outs, exact, plain = (x if isinstance(x, tuple) else (x,) for x in (outs, exact, plain))
    for triple in zip(outs, exact, plain, strict=True):
        assert_close(*triple)
        if triple[0].numel():
            assert strides(triple[0]) == strides(torch.empty_like(triple[2]))


def strides(x):
    """Of the axes that have any: PyTorch lets the stride of an axis of size 1 be anything."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def views(width, dtype):
    """Inputs [..., width] of every layout: shifted, halves, slices of a batch, permuted, gaps inside a row."""
    whole = random(3, 7, 2 * width + 3, dtype=dtype)
    return {
        "dense": whole[..., :width].contiguous(),
        "half": whole[..., width : 2 * width],
        "shifted": whole[..., 3 : width + 3],
        "slice of a batch": whole[:, 2:5, :width],
        "last row": whole[:, -1:, :width],
        "permuted": whole[..., :width].contiguous().transpose(0, 1),
        "gaps": whole[..., : 2 * width : 2],
        "empty": whole[:0, :, :width],
    }


LAYOUTS = list(views(1, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (63, 5), (2, 3, 48), (3, 123), (2, 96), (1, 3584)])
@interpreted
def test_norms(shape, dtype):
    """Catches lanes beyond C that count in the mean, a mean over the block's size, statistics in low precision."""
    x, residual, weight = (random(*s, seed=i, dtype=dtype) for i, s in enumerate([shape, shape, shape[-1:]]))
    for scale in (1e-3, 100.0):
        assert_is_the_reference(rms_norm.rms_norm, reference.rms_norm, x * scale, weight, EPS)
        assert_is_the_reference(rms_norm.add_rms_norm, reference.add_rms_norm, x * scale, residual, weight, EPS)


@interpreted
def test_the_normalised_value_is_rounded_before_the_weight():
    """Catches another rounding than the models were trained with. In fp16: the interpreter truncates to bf16."""
    x, weight = random(63, 48, dtype=torch.float16), random(48, seed=1, dtype=torch.float16)
    out = rms_norm.rms_norm(x, weight, EPS)
    rounded_once = (weight.double() * torch.nn.functional.rms_norm(x.double(), (48,), eps=EPS)).half()
    ref = reference.rms_norm(x, weight, EPS)
    assert (out != ref).float().mean() < 0.01  # where the root's last bit decides
    assert (out != rounded_once).float().mean() > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
@interpreted
def test_norms_and_swiglu_of_any_layout(layout):
    """Catches rows read at another stride, a view's offset lost, a result laid out otherwise than the fake says."""
    for width in (1, 48, 63):
        x, other = views(width, torch.float32)[layout], views(width, torch.float32)[layout] + 1
        weight = random(width, dtype=torch.float32)
        assert_is_the_reference(rms_norm.rms_norm, reference.rms_norm, x, weight, EPS)
        assert_is_the_reference(rms_norm.add_rms_norm, reference.add_rms_norm, x, other, weight, EPS)
        assert_is_the_reference(rms_norm.add_rms_norm, reference.add_rms_norm, other, x, weight, EPS)
        assert_is_the_reference(swiglu.swiglu, reference.swiglu, x, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 63, 123, 1024, 1500])
@interpreted
def test_swiglu_of_two_halves(width, dtype):
    """Catches the gate and the projection swapped, and columns at the edge of a block."""
    gate, up = random(2, 3, 2 * width, dtype=dtype).chunk(2, dim=-1)
    assert_is_the_reference(swiglu.swiglu, reference.swiglu, gate, up)
    assert_is_the_reference(swiglu.swiglu, reference.swiglu, gate * 100, up)  # exp overflows on one side


def frames_of(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(14, 2, 2), (16, 2, 2), (3, 1, 1), (2, 3, 5)])
@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 1, 3)])
@interpreted
def test_patchify(grid, sizes, dtype):
    """Catches any two axes swapped, also those of equal size, and a division that rounds otherwise."""
    size, steps, merge = sizes
    frames = frames_of(grid[0] * steps, grid[1] * merge * size, grid[2] * merge * size, 3)
    mean, std = random(3, dtype=dtype), random(3, seed=1, dtype=dtype).abs() + 0.1
    out = patchify.patchify(frames, mean, std, *sizes)
    exact = reference.patchify(frames, mean.double(), std.double(), *sizes)
    plain = reference.patchify(frames, mean, std, *sizes)
    assert_close(out, exact, plain)
    assert out.is_contiguous()
    if dtype != torch.bfloat16:  # which the interpreter truncates
        assert torch.equal(out, plain)
    wide = patchify.patchify(frames, mean.float(), std.float(), *sizes, dtype)
    exact = reference.patchify(frames, mean.double(), std.double(), *sizes)
    assert_close(wide, exact, reference.patchify(frames, mean.float(), std.float(), *sizes, dtype))
    assert wide.dtype == dtype


@interpreted
def test_patchify_of_views():
    """Catches strides of a crop, of every other frame, or of channels-first frames taken for granted."""
    whole = frames_of(8, 3, 40, 50)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    for frames in (whole.permute(0, 2, 3, 1)[:, 2:38, 1:49], whole.permute(0, 2, 3, 1)[::2, :36, :48]):
        given = (frames, mean, std, 6, 2, 2)
        assert torch.equal(patchify.patchify(*given), reference.patchify(*given))


@interpreted
def test_patchify_is_that_of_the_runtime():
    """Catches a kernel and a preprocessor that the same model would read differently."""
    vision = SimpleNamespace(patch_size=14, temporal_patch_size=2, spatial_merge_size=2, patch_dim=1176)
    video = config.Video()
    data = frames_of(4, 28, 56, 3)
    frames = SimpleNamespace(data=data.numpy(), sample_fps=2.0, is_image=False)
    ref = preprocess.patchify(frames, video, vision).pixels
    out = patchify.patchify(data, torch.tensor(video.mean), torch.tensor(video.std), 14, 2, 2)
    assert np.array_equal(out.numpy(), ref)


ONES = torch.ones(2, 3, 48)


MISREAD = [
    (lambda: rms_norm.rms_norm(ONES, torch.ones(47), EPS), "weight"),
    (lambda: rms_norm.rms_norm(ONES, torch.ones(48).half(), EPS), "one dtype"),
    (lambda: rms_norm.rms_norm(ONES.double(), torch.ones(48).double(), EPS), "float64"),
    (lambda: rms_norm.add_rms_norm(ONES, ONES[:1], torch.ones(48), EPS), "residual"),
    (lambda: swiglu.swiglu(ONES, ONES[:, :1]), "up"),
    (lambda: patchify.patchify(frames_of(3, 28, 28, 3), torch.ones(3), torch.ones(3), 14, 2, 2), "multiple of 2"),
    (lambda: patchify.patchify(frames_of(2, 28, 30, 3), torch.ones(3), torch.ones(3), 14, 2, 2), "H and W of 28"),
]


@pytest.mark.parametrize("case", range(len(MISREAD)), ids=[reason for _, reason in MISREAD])
@interpreted
def test_what_a_kernel_would_misread_is_refused(case):
    """Catches wrong results in place of an error."""
    run, reason = MISREAD[case]
    with pytest.raises(ValueError, match=reason):
        run()
