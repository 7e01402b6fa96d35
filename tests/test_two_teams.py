"""Two teams exchange data: one makes, signs and packs it; the other trusts the key, unpacks it and trains on it.

Each has a folder, a home and a key of its own, and types commands; nothing else passes between them but the bundle
and, once, the sender's public key.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from focal.datasets import open_collection

pytestmark = [
    pytest.mark.slow,  # 50 s; .ci/run runs it, too
    pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed"),
]


@dataclass
class Team:
    """A user with a home folder and a key."""

    home: Path
    mail: str

    def __post_init__(self) -> None:
        self.home.mkdir()
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.mail, "-f", self.home / "key"]
        subprocess.run(key, check=True)

    def types(self, *words: object, code: int = 0) -> str:
        """Run focal-cli in the home folder; return its output, or its one error line."""
        environment = {**os.environ, "HOME": str(self.home), "OMP_NUM_THREADS": "1"}
        for name in ("FOCAL_STORES", "FOCAL_RUNS", "FOCAL_CACHE", "FOCAL_ALLOWED_SIGNERS"):
            environment.pop(name, None)
        command = [sys.executable, "-m", "focal.cli", *map(str, words)]
        done = subprocess.run(command, cwd=self.home, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        if code:
            assert "Traceback" not in done.stderr
            assert len(done.stderr.strip().splitlines()) == 1
        return done.stderr if code else done.stdout

    def trusts(self, other: "Team") -> None:
        """Put the other's public key into the place focal-cli looks at."""
        folder = self.home / ".config" / "focal"
        folder.mkdir(parents=True, exist_ok=True)
        public = (other.home / "key.pub").read_text()
        (folder / "allowed_signers").write_text(f'{other.mail} namespaces="focal-bundle" {public}')


@pytest.fixture(scope="module")
def sender(tmp_path_factory) -> Team:
    team = Team(tmp_path_factory.mktemp("sender") / "ada", "ada@team-a.example")
    team.types("data", "generate", "--env", "point", "--scale", "smoke", "--author", "Ada <ada@team-a.example>")
    printed = team.types("bundle", "pack", "stores/sparse-point-robot", "-o", "data.focal.zip", "--sign", "key")
    assert "licence CC-BY-4.0, by Ada <ada@team-a.example>" in printed
    return team


@pytest.fixture
def receiver(tmp_path) -> Team:
    return Team(tmp_path / "bob", "bob@team-b.example")


def train(team: Team) -> bytes:
    """Train for a moment; return the last checkpoint's weights."""
    team.types("train", "--data", "mixed", "--name", "first")
    newest = sorted((team.home / "runs/first/seed_0/checkpoints").glob("step_*"))[-1]
    (weights,) = newest.glob("*.safetensors")
    return weights.read_bytes()


def test_from_generate_to_a_policy_trained_by_the_other_team(sender, receiver):
    bundle = shutil.copy(sender.home / "data.focal.zip", receiver.home)
    error = receiver.types("bundle", "unpack", bundle, "--require-signature", code=1)
    assert "signer unknown" in error
    assert "--allowed-signers" in error
    assert not (receiver.home / "stores").exists()

    receiver.trusts(sender)
    printed = receiver.types("bundle", "unpack", bundle, "--require-signature")
    assert "signed by ada@team-a.example (trusted)" in printed
    ours, theirs = (open_collection(team.home / "stores/sparse-point-robot") for team in (receiver, sender))
    assert ours.content_hash == theirs.content_hash
    assert ours.files == theirs.files

    assert train(receiver) == train(sender)  # the same data and seed give the same network, whoever trains it
    result = json.loads(receiver.types("test", "--json", "--episodes", 1, "--no-figures"))
    assert result["collection"]["content_hash"] == theirs.content_hash


def test_a_tampered_copy_is_refused(sender, receiver):
    receiver.trusts(sender)
    data = bytearray((sender.home / "data.focal.zip").read_bytes())
    place = data.index(b'"expert_from": 0.9')
    data[place + 17] ^= 1
    (receiver.home / "copy.focal.zip").write_bytes(data)
    error = receiver.types("bundle", "unpack", "copy.focal.zip", "--require-signature", code=1)
    assert "is damaged" in error
    assert not (receiver.home / "stores").exists()


def test_a_copy_signed_again_by_somebody_else_is_refused(sender, receiver, tmp_path):
    receiver.trusts(sender)
    mallory = Team(tmp_path / "mallory", sender.mail)  # the same name, another key
    mallory.types("bundle", "unpack", sender.home / "data.focal.zip")
    mallory.types("bundle", "pack", "stores/sparse-point-robot", "-o", "data.focal.zip", "--sign", "key")
    error = receiver.types("bundle", "unpack", mallory.home / "data.focal.zip", "--require-signature", code=1)
    assert "signer unknown" in error
    mallory.types("bundle", "pack", "stores/sparse-point-robot", "-o", "unsigned.focal.zip")
    error = receiver.types("bundle", "unpack", mallory.home / "unsigned.focal.zip", "--require-signature", code=1)
    assert "unsigned, expected a trusted signer's signature" in error
    assert not (receiver.home / "stores").exists()
