"""Group sequence policy optimisation (section 3.3.3): rule rewards, one ratio per response.

For each prompt a group of responses is sampled and scored; rewards are normalised within the
group. The policy ratio is that of whole sequences, length-normalised (Zheng et al., "Group Sequence
Policy Optimization", 2025, eq. 5-7), which unlike token ratios has one unit of
credit and of clipping: the response that earned the reward.

Letters: R responses (all groups), T tokens of the longest one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GspoOptions:
    """What the objective leaves open."""

    clip_low: float = 3e-4
    """How far below 1 a sequence ratio counts; sequence ratios move far less than token ratios."""
    clip_high: float = 4e-4
    """How far above 1."""
    kl_weight: float = 0.04
    """Weight of the divergence from the SFT reference."""


class GspoLoss(NamedTuple):
    """The loss and what to watch."""

    loss: Tensor
    kl: Tensor
    """Estimated divergence from the reference, nats a token (detached)."""
    clipped_share: Tensor
    """Share of responses whose ratio is clipped (detached)."""
    ratio: Tensor
    """Mean sequence ratio to the policy before the step's updates (detached)."""


def group_advantages(reward_R: Tensor, group_R: Tensor) -> Tensor:
    """Rewards minus their group's mean, over its standard deviation.

    A group whose responses all earned the same says nothing: its advantages are 0.

    Args:
        reward_R: Reward of each response.
        group_R: Index (from 0) of the prompt that it answers.

    Raises:
        ValueError: If a reward is not finite.
    """
    if not torch.isfinite(reward_R).all():
        raise ValueError(f"rewards must be finite, got {reward_R.tolist()}")
    groups = int(group_R.max()) + 1
    count = torch.bincount(group_R, minlength=groups).to(reward_R.dtype)
    sums = reward_R.new_zeros(groups).index_add_(0, group_R, reward_R)
    centred_R = reward_R - (sums / count.clamp(min=1))[group_R]
    squares = reward_R.new_zeros(groups).index_add_(0, group_R, centred_R.square())
    spread_R = (squares / count.clamp(min=1)).sqrt()[group_R]
    return torch.where(spread_R > 1e-6, centred_R / spread_R.clamp(min=1e-6), 0.0)


def sampler_weights(
    old_logp_RT: Tensor, rollout_logp_RT: Tensor, said_RT: Tensor, cap: float
) -> tuple[Tensor, Tensor]:
    """What each response counts for, where the sampler is not quite the policy.

    A server, or another precision, gives the same weights other probabilities. The responses are
    then of another distribution; their ratio to it corrects that, cut off so that none outweighs
    the others (truncated importance sampling: Yao et al., "Your efficient RL framework secretly
    brings you off-policy RL training", 2025; per sequence and length-normalised, as GSPO's ratio).

    Args:
        old_logp_RT: Log-probabilities of the sampled ids under the policy that was to sample, as
            training computes them.
        rollout_logp_RT: The same as the sampler told them.
        said_RT: True at response tokens.
        cap: Largest weight.

    Returns:
        Weights `[R]`, and how far apart the two are, nats a token, `[R]`.
    """
    gap_R = _mean_over(old_logp_RT - rollout_logp_RT, said_RT)
    return gap_R.exp().clamp(max=cap), gap_R.abs()


def gspo_loss(
    logp_RT: Tensor,
    old_logp_RT: Tensor,
    reference_logp_RT: Tensor,
    said_RT: Tensor,
    advantage_R: Tensor,
    options: GspoOptions,
) -> GspoLoss:
    """The clipped sequence objective with KL to the reference.

    Args:
        logp_RT: Log-probabilities of the sampled ids under the policy; gradients flow through it.
        old_logp_RT: The same when they were sampled.
        reference_logp_RT: The same under the SFT reference.
        said_RT: True at response tokens.
        advantage_R: From `group_advantages`.
        options: Clipping and KL weight.

    Raises:
        ValueError: If a response has no token.
    """
    length_R = said_RT.sum(-1)
    if not (length_R > 0).all():
        raise ValueError(f"response {int(length_R.argmin())} has no token; drop it before the loss")
    drift_R = _mean_over(logp_RT - old_logp_RT, said_RT)
    ratio_R = drift_R.exp()
    clipped_R = ratio_R.clamp(1 - options.clip_low, 1 + options.clip_high)
    gain_R = torch.minimum(ratio_R * advantage_R, clipped_R * advantage_R)
    # exp(d) - d - 1 >= 0 with d = log reference - log policy: an unbiased estimate of the KL
    # divergence of low variance (Schulman, "Approximating KL divergence", 2020).
    gap_RT = torch.where(said_RT, reference_logp_RT - logp_RT, 0.0)
    kl_R = _mean_over(gap_RT.exp() - gap_RT - 1, said_RT)
    loss = -gain_R.mean() + options.kl_weight * kl_R.mean()
    beyond_R = clipped_R * advantage_R < ratio_R * advantage_R
    watched = (kl_R.mean(), beyond_R.float().mean(), ratio_R.mean())
    return GspoLoss(loss, *(one.detach() for one in watched))


def _mean_over(value_RT: Tensor, said_RT: Tensor) -> Tensor:
    return torch.where(said_RT, value_RT, 0.0).sum(-1) / said_RT.sum(-1)
