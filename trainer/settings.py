"""Settings of meta-training: one line of meaning per field, and one table of differences per family and scale.

The defaults are the paper's common values, or the released code's where the paper's are not recoverable
(reference-facts sections 0, 3 and 8).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import UsageError, did_you_mean
from ..settings import SCALES, Scale
from .divergence import Divergence


@dataclass(frozen=True)
class EncoderSettings:
    """What infers a task embedding from a context (encoder.py)."""

    kind: Literal["deterministic", "probabilistic"] = "deterministic"  # a point, or a Gaussian posterior with a KL term
    kl_weight: float = 0.1  # of the KL of posteriors from the prior, summed over tasks and dimensions (probabilistic)
    prior_std: float = 1.0  # standard deviation of the prior, whose mean is 0 (the released code: 0.05)
    bounded: bool = True  # means in (-1, 1), by tanh; embeddings of the deterministic kind always are (probabilistic)

    def __post_init__(self) -> None:
        require(self, "encoder.", above_zero=("prior_std",), not_negative=("kl_weight",))


@dataclass(frozen=True)
class DistanceSettings:
    """The distance metric loss (distance.py)."""

    power: int = -2  # of the distance in the term of different tasks: -2, -1, 1 or 2
    beta: float | None = None  # weight of that term; none: the paper's for the power, 1, 2, 8, 16 for -2, -1, 1, 2
    epsilon: float = 0.1  # keeps the negative powers finite at distance 0; the paper's for every power
    form: Literal["paper", "released"] = "paper"  # eq. 13, or the released code's form (power -2 only)
    weight: float = 10.0  # of the whole loss beside the encoder's other losses (alone, Adam is scale-free); 0: without

    def __post_init__(self) -> None:
        if self.power not in (-2, -1, 1, 2):
            raise UsageError(f"distance.power={self.power}, expected -2, -1, 1 or 2; --set distance.power=-2")
        require(self, "distance.", above_zero=("epsilon",), not_negative=("beta", "weight"))


@dataclass(frozen=True)
class RegularisationSettings:
    """Keeping the policy near the data (divergence.py)."""

    kind: Literal["none", "value-penalty", "policy"] = "none"  # none; in target and actor; or in the actor only
    divergence: Divergence = "kl"  # dual form of the KL, or of the Wasserstein distance
    alpha: float = 1.0  # weight of the divergence; its first value where it is adaptive
    adaptive: bool = False  # alpha <- clip(alpha exp(alpha_learning_rate clip(D - target_divergence, -1, 1)), ..)
    alpha_min: float = 1e-3  # smallest adaptive alpha
    alpha_max: float = 2000.0  # largest adaptive alpha
    alpha_learning_rate: float = 1e-2  # relative change of an adaptive alpha per step and unit of divergence
    target_divergence: float = 0.05  # divergence that an adaptive alpha steers to
    discriminator_steps: int = 3  # per gradient step; each after the first on a fresh batch of the same tasks
    discriminator_learning_rate: float = 1e-4  # of the discriminator's Adam
    gradient_penalty: float = 5.0  # weight of the penalty on slopes above 1

    def __post_init__(self) -> None:
        require(
            self,
            "regularisation.",
            above_zero=("alpha_min", "alpha_max", "discriminator_steps", "discriminator_learning_rate"),
            not_negative=("alpha", "alpha_learning_rate", "gradient_penalty"),
        )


@dataclass(frozen=True)
class EntropySettings:
    """The maximum-entropy term of target and actor."""

    enabled: bool = True  # whether -weight * log pi is in the value target and in the actor's objective
    weight: float = 1.0  # of the entropy, beside rewards multiplied by reward_scale; its first value where learnt
    learnt: bool = False  # learn the weight so that the entropy meets `target`, as SAC does
    target: float | None = None  # wanted entropy in nats; none: minus the number of action dimensions
    learning_rate: float = 3e-4  # of the Adam that learns the weight

    def __post_init__(self) -> None:
        require(self, "entropy.", above_zero=("weight", "learning_rate"))


@dataclass(frozen=True)
class BcqSettings:
    """Batch-constrained Q-learning (bcq.py). Defaults: the released Contextual BCQ's (reference-facts 5.2)."""

    candidates: int = 10  # actions proposed per state, in targets and when acting
    min_weight: float = 0.75  # of the smaller of the twin values in targets; the larger has the rest
    perturbation_limit: float = 0.05  # largest change of a proposed action, per dimension
    # Its own, since Adam follows the slope of a critic that has learnt nothing yet at full speed: at 1e-3 a network of
    # 3 x 256 was at an end of its tanh for good after 20 steps, at 3e-4 it was not.
    perturbation_learning_rate: float = 3e-4
    critic_hidden: tuple[int, ...] = (1024,) * 9  # hidden widths of the action values
    vae_hidden: tuple[int, ...] = (1024,) * 7  # hidden widths of both halves of the generative model
    perturbation_hidden: tuple[int, ...] = (1024,) * 8  # hidden widths of the perturbation

    def __post_init__(self) -> None:
        above_zero = ("candidates", "perturbation_learning_rate")
        require(self, "bcq.", above_zero=above_zero, not_negative=("perturbation_limit",))
        require_share(self, "bcq.", "min_weight")
        require_widths(self, "bcq.")


@dataclass(frozen=True)
class ReleasedSettings:
    """What the released code does otherwise than the paper (reference-facts section 7); distance.form has one more."""

    discard_bellman: bool = False  # D1: coupled gradients never reach the encoder, its optimiser having stepped before
    penalise_output: bool = False  # D2: the discriminator's gradient penalty is on its output, not on its gradient
    penalty_at_state: bool = False  # D3: the value penalty is the divergence at s, with the action logged there, not s'
    no_actor_divergence: bool = False  # D4: the divergence gives the actor no gradient (FOCAL-latest, UNICORN)
    limits_terminate: bool = False  # D6: the last step of every episode is a termination, time limits too
    raw_reset: bool = False  # D7: when acting, the observation of a reset is not divided by observation_scale


@dataclass(frozen=True)
class TrainSettings:
    """What every method needs to know of a meta-training run, apart from data and seed; each adds its own."""

    algo: str = ""  # method, fixed by the class of its settings
    steps: int = 100_000  # gradient steps of the control networks
    latent_dim: int = 20  # length of a task embedding
    meta_batch: int = 16  # tasks per step; without replacement at most the training tasks there are
    context_size: int = 256  # transitions per context
    batch_size: int = 256  # transitions per task and step for the control networks
    next_observation_in_context: bool = False  # whether context rows hold the next observation
    context_reward: Literal["dense", "sparse"] = "dense"  # reward in the context; control always learns from the dense
    discount: float = 0.99  # of the return
    encoder_hidden: tuple[int, ...] = (200, 200, 200)  # hidden widths of the encoder
    encoder_learning_rate: float = 3e-4  # of the encoder's Adam
    critic_learning_rate: float = 3e-4  # of the action values' Adam
    actor_learning_rate: float = 3e-4  # of the Adam of what acts: the policy, or BCQ's generative model and actor
    tau: float = 0.005  # share of the new weights in the target networks, every step
    observation_scale: Literal["absmax", "rms", "none"] = "absmax"  # divide each observation column by its largest
    # absolute value, or by its root mean square
    hide_x: bool = False  # drop the absolute x from observations (half-cheetah: it gives the direction away)
    precision: Literal["fp32", "bf16"] = "fp32"  # of matrix products; weights, losses and optimisers are always fp32
    value_limit: float | None = (
        None  # largest action value before a run stops as diverged; none: 100 x what is possible
    )
    log_every: int = 100  # steps between rows of metrics.jsonl
    checkpoint_every: int = 2000  # steps between checkpoints
    eval_every: int = 5000  # steps between evaluations, once the control networks train
    encoder: EncoderSettings = field(default_factory=EncoderSettings)

    def __post_init__(self) -> None:
        counts = ("steps", "latent_dim", "meta_batch", "context_size", "batch_size")
        intervals = ("log_every", "checkpoint_every", "eval_every", "value_limit")
        rates = ("encoder_learning_rate", "critic_learning_rate", "actor_learning_rate", "tau")
        require(self, "", above_zero=counts + intervals + rates)
        require_share(self, "", "discount", "tau")
        require_widths(self, "")

    @property
    def total_steps(self) -> int:
        """All gradient steps of the run."""
        return self.steps

    def phase(self, step: int) -> str:
        """Return what trains after `step` gradient steps: "encoder", "control" or both, "joint"."""
        return "joint"

    def largest_step(self, largest_reward: float) -> float:
        """Return the most that one step can add to an action value, given the largest absolute reward."""
        return largest_reward

    @property
    def limits_terminate(self) -> bool:
        """Whether the last step of every episode counts as a termination, time limits too (D6)."""
        return False

    @property
    def raw_reset(self) -> bool:
        """Whether the observation of a reset is not divided by observation_scale when acting (D7)."""
        return False

    def check(self) -> None:
        """Raise `UsageError` for settings that are each fine and wrong together (`--set` changes one at a time)."""

    def idle(self) -> dict[str, str]:
        """Return the settings that change nothing beside the others, each with the `--set` words that let it act."""
        names = ("kl_weight", "prior_std", "bounded") if self.encoder.kind == "deterministic" else ()
        return {f"encoder.{name}": "encoder.kind=probabilistic" for name in names}


@dataclass(frozen=True)
class ControlSettings(TrainSettings):
    """And of the behaviour-regularised actor-critic (control.py), which FOCAL and Batch PEARL share."""

    reward_scale: float = 5.0  # multiplies rewards in the value target only
    control_hidden: tuple[int, ...] = (300, 300, 300)  # hidden widths of policy, action values and discriminator
    policy_penalty: float = 1e-3  # weight of mean^2 + log_std^2, which keeps tanh from saturating
    log_std_min: float = -20.0  # lower bound of the policy's log standard deviation
    log_std_max: float = 0.0  # upper bound of the policy's log standard deviation
    regularisation: RegularisationSettings = field(default_factory=RegularisationSettings)
    entropy: EntropySettings = field(default_factory=EntropySettings)
    released: ReleasedSettings = field(default_factory=ReleasedSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "", above_zero=("reward_scale",), not_negative=("policy_penalty",))

    def largest_step(self, largest_reward: float) -> float:
        """Return the most that one step can add to an action value, given the largest absolute reward: with a unit of
        divergence and one nat of entropy, reward_scale |r| + alpha + w, alpha with the value penalty only."""
        rule = self.regularisation
        penalty = (rule.alpha_max if rule.adaptive else rule.alpha) if rule.kind == "value-penalty" else 0.0
        entropy = self.entropy.weight if self.entropy.enabled else 0.0
        return self.reward_scale * largest_reward + penalty + entropy

    @property
    def limits_terminate(self) -> bool:
        """Whether the last step of every episode counts as a termination, time limits too (D6)."""
        return self.released.limits_terminate

    @property
    def raw_reset(self) -> bool:
        """Whether the observation of a reset is not divided by observation_scale when acting (D7)."""
        return self.released.raw_reset

    def check(self) -> None:
        """Raise `UsageError` for settings that are each fine and wrong together."""
        if self.log_std_min > self.log_std_max:
            raise UsageError(f"log_std_min={self.log_std_min} is above log_std_max={self.log_std_max}; "
                             f"--set log_std_min={self.log_std_max - 20}")  # fmt: skip
        rule = self.regularisation
        if rule.alpha_min > rule.alpha_max:
            raise UsageError(f"regularisation.alpha_min={rule.alpha_min} is above regularisation.alpha_max="
                             f"{rule.alpha_max}; --set regularisation.alpha_max={rule.alpha_min}")  # fmt: skip
        adapts = rule.adaptive and rule.kind != "none"
        if adapts and not rule.alpha_min <= rule.alpha <= rule.alpha_max:
            above = rule.alpha > rule.alpha_max
            remedy = f"alpha_max={rule.alpha}" if above else f"alpha={rule.alpha_min}"
            raise UsageError(f"regularisation.alpha={rule.alpha} is adaptive and outside its bounds, {rule.alpha_min} "
                             f"to {rule.alpha_max}; --set regularisation.{remedy}")  # fmt: skip
        self._check_effects()

    def idle(self) -> dict[str, str]:
        """Return the settings that change nothing beside the others, each with the `--set` words that let it act."""
        rule, entropy, found = self.regularisation, self.entropy, super().idle()
        if not entropy.enabled:
            found |= dict.fromkeys(_named("entropy", entropy, but="enabled"), "entropy.enabled=true")
        elif not entropy.learnt:
            found |= dict.fromkeys(("entropy.target", "entropy.learning_rate"), "entropy.learnt=true")
        regularised, adaptive = "regularisation.kind=policy", "regularisation.adaptive=true"
        if rule.kind == "none":
            found |= dict.fromkeys(_named("regularisation", rule, but="kind"), regularised)
        if rule.kind == "none" or not rule.adaptive:
            words = adaptive if rule.kind != "none" else f"{regularised} {adaptive}"
            names = ("alpha_min", "alpha_max", "alpha_learning_rate", "target_divergence")
            found |= {f"regularisation.{name}": words for name in names}
        return found

    def _check_effects(self) -> None:
        """An ablation that changes nothing would be read as a result."""
        rule, entropy, released = self.regularisation, self.entropy, self.released
        penalised, regularised = rule.kind == "value-penalty", rule.kind != "none"
        scaled = self.observation_scale != "none"
        value_penalty, policy = "regularisation.kind=value-penalty", "regularisation.kind=policy"
        chosen = {  # whether it is, whether it acts, and what would let it
            "released.penalise_output=true": (released.penalise_output, regularised, policy),
            "released.penalty_at_state=true": (released.penalty_at_state, penalised, value_penalty),
            "released.no_actor_divergence=true": (released.no_actor_divergence, regularised, value_penalty),
            "released.raw_reset=true": (released.raw_reset, scaled, "observation_scale=absmax"),
            "regularisation.divergence=wasserstein": (rule.divergence == "wasserstein", regularised, policy),
            "entropy.learnt=true": (entropy.learnt, entropy.enabled, "entropy.enabled=true"),
        }
        for name, (on, acts, remedy) in chosen.items():
            if on and not acts:
                raise UsageError(f"{name} has no effect here; --set {remedy}")


@dataclass(frozen=True)
class FocalSettings(ControlSettings):
    """Everything that decides a run of FOCAL (focal.py)."""

    algo: Literal["focal"] = "focal"
    schedule: Literal["joint", "encoder-first"] = "joint"  # train both at once (the paper), or first the encoder alone
    encoder_steps: int = 0  # encoder-only gradient steps before `steps` (encoder-first; joint ignores it)
    encoder_after: Literal["frozen", "decaying"] = "frozen"  # its learning rate after those: 0, or halving
    encoder_half_life: int = 1000  # control steps in which a decaying rate halves; below 1/1000 it is 0
    gradients: Literal["decoupled", "coupled"] = "decoupled"  # coupled: the Bellman error trains the encoder too
    task_replacement: bool = False  # draw a step's tasks with replacement, as the released code does
    context_draws: int = 2  # contexts per task where the encoder trains: 2 make a positive pair of each task, 1 (the
    # released code) only of a task drawn twice
    distance: DistanceSettings = field(default_factory=DistanceSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "", above_zero=("encoder_half_life",), not_negative=("encoder_steps",))
        if self.context_draws not in (1, 2):
            raise UsageError(f"context_draws={self.context_draws}, expected 1 or 2; --set context_draws=2")

    @property
    def encoder_only_steps(self) -> int:
        """Steps at the start that train the encoder alone."""
        return self.encoder_steps if self.schedule == "encoder-first" else 0

    @property
    def total_steps(self) -> int:
        """All gradient steps of the run."""
        return self.encoder_only_steps + self.steps

    def encoder_rate(self, step: int) -> float:
        """Factor of the encoder's learning rate after `step` gradient steps; at 0 it does not train."""
        control_steps = step - self.encoder_only_steps
        if self.schedule == "joint" or control_steps < 0:
            return 1.0
        rate = 0.5 ** (control_steps / self.encoder_half_life) if self.encoder_after == "decaying" else 0.0
        return rate if rate >= 1e-3 else 0.0

    def trains_control(self, step: int) -> bool:
        """Whether the control networks train after `step` gradient steps."""
        return step >= self.encoder_only_steps

    def phase(self, step: int) -> str:
        """Return what trains after `step` gradient steps: "encoder", "control" or both, "joint"."""
        if not self.trains_control(step):
            return "encoder"
        return "joint" if self.encoder_rate(step) > 0 else "control"

    def check(self) -> None:
        """Raise `UsageError` for settings that are each fine and wrong together."""
        super().check()
        if self.distance.form == "released" and self.distance.power != -2:
            raise UsageError(
                f"distance.form=released knows only power -2, found {self.distance.power}; --set distance.form=paper"
            )
        if self.distance.form == "released" and self.distance.beta is not None:
            raise UsageError(f"distance.beta={self.distance.beta} has no effect here; --set distance.form=paper")
        if self.context_draws == 1 and not self.task_replacement and self.distance.weight > 0:
            raise UsageError("context_draws=1 gives the distance metric loss no two contexts of a task where no task "
                             "is drawn twice; --set task_replacement=true")  # fmt: skip
        if self.schedule == "encoder-first" and self.encoder_steps == 0:
            raise UsageError("schedule=encoder-first with encoder_steps=0 freezes an untrained encoder; "
                             "--set encoder_steps=1500")  # fmt: skip
        if self.encoder_after == "decaying" and self.schedule == "joint":
            raise UsageError("encoder_after=decaying has no effect here; --set schedule=encoder-first "
                             "--set encoder_steps=1500")  # fmt: skip
        if self.released.discard_bellman and self.gradients != "coupled":
            raise UsageError("released.discard_bellman=true has no effect here; --set gradients=coupled")
        self._check_encoder()

    def idle(self) -> dict[str, str]:
        """Return the settings that change nothing beside the others, each with the `--set` words that let it act."""
        found, distance = super().idle(), self.distance
        if distance.weight == 0:
            found |= dict.fromkeys(_named("distance", distance, but="weight"), "distance.weight=10")
        elif distance.form == "released":
            found |= {"distance.epsilon": "distance.form=paper"}
        elif distance.power > 0:
            found |= {"distance.epsilon": "distance.power=-2"}
        first = "schedule=encoder-first"
        if self.schedule == "joint":
            found |= {"encoder_steps": first, "encoder_half_life": f"{first} encoder_steps=1500 encoder_after=decaying"}
        elif self.encoder_after == "frozen":
            found |= {"encoder_half_life": "encoder_after=decaying"}
        return found

    def _check_encoder(self) -> None:
        coupled = self.gradients == "coupled"
        if coupled and self.schedule == "encoder-first" and self.encoder_after == "frozen":
            raise UsageError("gradients=coupled has no effect on a frozen encoder; --set encoder_after=decaying")
        learns = self.distance.weight > 0 or (self.encoder.kind == "probabilistic" and self.encoder.kl_weight > 0)
        if not learns and (not coupled or self.schedule == "encoder-first"):
            raise UsageError("distance.weight=0 leaves the encoder without a loss; --set gradients=coupled "
                             "--set schedule=joint, or --set encoder.kind=probabilistic")  # fmt: skip


_POINT: dict[str, Any] = {"discount": 0.9, "reward_scale": 100.0, "encoder.kl_weight": 1.0}
_BRAC_POLICY: dict[str, Any] = {"regularisation.kind": "policy", "regularisation.adaptive": True}
_BRAC_VALUE: dict[str, Any] = {"regularisation.kind": "value-penalty", "regularisation.adaptive": True}

# Differences from the defaults at the paper's scale. alpha is the paper's where recoverable (facts section 0), else the
# released one. alpha's rate is relative to it here and 1 in the released code, whatever alpha is: hence 1 / alpha, with
# which it starts at the same pace. The released code draws 4 of the 2 fwd-back tasks with replacement; here a step
# takes both.
_PAPER: dict[str, dict[str, Any]] = {
    "sparse-point-robot": {**_POINT, "latent_dim": 5, "context_size": 1024, "context_reward": "sparse"},
    "point-robot-wind": {**_POINT, "next_observation_in_context": True},
    "half-cheetah-vel": {
        **_BRAC_POLICY,
        "regularisation.alpha": 500.0,
        "regularisation.alpha_learning_rate": 2e-3,
        "context_size": 100,
    },
    "half-cheetah-fwd-back": {
        **_BRAC_VALUE,
        "regularisation.alpha": 500.0,
        "regularisation.alpha_learning_rate": 2e-3,
        "latent_dim": 5,
        "steps": 1_000_000,
    },
    "ant-fwd-back": {
        **_BRAC_VALUE,
        "regularisation.alpha": 1e6,
        "regularisation.alpha_learning_rate": 1e-6,
        "regularisation.alpha_max": 5e6,
        "steps": 2_000_000,
    },
    "walker-2d-params": {
        **_BRAC_POLICY,
        "regularisation.alpha": 50.0,
        "regularisation.alpha_learning_rate": 2e-2,
        "regularisation.alpha_max": 1e4,
        "next_observation_in_context": True,
        "context_size": 100,
        "steps": 2_000_000,
    },
}  # fmt: skip

_LAPTOP_POINT: dict[str, Any] = {
    "schedule": "encoder-first", "encoder_steps": 1500, "steps": 8000, "context_size": 256, "batch_size": 128,
    "latent_dim": 5, "encoder_hidden": (128, 128), "control_hidden": (128, 128), "encoder_learning_rate": 1e-3,
    "critic_learning_rate": 1e-3, "actor_learning_rate": 1e-3, "checkpoint_every": 1000, "eval_every": 2000,
}  # fmt: skip
# alpha 500 and 1e6 of the paper belong to a divergence that the released penalty caps near 1 (D2) and to 1e6 steps.
# Here, on expert data of half-cheetah-fwd-back, alpha 50 and 100 with the learning rates of the paper stayed below 0.7
# of the expert for 5,000 steps, and 500 was lower still; with the rates below, 100 reached the expert at 6,000.
_LAPTOP_MUJOCO: dict[str, Any] = {
    "steps": 10_000, "context_size": 256, "batch_size": 128, "latent_dim": 5, "encoder_hidden": (128, 128),
    "control_hidden": (256, 256), "critic_learning_rate": 1e-3, "actor_learning_rate": 1e-3, "tau": 0.01,
    "regularisation.alpha": 100.0, "regularisation.alpha_max": 500.0, "regularisation.adaptive": False,
    "regularisation.alpha_learning_rate": 1e-2,
    "regularisation.discriminator_steps": 2, "regularisation.discriminator_learning_rate": 1e-3,
    "checkpoint_every": 1000, "eval_every": 2000,
}  # fmt: skip
# With the settings above FOCAL earned on half-cheetah-vel what standing still earns (docs/results.md). Observations
# divided by their largest value are mostly small; embeddings that still move are new tasks to policy and discriminator.
_LAPTOP_MANY: dict[str, Any] = {
    **_LAPTOP_MUJOCO, "schedule": "encoder-first", "encoder_steps": 3000, "meta_batch": 8, "batch_size": 32,
    "context_size": 100, "actor_learning_rate": 3e-4, "entropy.weight": 0.2, "observation_scale": "rms",
}  # fmt: skip
_SMOKE: dict[str, Any] = {
    "steps": 60, "context_size": 32, "batch_size": 32, "meta_batch": 4, "latent_dim": 3, "encoder_hidden": (32, 32),
    "control_hidden": (32, 32), "log_every": 20, "checkpoint_every": 40, "eval_every": 60,
}  # fmt: skip

# Differences of a scale from the paper's settings of the same family.
_SCALES: dict[Scale, dict[str, dict[str, Any]]] = {
    "paper": {family: {} for family in _PAPER},
    "laptop": {
        "sparse-point-robot": _LAPTOP_POINT,
        "point-robot-wind": _LAPTOP_POINT,
        "half-cheetah-vel": _LAPTOP_MANY,
        "half-cheetah-fwd-back": _LAPTOP_MUJOCO,
        "ant-fwd-back": _LAPTOP_MUJOCO,
        "walker-2d-params": _LAPTOP_MANY,
    },
    "smoke": {
        "sparse-point-robot": {**_SMOKE, "schedule": "encoder-first", "encoder_steps": 40},
        "point-robot-wind": {**_SMOKE, "schedule": "encoder-first", "encoder_steps": 40},
        **{family: {**_SMOKE, "regularisation.discriminator_steps": 1} for family in list(_PAPER)[2:]},
    },
}


def add_family(family: str, changes: Mapping[str, Any]) -> None:
    """Add a task family's differences from the defaults, by dotted name, the same at every scale; see extend.py."""
    _PAPER[family] = dict(changes)
    for scale in SCALES:
        smoke = {**_SMOKE, "regularisation.discriminator_steps": 1}
        _SCALES[scale][family] = smoke if scale == "smoke" else {}


def family_table(family: str, scale: Scale) -> dict[str, Any]:
    """Return FOCAL's differences from the defaults for a task family at a scale, by dotted name.

    Raises `UsageError` naming the nearest known family.
    """
    if family not in _PAPER:
        raise UsageError(f"no training settings for family '{family}'; {did_you_mean(family, _PAPER)}")
    return {**_PAPER[family], **_SCALES[scale][family]}


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted names at which two JSON forms of settings differ."""
    names = []
    for name in sorted(set(found) | set(expected)):
        ours, theirs = found.get(name), expected.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            names += differences(ours, theirs, f"{prefix}{name}.")
        elif ours != theirs:
            names.append(prefix + name)
    return names


def _named(group: str, settings: Any, but: str) -> list[str]:
    """The dotted names of a group's settings, all but one."""
    return [f"{group}.{each.name}" for each in dataclasses.fields(settings) if each.name != but]


def hidden_widths(settings: Any) -> list[tuple[int, ...]]:
    """Return the hidden widths of every network that settings describe, in the order of their fields."""
    found: list[tuple[int, ...]] = []
    for each in dataclasses.fields(settings):
        value = getattr(settings, each.name)
        if dataclasses.is_dataclass(value):
            found += hidden_widths(value)
        elif each.name.endswith("hidden"):
            found.append(value)
    return found


def require(settings: Any, prefix: str, above_zero: tuple[str, ...] = (), not_negative: tuple[str, ...] = ()) -> None:
    """Raise `UsageError` for the first field out of range; NaN is out of every range."""
    for name in above_zero + not_negative:
        value = getattr(settings, name)
        fits = value is None or ((value > 0 if name in above_zero else value >= 0) and value < float("inf"))
        if not fits:
            words = "above 0" if name in above_zero else "of 0 or more"
            raise UsageError(f"{prefix}{name}={value}, expected a number {words}{_default(settings, prefix, name)}")


def require_share(settings: Any, prefix: str, *names: str) -> None:
    """Raise `UsageError` for the first field that is not from 0 to 1."""
    for name in names:
        value = getattr(settings, name)
        if not 0.0 <= value <= 1.0:
            raise UsageError(f"{prefix}{name}={value}, expected a number from 0 to 1{_default(settings, prefix, name)}")


def require_widths(settings: Any, prefix: str) -> None:
    """Raise `UsageError` for a list of hidden widths that is empty or holds a 0."""
    for name in (each.name for each in dataclasses.fields(settings) if each.name.endswith("hidden")):
        widths = getattr(settings, name)
        if not widths or min(widths) < 1:
            raise UsageError(
                f"{prefix}{name}={widths}, expected widths of at least 1, for example --set {prefix}{name}=256,256"
            )


def _default(settings: Any, prefix: str, name: str) -> str:
    """End an error message with a field's default, as `--set` takes it."""
    if prefix and not prefix.endswith("."):  # MBML's ensembles, which do not know which of two groups they are
        return ""
    default = next(each.default for each in dataclasses.fields(settings) if each.name == name)
    return f"; its default: --set {prefix}{name}={'none' if default is None else default}"
