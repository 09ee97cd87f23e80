"""torch_mlir: MLIR in the torch dialect, packed and sharded weights, compiled and run by IREE (see README.md)."""

from qcompile.backends.torch_mlir.backend import TorchMlirBackend

__all__ = ["TorchMlirBackend"]
