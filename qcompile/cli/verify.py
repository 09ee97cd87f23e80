"""`qcompile verify`: is an artifact what was exported, and does its runtime still compute the same?"""

from __future__ import annotations

from pathlib import Path

from qcompile.artifact import verify
from qcompile.cli.show import console, print_json


def run(directory: Path, as_json: bool) -> None:
    manifest = verify(directory).manifest
    quantized = sum(1 for t in manifest.tensors.values() if t.codes_sha256)
    if as_json:
        print_json({"directory": str(directory), "files": len(manifest.files), "codes": quantized, "ok": True})
        return
    runtime = f"; {manifest.agreement.runtime} gives the Program's logits" if manifest.agreement else ""
    console().print(
        f"{directory}: {len(manifest.files)} files unchanged; codes of {quantized} weights as computed{runtime}"
    )
