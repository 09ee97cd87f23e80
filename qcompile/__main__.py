"""``python -m qcompile``, and ``torchrun --nproc-per-node N -m qcompile export …``: the command line."""

from __future__ import annotations

from qcompile.cli import main

if __name__ == "__main__":
    main()
