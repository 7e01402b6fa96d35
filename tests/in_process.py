"""Stand-ins of tests: worker processes without the seconds they take to start, and deaths at chosen moments."""

import itertools
import os


def run_here(work, jobs, workers, on_report, how_to_continue):
    """What `run_jobs` does, in this process."""
    failures = {}
    for key, job in jobs.items():
        try:
            work(job, on_report)
        except Exception as error:
            failures[key] = error
    return failures


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code may catch it and go on."""


def until_it_survives(monkeypatch, attempt, lives, after_death):
    """Call `attempt` until it ends, killed at rename, replacement or link 0, 1, ... as `lives` says; count deaths."""
    countdown, died, limit = itertools.count(), 0, 0

    def dying(real):
        def call(*args, **kwargs):
            real(*args, **kwargs)
            if next(countdown) == limit:
                raise Killed

        return call

    for name in ("rename", "replace", "link"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    for limit in itertools.cycle(lives):  # noqa: B007 - read by `call`
        countdown = itertools.count()
        try:
            attempt()
            return died
        except Killed:
            died += 1
            after_death()
