"""Real SIGKILLs, real full disks, at random moments, through the command line (slow)."""

import json
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from focal.datasets import open_collection, verify_collection
from focal.trainer.methods import METHODS

pytestmark = pytest.mark.slow

GENERATE = [
    "data", "generate", "--env", "point", "--scale", "smoke", "--tasks", "3/1", "--seed", "3",
    "--set", "sac.total_steps=600", "--set", "checkpoints=12", "--set", "episodes_per_checkpoint=4",
]  # fmt: skip
EPISODES = 4 * 13 * 4
KILLED_IN = ("*", "*", "run", "run")  # folders of runs: MBML's first stage, which goes first, is in teachers


def start(*arguments, **options):
    command = [str(Path(sys.executable).with_name("focal-cli")), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def finish(*arguments, **options):
    process = start(*arguments, **options)
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


@pytest.mark.parametrize("engine", ["sb3", "fleet"])
def test_generate_survives_twenty_kills(tmp_path, engine):
    generate = [*GENERATE, "--engine", engine, "--set", "fleet.size=2"]
    code, output = finish(*generate, "-o", tmp_path / "straight")
    assert code == 0, output
    expected = open_collection(tmp_path / "straight").content_hash
    moments, kills = random.Random(0), 0
    path = tmp_path / "killed"
    while kills < 20:
        process = start(*generate, "-o", path, start_new_session=True)
        try:
            # the first four seconds or so are imports; most kills shall hit the work
            process.wait(timeout=moments.uniform(2.0, 9.0))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)  # the parent alone: its workers must notice by themselves
            process.wait()
            kills += 1
        else:
            output = process.stdout.read()
            assert process.returncode == 0, output
            if kills < 20:  # it finished between two kills: start over elsewhere, so that all 20 hit work under way
                assert_complete(path, expected)
                path = tmp_path / f"killed-{kills}"
    code, output = finish(*generate, "-o", path)
    assert code == 0, output
    assert_complete(path, expected)


def assert_complete(path, expected):
    report = verify_collection(path)
    assert report.episodes == EPISODES, "an episode was lost or doubled"
    assert open_collection(path).content_hash == expected
    assert not list(path.rglob(".tmp*"))


@pytest.mark.parametrize("algo", METHODS)
def test_a_killed_run_resumes_bit_identical(tmp_path, make_collection, algo):
    make_collection(tmp_path / "stores" / "point", tasks=6)
    command = ["train", "--stores", tmp_path / "stores", "--data", "mixed", "--scale", "smoke", "--algo", algo, "--set",
               "steps=400", "--set", "checkpoint_every=20", "--set", "eval_every=200", "--seeds", "2"]  # fmt: skip
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    code, output = finish(*command, "--runs", straight, "--name", "run")
    assert code == 0, output
    moments = random.Random(1)
    for where in KILLED_IN:
        before = checkpoints(killed, where)
        process = start(*command, "--runs", killed, "--name", "run", "--resume")
        while not checkpoints(killed, where) - before:  # before that a kill hits imports, and nothing is resumed
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)
        time.sleep(moments.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.5)
    code, output = finish(*command, "--runs", killed, "--name", "run", "--resume")
    assert code == 0, output
    folders = {path.parent.parent.relative_to(straight) for path in checkpoints(straight)}
    assert len(folders) == (3 if algo == "mbml" else 2), "two seeds, and MBML's first stage"
    for folder in folders:
        assert_same_training(straight / folder, killed / folder)


def checkpoints(runs, where="*"):
    """The checkpoints of seeds and of MBML's first stage in a folder of runs."""
    return set(runs.glob(f"{where}/*/checkpoints/step_*"))


def assert_same_training(straight, killed):
    """The last checkpoint to the byte, what MBML's first stage predicts too, and the logs but for their seconds."""
    last = max((straight / "checkpoints").iterdir()).relative_to(straight)
    for file in [*(straight / last).iterdir(), *straight.glob("predictions.*")]:
        assert file.read_bytes() == (killed / file.relative_to(straight)).read_bytes(), file
    for log in straight.glob("*.jsonl"):
        rows = [[json.loads(line) for line in (run / log.name).read_text().splitlines()] for run in (straight, killed)]
        for row in rows[0] + rows[1]:
            row.pop("time/seconds", None)
        assert rows[0] == rows[1], log


def limited_files(size):
    """Make writes beyond `size` bytes fail like a full disk, in the child and its workers."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.parametrize("engine", ["sb3", "fleet"])
@pytest.mark.parametrize("size", [300, 3_000, 12_000])
def test_generate_on_a_full_disk(tmp_path, size, engine):
    generate = [*GENERATE, "--engine", engine, "--set", "fleet.size=2"]
    code, output = finish(*generate, "-o", tmp_path / "point", preexec_fn=limited_files(size))
    assert code == 1, output
    assert "Traceback" not in output
    assert "free" in output
    assert "run the same command again" in output
    code, output = finish(*generate, "-o", tmp_path / "point")
    assert code == 0, output
    assert verify_collection(tmp_path / "point").episodes == EPISODES


@pytest.mark.parametrize("algo", METHODS)
def test_train_on_a_full_disk(tmp_path, make_collection, algo):
    make_collection(tmp_path / "stores" / "point")
    command = ["train", "--stores", tmp_path / "stores", "--runs", tmp_path / "runs", "--data", "mixed", "--scale",
               "smoke", "--algo", algo, "--name", "run"]  # fmt: skip
    code, output = finish(*command, preexec_fn=limited_files(20_000))
    assert code == 1, output
    assert "Traceback" not in output
    assert "disk full while writing" in output
    advice = " ".join(output.split("continue with: focal-cli ")[1].split())
    code, output = finish(*shlex.split(advice))
    assert code == 0, output
