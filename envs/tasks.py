"""Task families as data: what varies, how tasks are drawn and split, and their dimensions."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..errors import UsageError, did_you_mean

Split = Literal["train", "test", "both"]

TaskParameters = dict[str, Any]
"""One task: names to plain float64 numbers or nested lists of them, exact through JSON."""

TASK_STREAM, SPLIT_STREAM = 0, 1  # children of the seed, so that drawing more tasks never moves the split's numbers


@dataclass(frozen=True)
class TaskSet:
    """The tasks of one collection, and which of them are for meta-training and for meta-testing (indices)."""

    parameters: tuple[TaskParameters, ...]
    train: tuple[int, ...]
    test: tuple[int, ...]

    def split_of(self, index: int) -> Split:
        """Return 'train', 'test' or 'both'."""
        if index in self.train:
            return "both" if index in self.test else "train"
        return "test"


@dataclass(frozen=True)
class ExpertReport:
    """Outcome of a family's absolute expert test (design section 5): passed or not, and the sentence that says why."""

    reached: bool
    measured: str


@dataclass(frozen=True)
class TaskFamily:
    """A set of tasks that share state and action space and differ in reward or in transitions."""

    name: str
    alias: str
    env_id: str
    varies: str  # "reward" or "transitions"
    summary: str  # one line for `focal-cli envs`
    obs_dim: int
    act_dim: int
    horizon: int  # steps after which an episode is truncated
    n_train: int
    n_test: int
    discount: float
    draw: Callable[[np.random.Generator, int], list[TaskParameters]] = field(repr=False)
    order: Callable[[TaskParameters], Any] = field(repr=False)  # sort key: neighbours in this order are similar tasks
    passes_expert_test: Callable[[Any, TaskParameters], ExpertReport] = field(repr=False)
    published: Callable[[int], list[TaskParameters]] | None = field(default=None, repr=False)
    published_split_in_order: bool = False  # first tasks train, last test, as the released code did where it was fixed
    sparse: bool = False  # info["sparse_reward"] exists
    fixed_tasks: tuple[TaskParameters, ...] | None = None  # the fwd-back families: these two, for training and test
    optimum: Callable[[TaskParameters], float] | None = field(default=None, repr=False)  # of the reported return
    absolute_x: int | None = None  # observation column that holds the absolute x position

    def sample_tasks(
        self, n_train: int | None = None, n_test: int | None = None, seed: int = 0, source: str = "seed"
    ) -> TaskSet:
        """Draw `n_train + n_test` tasks and split them by a seeded permutation.

        `source` is "seed" (drawn from `seed`) or "published" (the released code's sets: linspace goals or
        RandomState(1337) draws, the fwd-back families' two tasks in the released order; `seed` then only splits, where
        the released split was not fixed).
        Raises `UsageError` for a family without published tasks or for a count it cannot give.
        """
        n_train = self.n_train if n_train is None else n_train
        n_test = self.n_test if n_test is None else n_test
        if self.fixed_tasks is not None:
            both = tuple(range(len(self.fixed_tasks)))
            if (n_train, n_test) != (len(both), len(both)):
                raise UsageError(
                    f"{self.name} has exactly {len(both)} tasks, used for training and test alike; "
                    f"found {n_train} and {n_test}; leave --tasks out"
                )
            released = self._released(len(both)) if source == "published" else self.fixed_tasks
            return TaskSet(tuple(released), both, both)
        if n_train < 1 or n_test < 1:
            raise UsageError(f"found {n_train} training and {n_test} test tasks, expected at least 1 of each")
        n = n_train + n_test
        if source == "published":
            parameters = self._released(self.n_train + self.n_test)
            if n != self.n_train + self.n_test:
                raise UsageError(
                    f"the released set of {self.name} has {self.n_train} training and {self.n_test} test tasks, found "
                    f"{n_train} and {n_test}; use --tasks {self.n_train}/{self.n_test}, or --tasks-from seed"
                )
        elif source == "seed":
            parameters = self.draw(stream(seed, TASK_STREAM), n)
        else:
            raise UsageError(f"unknown task source '{source}'; {did_you_mean(source, ['seed', 'published'])}")
        if source == "published" and self.published_split_in_order:
            order = np.arange(n)
        else:
            order = stream(seed, SPLIT_STREAM).permutation(n)
        train, test = order[:n_train], order[n_train:]
        return TaskSet(tuple(parameters), tuple(sorted(map(int, train))), tuple(sorted(map(int, test))))

    def _released(self, n: int) -> list[TaskParameters]:
        if self.published is None:
            raise UsageError(f"the released task set of {self.name} is not recoverable; use --tasks-from seed")
        return self.published(n)

    def checked(self, parameters: Any, name: str) -> TaskParameters:
        """Return the parameters of a task called `name` as exact floats.

        Raises `UsageError` unless they have the form of this family's.
        """
        expected, fits = self._some_task, False
        if isinstance(parameters, Mapping) and sorted(parameters) == sorted(expected):
            parameters = {key: _floats(parameters[key]) for key in expected}
            with contextlib.suppress(ValueError):  # NumPy's, for lists of unequal length
                fits = all(
                    np.shape(values) == np.shape(expected[key]) and bool(np.isfinite(np.asarray(values, float)).all())
                    for key, values in parameters.items()
                )
        if fits and self.fixed_tasks is not None:
            fits = any(parameters == {key: _floats(task[key]) for key in task} for task in self.fixed_tasks)
        if not fits:
            raise UsageError(f"{name} has parameters {str(parameters)[:100]}, expected the form {self.example}")
        return dict(parameters)

    @property
    def example(self) -> str:
        """Parameters of a task as a user writes them."""
        return str(self._some_task).replace("'", '"') if len(str(self._some_task)) < 100 else "{...}"

    @functools.cached_property
    def _some_task(self) -> TaskParameters:
        return self.fixed_tasks[0] if self.fixed_tasks else self.draw(np.random.default_rng(0), 1)[0]

    def ordered(self, indices: Sequence[int], parameters: Sequence[TaskParameters]) -> list[int]:
        """Return `indices` sorted so that neighbours are similar tasks; half-way round the list is a wrong task."""
        return [index for index, _ in sorted(zip(indices, parameters, strict=True), key=lambda p: self.order(p[1]))]


def _floats(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_floats(item) for item in value]
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def stream(seed: int, *key: int) -> np.random.Generator:
    """Return the independent generator number `key` of `seed`."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def draw_goals(rng: np.random.Generator, n: int) -> list[TaskParameters]:
    """Goals uniform in angle on the upper unit half circle."""
    return [{"goal": [math.cos(angle), math.sin(angle)]} for angle in rng.uniform(0.0, math.pi, n).tolist()]


def published_goals(n: int) -> list[TaskParameters]:
    """Angles linspace(0, pi, n), as the released data (n = 100)."""
    return [{"goal": [math.cos(angle), math.sin(angle)]} for angle in np.linspace(0.0, math.pi, n).tolist()]


def draw_winds(rng: np.random.Generator, n: int) -> list[TaskParameters]:
    """Drift per step uniform in [-0.05, 0.05]^2 (paper appendix D)."""
    return [{"wind": wind} for wind in rng.uniform(-0.05, 0.05, (n, 2)).tolist()]


def published_winds(n: int) -> list[TaskParameters]:
    """RandomState(1337): all x components first, then all y components (released set: n = 50)."""
    rng = np.random.RandomState(1337)
    x, y = rng.uniform(-0.05, 0.05, n), rng.uniform(-0.05, 0.05, n)
    return [{"wind": [float(a), float(b)]} for a, b in zip(x, y, strict=True)]


def draw_velocities(rng: np.random.Generator, n: int) -> list[TaskParameters]:
    """Target velocities uniform in [0, 3] m/s."""
    return [{"target_velocity": velocity} for velocity in rng.uniform(0.0, 3.0, n).tolist()]


def published_velocities(n: int) -> list[TaskParameters]:
    """The first n uniform draws from [0, 3] after RandomState(1337) (released set: n = 100)."""
    return [{"target_velocity": float(v)} for v in np.random.RandomState(1337).uniform(0.0, 3.0, n)]


WALKER_LOG_SCALE = 3.0
WALKER_FACTORS = {  # field: (base of the power, shape); facts 1.6, in the order of the draws
    "body_mass": (1.5, (8,)),
    "body_inertia": (1.5, (8, 3)),
    "dof_damping": (1.3, (9,)),
    "geom_friction": (1.5, (8, 3)),
}


def draw_walkers(rng: np.random.Generator, n: int) -> list[TaskParameters]:
    """Factors base**u, u uniform in [-3, 3], independently for every element of the four model arrays."""
    return [
        {
            name: np.power(base, rng.uniform(-WALKER_LOG_SCALE, WALKER_LOG_SCALE, shape)).tolist()
            for name, (base, shape) in WALKER_FACTORS.items()
        }
        for _ in range(n)
    ]


def walker_order(parameters: TaskParameters) -> float:
    """Mean log mass factor: heavy and light bodies are far apart."""
    return float(np.mean(np.log(parameters["body_mass"])))
