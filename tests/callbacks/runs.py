"""Read back what loggers have written: CSV files, and the transaction log of an offline W&B run."""

import csv
import json
import struct
import time
import zlib
from pathlib import Path

BLOCK, HEADER = 32768, struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


GRADIENTS = [
    "dni_sg_loss",
    "dni_sg_error",
    "dni_true_gradient_cosine",
    "dni_row_cosine",
    "dni_zero_rows",
    "dni_norm_ratio",
    "dni_target_error",
    "dni_target_cosine",
    "dni_bootstrap_error",
    "dni_weight_cosine",
    "dni_weight_error",
]
KEYS = [f"{metric}/{name}" for metric in GRADIENTS for name in ("net_0", "net_1")]
AGGREGATES = ["dni_mean_cosine", "dni_worst_error"]
SPEED = ["dni_step_time", "dni_samples_per_second", "dni_peak_memory"]


def csv_rows(logger):
    """Rows by step, without the fields that were not logged in them."""
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = [{key: float(v) for key, v in row.items() if v != ""} for row in csv.DictReader(file)]
    merged = {}
    for row in rows:
        merged.setdefault(int(row["step"]), {}).update(row)
    return merged


def rows_with(rows, key):
    """The steps at which `key` was logged."""
    return sorted(step for step, row in rows.items() if key in row)


def read_run(path, timeout_s=30):
    """The run in a file, once it is there to its end: W&B's service writes it, and `finish` may be ahead."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        run = WandbRun(path)
        if run.ended:
            return run
        time.sleep(0.05)
    raise TimeoutError(f"{path} has no exit record after {timeout_s} s")


class WandbRun:
    """A run file: its id, config, summary, metric definitions and history."""

    def __init__(self, path):
        from wandb.proto import wandb_internal_pb2 as pb

        self.sweep_id = ""
        self.id, self.config, self.summary, self.axes, self.rows, self.ended = None, {}, {}, {}, [], False
        for frame in frames(path) if Path(path).exists() else []:
            record = pb.Record()
            record.ParseFromString(frame)
            self._read(record.WhichOneof("record_type"), record)

    def _read(self, kind, record):
        if kind == "run":
            self.id, self.sweep_id = record.run.run_id, record.run.sweep_id
            self.config.update(items(record.run.config.update))
        elif kind == "config":
            self.config.update(items(record.config.update))
        elif kind == "summary":
            self.summary.update(items(record.summary.update))
        elif kind == "metric":
            self.axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
        elif kind == "history":
            self.rows.append(items(record.history.item))
        elif kind == "exit":
            self.ended = True

    def by_step(self):
        """Rows by trainer step, merged."""
        merged = {}
        for row in self.rows:
            if "trainer/global_step" in row:
                merged.setdefault(row["trainer/global_step"], {}).update(row)
        return merged


def items(found):
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in found}


def frames(path):
    """The records of a LevelDB log: blocks of 32 KiB, each record with checksum, length and type."""
    data = Path(path).read_bytes()
    if len(data) < 7:
        return
    assert struct.unpack("<4sHB", data[:7])[:2] == (b":W&B", 0xBEE1)
    position, parts = 7, b""
    while position + HEADER.size <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER.size:
            position += left
            continue
        checksum, length, kind = HEADER.unpack(data[position : position + HEADER.size])
        chunk = data[position + HEADER.size : position + HEADER.size + length]
        if len(chunk) < length:  # still being written
            return
        position += HEADER.size + length
        assert zlib.crc32(chunk, zlib.crc32(bytes([kind]))) == checksum
        parts = chunk if kind in (FULL, FIRST) else parts + chunk
        if kind in (FULL, LAST):
            yield parts
