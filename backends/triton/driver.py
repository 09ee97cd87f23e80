"""A GPU driver's C interface by ctypes: load a binary, launch it. CUDA's libcuda and AMD's libamdhip64 are called
alike."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qcompile.errors import ArtifactError

PLAIN_SHARED = 48 << 10
"""Bytes of shared memory that a kernel gets without asking."""
_CUDA_MAX_SHARED, _OUT_OF_MEMORY = 8, 2  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, CUDA_ERROR_OUT_OF_MEMORY


@dataclass(frozen=True)
class Calls:
    """Names of the functions in a driver's library."""

    library: str
    load: str
    function: str
    attribute: str
    launch: str
    error: str


CUDA = Calls(
    "libcuda.so.1",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuFuncSetAttribute",
    "cuLaunchKernel",
    "cuGetErrorString",
)
HIP = Calls(
    "libamdhip64.so",
    "hipModuleLoadData",
    "hipModuleGetFunction",
    "hipFuncSetAttribute",
    "hipModuleLaunchKernel",
    "hipDrvGetErrorString",
)


@dataclass(eq=False)
class Driver:
    """Loads binaries into the context that torch made current, and launches their kernels.

    Args:
        calls: the interface.  library: what has these functions; the system's library if None.

    Raises ArtifactError where the library is missing, and for every error that the driver reports.
    """

    calls: Calls = CUDA
    library: Any = None
    _modules: list[tuple[bytes, ctypes.c_void_p]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.library is None:
            try:
                self.library = ctypes.CDLL(self.calls.library)
            except OSError as error:
                raise ArtifactError(
                    f"{self.calls.library} is not there ({error}); install the GPU's driver, or run on the CPU"
                ) from None

    def load(self, code: bytes, symbol: str, shared: int) -> ctypes.c_void_p:
        """The function `symbol` of a binary, allowed `shared` bytes of shared memory."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call(self.calls.load, ctypes.byref(module), code)
        self._modules.append((code, module))  # the driver may read the image later
        self._call(self.calls.function, ctypes.byref(function), module, symbol.encode())
        if shared > PLAIN_SHARED:
            self._call(self.calls.attribute, function, _CUDA_MAX_SHARED, shared)
        return function

    def launch(
        self,
        function: ctypes.c_void_p,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        stream: int,
        arguments: Sequence[Any],
    ) -> None:
        """Queue a kernel on a stream; `arguments` are ctypes values in the kernel's order, hidden ones included."""
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        handle = ctypes.c_void_p(stream)
        self._call(self.calls.launch, function, *grid, threads, 1, 1, shared, handle, pointers, None)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(*arguments)
        if status == _OUT_OF_MEMORY:
            raise ArtifactError(f"{name}: the GPU is out of memory; free some, or shorten prompt or batch")
        if status:
            raise ArtifactError(f"{name} failed: {self._meaning(status)}")

    def _meaning(self, status: int) -> str:
        text = ctypes.c_char_p()
        getattr(self.library, self.calls.error)(status, ctypes.byref(text))
        return f"error {status}, {(text.value or b'unknown').decode()}"
