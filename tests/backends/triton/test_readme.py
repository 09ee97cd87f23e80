"""The page of the target: its C compiles, and its Python runs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qcompile.backends.triton import ops
from qcompile.backends.triton.ops.registration import PLANS

PAGE = Path(__file__).parents[3] / "backends" / "triton" / "README.md"

CUDA_H = """\
#include <stddef.h>
typedef int CUresult;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;
typedef unsigned long long CUdeviceptr;
typedef int CUfunction_attribute;
#define CUDA_SUCCESS 0
#define CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES 8
CUresult cuModuleLoad(CUmodule *, const char *);
CUresult cuModuleGetFunction(CUfunction *, CUmodule, const char *);
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int);
CUresult cuLaunchKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void **,
                        void **);
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
def test_the_c_compiles(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```c\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "cuda.h").write_text(CUDA_H)
    (tmp_path / "load.c").write_text(code)
    command = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I.", "load.c"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_operator_is_on_the_page() -> None:
    assert ops.__all__
    for op in PLANS:
        assert f"`{op._schema.name.partition('::')[2]}`" in PAGE.read_text()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target
