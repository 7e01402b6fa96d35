"""docs/sharing.md: its commands do what it says, typed in order by a user with a key and an object store."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .object_store import BUCKET, WRITER, seaweed

DOCUMENT = (Path(__file__).parents[1] / "docs" / "sharing.md").read_text()
TOOLS = ("ssh-keygen", "unzip", "sha256sum")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(TOOLS)}"),
]


def test_the_commands_in_order(tmp_path):
    blocks = re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL)
    lines = [line for line in "".join(blocks).splitlines() if not line.startswith("export ")]
    assert sum(line.startswith("focal-cli ") for line in lines) == 9
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / ".ssh" / "id_ed25519"], check=True)
    script = [
        "set -euo pipefail",
        f'focal-cli() {{ "{sys.executable}" -m focal.cli "$@"; }}',
        "focal-cli data generate --env point --scale smoke --author 'Ada Lovelace <ada@team-a.example>'",
        *(line.replace("s3://team-a", f"s3://{BUCKET}") for line in lines),
        "cmp stores/sparse-point-robot/dataset.json pulled/point/dataset.json",
        "cmp stores/sparse-point-robot/dataset.json theirs/point/dataset.json",
    ]
    (tmp_path / "seaweed").mkdir()
    with seaweed(tmp_path / "seaweed") as port:
        environment = {
            **os.environ,
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": WRITER[0],
            "AWS_SECRET_ACCESS_KEY": WRITER[1],
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            ["bash", "-c", "\n".join(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'Good "focal-bundle" signature for ada@team-a.example' in done.stdout
    assert done.stdout.count("signed by ada@team-a.example (trusted)") == 3
