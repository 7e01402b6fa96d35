"""docs/format.md says enough: its own reader, run without this package, reads and checks a collection."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[1] / "docs" / "format.md"


@pytest.fixture(scope="module")
def readers() -> list[str]:
    """The Python blocks of the document."""
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


def test_the_foreign_reader_agrees(readers, collection, tmp_path):
    script = tmp_path / "reader.py"
    script.write_text("import sys\nsys.modules['focal'] = None  # an import would fail\n" + readers[0])
    result = subprocess.run([sys.executable, script, collection.path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.split("\n")
    assert lines[4] == collection.content_hash
    assert lines[0].startswith("0 {'goal': [")
    assert lines[0].endswith("(1000, 2) (1000, 2) 0")


def test_the_foreign_reader_finds_a_changed_digit(readers, make_collection, tmp_path):
    path = make_collection(tmp_path / "walks").path
    document = json.loads((path / "dataset.json").read_text())
    (path / "dataset.json").write_text(json.dumps(document | {"content_hash": "0" * 64}))
    script = tmp_path / "reader.py"
    script.write_text(readers[0])
    result = subprocess.run([sys.executable, script, path], capture_output=True, text=True)
    assert 'assert hashlib.sha256(canonical(tasks)).hexdigest() == document["content_hash"]' in result.stderr


def test_the_short_example_runs(readers, collection):
    example = readers[1].replace("stores/walker-2d-params", str(collection.path)).replace("(100,", "(-100,")
    result = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1 + 3  # the counts, and three training tasks
