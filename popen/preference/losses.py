"""Preference losses: L_t on the words and L_s on the segmentation, both direct preference optimisation.

DPO (Rafailov et al. 2023, eq. 7) compares how much more likely the policy makes the winner than the frozen
reference does, with how much more likely it makes the loser:

    reward(x) = beta * (log pi(x) - log pi_ref(x)),    loss = -log sigmoid(reward(winner) - reward(loser))

The losses below differ only in log pi. That POPEN's own L_t and L_s look like this in every detail is not
known to us; the forms are ours where no other source is named.

Metrics carry TRL's names (`rewards/chosen`, ...), under `rewards_t` and `logps_t` for text and `rewards_s`
for segmentation. An empty batch gives a loss of zero that can still be differentiated, and no metrics.
Means are over the pairs of all processes of a training (`popen.devices.share`; one process: its own).

Shapes: B answers, T tokens, N targets (flat), S scales, C decoder width, H W mask size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from popen.devices import share

Metrics = dict[str, float]


def weighted_logp(logps: Tensor, changed: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Dense log-likelihood of pairs: sum(w log p) / Z, w = gamma on changed tokens and 1 elsewhere.

    The weights keep the part that winner and loser share from drowning the few tokens that differ (the dense
    DPO of RLHF-V, Yu et al. 2024, eq. 4). There Z is each answer's own sum(w). Here it is the mean of the
    two answers' (ours): words that both begin with then cancel from the margin. Under its own Z the shorter
    answer's weigh more, so that a loser that only forgot a target teaches against those it had right. That
    this follows is arithmetic; the trials in docs/experiments.md show no difference between the two.

    Args:
        logps: (B, T) log-probability of each answer token; the winners, then as many losers in the same
            order.
        changed: (B, T) bool, tokens in which this answer differs from its rival.
        mask: (B, T) bool, tokens of the answer; what the others (prompt, padding) hold is not looked at.
        gamma: weight of a changed token, > 0.

    Returns:
        (B,) in fp32 or better; 0 for a pair without tokens.
    """
    logps = _precise(logps).masked_fill(~mask, 0.0)
    weights = (1.0 + (gamma - 1.0) * changed.to(logps.dtype)) * mask
    half = len(weights) // 2
    total = ((weights[:half].sum(1) + weights[half:].sum(1)) / 2).repeat(2)
    return (weights * logps).sum(1) / torch.where(total > 0, total, 1.0)


def text_loss(
    chosen: Tensor, rejected: Tensor, chosen_ref: Tensor, rejected_ref: Tensor, beta: float
) -> tuple[Tensor, Metrics]:
    """L_t: DPO on answers.

    Args:
        chosen, rejected: (B,) log-likelihoods of the corrected and the sampled answer under the policy
            (see `weighted_logp`).
        chosen_ref, rejected_ref: (B,) the same under the frozen reference; no gradient flows into them.
        beta: strength; a larger one saturates earlier and so stays closer to the reference.

    Returns:
        The mean loss () and `rewards_t/{chosen,rejected,margins,accuracies}`, `logps_t/{chosen,rejected}`.
    """
    chosen, rejected = _precise(chosen), _precise(rejected)
    part = share(len(chosen))
    loss, metrics = _dpo(
        beta * (chosen - _precise(chosen_ref).detach()),
        beta * (rejected - _precise(rejected_ref).detach()),
        "rewards_t",
        part,
    )
    if metrics:
        means = {"logps_t/chosen": chosen.mean(), "logps_t/rejected": rejected.mean()}
        metrics |= {name: (mean * part).item() for name, mean in means.items()}
    return loss, metrics


def embedding_loss(
    policy: Tensor, winner: Tensor, loser: Tensor, reference: Tensor, beta: float
) -> tuple[Tensor, Metrics]:
    """L_s, embedding form: DPO with a Gaussian around the segmentation embedding (as Diffusion-DPO, Wallace
    et al. 2024, eq. 14, has it around the denoised image; that it suits segmentation embeddings is POPEN's
    idea).

    Up to a constant that cancels, log pi(x) = -|p - x|^2, so with the squared distances of policy p and
    reference r summed over C and averaged over S

        loss = -log sigmoid(-beta * ((|p-w|^2 - |r-w|^2) - (|p-l|^2 - |r-l|^2)))

    The p^2 terms cancel too and the margin is 2 beta (p - r).(w - l): its gradient never points anywhere but
    along w - l and nothing pulls back, so this loss needs an anchor beside it.

    Args:
        policy: (N, S, C) embeddings of the model in training.
        winner, loser: (N, S, C) embeddings of the better and the worse perturbed image; constants.
        reference: (N, S, C) embeddings of the frozen reference; constants.
        beta: strength, per unit of squared distance.

    Returns:
        The mean loss () over targets and `rewards_s/{chosen,rejected,margins,accuracies}`.
    """
    policy, reference = _precise(policy), _precise(reference).detach()

    def reward(x: Tensor) -> Tensor:
        # |p-x|^2 - |r-x|^2 factored: no difference of two large squares, and exactly 0 at p == r
        closer = (policy - reference) * (policy + reference - 2.0 * _precise(x).detach())
        return -beta * closer.sum(-1).mean(-1)

    return _dpo(reward(winner), reward(loser), "rewards_s", share(len(policy)))


def mask_loss(
    policy: Tensor, reference: Tensor, winner: Tensor, loser: Tensor, beta: float
) -> tuple[Tensor, Metrics]:
    """L_s, mask form: DPO with one Bernoulli a pixel (ours).

    With y the mask and z the logits, log pi(y) = sum over pixels of log sigmoid(z) where y is set and of
    log sigmoid(-z) where it is not. Where winner and loser agree, both hold the same term and it cancels from
    the margin; where they differ, log sigmoid(z) - log sigmoid(-z) = z is left:

        margin = beta * mean over differing pixels of +-(z - z_ref),   + where only the winner is set

    So rewards are of the differing pixels alone, and pixels are left out (an ignore region) by giving both
    masks the same value there.

    The likelihood of the whole mask is their sum, which grows with the object: under one beta a large object
    is saturated after a step while a small one still adds nothing, and beta means something else at each
    resolution. Hence the mean, as `weighted_logp` does with long answers. A pair matched in area differs by
    as much growth as shrinkage, so that raising all logits together, the cheap way to a larger mask, earns
    nothing.

    Args:
        policy: (N, H, W) mask logits of the model in training.
        reference: (N, H, W) mask logits of the frozen reference; no gradient flows into them.
        winner, loser: (N, H, W) bool masks. A pair that is the same everywhere teaches nothing: loss log 2,
            gradient 0.
        beta: strength, per unit of logit.

    Returns:
        The mean loss () over targets and `rewards_s/{chosen,rejected,margins,accuracies}`.
    """
    policy, reference = _precise(policy), _precise(reference).detach()
    differs = winner != loser
    size = differs.sum((1, 2)).clamp_min(1)
    sign = torch.where(winner, 1.0, -1.0)  # on differing pixels the loser's is the opposite

    def reward(sign: Tensor) -> Tensor:
        gain = F.logsigmoid(sign * policy) - F.logsigmoid(sign * reference)
        return beta * (gain * differs).sum((1, 2)) / size

    return _dpo(reward(sign), reward(-sign), "rewards_s", share(len(policy)))


def _dpo(chosen: Tensor, rejected: Tensor, name: str, part: Tensor | float) -> tuple[Tensor, Metrics]:
    """Mean of -log sigmoid(chosen - rejected) over rewards (N,), and what TRL reports about them; both are
    multiplied by `part`."""
    margins = chosen - rejected
    loss = -F.logsigmoid(margins).sum() / max(len(margins), 1) * part
    if len(margins) == 0:
        return loss, {}
    means = {
        f"{name}/chosen": chosen.mean(),
        f"{name}/rejected": rejected.mean(),
        f"{name}/margins": margins.mean(),
        f"{name}/accuracies": (margins > 0).float().mean(),
    }
    return loss, {key: (mean * part).item() for key, mean in means.items()}


def _precise(x: Tensor) -> Tensor:
    """At least fp32: differences of log-likelihoods drown in bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
