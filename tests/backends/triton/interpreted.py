"""Runs kernels in Triton's interpreter: a process that reads cases as lines of JSON and answers with their errors.

It must be a process of its own: TRITON_INTERPRET is read when Triton is imported. A case names a function of this file
and its arguments; the answer is {"error": max |Δ| / max |reference|, …} or {"raised": "…"}.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch

sys.path.insert(0, str(Path(__file__).parent))
import cases

torch.set_num_threads(1)


def main() -> None:
    for line in sys.stdin:
        case = json.loads(line)
        try:
            answer = getattr(cases, case.pop("function"))(**case)
        except Exception:  # whatever it is, the test that asked shows it
            answer = {"raised": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
