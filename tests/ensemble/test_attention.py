"""Refined embeddings: identity at the start, limits by hand, symmetry, weights on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from popen.ensemble.attention import RefinementAttention, best_embedding, mean_embedding

N, M, S, C = 3, 4, 2, 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained() -> RefinementAttention:
    """A module away from its start, as training would leave it."""
    module = RefinementAttention(S, C)
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.add_(0.5 * normal(*parameter.shape, seed=seed + 10))
    return module


@pytest.fixture
def embeddings() -> Tensor:
    return normal(N, M, S, C)


@pytest.fixture
def scores() -> Tensor:
    return normal(N, M, seed=1)


def test_untrained_it_returns_the_clean_embedding_exactly(embeddings: Tensor, scores: Tensor) -> None:
    module = RefinementAttention(S, C)
    assert torch.equal(module(embeddings, scores), embeddings[:, 0])


def test_an_open_gate_alone_gives_the_mean_weighted_by_the_scores(embeddings: Tensor, scores: Tensor) -> None:
    module = RefinementAttention(S, C)
    torch.nn.init.ones_(module.gate)
    expected = (scores.softmax(1)[:, :, None, None] * embeddings).sum(1)
    assert torch.allclose(module(embeddings, scores), expected, atol=1e-6)
    equal = torch.full_like(scores, 7.0)
    assert torch.allclose(module(embeddings, equal), mean_embedding(embeddings), atol=1e-6)
    # far apart, the best member alone is left
    assert torch.allclose(module(embeddings, 1e4 * scores), best_embedding(embeddings, scores), atol=1e-5)


def test_attention_by_hand() -> None:
    # one target, one scale, two members; layer norm of (1, -1) and (-2, 2) is (1, -1) and (-1, 1)
    module = RefinementAttention(1, 2)
    with torch.no_grad():
        module.affinity[0] = 0.5 * torch.eye(2)
        module.value[0] = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        module.bias[0], module.gate[0] = 3.0, 0.5
    embeddings = torch.tensor([[[[1.0, -1.0]], [[-2.0, 2.0]]]])
    out = module(embeddings, torch.tensor([[0.0, 0.5]]))
    # logits: .5 * 2 / sqrt 2 + 0 and .5 * -2 / sqrt 2 + 1.5; difference of the members (-3, 3)
    weight = torch.tensor([2**-0.5, -(2**-0.5) + 1.5]).softmax(0)[1].item()
    assert out.flatten().tolist() == pytest.approx(
        [1 - 0.5 * weight * 3, -1 + 0.5 * weight * 2 * 3], rel=1e-4
    )


def test_order_of_the_perturbed_members_does_not_matter_but_member_0_is_special(
    embeddings: Tensor, scores: Tensor
) -> None:
    module = trained()
    out = module(embeddings, scores)
    others = [0, 3, 1, 2]
    assert torch.allclose(module(embeddings[:, others], scores[:, others]), out, atol=1e-5)
    swapped = [1, 0, 2, 3]
    assert not torch.allclose(module(embeddings[:, swapped], scores[:, swapped]), out, atol=1e-2)


def test_only_differences_of_scores_matter(embeddings: Tensor, scores: Tensor) -> None:
    module = trained()
    assert torch.allclose(module(embeddings, scores + 11.0), module(embeddings, scores), atol=1e-5)


def test_scales_do_not_mix(embeddings: Tensor, scores: Tensor) -> None:
    module = trained()
    other = embeddings.clone()
    other[:, :, 1] = normal(N, M, C, seed=5)
    before, after = module(embeddings, scores), module(other, scores)
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.allclose(before[:, 1], after[:, 1])


def test_every_part_of_it_learns(embeddings: Tensor, scores: Tensor) -> None:
    module = trained()
    module(embeddings, scores).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_it_learns_to_average_noise_away() -> None:
    truth = normal(256, S, C)
    embeddings = truth[:, None] + 0.5 * normal(256, M, S, C, seed=1)
    module = RefinementAttention(S, C)
    optimiser = torch.optim.Adam(module.parameters(), 0.05)
    zeros = torch.zeros(256, M)

    def error() -> Tensor:
        return ((module(embeddings, zeros) - truth) ** 2).mean()

    start = error().item()
    for _ in range(60):
        optimiser.zero_grad()
        loss = error()
        loss.backward()
        optimiser.step()
    assert start == pytest.approx(0.25, rel=0.1)  # the noise of one member
    assert loss.item() < 0.4 * start  # of four: about a quarter


def test_no_targets(embeddings: Tensor, scores: Tensor) -> None:
    assert trained()(embeddings[:0], scores[:0]).shape == (0, S, C)


def test_weights_survive_safetensors(embeddings: Tensor, scores: Tensor, tmp_path: Path) -> None:
    module, other = trained(), RefinementAttention(S, C)
    save_file(module.state_dict(), tmp_path / "attention.safetensors")
    other.load_state_dict(load_file(tmp_path / "attention.safetensors"))
    assert torch.equal(other(embeddings, scores), module(embeddings, scores))


def test_two_untrained_modules_are_equal_under_any_global_seed() -> None:
    torch.manual_seed(1)
    one = RefinementAttention(S, C).state_dict()
    torch.manual_seed(2)
    two = RefinementAttention(S, C).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_comparison_modes_by_hand() -> None:
    embeddings = torch.tensor([[1.0, 3.0, 8.0], [2.0, 4.0, 9.0]])[..., None, None]
    scores = torch.tensor([[0.1, 0.5, 0.9], [0.3, 0.3, 0.2]])
    assert mean_embedding(embeddings).flatten().tolist() == [4.0, 5.0]
    assert best_embedding(embeddings, scores).flatten().tolist() == [8.0, 2.0]
