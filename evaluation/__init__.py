"""Meta-testing, statistics and figures."""

from .metatest import CONDITIONS, MetaTestResult, TestTasks, meta_test, quick_test, select_test_tasks
from .statistics import Interval, seed_interval

__all__ = [
    "CONDITIONS",
    "Interval",
    "MetaTestResult",
    "TestTasks",
    "meta_test",
    "quick_test",
    "seed_interval",
    "select_test_tasks",
]
