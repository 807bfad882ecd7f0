"""The preference score: a known rule is found again; plain JSON; hand-made confidence and correlation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from popen.ensemble.score import (
    REWARD,
    Array,
    Score,
    agreement,
    correlation,
    fit,
    reward_score,
)

RULE = np.array([0.3, 0.1, -0.05])  # quality a unit of logp, confidence, agreement


def synthetic(
    questions: int = 400, members: int = 6, noise: float = 0.0, seed: int = 0
) -> tuple[Array, Array]:
    """Features of very different size, questions of very different difficulty."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(questions, members, 3)) * [0.2, 0.05, 30.0] + [-4.0, 0.8, 100.0]
    difficulty = rng.normal(size=(questions, 1))
    return features, features @ RULE + 5 * difficulty + noise * rng.normal(size=(questions, members))


def test_a_linear_rule_is_recovered_whatever_the_difficulty_of_the_questions() -> None:
    features, quality = synthetic()
    score = fit(features, quality, ridge=1e-9)
    assert np.array(score.weight) / np.array(score.scale) == pytest.approx(RULE)
    assert correlation(score(features), quality) == pytest.approx(1.0)


def test_a_noisy_rule_is_recovered_on_questions_not_seen() -> None:
    score = fit(*synthetic(noise=0.5))
    features, quality = synthetic(noise=0.0, seed=1)
    assert correlation(score(features), quality) > 0.99
    best = score(features).argmax(1)
    picked = np.take_along_axis(quality, best[:, None], 1).mean()
    assert picked > quality.mean() + 0.8 * (quality.max(1).mean() - quality.mean())


def test_ridge_by_hand() -> None:
    # one question, two members: centred feature +-1 (scale 1), centred quality +-0.5; w = .5 / (1 + ridge)
    features = np.zeros((1, 2, 3))
    features[0, :, 0] = [3.0, 5.0]
    score = fit(features, np.array([[0.2, 1.2]]), ridge=0.25)
    assert score.weight == pytest.approx((0.5 / 1.25, 0.0, 0.0))
    assert score.mean == pytest.approx((4.0, 0.0, 0.0))
    assert score(features) == pytest.approx(np.array([[-0.4, 0.4]]))


def test_the_units_of_a_feature_do_not_matter() -> None:
    features, quality = synthetic(50, noise=0.1)
    scaled = features * [1000.0, 1e-4, 1.0] + [7.0, 0.0, 3.0]
    assert fit(scaled, quality)(scaled) == pytest.approx(fit(features, quality)(features))


def test_features_that_never_vary_or_repeat_another_are_harmless() -> None:
    features, quality = synthetic(50)
    features[..., 1] = 0.1 + 0.2
    features[..., 2] = 2 * features[..., 0]
    score = fit(features, quality)
    assert np.isfinite(score.weight).all()
    assert score.weight[1] == pytest.approx(0.0)
    assert score.weight[2] == pytest.approx(score.weight[0])


def test_the_reward_score_is_the_reward() -> None:
    features, _ = synthetic(5)
    assert reward_score().features == REWARD
    assert np.array_equal(reward_score()(features[..., :1]), features[..., 0])


def test_agreement_by_hand() -> None:
    left, right = torch.zeros(2, 4, 4, dtype=torch.bool)
    left[:, :2], right[:, 2:] = True, True
    both = left | right
    members = [torch.stack([left, right]), torch.stack([right, left]), both[None], left.new_zeros((0, 4, 4))]
    # the order means nothing; the whole picture against its halves: one pair of IoU 1/2, of two masks
    first = (1.0 + 0.25 + 0.0) / 3
    assert agreement(members) == pytest.approx([first, first, 0.5 / 3, 0.0])
    assert agreement(members[:1]) == [1.0]
    assert agreement([members[3], members[3]]) == [1.0, 1.0]  # both say that there is nothing


def test_json_round_trip() -> None:
    features, quality = synthetic(20, noise=0.1)
    score = fit(features, quality)
    again = Score.from_dict(json.loads(json.dumps(score.to_dict())))
    assert again == score
    assert np.array_equal(again(features), score(features))


def test_unusable_input_is_named() -> None:
    features, quality = synthetic(4, 3)
    with pytest.raises(ValueError, match=r"\(4, 3, 2\)"):
        fit(features[..., :2], quality)
    with pytest.raises(ValueError, match="at least one question"):
        fit(features[:0], quality[:0])
    features[2, 1, 1] = np.nan
    with pytest.raises(ValueError, match="question 2, member 1: confidence is nan"):
        fit(features, quality)
    features[2, 1, 1] = 0.0
    quality[3, 0] = np.inf
    with pytest.raises(ValueError, match="question 3, member 0: quality is inf"):
        fit(features, quality)


def test_correlation_by_hand_and_within_questions_only() -> None:
    quality = np.array([[0.0, 1.0], [10.0, 12.0]])
    # centred: scores (-1, 1), (1, -1); quality (-.5, .5), (-1, 1): (1 - 2) / sqrt(4 * 2.5)
    assert correlation(np.array([[0.0, 2.0], [102.0, 100.0]]), quality) == pytest.approx(-1 / np.sqrt(10))
    # what tells questions apart, not members, is no correlation
    assert correlation(np.array([[0.0, 0.0], [9.0, 9.0]]), quality) == 0.0
