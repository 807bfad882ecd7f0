"""Preference losses against arithmetic by hand, finite differences and the formulas written out in full."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from popen.preference.losses import embedding_loss, mask_loss, text_loss, weighted_logp

LOG2 = math.log(2.0)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def blobs(n: int = 3, size: int = 4, seed: int = 5) -> Tensor:
    return normal(n, size, size, seed=seed) > 0


def test_weighted_logp_by_hand() -> None:
    logps = torch.tensor([[-1.0, -2.0, -4.0, -100.0], [-3.0, float("-inf"), float("nan"), -5.0]])
    changed = torch.tensor([[False, True, False, True], [False, True, False, False]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, True]])
    # 1*-1 + 3*-2 + 1*-4 and, with no changed token inside the mask, the plain sum -3-5; both through the
    # mean of their weights 1+3+1 and 1+1
    assert weighted_logp(logps, changed, mask, 3.0).tolist() == pytest.approx([-11 / 3.5, -8 / 3.5])


def test_words_that_both_answers_begin_with_cancel_from_the_margin() -> None:
    """Else a loser that only forgot a target would teach against what it had right."""
    logps = normal(2, 6).requires_grad_()
    changed = torch.tensor([[False, False, False, True, True, True], [False] * 6])
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])  # the loser is the winner's first half
    chosen, rejected = weighted_logp(logps, changed, mask, 2.0).split(1)
    (chosen - rejected).sum().backward()
    assert logps.grad is not None
    together = logps.grad[0, :3] + logps.grad[1, :3]  # those positions hold the same tokens
    torch.testing.assert_close(together, torch.zeros(3).double())
    assert (logps.grad[0, 3:] > 0).all()


def test_weighted_logp_of_an_answer_without_tokens_is_zero_and_bf16_is_raised() -> None:
    empty = torch.zeros(2, 3, dtype=torch.bool)
    logps = normal(2, 3, dtype=torch.float32).bfloat16().requires_grad_()
    out = weighted_logp(logps, empty, empty, 2.0)
    assert out.tolist() == [0.0, 0.0]
    assert out.dtype == torch.float32
    out.sum().backward()
    assert logps.grad is not None
    assert logps.grad.isfinite().all()


def test_text_loss_by_hand() -> None:
    chosen, rejected = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.5])
    chosen_ref, rejected_ref = torch.tensor([-1.5, -2.0]), torch.tensor([-1.0, -2.0])
    loss, metrics = text_loss(chosen, rejected, chosen_ref, rejected_ref, beta=2.0)
    # rewards: chosen 2*(.5, 0) = (1, 0), rejected 2*(-1, .5) = (-2, 1); margins (3, -1)
    assert loss.item() == pytest.approx((math.log1p(math.exp(-3)) + math.log1p(math.exp(1))) / 2)
    assert metrics == pytest.approx(
        {
            "rewards_t/chosen": 0.5,
            "rewards_t/rejected": -0.5,
            "rewards_t/margins": 1.0,
            "rewards_t/accuracies": 0.5,
            "logps_t/chosen": -1.5,
            "logps_t/rejected": -1.75,
        }
    )


def test_embedding_loss_by_hand() -> None:
    # one target, two scales, two channels
    policy = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    reference = torch.zeros(1, 2, 2)
    winner = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
    loser = torch.tensor([[[-1.0, 0.0], [0.0, 1.0]]])
    loss, metrics = embedding_loss(policy, winner, loser, reference, beta=0.5)
    # scale 0: |p-w|^2 - |r-w|^2 = 1 - 4 = -3, |p-l|^2 - |r-l|^2 = 4 - 1 = 3; scale 1: both 0; means -1.5, 1.5
    assert metrics["rewards_s/chosen"] == pytest.approx(0.75)
    assert metrics["rewards_s/rejected"] == pytest.approx(-0.75)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.5)))


def test_embedding_loss_is_the_formula_written_out() -> None:
    policy, winner, loser, reference = (normal(5, 3, 4, seed=seed) for seed in range(4))

    def far(a: Tensor, b: Tensor) -> Tensor:
        return ((a - b) ** 2).sum(-1).mean(-1)

    inside = (far(policy, winner) - far(reference, winner)) - (far(policy, loser) - far(reference, loser))
    expected = -F.logsigmoid(-0.7 * inside).mean()
    assert torch.allclose(embedding_loss(policy, winner, loser, reference, 0.7)[0], expected)


def test_embedding_loss_keeps_small_steps_from_a_far_reference() -> None:
    # 1e-3 beside embeddings of size 1e3: squares of 1e6 in fp32 could not show it
    reference = torch.full((1, 1, 2), 1000.0)
    policy = reference + torch.tensor([0.001, 0.0])
    winner, loser = reference + torch.tensor([1.0, 0.0]), reference - torch.tensor([1.0, 0.0])
    step = (policy - reference).double().sum().item()
    _, metrics = embedding_loss(policy, winner, loser, reference, beta=1.0)
    assert metrics["rewards_s/margins"] == pytest.approx(2 * step * 2, rel=0.05)


def test_mask_loss_by_hand() -> None:
    # pixels: winner only, loser only, both, none
    winner = torch.tensor([[[True, False], [True, False]]])
    loser = torch.tensor([[[False, True], [True, False]]])
    policy = torch.tensor([[[2.0, -1.0], [9.0, 9.0]]])
    reference = torch.tensor([[[0.5, 0.5], [-9.0, -9.0]]])
    loss, metrics = mask_loss(policy, reference, winner, loser, beta=0.5)
    # margin: beta * ((2 - .5) - (-1 - .5)) = 1.5, over two differing pixels
    margin = 1.5 / 2
    assert metrics["rewards_s/margins"] == pytest.approx(margin)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-margin)))


def test_mask_loss_is_the_likelihood_of_whole_masks() -> None:
    policy, reference, winner, loser = normal(3, 4, 4), normal(3, 4, 4, seed=1), blobs(seed=2), blobs(seed=3)

    def likelihood(logits: Tensor, mask: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(logits, mask.double(), reduction="none").sum((1, 2))

    won = likelihood(policy, winner) - likelihood(reference, winner)
    lost = likelihood(policy, loser) - likelihood(reference, loser)
    region, _ = mask_loss(policy, reference, winner, loser, 0.3)
    assert torch.allclose(region, -F.logsigmoid(0.3 * (won - lost) / (winner ^ loser).sum((1, 2))).mean())


def test_mask_loss_does_not_see_pixels_where_the_masks_agree() -> None:
    policy, reference = normal(3, 4, 4), normal(3, 4, 4, seed=1)
    winner, loser = blobs(seed=2), blobs(seed=3)
    small = mask_loss(policy, reference, winner, loser, 1.0)

    def pad(x: Tensor, value: float) -> Tensor:
        return F.pad(x.double(), (3, 2, 1, 4), value=value)

    for both in (0.0, 1.0):
        grown = mask_loss(
            pad(policy, 50.0), pad(reference, -3.0), pad(winner, both).bool(), pad(loser, both).bool(), 1.0
        )
        assert grown[0].item() == pytest.approx(small[0].item())
        assert grown[1] == pytest.approx(small[1])


def test_mask_loss_weighs_small_and_large_objects_alike() -> None:
    winner = torch.zeros(2, 8, 8, dtype=torch.bool)
    winner[0, 0, 0] = True  # one pixel
    winner[1, :, :4] = True  # half the picture
    policy = torch.zeros(2, 8, 8, requires_grad=True)
    loss, _ = mask_loss(policy, torch.zeros(2, 8, 8), winner, torch.zeros_like(winner), 1.0)
    (gradient,) = torch.autograd.grad(loss, policy)
    small, large = gradient.sum((1, 2)).tolist()
    assert small == pytest.approx(large)
    assert small < 0


def test_raising_all_logits_earns_nothing_where_areas_match() -> None:
    winner = torch.zeros(1, 4, 4, dtype=torch.bool)
    loser = winner.clone()
    winner[0, :2, 1:3], loser[0, :2, :2] = True, True
    reference = normal(1, 4, 4)
    for shift in (-3.0, 5.0):
        loss, _ = mask_loss(reference + shift, reference, winner, loser, 1.0)
        assert loss.item() == pytest.approx(LOG2)


def test_a_policy_equal_to_the_reference_has_margin_0_and_loss_log_2() -> None:
    logps, embeddings, logits = normal(4), normal(4, 2, 3), normal(3, 4, 4)
    for loss, metrics in (
        text_loss(logps, logps - 1, logps, logps - 1, 5.0),
        embedding_loss(embeddings, normal(4, 2, 3, seed=1), normal(4, 2, 3, seed=2), embeddings, 5.0),
        mask_loss(logits, logits, blobs(seed=1), blobs(seed=2), 5.0),
    ):
        assert loss.item() == pytest.approx(LOG2)
        for name, value in metrics.items():
            if name.startswith("rewards"):
                assert value == 0.0, name


def test_losses_survive_extreme_values_in_fp32() -> None:
    big = torch.full((3, 4, 4), 1e4, requires_grad=True)
    loss, _ = mask_loss(big, -big.detach(), blobs(), ~blobs(), 1.0)
    loss.backward()
    assert loss.isfinite()
    assert big.grad is not None
    assert big.grad.isfinite().all()
    far = torch.tensor([-1e4], requires_grad=True)
    loss, _ = text_loss(far, torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([-1e4]), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert far.grad is not None
    assert far.grad.item() == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("loss", "inputs"),
    [
        (lambda a, b: text_loss(a, b, normal(3, seed=8), normal(3, seed=9), 0.8)[0], ((3,), (3,))),
        (
            lambda p: embedding_loss(
                p, normal(3, 2, 4, seed=7), normal(3, 2, 4, seed=8), normal(3, 2, 4, seed=9), 0.3
            )[0],
            ((3, 2, 4),),
        ),
        (
            lambda p: mask_loss(p, normal(3, 4, 4, seed=9), blobs(seed=1), blobs(seed=2), 0.5)[0],
            ((3, 4, 4),),
        ),
        (lambda p: weighted_logp(p, normal(4, 3, seed=3) > 0, normal(4, 3, seed=4) > 0, 2.5), ((4, 3),)),
    ],
    ids=["text", "embedding", "mask", "weighted_logp"],
)
def test_gradients_match_finite_differences(
    loss: Callable[..., Tensor], inputs: tuple[tuple[int, ...], ...]
) -> None:
    values = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(inputs)]
    assert torch.autograd.gradcheck(loss, values)


def test_descent_moves_towards_the_winner_and_away_from_the_loser() -> None:
    chosen, rejected = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    text_loss(chosen, rejected, torch.zeros(2), torch.zeros(2), 0.5)[0].backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert (chosen.grad < 0).all()
    assert (rejected.grad > 0).all()

    reference = normal(3, 2, 4)
    policy = reference.clone().requires_grad_()
    winner, loser = normal(3, 2, 4, seed=1), normal(3, 2, 4, seed=2)
    embedding_loss(policy, winner, loser, reference, 1.0)[0].backward()
    assert policy.grad is not None
    assert torch.allclose(F.cosine_similarity(-policy.grad, winner - loser, -1), torch.ones(3, 2).double())

    logits = torch.zeros(3, 4, 4, dtype=torch.float64, requires_grad=True)
    better, worse = blobs(seed=1), blobs(seed=2)
    mask_loss(logits, torch.zeros(3, 4, 4), better, worse, 1.0)[0].backward()
    assert logits.grad is not None
    assert torch.equal(-logits.grad.sign(), better.double() - worse.double())


def test_no_gradient_reaches_reference_winner_or_loser() -> None:
    policy, *frozen = (normal(3, 2, 4, seed=seed).requires_grad_() for seed in range(4))
    embedding_loss(policy, frozen[0], frozen[1], frozen[2], 1.0)[0].backward()
    logits, reference = normal(3, 4, 4).requires_grad_(), normal(3, 4, 4, seed=1).requires_grad_()
    mask_loss(logits, reference, blobs(seed=1), blobs(seed=2), 1.0)[0].backward()
    chosen, rejected, *refs = (normal(2, seed=seed).requires_grad_() for seed in range(4))
    text_loss(chosen, rejected, refs[0], refs[1], 1.0)[0].backward()
    assert all(x.grad is None for x in (*frozen, reference, *refs))
    assert all(x.grad is not None for x in (policy, logits, chosen, rejected))


def test_an_empty_batch_gives_a_differentiable_zero_and_no_metrics() -> None:
    logps = torch.zeros(0, requires_grad=True)
    embeddings = torch.zeros(0, 2, 3, requires_grad=True)
    logits = torch.zeros(0, 4, 4, requires_grad=True)
    none = torch.zeros(0, 4, 4, dtype=torch.bool)
    for (loss, metrics), x in (
        (text_loss(logps, logps, logps, logps, 1.0), logps),
        (embedding_loss(embeddings, embeddings, embeddings, embeddings, 1.0), embeddings),
        (mask_loss(logits, logits, none, none, 1.0), logits),
    ):
        loss.backward()
        assert loss.item() == 0.0
        assert metrics == {}
        assert x.grad is not None


def test_a_pair_without_a_difference_teaches_nothing() -> None:
    logits = normal(1, 4, 4).requires_grad_()
    same = blobs(1)
    loss, _ = mask_loss(logits, normal(1, 4, 4, seed=1), same, same, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(LOG2)
    assert logits.grad is not None
    assert not logits.grad.any()
