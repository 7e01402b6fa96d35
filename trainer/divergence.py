"""Divergence between the policy and the behaviour that made the data, in dual form (BRAC; the paper's appendix F).

A discriminator c(s, a, z) is trained to tell the policy's actions from the logged ones; no clone of the behaviour
policy is needed. States are the augmented ones, observation and task embedding joined, without gradient to either.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .networks import StateActionNet
from .optimisers import Metrics

Divergence = Literal["kl", "wasserstein"]


def dual_divergence(kind: Divergence, policy_scores: Tensor, logged_scores: Tensor) -> Tensor:
    """Estimate the divergence of the policy from the behaviour, per sample, from the discriminator's scores (...,).

    "kl": with g = softplus(c), -g(s, a_logged) + log(g(s, a_policy) + 1e-8) + 1, the variational lower bound of
    KL(policy || behaviour), tight where g is the density ratio (reference-facts 3.5). "wasserstein":
    c(s, a_policy) - c(s, a_logged), the Kantorovich dual for a discriminator of slope at most 1.
    """
    if kind == "kl":
        return -softplus(logged_scores) + torch.log(softplus(policy_scores) + 1e-8) + 1.0
    return policy_scores - logged_scores


def policy_divergence(
    discriminator: StateActionNet, kind: Divergence, states: Tensor, policy_actions: Tensor, logged_actions: Tensor
) -> Tensor:
    """Estimate the divergence at `states` (..., state_dim), (...,); its gradient reaches the policy's actions."""
    with torch.no_grad():  # a constant for the policy
        logged_scores = discriminator(states, logged_actions)
    return dual_divergence(kind, discriminator(states, policy_actions), logged_scores)


def gradient_penalty(
    discriminator: StateActionNet,
    states: Tensor,
    policy_actions: Tensor,
    logged_actions: Tensor,
    generator: torch.Generator | None = None,
    of_output: bool = False,
) -> tuple[Tensor, Tensor]:
    """Penalise slopes above 1 in the action. Returns the penalty () and the mean slope () without gradient.

    At a = a_policy + u (a_logged - a_policy), u ~ U(0, 1) per sample: mean of max(slope - 1, 0)^2 with slope =
    sqrt(1e-8 + |dc/da|^2). BRAC's penalty. `of_output` puts c itself in place of dc/da, as the released FOCAL code does
    (reference-facts D2): that caps the divergence near 1 and bounds no slope.
    """
    u = torch.rand((*states.shape[:-1], 1), generator=generator, device=states.device, dtype=states.dtype)
    mixed = torch.lerp(policy_actions.detach(), logged_actions, u)
    if of_output:
        gradient = discriminator(states, mixed).unsqueeze(-1)
    else:
        gradient = discriminator.action_gradient(states, mixed)
    slope = torch.sqrt(1e-8 + gradient.square().sum(dim=-1))
    return (slope - 1.0).clamp_min(0.0).square().mean(), slope.detach().mean()


def discriminator_loss(
    discriminator: StateActionNet,
    states: Tensor,
    policy_actions: Tensor,
    logged_actions: Tensor,
    kind: Divergence,
    penalty_weight: float,
    generator: torch.Generator | None = None,
    penalise_output: bool = False,
) -> tuple[Tensor, Metrics]:
    """Loss of the discriminator: minus the mean dual estimate, plus the weighted gradient penalty.

    `states` (..., state_dim), both actions (..., act_dim); no gradient leaves through any of them.
    """
    both = torch.stack([policy_actions.detach(), logged_actions])
    policy_scores, logged_scores = discriminator(states.expand(2, *states.shape), both)
    estimate = dual_divergence(kind, policy_scores, logged_scores).mean()
    penalty, slope = gradient_penalty(
        discriminator, states, policy_actions, logged_actions, generator, of_output=penalise_output
    )
    loss = penalty_weight * penalty - estimate
    return loss, {
        "discriminator/loss": loss.detach(),
        "discriminator/penalty": penalty.detach(),
        "discriminator/slope": slope,
    }
