"""Worker processes: reports, failures, a worker that dies, Ctrl-C."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from focal import FocalError
from focal.workers import run_jobs

JOBS = """
import os, signal

def double(job, report):
    report(job, 2 * job)
    if job == 3:
        raise ValueError("three")

def die(job, report):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """A module that worker processes can import, which a test file is not."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "jobs_for_workers.py").write_text(JOBS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("jobs_for_workers")


def test_reports_arrive_and_one_failure_spoils_no_other(jobs):
    seen = {}
    numbers = {job: job for job in range(5)}
    failures = run_jobs(jobs.double, numbers, 2, lambda job, value: seen.update({job: value}), "again")
    assert seen == {job: 2 * job for job in range(5)}
    assert list(failures) == [3]
    assert isinstance(failures[3], ValueError)
    assert run_jobs(jobs.double, {}, 2, print, "again") == {}


def test_a_worker_that_dies_is_explained(jobs):
    failures = run_jobs(jobs.die, {0: 0}, 1, print, "type it again")
    assert isinstance(failures[0], FocalError)
    assert "a worker process died" in str(failures[0])
    assert "type it again" in str(failures[0])


def _listen_to_ctrl_c() -> None:
    """A shell without job control starts what runs in the background deaf to Ctrl-C, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_everything_at_once(tmp_path):
    """Interrupt the whole group, as a terminal does: no further job may start, and all processes must be gone."""
    command = [Path(sys.executable).with_name("focal-cli"), "data", "generate", "--env", "point", "--scale", "smoke",
               "--set", "sac.total_steps=3000", "-o", "x"]  # fmt: skip
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, preexec_fn=_listen_to_ctrl_c)  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("ckpt_*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)  # 1.4 s where nothing else runs
    assert process.returncode == 130
    assert b"stopped; finished tasks and checkpoints are kept, run the same command again to continue" in output
    assert b"Traceback" not in output
    assert not list(tmp_path.rglob("task_*.zarr")), "no task can have finished so soon"
    for _ in range(50):
        alive = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True, check=False).stdout
        if not alive:
            break
        time.sleep(0.1)
    assert alive == ""
