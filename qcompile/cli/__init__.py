"""The command line. Importing it is cheap: each command loads what it needs when it runs."""

from __future__ import annotations

import os
import sys

EXIT_CODES = (
    "Exit codes: 0 done; 1 bad input or a check that failed (one line on stderr says which); 2 wrong usage; "
    "130 interrupted. --debug (or QCOMPILE_DEBUG=1) shows the traceback."
)


def main() -> None:
    """Run the command line; errors that a user can mend are one line, without a traceback."""
    debug = "--debug" in sys.argv or os.environ.get("QCOMPILE_DEBUG") == "1"
    from qcompile.cli.app import app

    try:
        app()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if debug:
            raise
        raise SystemExit(_explain(error)) from None


def _explain(error: Exception) -> int:
    """Print one line for `error`; the exit code."""
    from qcompile.errors import QCompileError

    if isinstance(error, QCompileError):
        print(f"qcompile: error: {error}", file=sys.stderr)
    else:
        print(f"qcompile: internal error: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
    return 1
