"""`focal-cli bundle`: what it prints, what it asks for, its exit codes."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from focal.cli import main
from focal.datasets import open_collection


def run(*arguments, code=0):
    """Run a command; return its output, or its one error line."""
    result = CliRunner().invoke(main, ["bundle", *map(str, arguments)])
    assert result.exit_code == code, (result.exit_code, result.output, result.stderr)
    assert "Traceback" not in result.output
    return result.stdout if code == 0 else result.stderr.strip().splitlines()[-1]


@pytest.fixture
def stores(make_collection, tmp_path, monkeypatch):
    """A folder of one collection; the working folder and the home are new and empty."""
    make_collection(tmp_path / "stores" / "walks", tasks=2, skills=(0.0, 1.0), episodes=2)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "work"))
    monkeypatch.delenv("FOCAL_ALLOWED_SIGNERS", raising=False)
    return tmp_path / "stores"


def test_pack_verify_unpack(stores, tmp_path):
    text = run("pack", "--stores", stores)
    assert "walks-1.0.0.focal.zip: walks-1.0.0 of sparse-point-robot" in text
    assert "licence CC-BY-4.0, by Ada Lovelace, unsigned" in text
    command = text.splitlines()[-1].split("focal-cli bundle ")[1]
    assert "good" in run("verify", "walks-1.0.0.focal.zip")
    text = run(*shlex.split(command), "--stores", tmp_path / "theirs")
    assert "licence CC-BY-4.0, by Ada Lovelace, unsigned" in text
    assert f"train --collection {tmp_path}/theirs/sparse-point-robot --data mixed" in text
    found, given = (open_collection(path) for path in (tmp_path / "theirs" / "sparse-point-robot", stores / "walks"))
    assert found.content_hash == given.content_hash
    assert "unpacked" in run("unpack", "walks-1.0.0.focal.zip", "-o", tmp_path / "there")
    run("pack", stores / "walks", "--folder", "-o", tmp_path / "bag")
    assert (tmp_path / "bag" / "bagit.txt").is_file()
    assert "good" in run("verify", tmp_path / "bag")


def test_json(stores, tmp_path):
    content = open_collection(stores / "walks").content_hash
    expected = {
        "path": "x.zip", "name": "walks-1.0.0", "family": "sparse-point-robot", "licence": "CC-BY-4.0",
        "authors": ["Ada Lovelace"], "content_hash": content,
        "trust": {"state": "unsigned", "signer": "", "key": "", "reason": ""},
    }  # fmt: skip
    for words in (("pack", stores / "walks", "-o", "x.zip"), ("verify", "x.zip")):
        document = json.loads(run(*words, "--json"))
        assert document.pop("verified")["transitions"] == 160
        assert document == expected
    assert json.loads(run("unpack", "x.zip", "-o", "walks", "--json"))["collection"] == "walks"


def test_signatures(stores, tmp_path, monkeypatch):
    if not shutil.which("ssh-keygen"):
        pytest.skip("ssh-keygen is not installed")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    allowed = tmp_path / "work" / ".config" / "focal" / "allowed_signers"
    assert "signed, signer unknown (ED25519" in run("pack", stores / "walks", "-o", "x.zip", "--sign", tmp_path / "key")
    assert "signed, signer unknown (ED25519" in run("verify", "x.zip")
    assert "--allowed-signers" in run("verify", "x.zip", "--require-signature", code=1)
    allowed.parent.mkdir(parents=True)
    allowed.write_text(f"ada@example.org {(tmp_path / 'key.pub').read_text()}")
    assert "signed by ada@example.org (trusted)" in run("verify", "x.zip", "--require-signature")
    assert "signed by ada@example.org (trusted)" in run("unpack", "x.zip", "--require-signature")
    (tmp_path / "nobody").write_text("")
    monkeypatch.setenv("FOCAL_ALLOWED_SIGNERS", str(tmp_path / "nobody"))
    assert "signed, signer unknown" in run("verify", "x.zip")
    assert "signed by ada@example.org (trusted)" in run("verify", "x.zip", "--allowed-signers", allowed)
    assert "no allowed signers at" in run("verify", "x.zip", "--allowed-signers", "nothing", code=2)


def test_mistakes(stores, tmp_path):
    assert "leave --author out" in run("pack", stores / "walks", "--author", "Eve", code=2)
    assert "no collection at" in run("pack", "nothing", code=1)
    assert "no bundle at" in run("verify", "nothing.zip", code=1)
    run("pack", stores / "walks", "-o", "x.zip")
    assert "more than the 2000 allowed; raise --max-size" in run("verify", "x.zip", "--max-size", "2kB", code=1)
    for size, fits in (("1GB", 0), ("1.5 MB", 0), ("10TB", 0), ("99", 1)):
        run("verify", "x.zip", "--max-size", size, code=fits)
    assert "--max-size got 'much', expected a size, for example --max-size 50GB" in run(
        "verify", "x.zip", "--max-size", "much", code=2
    )
    with open("x.zip", "ab") as file:
        file.write(b"x")
    assert "data were added at its end" in run("unpack", "x.zip", code=1)


@pytest.mark.parametrize(("output", "named"), [(".", "NAME"), ("", "NAME"), ("..", "../NAME"), ("x/..", "x/../NAME")])
def test_a_place_without_a_name_is_refused_before_any_work(stores, tmp_path, output, named):
    run("pack", stores / "walks", "-o", tmp_path / "x.zip")
    for words in (
        ("unpack", tmp_path / "x.zip", "-o", output),
        ("pull", "s3://bucket/nothing", "-o", output),
        ("pack", stores / "walks", "--folder", "-o", output),
    ):
        assert f"expected a new folder; name it, for example: -o {named}" in run(*words, code=2)
    assert "-o " in run("unpack", tmp_path / "x.zip", "-o", tmp_path / "work", code=2), "the current folder by its path"
    assert list((tmp_path / "work").iterdir()) == []


def test_verifying_needs_neither_torch_nor_gymnasium(stores):
    """Seconds of imports, and code that a check of foreign data has no need of."""
    run("pack", stores / "walks", "-o", "x.zip")
    script = (
        "import sys; from focal.cli import main\ntry: main(['bundle', 'verify', 'x.zip'])\nfinally: print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "gymnasium", "matplotlib"} & set(done.stdout.split())
