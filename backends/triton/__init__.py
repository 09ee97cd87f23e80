"""triton: executables with packed weights whose products are Triton kernels (see README.md); aoti: the same for
CPUs."""

from qcompile.backends.triton.aoti import AotiBackend
from qcompile.backends.triton.backend import TritonBackend

__all__ = ["AotiBackend", "TritonBackend"]
