"""A bundle's optional signature: OpenSSH's, over tagmanifest-sha256.txt, with the keys everybody has already.

    ssh-keygen -Y sign   -n focal-bundle -f KEY tagmanifest-sha256.txt              makes ...txt.sig
    ssh-keygen -Y verify -n focal-bundle -f allowed_signers -I WHO -s ...sig < tagmanifest-sha256.txt

The tagmanifest hashes every other file, so the signature covers all. Whose keys are trusted says a file of the
receiver's, one line per signer (ssh-keygen(1), ALLOWED SIGNERS):

    ada@example.org namespaces="focal-bundle" ssh-ed25519 AAAAC3...
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import FocalError, UsageError
from .bag import FETCH_AGAIN, MAX_TAG_BYTES, SIGNATURE, TAGMANIFEST, Bag

NAMESPACE = "focal-bundle"
_SECONDS = 60


@dataclass(frozen=True)
class Trust:
    """What is known about who signed a bundle. A wrong signature is no state: it is refused."""

    state: Literal["trusted", "unknown", "unsigned"]
    signer: str = ""
    """Whom the receiver's file calls the owner of the key."""
    key: str = ""
    """The key's kind and fingerprint."""
    reason: str = ""
    """Of an unknown signer: what ssh-keygen finds wrong in the receiver's file, such as a line that has expired."""

    def __str__(self) -> str:
        """One of `signed by X (trusted)`, `signed, signer unknown`, `unsigned`, with the key's fingerprint."""
        if self.state == "trusted":
            return f"signed by {self.signer} (trusted)"
        reason = f"; {self.reason}" if self.reason else ""
        return f"signed, signer unknown ({self.key}{reason})" if self.state == "unknown" else "unsigned"


def sign(data: bytes, key: Path) -> bytes:
    """Sign `data` with the private key in the file `key`, or, for a public one, with the ssh agent that holds it.

    A passphrase is asked for on the terminal. Raises `UsageError` without such a file, `FocalError` where ssh-keygen
    refuses or is not installed.
    """
    if not key.is_file():
        raise UsageError(f"no key at {key}, expected a private SSH key; make one: ssh-keygen -t ed25519 -f {key}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, TAGMANIFEST)
        file.write_bytes(data)
        done = _ssh_keygen(["-q", "-Y", "sign", "-f", key, "-n", NAMESPACE, file], data=None)
        if done.returncode:
            raise FocalError(f"ssh-keygen cannot sign with {key}{_reason(done)}; check the key and run it again")
        return file.with_name(SIGNATURE).read_bytes()


def check_signature(bag: Bag, allowed_signers: Path | None, required: bool = False) -> Trust:
    """Check the signature of a bag, before its payload is believed.

    `allowed_signers` names the trusted keys; without it every signer is unknown. Raises `FocalError` for a wrong
    signature, for one that cannot be checked since ssh-keygen is missing, and where `required` for any that is not
    trusted.
    """
    source, trust = bag.source, Trust("unsigned")
    if source.exists(SIGNATURE):
        signature = source.read(SIGNATURE, MAX_TAG_BYTES)
        trust = verify_signature(str(source), bag.tagmanifest, signature, allowed_signers)
    if required and trust.state != "trusted":
        raise FocalError(
            f"{source} is {trust}, expected a trusted signer's signature (--require-signature); ask for a signed one, "
            f'or list the signer in the file of --allowed-signers: WHO namespaces="{NAMESPACE}" ssh-ed25519 AAAA...'
        )
    return trust


def verify_signature(where: str, data: bytes, signature: bytes, allowed_signers: Path | None = None) -> Trust:
    """Return who signed `data`. Raises `FocalError`, which names `where`, for a wrong signature."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, SIGNATURE)
        file.write_bytes(signature)
        good = _ssh_keygen(["-Y", "check-novalidate", "-n", NAMESPACE, "-s", file], data)
        if good.returncode:
            raise FocalError(f"{where}: {SIGNATURE} is no good signature{_reason(good)}; {FETCH_AGAIN}")
        match = re.search(r"with (\S+) key (\S+)", good.stdout.decode(errors="replace"))
        key, reason = " ".join(match.groups()) if match else "key unknown", ""
        if allowed_signers:
            found = _ssh_keygen(["-Y", "find-principals", "-s", file, "-f", allowed_signers])
            reason = _complaint(found)
            for who in re.split(r"[\n,]", found.stdout.decode(errors="replace")) if not found.returncode else []:
                options = ["-Y", "verify", "-n", NAMESPACE, "-f", allowed_signers, "-I", who, "-s", file]
                if who and not (done := _ssh_keygen(options, data)).returncode:
                    return Trust("trusted", who, key)
                reason = _complaint(done) if who else reason
    return Trust("unknown", key=key, reason=reason)


def _ssh_keygen(options: Sequence[str | Path], data: bytes | None = b"") -> subprocess.CompletedProcess[bytes]:
    """Run ssh-keygen; without `data` it shares the terminal, where it asks for a passphrase or the touch of a token."""
    terminal = data is None and sys.stdin is not None and sys.stdin.isatty()
    try:
        return subprocess.run(
            ["ssh-keygen", *map(str, options)],
            input=data,
            stdout=subprocess.PIPE,
            stderr=None if terminal else subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C"},
            timeout=None if data is None else _SECONDS,
            check=False,
        )
    except FileNotFoundError as error:
        raise FocalError(
            "ssh-keygen is not installed, and signatures need it; install OpenSSH, for example: "
            "apt-get install openssh-client"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise FocalError(f"ssh-keygen did not answer within {_SECONDS} s; {FETCH_AGAIN}") from error


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    """`_complaint` in brackets."""
    complaint = _complaint(done)
    return f" ({complaint})" if complaint else ""


def _complaint(done: subprocess.CompletedProcess[bytes]) -> str:
    """The last line ssh-keygen wrote to its error stream, but none that only says that no key is the signer's."""
    lines = [line for line in (done.stderr or b"").decode(errors="replace").splitlines() if line.strip()]
    lines = [line for line in lines if line != "No principal matched."]
    return "".join(filter(str.isprintable, lines[-1]))[:200] if lines else ""
