"""How long `qcompile --help` takes, beside the import of the library it is built with."""

from __future__ import annotations

import shutil
import statistics
import sys

from common import measure, publish


def main() -> None:
    qcompile = shutil.which("qcompile")
    assert qcompile is not None, "install the package first"
    commands = {
        'python -c "import typer"': [sys.executable, "-c", "import typer"],
        'python -c "import qcompile"': [sys.executable, "-c", "import qcompile"],
        "qcompile --help": [qcompile, "--help"],
    }
    walls: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(12):  # in turn, so that a change of the machine's speed meets all of them
        for name, command in commands.items():
            walls[name].append(measure(command).wall)
    medians = {name: statistics.median(times[2:]) for name, times in walls.items()}
    base = next(iter(medians.values()))
    rows: list[dict[str, object]] = [
        {"command": f"`{name}`", "median ms": f"{1000 * m:.0f}", "ratio": f"{m / base:.2f}"}
        for name, m in medians.items()
    ]
    publish("cli_startup", "Start-up of the command line", rows, "Target: `--help` within 2 of the import.")


if __name__ == "__main__":
    main()
