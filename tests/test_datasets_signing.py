"""Signatures: who is trusted, that a wrong one is always refused, and that OpenSSH alone can check ours."""

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from focal.datasets import pack_bundle, unpack_bundle, verify_bundle
from focal.datasets.signing import Trust
from focal.errors import FocalError, UsageError

from .bundle_tools import Files, files_of, refused, reseal_tags, write_files, zip_of

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")

NAME = "walks-1.0.0"
SIGNATURE = "tagmanifest-sha256.txt.sig"


def make_key(path: Path, passphrase: str = "", kind: str = "ed25519") -> Path:
    """A new key; its public half is beside it."""
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", "", "-f", path], check=True)
    return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    """The keys of Ada, who is trusted, and of Eve; `allowed` lists Ada's."""
    folder = tmp_path_factory.mktemp("keys")
    make_key(folder / "ada")
    make_key(folder / "eve")
    allow(folder / "allowed", "ada@example.org", folder / "ada")
    return folder


def allow(file: Path, who: str, key: Path, options: str = "") -> Path:
    """Write a line for one signer."""
    file.write_text(f"{who} {options} {key.with_name(key.name + '.pub').read_text()}")
    return file


@pytest.fixture(scope="module")
def signed(make_collection, keys, tmp_path_factory) -> Path:
    """A bundle file that Ada signed."""
    path = make_collection(tmp_path_factory.mktemp("stores") / "walks", tasks=2, skills=(0.0, 1.0), episodes=2).path
    out, report = pack_bundle(path, tmp_path_factory.mktemp("signed") / "x.zip", keys / "ada")
    assert report.trust.state == "unknown", "the packer's own list of trusted keys plays no part"
    assert report.trust.key.startswith("ED25519 SHA256:")
    return out


@pytest.fixture(scope="module")
def bag(signed, tmp_path_factory) -> Files:
    """The same bundle's files."""
    folder = tmp_path_factory.mktemp("bag")
    shutil.unpack_archive(signed, folder, "zip")
    return files_of(folder / NAME)


def sign(data: bytes, key: Path, folder: Path, namespace: str = "focal-bundle") -> bytes:
    """Sign without our software."""
    (folder / "data").write_bytes(data)
    (folder / "data.sig").unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-Y", "sign", "-f", key, "-n", namespace, folder / "data"], check=True)
    return (folder / "data.sig").read_bytes()


# ---- the three states ----


def test_trusted(signed, keys, tmp_path):
    trust = verify_bundle(signed, keys / "allowed", require_signature=True).trust
    assert str(trust) == "signed by ada@example.org (trusted)"
    trusting = {"allowed_signers": keys / "allowed", "require_signature": True}
    collection, report = unpack_bundle(signed, tmp_path / "walks", **trusting)
    assert report.trust == trust
    assert not (collection.path / SIGNATURE).exists()


def test_unknown(signed, keys, tmp_path):
    eve = allow(tmp_path / "allowed", "eve@example.org", keys / "eve")
    (tmp_path / "empty").write_text("# nobody yet\n")
    for allowed in (None, eve, tmp_path / "empty"):
        trust = verify_bundle(signed, allowed).trust
        assert (trust.state, trust.signer) == ("unknown", "")
        assert str(trust).startswith("signed, signer unknown (ED25519 SHA256:")
        message = refused(lambda allowed=allowed: verify_bundle(signed, allowed, require_signature=True))
        assert "is signed, signer unknown (ED25519 SHA256:" in message
        assert "expected a trusted signer's signature (--require-signature)" in message
        assert 'WHO namespaces="focal-bundle" ssh-ed25519 AAAA...' in message


def test_unsigned(bag, keys, tmp_path):
    files = {name: data for name, data in bag.items() if name != SIGNATURE}
    path = zip_of(tmp_path / "x.zip", files, NAME)
    assert verify_bundle(path, keys / "allowed").trust == Trust("unsigned")
    assert str(Trust("unsigned")) == "unsigned"
    assert "is unsigned, expected a trusted" in refused(lambda: verify_bundle(path, keys / "allowed", True))
    message = refused(lambda: unpack_bundle(path, tmp_path / "s" / "w", require_signature=True))
    assert "is unsigned, expected a trusted" in message
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("options", ['namespaces="git"', 'valid-before="20200101"', 'valid-after="20990101"'])
def test_a_key_that_is_trusted_for_something_else(signed, keys, tmp_path, options):
    allowed = allow(tmp_path / "allowed", "ada@example.org", keys / "ada", options)
    assert verify_bundle(signed, allowed).trust.state == "unknown"
    refused(lambda: verify_bundle(signed, allowed, require_signature=True))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("namespaces=focal-bundle", ":1: bad options: missing start quote)"),
        ('valid-before="20200101"', ":1: key has expired: verify time "),
        ('namespaces="git"', ':1: key is not permitted for use in signature namespace "focal-bundle")'),
    ],
)
def test_why_a_listed_signer_is_unknown(signed, keys, tmp_path, options, reason):
    allowed = allow(tmp_path / "allowed", "ada@example.org", keys / "ada", options)
    assert reason in str(verify_bundle(signed, allowed).trust)
    assert reason in refused(lambda: verify_bundle(signed, allowed, require_signature=True))
    for other in (None, allow(tmp_path / "eve", "eve@example.org", keys / "eve")):
        assert verify_bundle(signed, other).trust.reason == "", "nothing is wrong with a file that does not list her"


def test_a_key_of_several_names(signed, keys, tmp_path):
    allowed = allow(tmp_path / "allowed", "ada@example.org,lovelace@example.org", keys / "ada")
    assert verify_bundle(signed, allowed).trust.signer == "ada@example.org"


# ---- wrong signatures ----


def test_a_signature_of_another_bundle(bag, keys, tmp_path):
    """A replay: Ada did sign, but something else."""
    for number, signature in enumerate((
        sign(b"other", keys / "ada", tmp_path),
        sign(bag["tagmanifest-sha256.txt"], keys / "ada", tmp_path, namespace="git"),
        bag[SIGNATURE][:200] + (b"B" if bag[SIGNATURE][200:201] == b"A" else b"A") + bag[SIGNATURE][201:],
        b"",
        b"\xff" * 100,
        bag[SIGNATURE][:150],
    )):  # fmt: skip
        path = zip_of(tmp_path / f"{number}.zip", {**bag, SIGNATURE: signature}, NAME)
        for allowed in (None, keys / "allowed"):
            message = refused(lambda path=path, allowed=allowed: verify_bundle(path, allowed))
            assert "tagmanifest-sha256.txt.sig is no good signature (" in message
        assert "is no good signature" in refused(lambda path=path: unpack_bundle(path, tmp_path / "s" / "w"))
    assert not (tmp_path / "s").exists()


def test_a_change_anywhere_breaks_the_chain(bag, keys, tmp_path):
    """The signature covers the tagmanifest, which covers the rest: changed data need another signature."""
    info = {**bag, "bag-info.txt": bag["bag-info.txt"].replace(b"Author: Ada", b"Author: Eve")}
    folder = write_files(tmp_path / NAME, info)
    assert "bag-info.txt is damaged" in refused(lambda: verify_bundle(folder, keys / "allowed"))
    write_files(folder, reseal_tags(info))
    assert "is no good signature" in refused(lambda: verify_bundle(folder, keys / "allowed"))
    eves = sign(reseal_tags(info)["tagmanifest-sha256.txt"], keys / "eve", tmp_path)
    write_files(folder, {**reseal_tags(info), SIGNATURE: eves})
    message = refused(lambda: verify_bundle(folder, keys / "allowed", require_signature=True))
    assert "signed, signer unknown" in message


def test_a_huge_signature(bag, tmp_path):
    path = zip_of(tmp_path / "x.zip", {**bag, SIGNATURE: bytes(2**21)}, NAME)
    assert "is larger than the 1048576 bytes" in refused(lambda: verify_bundle(path))


# ---- with OpenSSH alone ----


def test_others_verify_it_without_our_software(bag, keys, tmp_path):
    folder = write_files(tmp_path / NAME, bag)
    command = ["ssh-keygen", "-Y", "verify", "-n", "focal-bundle", "-f", keys / "allowed", "-I", "ada@example.org"]
    command += ["-s", folder / SIGNATURE]
    subprocess.run(command, input=bag["tagmanifest-sha256.txt"], check=True, capture_output=True)
    bagit = [sys.executable, Path(sys.executable).with_name("bagit.py"), "--validate", "--quiet", folder]
    subprocess.run(bagit, check=True)


def test_a_signature_made_without_our_software(bag, keys, tmp_path):
    signature = sign(bag["tagmanifest-sha256.txt"], keys / "ada", tmp_path)
    path = zip_of(tmp_path / "x.zip", {**bag, SIGNATURE: signature}, NAME)
    assert verify_bundle(path, keys / "allowed").trust.state == "trusted"
    assert signature == bag[SIGNATURE], "ed25519 signs without chance, so signed bundles have the same bytes, too"


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_other_kinds_of_keys(signed, tmp_path, kind):
    collection, _ = unpack_bundle(signed, tmp_path / "walks")
    key = make_key(tmp_path / "key", kind=kind)
    out, _ = pack_bundle(collection.path, tmp_path / NAME, key, as_folder=True)
    assert str(verify_bundle(out, allow(tmp_path / "allowed", "bo", key)).trust) == "signed by bo (trusted)"


# ---- keys ----


def test_no_key_and_no_ssh_keygen(signed, bag, keys, tmp_path, monkeypatch):
    collection, _ = unpack_bundle(signed, tmp_path / "walks")
    with pytest.raises(UsageError, match=r"no key at .*; make one: ssh-keygen -t ed25519"):
        pack_bundle(collection.path, tmp_path / "x.zip", tmp_path / "nothing")
    (tmp_path / "no-key").write_text("hello")
    with pytest.raises(FocalError, match=r"ssh-keygen cannot sign with .*no-key.*\(.*\); check the key"):
        pack_bundle(collection.path, tmp_path / "x.zip", tmp_path / "no-key")
    assert not (tmp_path / "x.zip").exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    for call in (lambda: pack_bundle(collection.path, tmp_path / "x.zip", keys / "ada"), lambda: verify_bundle(signed)):
        with pytest.raises(FocalError, match="ssh-keygen is not installed, and signatures need it; install OpenSSH"):
            call()
    pack_bundle(collection.path, tmp_path / "x.zip")
    assert verify_bundle(tmp_path / "x.zip").trust.state == "unsigned"


def test_a_passphrase_is_asked_for_on_the_terminal(signed, tmp_path):
    collection, _ = unpack_bundle(signed, tmp_path / "walks")
    key = make_key(tmp_path / "key", passphrase="open sesame")
    command = [sys.executable, "-m", "focal.cli", "bundle", "pack", str(collection.path), "--sign", str(key)]
    child, terminal = pty.fork()
    if child == 0:
        try:
            os.chdir(tmp_path)
            os.execv(sys.executable, [*command, "-o", "x.zip"])
        finally:
            os._exit(127)
    shown = b""
    while b"passphrase" not in shown:
        shown += os.read(terminal, 1000)
    os.write(terminal, b"open sesame\n")
    try:
        while piece := os.read(terminal, 1000):
            shown += piece
    except OSError:  # how a terminal says that the other side is gone
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, shown
    assert b"signed, signer unknown (ED25519" in shown.replace(b"\r\n", b"")
    assert verify_bundle(tmp_path / "x.zip", allow(tmp_path / "allowed", "cy", key)).trust.signer == "cy"


def test_a_locked_key_without_a_terminal_is_an_error(signed, tmp_path):
    collection, _ = unpack_bundle(signed, tmp_path / "walks")
    key = make_key(tmp_path / "key", passphrase="open sesame")
    command = [sys.executable, "-m", "focal.cli", "bundle", "pack", collection.path, "--sign", key, "-o", "x.zip"]
    done = subprocess.run(
        command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, start_new_session=True
    )
    assert done.returncode == 1
    assert "ssh-keygen cannot sign with" in done.stderr
    assert "passphrase" in done.stderr
    assert not (tmp_path / "x.zip").exists()


def test_a_key_in_the_agent(signed, tmp_path, monkeypatch):
    """Only the public half is a file; the agent has the other."""
    collection, _ = unpack_bundle(signed, tmp_path / "walks")
    key = make_key(tmp_path / "key")
    socket = tmp_path / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.PIPE)
    try:
        assert agent.stdout.readline()  # it prints where its socket is
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        subprocess.run(["ssh-add", "-q", key], check=True)
        key.unlink()
        out, _ = pack_bundle(collection.path, tmp_path / "x.zip", key.with_name("key.pub"))
    finally:
        agent.terminate()
        agent.wait()
    assert verify_bundle(out, allow(tmp_path / "allowed", "di", key)).trust.signer == "di"
