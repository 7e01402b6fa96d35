"""A real S3 server (SeaweedFS) on this machine, a network that breaks on demand, and a server that lies."""

import contextlib
import http.server
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from obstore.store import S3Store

BUCKET = "shared"
WRITER = ("writer-key", "writer-secret")
READER = ("reader-key", "reader-secret")
_BLOCK = 2**14


@contextlib.contextmanager
def seaweed(folder: Path) -> Iterator[int]:
    """Run the server with its data in `folder` and one bucket; yield the port of its S3 interface (plain http)."""
    program = shutil.which("weed") or str(Path(sys.executable).parent / "weed")
    keys = {"identities": [_identity(*WRITER, "Admin"), _identity(*READER, "Read", "List")]}
    (folder / "keys.json").write_text(json.dumps(keys))
    (folder / "data").mkdir()
    master, volume, filer, s3 = _free_ports(4)
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(
            [
                program, "-logtostderr=true", "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1", f"-master.port={master}", f"-volume.port={volume}", "-filer",
                f"-filer.port={filer}", "-s3", f"-s3.port={s3}", f"-s3.config={folder / 'keys.json'}",
                "-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.max=8", "-master.volumeSizeLimitMB=64",
                "-master.telemetry=false",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        _wait_until_healthy(server, s3, folder / "log")
        S3Store(
            BUCKET, endpoint=f"http://127.0.0.1:{s3}", access_key_id=WRITER[0], secret_access_key=WRITER[1],
            client_options={"allow_http": True},
        ).put("made", b"made")  # fmt: skip  # the first object takes seconds
        yield s3
    finally:
        server.terminate()
        try:
            server.wait(2)
        except subprocess.TimeoutExpired:  # it waits for open connections
            server.kill()
            server.wait()


def _identity(key: str, secret: str, *actions: str) -> dict:
    return {"name": key, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}


def _free_ports(count: int) -> list[int]:
    """Ports free together with the one 10,000 above, which SeaweedFS takes for gRPC."""
    ports: list[int] = []
    while len(ports) < count:
        with socket.socket() as low, socket.socket() as high, contextlib.suppress(OSError, OverflowError):
            low.bind(("127.0.0.1", 0))
            high.bind(("127.0.0.1", low.getsockname()[1] + 10_000))
            if (port := low.getsockname()[1]) not in ports:
                ports.append(port)
    return ports


def _wait_until_healthy(server: subprocess.Popen, port: int, log: Path) -> None:
    for _ in range(600):
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=1).close()
            return
        if server.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"SeaweedFS did not start: {log.read_text()[-2000:]}")


class Link:
    """A network connection to the server at `port`: counts what passes, is slow, or breaks for good after some bytes.

    With `cut` set, that many more bytes pass, both ways together; then every connection is closed at once, and new ones
    too until `cut` is None again.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self.cut: int | None = None
        self.pause = 0.0
        self.up = self.down = 0
        self.requests: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def reset(self) -> None:
        """Repair it and forget what passed."""
        self.cut, self.pause, self.up, self.down, self.requests = None, 0.0, 0, 0, []

    def close(self) -> None:
        """Stop for good."""
        self._listening.close()
        self._break()

    def asked(self, method: str) -> list[str]:
        """The paths of all requests of one method, without query."""
        return [path.partition("?")[0] for found, path in self.requests if found == method]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                if self.cut == 0:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self.target))
                self._open |= {client, server}
                threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_BLOCK):
                with self._lock:
                    if self.cut is not None:
                        data = data[: self.cut]
                        self.cut -= len(data)
                    if up and (match := re.match(rb"([A-Z]+) (\S+) HTTP/1.1\r\n", data)):
                        self.requests.append((match[1].decode(), match[2].decode()))
                    sink.sendall(data)
                    self.up, self.down = self.up + up * len(data), self.down + (not up) * len(data)
                if self.cut == 0:
                    self._break()
                    return
                if self.pause:
                    time.sleep(self.pause)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
            self._open.discard(end)

    def _break(self) -> None:
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open.clear()


@contextlib.contextmanager
def lying_server(keys: Sequence[tuple[str, int]]) -> Iterator[str]:
    """Serve a bucket that lists objects of any name and size; yield the endpoint."""
    entries = "".join(
        f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>e</ETag>"
        f"<Size>{size}</Size></Contents>"
        for key, size in keys
    )
    listing = (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>b</Name><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
    ).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(b"")

        def do_GET(self) -> None:
            self._answer(listing if "list-type" in self.path else b"?")

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
