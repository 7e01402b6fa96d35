"""Collections and bags on an object store: s3://, and gs://, az://, file:// as obstore (extra `s3`) gives them.

Credentials, endpoint and region come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN,
AWS_ENDPOINT_URL, AWS_REGION; AWS_SKIP_SIGNATURE=true for public data), never from a URL, and no message repeats them or
what the server answered: servers quote keys. obstore repeats a request that failed for a passing reason (no connection,
a cut one, 5xx) a few times with growing pauses, and a download that was cut goes on at its last byte; then the error
is final.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from ..errors import FocalError, UsageError
from .bag import MANIFEST, MAX_FILES, TAGMANIFEST
from .opening import DOCUMENT
from .sources import side_by_side
from .storage import AGAIN

SCHEMES = ("s3", "gs", "az", "file")
SIDE_BY_SIDE = 16
"""Requests under way at once: small ones only wait for the network."""
PIECE_BYTES = 2**18
"""A download reaches the disk or the hash in pieces of this size."""
PART_BYTES = 2**24
"""An upload longer than this is made of parts, which are repeated one by one."""

_CLIENT = {"connect_timeout": "10s", "read_timeout": "2m", "timeout": "1h"}
_RETRIES = {
    "max_retries": 4,
    "retry_timeout": timedelta(minutes=3),
    "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=10), "base": 2},
}
_CONTINUE = "run the same command again"
_KEYS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_BAD_KEYS = ("SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken", "InvalidToken", "TokenRefreshRequired")


@dataclass(frozen=True)
class Remote:
    """A folder on an object store."""

    url: str
    """What messages call it, and a user can type again: for a bag's payload the bag."""
    store: Any = field(repr=False, compare=False)
    """obstore's, rooted at the folder."""

    def __str__(self) -> str:
        return self.url

    def sizes(self, skip: tuple[str, ...] = ()) -> dict[str, int]:
        """See `Source`; from the listing, so nothing is downloaded."""
        found: dict[str, int] = {}
        with asking(self.url):
            for page in self.store.list(chunk_size=1000):
                found.update((entry["path"], entry["size"]) for entry in page)
                if len(found) > MAX_FILES:
                    raise FocalError(f"{self.url} lists more than {MAX_FILES} objects, so it is no bundle; {AGAIN}")
        # browsers of object stores keep empty objects where a folder would be
        folders = {"", *(name.rpartition("/")[0] for name in found)}
        files = {name: size for name, size in found.items() if size or name not in folders}
        return {name: size for name, size in sorted(files.items()) if name.partition("/")[0] not in skip}

    def read(self, name: str, limit: int) -> bytes:
        """See `Source`; the size is compared before the content is fetched."""
        with asking(self.url, name):
            found = self.store.get(name)
            if found.meta["size"] > limit:
                raise FocalError(f"{self.url}: {name} is larger than the {limit} bytes allowed there; {AGAIN}")
            return bytes(found.bytes())

    def read_many(self, names: Iterable[str], limit: int) -> Iterator[tuple[str, bytes]]:
        """See `Source`."""
        return side_by_side(lambda name: (name, self.read(name, limit)), names, SIDE_BY_SIDE)

    def sha256(self, name: str) -> str:
        """See `Source`; fetched, never what the server says of itself."""
        digest = hashlib.sha256()
        for piece in self.stream(name):
            digest.update(piece)
        return digest.hexdigest()

    def exists(self, name: str) -> bool:
        """See `Source`."""
        with asking(self.url, name):
            try:
                self.store.head(name)
            except FileNotFoundError:
                return False
        return True

    def stream(self, name: str, start: int = 0) -> Iterator[bytes]:
        """Fetch a file from its byte `start`, one that it has, to its end, in pieces."""
        with asking(self.url, name):
            found = self.store.get(name, options={"range": {"offset": start}} if start else None)
            pieces = found.stream(min_chunk_size=PIECE_BYTES)
        while True:
            with asking(self.url, name):  # not around the `yield`: what the reader does is not the network's fault
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def put(self, name: str, data: bytes, sha256: str) -> None:
        """Write a file, over one that is there; in parts side by side where it is large. `sha256` is kept beside it."""
        kept = {"sha256": sha256} if self._keeps_attributes else None
        with asking(self.url, name):
            self.store.put(name, data, attributes=kept, chunk_size=PART_BYTES, max_concurrency=4)

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file unless one of that name is there: of several writers at once, one is told True."""
        with asking(self.url, name):
            try:
                self.store.put(name, data, mode="create", use_multipart=False)
            except _exceptions().AlreadyExistsError:
                return False
        return True

    def holds(self, name: str, sha256: str) -> bool:
        """Whether a file that is there was put with this sha256; fetched and hashed where the store keeps none."""
        if not self._keeps_attributes:
            return self.sha256(name) == sha256
        with asking(self.url, name):
            return self.store.get(name, options={"head": True}).attributes.get("sha256") == sha256

    @property
    def _keeps_attributes(self) -> bool:
        return not self.url.startswith("file:")


def open_remote(url: str, payload: str) -> Remote:
    """Return the source of the collection at `url`: inside its folder `payload` where `url` is a bag, else `url`."""
    remote = connect(url)
    if remote.exists(TAGMANIFEST):
        return Remote(remote.url, connect(f"{remote.url}/{payload}").store)
    if remote.exists(DOCUMENT):
        return remote
    raise _no_bundle(remote)


def open_bag_at(url: str) -> Remote:
    """Return the source of the bag at `url`. Raises `FocalError` saying what is there where there is none."""
    remote = connect(url)
    if not remote.exists(TAGMANIFEST):
        raise _no_bundle(remote)
    return remote


def _no_bundle(remote: Remote) -> FocalError:
    """What is at a URL that has no tagmanifest."""
    names = remote.sizes()
    if not names:
        return FocalError(f"nothing is at {remote}, expected a bundle; put one there: focal-cli bundle push FILE URL")
    if MANIFEST in names:
        above = remote.url.rpartition("/")[0]
        return FocalError(f"{remote} is a bundle whose push was cut; finish it: focal-cli bundle push FILE {above}")
    return FocalError(f"{remote} is no bundle ({TAGMANIFEST} is missing), expected what focal-cli bundle push writes")


def connect(url: str, create: bool = False) -> Remote:
    """Return the folder at `url`. No request is made; `create` makes the folder of a file:// URL.

    Raises `FocalError` where obstore is not installed, `UsageError` for a URL that names no object store.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise UsageError("the URL is malformed, expected s3://BUCKET/PATH") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise UsageError(
            f"the {parts.scheme}:// URL has more than a bucket and a path; credentials belong into the environment: "
            f"export {_KEYS['s3']}"
        )
    if parts.scheme not in SCHEMES or not (parts.netloc or parts.path.strip("/")):
        expected = "s3://BUCKET/PATH (gs://, az:// and file:// work too)"
        raise UsageError(f"'{url}' names no object store, expected {expected}")
    _check_environment()
    try:
        from obstore.store import from_url
    except ImportError:
        raise FocalError(
            f"{url} needs obstore, which is not installed; in the checkout: pip install -c constraints.txt -e '.[s3]'"
        ) from None
    options: dict[str, Any] = {}
    if parts.scheme == "file":
        options = {"mkdir": create}
    else:
        client = {**_CLIENT, "allow_http": _http_allowed()}
        options = {"client_options": client, "retry_config": _RETRIES}
    url = url.rstrip("/")
    with asking(url):
        return Remote(url, from_url(url, **options))


def _check_environment() -> None:
    """Refuse what makes obstore's library abort the whole program."""
    for name, value in os.environ.items():
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")) and not value.isprintable():
            raise UsageError(f"{name} holds a line break or another control character; export it again without")
    if (endpoint := _endpoint()) and not re.match(r"https?://[^/]", endpoint):
        raise UsageError("AWS_ENDPOINT_URL is no URL, expected for example https://s3.example.org; export it again")


def _http_allowed() -> bool:
    """Plain http is for this machine; for any other only where the user says so."""
    return os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("true", "1") or bool(
        re.fullmatch(r"localhost|127\.\d+\.\d+\.\d+|::1", urlsplit(_endpoint()).hostname or "")
    )


def _endpoint() -> str:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


@contextlib.contextmanager
def asking(url: str, name: str = "") -> Iterator[None]:
    """Turn what obstore raises while it asks for `name` at `url` into a `FocalError` without credentials."""
    try:
        yield
    except FocalError:
        raise
    except BaseException as error:
        expected = _exceptions().BaseError | OSError | ValueError | NotImplementedError
        if not isinstance(error, expected) and type(error).__name__ != "PanicException":  # a panic of the Rust library
            raise
        # not `from error`: its text quotes the server's answer, and that may quote the key
        raise _explain(url, name, error) from None


def _exceptions() -> Any:
    from obstore import exceptions

    return exceptions


def _explain(url: str, name: str, error: BaseException) -> FocalError:
    """Say what was found, what was expected and what to do; of the server's answer only its status and error code."""
    text, kind = str(error), type(error).__name__
    code, status = _first(r"<Code>(\w{1,60})</Code>", text), _first(r"status code: (\d{3})", text)
    answer = code or status
    scheme, bucket = urlsplit(url).scheme, urlsplit(url).netloc
    server = urlsplit(_endpoint()).netloc.rpartition("@")[2] if scheme == "s3" else ""
    server, keys = server or f"the {scheme} service", _KEYS.get(scheme, "the credentials")
    if "BadScheme" in text:
        fault, advice = f"{server} is plain http, expected https", "if you trust it: export AWS_ALLOW_HTTP=true"
    elif re.search(r"169\.254\.169\.254|metadata\.google\.internal", text):  # asked when there is nothing else
        fault, advice = "no credentials found", f"export {keys}"
        advice += ", or AWS_SKIP_SIGNATURE=true for public data" if scheme == "s3" else ""
    elif code == "NoSuchBucket":
        fault, advice = f"{server} has no bucket '{bucket}'", "check the name, or create the bucket first"
    elif code in ("PermanentRedirect", "AuthorizationHeaderMalformed") or status == "301":
        fault, advice = f"the bucket is in another region ({answer})", "export AWS_REGION=ITS_REGION"
    elif code in _BAD_KEYS:
        fault, advice = f"{server} refuses the key ({code}), expected one it knows", f"export {keys} anew"
    elif kind in ("PermissionDeniedError", "UnauthenticatedError") or status in ("401", "403"):
        fault = f"{server} refuses access ({answer or kind}), expected a key that may do this"
        advice = f"check {keys}, or ask the bucket's owner"
    elif isinstance(error, FileNotFoundError) or status == "404":
        fault, advice = "it is not there", "check the URL: list what is there with your object store's own tool"
    elif "kind: Connect" in text:
        reason = "refused" if "ConnectionRefused" in text else "unknown host" if "dns error" in text else "no answer"
        fault = f"cannot connect to {server} ({reason})"
        advice = f"check the network and AWS_ENDPOINT_URL, then {_CONTINUE}"
    elif "HTTP error" in text or status.startswith("5") or status == "429":
        fault, advice = f"the connection to {server} was cut or timed out ({answer or 'no answer'})", _CONTINUE
    elif kind == "InvalidPathError":
        fault, advice = "an object there has a name no file of a bundle has", "delete it"
    else:
        words = " ".join(re.split(r"<\?xml|Debug source", text)[0].split())
        fault = re.sub(r"//[^/\s]*@", "//", words)[:200] or kind
        advice = f"check the URL and the environment, then {_CONTINUE}"
    return FocalError(f"{url}: {name + ': ' if name else ''}{fault}; {advice}")


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""
