# SPDX-License-Identifier: Apache-2.0
"""Patch similarity against a slow reference: loops over images, windows and pairs, in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmdet.models.backbones import PyramidVisionTransformer, SwinTransformer
from mmdet.models.backbones.swin import ShiftWindowMSA
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mmzsq.errors import UserError
from mmzsq.synthesis import PatchSimilarityPrior, patch_similarity
from mmzsq.synthesis.patch_similarity import attention_modules, similarity_density, similarity_entropy


def reference_entropy(similarities: list[Tensor], bandwidth: float = 0.01, points: int = 10) -> Tensor:
    """Entropy of the similarities of one image, 0-dim tensors."""
    low, high = min(similarities).item(), max(similarities).item()
    grid = [low + (high - low) * index / (points - 1) for index in range(points)]
    terms = []
    for point in grid:
        kernels = [torch.exp(-(((value - point) / bandwidth) ** 2) / 2) for value in similarities]
        density = sum(kernels) / (len(kernels) * bandwidth * (2 * torch.pi) ** 0.5)
        terms.append(-density * torch.log(density + 1e-6))
    return sum((left + right) / 2 for left, right in zip(terms, terms[1:], strict=False)) * (high - low) / (points - 1)


def cosine(first: Tensor, second: Tensor) -> Tensor:
    return first @ second / (first.norm() * second.norm())


def reference(features: Tensor, apart: Tensor, **options: Any) -> Tensor:
    entropies = []
    for image in features:
        similarities = [
            cosine(window[i], window[j])
            for window, separated in zip(image, apart, strict=True)
            for i in range(len(window))
            for j in range(len(window))
            if not separated[i, j]
        ]
        entropies.append(reference_entropy(similarities, **options))
    return torch.stack(entropies)


def random_pairs(windows: int, patches: int) -> Tensor:
    """Excluded pairs: each patch with itself, and a third of the others."""
    apart = torch.rand(windows, patches, patches) < 0.3
    return apart | apart.mT | torch.eye(patches, dtype=torch.bool)


def run(prior: PatchSimilarityPrior, model: nn.Module, images: Tensor, *args: Any) -> Tensor:
    prior.attach(model)
    try:
        model(images, *args)
        return prior(images)
    finally:
        prior.detach()


@pytest.mark.parametrize(('bandwidth', 'points'), [(0.01, 10), (0.1, 7)])
def test_entropy_and_its_gradient_are_those_of_the_reference(bandwidth: float, points: int) -> None:
    features = torch.randn(2, 3, 6, 4, dtype=torch.double)
    apart = random_pairs(3, 6)
    slow, fast = features.clone().requires_grad_(), features.float().requires_grad_()
    expected = reference(slow, apart, bandwidth=bandwidth, points=points)
    got = similarity_entropy(fast, apart, bandwidth, points)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)
    weights = torch.tensor([1.0, -0.5])
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    assert slow.grad.norm() > 0.1
    torch.testing.assert_close(fast.grad.double(), slow.grad, rtol=1e-2, atol=1e-3 * float(slow.grad.abs().max()))


def test_gradient_of_the_density_is_that_of_finite_differences() -> None:
    unit = nn.functional.normalize(torch.randn(2, 2, 4, 3, dtype=torch.double), dim=-1).requires_grad_()
    apart = torch.eye(4, dtype=torch.bool).repeat(2, 1, 1)
    apart[1, 0, 2] = apart[1, 2, 0] = True
    grid = torch.linspace(-1, 1, 5, dtype=torch.double).repeat(2, 1) + torch.tensor([[0.0], [0.1]])
    assert torch.autograd.gradcheck(lambda unit: similarity_density(unit, apart, grid, 0.3), (unit,))


def test_density_integrates_to_one() -> None:
    unit = nn.functional.normalize(torch.randn(3, 2, 8, 4), dim=-1)
    grid = torch.linspace(-1.5, 1.5, 2001).repeat(3, 1)
    density = similarity_density(unit, random_pairs(2, 8), grid, 0.02)
    torch.testing.assert_close(torch.trapezoid(density, grid), torch.ones(3), rtol=1e-4, atol=1e-4)


def test_points_far_from_all_similarities_have_no_effect_on_the_gradient() -> None:
    # Two groups of patches, opposite to each other: similarities about 1 and about -1, nothing between.
    features = torch.tensor([1.0, 0.0]).repeat(8, 1) * torch.tensor([1.0, -1.0]).repeat(4)[:, None]
    features = (features + 0.01 * torch.randn(8, 2)).view(1, 1, 8, 2).requires_grad_()
    similarity_entropy(features, torch.eye(8, dtype=torch.bool)[None], 0.01, 10).sum().backward()
    assert torch.isfinite(features.grad).all() and features.grad.abs().max() > 0


@pytest.mark.parametrize('shape', [(1, 1, 1, 3), (1, 2, 5, 3)])
def test_no_pairs_and_equal_patches_have_no_entropy_and_a_finite_gradient(shape: tuple[int, ...]) -> None:
    features = torch.ones(shape).requires_grad_()
    apart = torch.eye(shape[2], dtype=torch.bool).repeat(shape[1], 1, 1)
    entropy = similarity_entropy(features, apart, 0.01, 10)
    entropy.sum().backward()
    assert entropy.abs().max() < 1e-5
    assert torch.isfinite(features.grad).all()


def test_the_backward_saves_no_tensor_of_all_pairs() -> None:
    kept: list[int] = []
    features = torch.randn(2, 3, 40, 4, requires_grad=True)
    apart = torch.eye(40, dtype=torch.bool).repeat(3, 1, 1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        entropy = similarity_entropy(features, apart, 0.01, 10)
    assert max(size for size in kept if size != apart.numel()) <= features.numel() < 2 * 3 * 40 * 40
    entropy.sum().backward()


# Windows of the real module


def shifted_reference(msa: ShiftWindowMSA, features: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean entropy, computed from the position of each patch in the image."""
    context: list[Tensor] = []
    handle = msa.w_msa.proj.register_forward_pre_hook(lambda _, inputs: context.append(inputs[0].detach()))
    msa(features, size)
    handle.remove()
    side, shift = msa.window_size, msa.shift_size
    padded = [-(-length // side) * side for length in size]
    windows = context[0].view(-1, side, side, context[0].shape[-1])
    grid = torch.roll(msa.window_reverse(windows, *padded), (shift, shift), (1, 2))
    heads = msa.w_msa.num_heads
    grid = grid.double().unflatten(-1, (heads, -1)).mean(3)
    places = [(y, x) for y in range(size[0]) for x in range(size[1])]
    windows_of = {(y, x): ((y - shift) % padded[0] // side, (x - shift) % padded[1] // side) for y, x in places}
    neighbors = [
        (a, b)
        for a in places
        for b in places
        # A window that the shift put together from both borders holds patches that are far from each other.
        if a != b and windows_of[a] == windows_of[b] and abs(a[0] - b[0]) < side and abs(a[1] - b[1]) < side
    ]
    return torch.stack([reference_entropy([cosine(image[a], image[b]) for a, b in neighbors]) for image in grid]).mean()


@pytest.mark.parametrize('shift', [0, 2])
@pytest.mark.parametrize('size', [(8, 8), (6, 9)])
def test_real_windows_compare_only_patches_of_one_window(shift: int, size: tuple[int, int]) -> None:
    msa = ShiftWindowMSA(8, 2, 4, shift_size=shift)
    nn.init.normal_(msa.w_msa.qkv.bias)
    features = torch.randn(2, size[0] * size[1], 8)
    expected = float(shifted_reference(msa, features, size))
    got = run(PatchSimilarityPrior(weight=2.0), msa, features, size)
    assert got.item() == pytest.approx(-2 * expected, rel=1e-3)
    assert abs(expected) > 0.05


def swin(depths: tuple[int, ...] = (1, 1)) -> nn.Module:
    backbone = SwinTransformer(
        embed_dims=8,
        depths=depths,
        num_heads=(2,) * len(depths),
        strides=(4, 2)[: len(depths)],
        out_indices=tuple(range(len(depths))),
        window_size=4,
    )
    for layer in backbone.modules():
        if isinstance(layer, nn.Linear):
            # Attention that tells keys apart.
            nn.init.normal_(layer.weight, std=2 * layer.in_features**-0.5)
    backbone.eval()
    return backbone.requires_grad_(False)


def test_is_the_mean_over_blocks_and_images() -> None:
    backbone, images = swin((1, 2)), torch.rand(3, 3, 32, 32)
    prior = PatchSimilarityPrior(weight=0.5)
    prior.attach(backbone)
    backbone(images)
    together = torch.stack(prior.block_entropies(3))
    assert together.shape == (3, 3)
    assert together.abs().mean() > 0.5
    backbone(images)
    assert float(prior(images)) == pytest.approx(-0.5 * float(together.mean()), rel=1e-5)
    alone = []
    for image in images:
        backbone(image[None])
        alone.append(torch.cat(prior.block_entropies(1)))
    torch.testing.assert_close(together, torch.stack(alone, 1), rtol=1e-3, atol=1e-3)


def test_following_the_gradient_makes_patches_less_alike() -> None:
    backbone = swin()
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    prior, optimizer = PatchSimilarityPrior(), torch.optim.Adam([images], lr=0.05)
    spreads = []
    for _ in range(15):
        prior.attach(backbone)
        backbone(images)
        unit = nn.functional.normalize(prior._blocks[0].features.detach(), dim=-1)
        spreads.append(float((unit @ unit.mT).std()))
        optimizer.zero_grad()
        prior(images).backward()
        optimizer.step()
        prior.detach()
    assert spreads[-1] > 1.5 * spreads[0]


def test_bf16_features_are_compared_in_fp32() -> None:
    backbone = swin()
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    exact = run(PatchSimilarityPrior(bandwidth=0.1), backbone, images).item()
    with torch.autocast('cpu', torch.bfloat16):
        penalty = run(PatchSimilarityPrior(bandwidth=0.1), backbone, images)
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx(exact, abs=0.02)
    penalty.backward()
    assert torch.isfinite(images.grad).all() and images.grad.abs().sum() > 0
    prior = PatchSimilarityPrior(bandwidth=0.1)
    prior.attach(backbone)
    backbone(images)
    with torch.autocast('cpu', torch.bfloat16):
        assert prior(images).item() == pytest.approx(exact, rel=1e-5)


class NoValueIsAskedFor(TorchDispatchMode):
    """Fails on operators that synchronize with the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in ('_local_scalar_dense', 'nonzero', 'masked_select', 'is_nonzero', 'equal'), name
        if name == 'index':
            assert all(index is None or index.dtype == torch.long for index in args[1])
        return function(*args, **(kwargs or {}))


def test_a_step_never_synchronizes() -> None:
    backbone, images = swin((1, 2)), torch.rand(1, 3, 24, 24, requires_grad=True)
    with NoValueIsAskedFor():
        run(PatchSimilarityPrior(), backbone, images).backward()
    assert images.grad is not None


@pytest.mark.cuda
def test_a_captured_step_equals_the_eager_one() -> None:
    backbone, prior = swin((1, 2)).cuda(), PatchSimilarityPrior()
    images = torch.rand(2, 3, 32, 32, device='cuda', requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            images.grad = None
            run(prior, backbone, images).backward()
    torch.cuda.current_stream().wait_stream(stream)
    eager = images.grad.clone()
    images.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(prior, backbone, images).backward()
    graph.replay()
    torch.testing.assert_close(images.grad, eager, rtol=1e-3, atol=1e-5)


# Where attention is


class PlainAttention(nn.Module):
    """Global attention without a class of any library: known by its heads and its projection."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads = 2
        self.qkv = nn.Linear(8, 24)
        self.out_proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.out_proj((query @ key.mT).softmax(-1).matmul(value).transpose(1, 2).flatten(2))


def test_attention_is_identified_by_its_heads_and_projection() -> None:
    attention, tokens = PlainAttention(), torch.randn(2, 6, 8)
    contexts: list[Tensor] = []
    handle = attention.out_proj.register_forward_pre_hook(lambda _, inputs: contexts.append(inputs[0]))
    got = run(PatchSimilarityPrior(), attention, tokens)
    handle.remove()
    averaged = contexts[0].detach().double().view(2, 1, 6, 2, 4).mean(3)
    apart = torch.eye(6, dtype=torch.bool)[None]
    assert got.item() == pytest.approx(-float(reference(averaged, apart).mean()), rel=1e-3)


@pytest.mark.parametrize('batch_first', [False, True])
def test_attention_without_visible_heads_is_compared_by_its_output(batch_first: bool) -> None:
    attention = MultiheadAttention(8, 2, batch_first=batch_first).eval()
    tokens = torch.randn(2, 6, 8)
    laid_out = tokens if batch_first else tokens.transpose(0, 1)
    prior = PatchSimilarityPrior()
    prior.attach(attention)
    with torch.no_grad():
        output = attention(laid_out, identity=torch.zeros_like(laid_out))
    output = output if batch_first else output.transpose(0, 1)
    expected = reference(output.double()[:, None], torch.eye(6, dtype=torch.bool)[None]).mean()
    assert prior(tokens).item() == pytest.approx(-float(expected), rel=1e-3)


def test_every_block_of_a_pyramid_transformer_is_observed() -> None:
    backbone = PyramidVisionTransformer(
        embed_dims=8,
        num_stages=2,
        num_layers=(2, 1),
        num_heads=(1, 2),
        patch_sizes=(4, 2),
        strides=(4, 2),
        paddings=(0, 0),
        sr_ratios=(2, 1),
        mlp_ratios=(2, 2),
        out_indices=(0, 1),
        pretrain_img_size=32,
        init_cfg=None,
    ).eval()
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    prior = PatchSimilarityPrior()
    assert len(attention_modules(backbone)) == 3
    prior.attach(backbone)
    backbone(images)
    assert [tuple(block.features.shape) for block in prior._blocks] == [(2, 64, 8), (2, 64, 8), (2, 16, 16)]
    prior(images).backward()
    assert images.grad.abs().sum() > 0


def test_attention_between_object_queries_is_ignored() -> None:
    detector = nn.Module()
    detector.backbone = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    detector.decoder = MultiheadAttention(8, 2)
    assert not PatchSimilarityPrior().applies_to(detector)
    assert PatchSimilarityPrior().applies_to(detector.decoder)


def test_large_windows_are_reduced_to_evenly_spaced_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, tokens = PlainAttention(), torch.randn(2, 12, 8)
    prior = PatchSimilarityPrior()
    prior.attach(attention)
    attention(tokens)
    every_third = prior._blocks.pop().features[:, ::3]
    monkeypatch.setattr(patch_similarity, 'MAX_PATCHES', 4)
    attention(tokens)
    expected = similarity_entropy(every_third[:, None], torch.eye(4, dtype=torch.bool)[None], 0.01, 10)
    torch.testing.assert_close(prior(tokens), -expected.mean())


# Mistakes


def test_detached_prior_sees_nothing() -> None:
    backbone, images, prior = swin(), torch.rand(1, 3, 32, 32), PatchSimilarityPrior()
    run(prior, backbone, images)
    backbone(images)
    with pytest.raises(RuntimeError, match='no forward'):
        prior(images)


def test_windows_that_belong_to_no_image_are_refused() -> None:
    prior, attention = PatchSimilarityPrior(), PlainAttention()
    prior.attach(attention)
    attention(torch.randn(3, 6, 8))
    with pytest.raises(RuntimeError, match='3 windows'):
        prior(torch.rand(2, 3, 8, 8))


class Checkpointed(nn.Module):
    """Runs attention as ``with_cp=True`` of OpenMMLab's backbones does."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = PlainAttention()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.attention, x, use_reentrant=True)


def test_activation_checkpointing_is_named_as_the_problem() -> None:
    tokens = torch.randn(2, 6, 8, requires_grad=True)
    with pytest.raises(UserError, match='with_cp=False'):
        run(PatchSimilarityPrior(), Checkpointed(), tokens)


def test_a_detector_without_attention_is_named_as_the_problem() -> None:
    with pytest.raises(UserError, match='needs attention'):
        PatchSimilarityPrior().attach(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))


@pytest.mark.parametrize(
    ('key', 'value'), [('weight', -1), ('bandwidth', 0.0), ('bandwidth', 'x'), ('points', 1), ('points', 2.5)]
)
def test_a_number_out_of_range_is_refused(key: str, value: float) -> None:
    with pytest.raises(UserError, match=f'PatchSimilarityPrior: {key} must be'):
        PatchSimilarityPrior(**{key: value})
