"""An artifact in iree-runtime: modules loaded on local devices, weights mapped from their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompile.backends.torch_mlir.plan import DECODE, Module, Plan
from qcompile.backends.torch_mlir.toolchain import INSTALL, lacking, missing
from qcompile.errors import ArtifactError, QCompileError

DRIVER = "local-task"


class IreeRunner:
    """The modules of an artifact, each on devices of its own.

    Args:
        directory: the artifact.
        driver: ``local-task`` (threads of its own, as many as there are cores) or ``local-sync`` (the calling thread).
        devices: how many local devices to make; None makes as many as the artifact was compiled for.

    Raises:
        QCompileError: iree-runtime is not installed, or the number of devices is another.
        ArtifactError: a file is missing or was cut, or the modules were compiled for a CPU that this one is not.
    """

    def __init__(self, directory: str | Path, driver: str = DRIVER, devices: int | None = None) -> None:
        if (reason := missing()) is not None:
            raise QCompileError(reason)
        self.directory, self.driver = Path(directory), driver
        self.plan = Plan.read(self.directory)
        if lacks := lacking(self.plan.cpu_features):
            raise ArtifactError(
                f"{directory} was compiled for {self.plan.cpu}, and this CPU has no {', '.join(lacks)}; export it "
                "again here, or with cpu=x86-64-v3"
            )
        wanted = sum(module.devices for module in self.plan.modules)
        if devices is not None and devices != wanted:
            raise QCompileError(f"{directory} was compiled for {wanted} devices, not devices={devices}; give {wanted}")
        self.modules = [_Loaded(self.directory, module, driver) for module in self.plan.modules]

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name; inputs by name, as the program calls them.

        Raises QCompileError for an input that is missing, unknown or of another rank or dtype than declared.
        """
        values: dict[str, Any] = dict(feeds)
        taken = {name for module in self.plan.modules for name in module.inputs}
        made = {name for module in self.plan.modules for name in module.outputs}
        if unknown := [name for name in feeds if name not in taken]:
            raise QCompileError(f"input {unknown[0]!r} is unknown; the artifact takes {sorted(taken - made)}")
        step = _one_token(feeds)
        last: dict[str, Tensor] = {}
        for module in self.modules:
            for name in module.plan.inputs:
                if name not in values:
                    raise QCompileError(f"input {name!r} is missing; the artifact takes {sorted(taken - made)}")
            found = module.call([values[name] for name in module.plan.inputs], step)
            outputs = dict(zip(module.plan.outputs, found, strict=True))
            values |= outputs
            last |= outputs
        return {name: tensor for name, tensor in last.items() if name not in taken}

    def statistics(self) -> dict[str, int]:
        """Bytes that all devices' allocators hold now and held at most; weights that are mapped are not in it."""
        found = [module.statistics() for module in self.modules]
        return {key: sum(s.get(key, 0) for s in found) for key in ("held", "peak")}


def _one_token(feeds: Mapping[str, Tensor]) -> bool:
    ids = feeds.get("input_ids")
    return ids is not None and tuple(ids.shape) == (1, 1)


class _Loaded:
    """One module in a context of its own."""

    def __init__(self, directory: Path, plan: Module, driver: str) -> None:
        import iree.runtime as rt

        self.plan = plan
        if plan.vmfb is None:
            raise ArtifactError(
                f"{directory} holds MLIR that was not compiled; {INSTALL}, and export it again (README.md of the "
                "backend has the commands)"
            )
        for name in (plan.vmfb, *plan.parameters.values()):
            if not (directory / name).is_file():
                raise ArtifactError(f"{directory / name} is missing; export the artifact again")
        made = rt.get_driver(driver)
        self.devices = [made.create_default_device() for _ in range(plan.devices)]
        instance = rt.VmInstance()
        hal = rt.create_hal_module(instance, devices=self.devices)
        providers = [_provider(rt, directory / name, scope) for scope, name in plan.parameters.items()]
        parameters = rt.create_io_parameters_module(instance, *providers)
        module = rt.VmModule.mmap(instance, str(directory / plan.vmfb))
        try:
            self.context = rt.VmContext(instance=instance, modules=[hal, parameters, module])
        except (RuntimeError, ValueError) as error:
            raise ArtifactError(_why(directory, plan, error)) from error
        self.functions = {
            name: rt.FunctionInvoker(self.context, self.devices[0], module.lookup_function(name))
            for name in plan.functions
        }

    def call(self, inputs: Sequence[Tensor], one_token: bool) -> list[Tensor]:
        """The outputs; `one_token` allows the function for a single token of a single sequence."""
        function = self.functions[DECODE if one_token and DECODE in self.functions else self.plan.functions[0]]
        found = function(*(_array(tensor) for tensor in inputs))
        results = found if isinstance(found, (tuple, list)) else [found]
        return [torch.from_numpy(np.array(result.to_host())) for result in results]

    def statistics(self) -> dict[str, int]:
        """Bytes allocated and freed, over all devices."""
        found = [device.allocator.statistics for device in self.devices]
        held = sum(s["device_bytes_allocated"] + s["host_bytes_allocated"] for s in found)
        freed = sum(s["device_bytes_freed"] + s["host_bytes_freed"] for s in found)
        return {"held": held - freed, "peak": sum(s["device_bytes_peak"] + s["host_bytes_peak"] for s in found)}


def _provider(rt: Any, path: Path, scope: str) -> Any:
    index = rt.ParameterIndex()
    try:
        index.load(str(path), mmap=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise ArtifactError(f"{path} is no parameter file ({_line(error)}); export the artifact again") from error
    return index.create_provider(scope)


def _why(directory: Path, plan: Module, error: Exception) -> str:
    return f"iree-runtime does not load {directory / str(plan.vmfb)}: {_line(error)}; export it again with this version"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().numpy()
