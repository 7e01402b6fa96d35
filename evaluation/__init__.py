"""Meta-testing, statistics and figures."""

from .metatest import (
    CONDITIONS,
    ContextSource,
    MetaTestResult,
    OfflineTransitions,
    TestTasks,
    meta_test,
    quick_test,
    select_test_tasks,
)
from .protocols import PROTOCOLS, UNITS, context_source
from .statistics import (
    Interval,
    difference_interval,
    interquartile_mean,
    over_seeds,
    performance_profile,
    probability_of_improvement,
    seed_interval,
    share_interval,
    verdict,
)

__all__ = [
    "CONDITIONS",
    "PROTOCOLS",
    "UNITS",
    "ContextSource",
    "Interval",
    "MetaTestResult",
    "OfflineTransitions",
    "TestTasks",
    "context_source",
    "difference_interval",
    "interquartile_mean",
    "meta_test",
    "over_seeds",
    "performance_profile",
    "probability_of_improvement",
    "quick_test",
    "seed_interval",
    "select_test_tasks",
    "share_interval",
    "verdict",
]
