"""triton: executables with packed weights whose products are Triton kernels (see README.md)."""

from qcompile.backends.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
