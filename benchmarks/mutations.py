"""How many seeded faults the tests catch.

Each fault of `mutation_faults.FAULTS` is written into a copy of the project, and the tests run there until one fails:
first those of the file itself, then those of its subject, then the random programs. Tests that are further off, such
as those over families of models, do not run: what survives here they may still catch. A fault whose text does not stand
in its file exactly once is an error, and so are tests that fail without any fault. Exits with 1 where more faults
survive than `--allow`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import cache_from_source
from pathlib import Path
from queue import SimpleQueue

from common import publish
from mutation_faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "results")
RANDOM = "tests/spaces/test_random_programs.py"
NEAR: dict[str, tuple[str, ...]] = {  # by folder or file, the first that fits: the tests that are likely to see a fault
    "passes/norm/raise": ("tests/passes/norm/test_raise_other_norms.py", "tests/passes/norm/test_raise_spellings.py"),
    "passes/norm/spelled": (
        "tests/passes/norm/test_raise_other_norms.py",
        "tests/passes/norm/test_raise_spellings.py",
        "tests/passes/norm/test_raise_norms.py",
    ),
    "passes/norm": (),
    "passes/rotate/scores": ("tests/passes/rotate/test_online.py",),
    "passes/rotate/inputs": ("tests/passes/rotate/test_online.py",),
    "passes/rotate": ("tests/passes/rotate/test_stream.py", "tests/passes/rotate/test_online.py"),
    "passes/scale/equalize": (),
    "passes/scale": ("tests/passes/scale/test_smooth.py",),
    "passes/permute": ("tests/passes/permute/test_expand.py", "tests/passes/permute/test_permute.py"),
    "spaces/apply": (
        "tests/passes/permute/test_untie_embeddings.py",
        "tests/passes/norm/test_center_norm.py",
        "tests/passes/scale/test_equalize.py",
    ),
    "spaces": (
        "tests/spaces/test_analysis.py",
        "tests/spaces/test_vectors.py",
        "tests/spaces/test_rules_between.py",
        "tests/spaces/test_layout.py",
    ),
    "hadamard": ("tests/hadamard",),
}


@dataclass(frozen=True)
class Verdict:
    """What the tests said of one fault. `by`: the test that failed; empty where all passed. `late`: no end in time."""

    fault: Fault
    by: str
    late: bool
    seconds: float

    @property
    def caught(self) -> bool:
        """Slow tests prove nothing: what did not end is not caught."""
        return bool(self.by) and not self.late

    @property
    def word(self) -> str:
        """The verdict as the table has it."""
        return "caught" if self.caught else "**no end**" if self.late else "**survived**"


def problems(faults: tuple[Fault, ...], root: Path) -> list[str]:
    """Faults that cannot be seeded: their text is not there once, the result is no Python, or they repeat another."""
    found, seen = [], set[tuple[str, str, str]]()
    for fault in faults:
        path = root / fault.file
        said = f"{fault.file}: {fault.what!r}"
        count = path.read_text().count(fault.old) if path.is_file() else 0
        if not path.is_file():
            found.append(f"{said}: the file does not exist")
        elif count != 1:
            found.append(f"{said}: {fault.old!r} stands there {count} times, wanted once")
        elif fault.old == fault.new or (fault.file, fault.old, fault.new) in seen:
            found.append(f"{said}: changes nothing, or is listed twice")
        else:
            try:
                compile(path.read_text().replace(fault.old, fault.new), fault.file, "exec")
            except SyntaxError as error:
                found.append(f"{said}: {fault.new!r} is no Python: {error.msg}")
        seen.add((fault.file, fault.old, fault.new))
    return found


def tests_for(file: str, root: Path) -> list[str]:
    """Test files and folders in the order to run them: the file's own, its subject's, and the random programs."""
    path = Path(file).relative_to("qcompile")
    subject = next(name for name in NEAR if path.as_posix().startswith(name))
    own = Path("tests") / path.parent / f"test_{path.name}"
    order = [str(own), *NEAR[subject], RANDOM]
    return [name for name in dict.fromkeys(order) if (root / name).exists()]


def make_copy(folder: Path) -> Path:
    """A copy of the project in `folder`; raises SystemExit where Python would still import the original."""
    copy = folder / "project"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=LEFT_OUT)
    command = [sys.executable, "-c", "import qcompile, qcompile.passes.norm as p; print(qcompile.__file__, p.__file__)"]
    told = subprocess.run(command, cwd=copy, env=_environment(copy), capture_output=True, text=True, check=True)
    if not all(name.startswith(str(copy)) for name in told.stdout.split()):
        raise SystemExit(f"python imports {told.stdout.strip()}, not the copy in {copy}")
    return copy


def run_tests(copy: Path, tests: list[str], limit: float) -> tuple[str, str]:
    """The first test that fails ("" where all pass), and what pytest printed at its end. Raises TimeoutExpired."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line", *tests]
    done = subprocess.run(command, cwd=copy, env=_environment(copy), capture_output=True, text=True, timeout=limit)
    tail = "\n".join(done.stdout.splitlines()[-6:])
    if done.returncode == 0:
        return "", tail
    if done.returncode not in (1, 2, 3):  # of usage, or no tests at all
        raise SystemExit(f"pytest stopped with {done.returncode}: {tail}\n{done.stderr[-500:]}")
    named = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return named.group(1) if named else f"pytest ended with {done.returncode}", tail


def judge(fault: Fault, copies: SimpleQueue[Path], limit: float) -> Verdict:
    """Seed one fault into a free copy, run the tests, and take it out again."""
    copy, start = copies.get(), time.perf_counter()
    path = (copy / fault.file).resolve()
    original, late = path.read_text(), False
    try:
        _write(path, original.replace(fault.old, fault.new))
        by, _ = run_tests(copy, tests_for(fault.file, copy), limit)
    except subprocess.TimeoutExpired:
        by, late = f"the tests ran longer than {limit:.0f} s", True
    finally:
        _write(path, original)
        copies.put(copy)
    verdict = Verdict(fault, by, late, time.perf_counter() - start)
    print(f"{verdict.word:12} {fault.file}: {fault.what} ({by})", file=sys.stderr, flush=True)
    return verdict


def _write(path: Path, text: str) -> None:
    """Write, and drop the bytecode: a change within a second and of the same length would not be seen."""
    path.write_text(text)
    Path(cache_from_source(str(path))).unlink(missing_ok=True)


def _environment(copy: Path) -> dict[str, str]:
    data = os.environ.get("QCOMPILE_TEST_DATA", str(ROOT.parent / "shared" / "data"))
    fixed = {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "QCOMPILE_TEST_DATA": data}
    return {**os.environ, **fixed}


def main() -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="faults whose file or description contains this")
    parser.add_argument("--jobs", type=int, default=2, help="copies that run at once")
    parser.add_argument("--limit", type=float, default=900, help="seconds for the tests of one fault")
    parser.add_argument("--allow", type=int, default=2, help="faults that may survive")
    parser.add_argument("--no-baseline", action="store_true", help="do not first run the tests without a fault")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if wrong := problems(FAULTS, ROOT):
        raise SystemExit("\n".join(wrong))
    faults = [f for f in FAULTS if options.only in f"{f.file} {f.what}"]
    if not faults:
        raise SystemExit(f"no fault has {options.only!r} in its file or description")
    with tempfile.TemporaryDirectory(prefix="qcompile-mutations-") as folder:
        copies: SimpleQueue[Path] = SimpleQueue()
        for job in range(options.jobs):
            copies.put(make_copy(Path(folder) / str(job)))
        if not options.no_baseline:
            _baseline(copies, faults, options.limit)
        with ThreadPoolExecutor(options.jobs) as pool:
            verdicts = list(pool.map(lambda fault: judge(fault, copies, options.limit), faults))
    rows: list[dict[str, object]] = [
        {
            "file": v.fault.file,
            "fault": v.fault.what,
            "": v.word,
            "by": f"`{v.by}`".replace("|", "\\|") if v.by else "",
            "s": f"{v.seconds:.0f}",
        }
        for v in verdicts
    ]
    survived = sum(not v.caught for v in verdicts)
    publish("mutations", "Seeded faults", rows, f"{len(verdicts) - survived} of {len(verdicts)} faults are caught.")
    return 1 if survived > options.allow else 0


def _baseline(copies: SimpleQueue[Path], faults: list[Fault], limit: float) -> None:
    """Without a fault everything passes; else nothing that follows would mean anything."""
    copy = copies.get()
    tests = list(dict.fromkeys(test for fault in faults for test in tests_for(fault.file, copy)))
    by, tail = run_tests(copy, tests, 4 * limit)
    copies.put(copy)
    if by:
        raise SystemExit(f"without any fault {by} fails:\n{tail}")
    print(f"without any fault: {tail.splitlines()[-1]}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
