"""Files in the IDX format, small or real, and servers that hand them out."""

import gzip
import hashlib
import os
import socket
import struct
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def _write_idx(path, shape, payload, type_code=0x08):
    header = struct.pack(f">2x2B{len(shape)}I", type_code, len(shape), *shape)
    path.write_bytes(header + payload)
    return path


@pytest.fixture(scope="session")
def write_idx():
    return _write_idx


@pytest.fixture
def small_mnist(tmp_path):
    """40 + 20 images whose pixels all equal the row's number, as raw files."""
    folder = tmp_path / "small"
    folder.mkdir()
    for prefix, size in (("train", 40), ("t10k", 20)):
        pixels = b"".join(bytes([row]) * 784 for row in range(size))
        _write_idx(folder / f"{prefix}-images-idx3-ubyte", (size, 28, 28), pixels)
        labels = bytes(row % 10 for row in range(size))
        _write_idx(folder / f"{prefix}-labels-idx1-ubyte", (size,), labels)
    return folder


@pytest.fixture
def small_archives(small_mnist):
    """The same files, gzipped, in a folder of their own."""
    folder = small_mnist.parent / "archives"
    folder.mkdir()
    for name in NAMES:
        data = (small_mnist / name).read_bytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(data, mtime=0))
    return folder


@pytest.fixture
def small_checksums(small_archives):
    """Sha256 of each small archive, as `MNISTDataModule` wants them."""
    archives = {name: small_archives / f"{name}.gz" for name in NAMES}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in archives.items()}


@pytest.fixture(scope="session")
def real_mnist():
    """The folder of the real files, where this machine has them."""
    beside_the_repository = Path(__file__).parents[3] / "shared/data/mnist"
    folder = Path(os.environ.get("LIGHTNING_DNI_MNIST", beside_the_repository))
    if not all((folder / name).exists() or (folder / f"{name}.gz").exists() for name in NAMES):
        pytest.skip(f"no MNIST in {folder}: set LIGHTNING_DNI_MNIST to a folder that has it")
    return folder


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    """Serve folders on 127.0.0.1, each at an address of its own."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started = []

    def start(folder):
        handler = partial(_QuietHandler, directory=str(folder))
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        started.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server, thread in started:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def dead_mirror(monkeypatch):
    """An address where nobody listens; the port is held, so that nobody comes to."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{holder.getsockname()[1]}/"
