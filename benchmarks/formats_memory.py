"""Peak memory of encoding and decoding a 4096 × 4096 float32 tensor, as multiples of the tensor beside itself.

Each spec has a process of its own, whose resident memory is read every two milliseconds.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from common import publish

from qcompile.numerics import QuantSpec

SPECS = (
    *("int4 sym group=128", "int4 asym group=32 zero=float hqo", "int4 group=32 percentile=99", "int4 group=32 mse"),
    *("e4m3fn", "mxfp4(even)", "mxfp4(mse)", "nvfp4", "nvfp4(mse)", "bfp16", "mx6", "mx9"),
    *("nf4 group=64 double=8x256", "int4 via=e4m3fn"),
)


def resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS")


def measure(text: str) -> None:
    spec = QuantSpec.parse(text)
    spec.quantize(torch.randn(64, 4096)).dequantize()
    x = torch.randn(4096, 4096)
    start = resident()
    peak, running = [start], True

    def watch() -> None:
        while running:
            peak[0] = max(peak[0], resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    q = spec.quantize(x)
    encode = (peak[0] - start) / x.nbytes
    values = q.dequantize()
    running = False
    watcher.join()
    assert values.shape == x.shape
    print(f"{encode:.2f} {(peak[0] - start) / x.nbytes:.2f}")


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] != "--write":
        measure(sys.argv[1])
        return
    rows: list[dict[str, object]] = []
    for text in SPECS:
        done = subprocess.run([sys.executable, __file__, text], capture_output=True, text=True, check=True)
        encode, both = done.stdout.split()
        rows.append({"spec": text, "encode": encode, "encode, then decode": both})
    notes = "Codes, one a byte, are 0.25 of a float32 tensor, and decoded values 1: what is above is scratch."
    publish("formats_memory", "Formats: peak memory beside the tensor", rows, notes)


if __name__ == "__main__":
    main()
