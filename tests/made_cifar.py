"""Small archives of CIFAR-10's form, written byte by byte."""

import gzip
import io
import tarfile

FOLDER = "cifar-10-batches-bin"
# in the order of the real archive, which is not that of their numbers
NAMES = ("data_batch_1", "data_batch_3", "data_batch_4", "test_batch", "data_batch_5", "data_batch_2")
FILES = tuple(f"{name}.bin" for name in NAMES)
TRAIN_FILES, TEST_FILE = sorted(FILES)[:-1], "test_batch.bin"
PER_FILE = 8


def pixel(row, channel, y, x):
    """What the pixels of the made images are; no two rows, channels, heights or widths are alike."""
    return (37 * row + 80 * channel + 7 * y + 3 * x + x * y) % 256


def record(row, label):
    planes = [[pixel(row, c, y, x) for y in range(32) for x in range(32)] for c in range(3)]
    return bytes([label]) + b"".join(bytes(plane) for plane in planes)


def made_files(per_file=PER_FILE):
    """Rows counted through the five training files, then the test file; the class is the row's last digit."""
    ordered = (*TRAIN_FILES, TEST_FILE)
    return {
        name: b"".join(record(row, row % 10) for row in range(k * per_file, (k + 1) * per_file))
        for k, name in enumerate(ordered)
    }


def pack(files, *others):
    """A .tar.gz of files in their folder, in the real archive's order, then of other members as they are."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        folder = tarfile.TarInfo(FOLDER)
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in FILES:
            if name in files:
                member = tarfile.TarInfo(f"{FOLDER}/{name}")
                member.size = len(files[name])
                tar.addfile(member, io.BytesIO(files[name]))
        for member in others:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return gzip.compress(buffer.getvalue(), mtime=0)


def write_archive(folder, content=None):
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / "cifar-10-binary.tar.gz"
    path.write_bytes(pack(made_files()) if content is None else content)
    return path
