"""Launching binaries of a bundle, against a driver that writes down what it is told."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompile.backends.triton.bundle import ArgumentEntry, BinaryEntry, Bundle, Choices, KernelEntry, digest
from qcompile.backends.triton.driver import CUDA, HIP, Driver
from qcompile.backends.triton.launch import Config, JustInTime, Launch, Variant
from qcompile.backends.triton.launcher import BundleDispatcher, pack_arguments
from qcompile.backends.triton.ops.registration import check_sizes
from qcompile.errors import ArtifactError, LoweringError


class FakeLibrary:
    """A driver's functions: they succeed, or fail as told, and remember."""

    def __init__(self, fail: dict[str, int] | None = None) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fail = fail or {}

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name.endswith("GetErrorString"):
                ctypes.cast(arguments[1], ctypes.POINTER(ctypes.c_char_p))[0] = b"something broke"
                return 0
            if name.endswith("GetFunction"):
                ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_void_p))[0] = 77
            seen: Any = arguments
            if "Launch" in name:
                function, *sizes, stream, pointers, extra = arguments
                values = [ctypes.cast(p, ctypes.POINTER(ctypes.c_uint64))[0] for p in pointers]
                seen = (function.value, sizes, stream.value, values, extra)
            self.calls.append((name, seen))
            return self.fail.get(name, 0)

        return call


def small_launch() -> Launch:
    x, out = torch.ones(32), torch.empty(32)
    arguments = {"x": x, "out": out, "N": 32, "M": -2}
    return Launch("family.kernel", arguments, {"BLOCK": 32}, (4, 5, 6), Config(1, 32, 2, 3))


def bundle_of(launch: Launch, folder: Path, shared: int = 1024, code: bytes = b"binary") -> Bundle:
    variant = launch.variant
    (folder / "k.cubin").write_bytes(code)
    binary = BinaryEntry(
        file="k.cubin",
        sha256=digest(b"binary"),
        symbol="kernel",
        threads=64,
        shared=shared,
        hidden=2,
        registers=40,
        spilled=0,
        occupancy=0.5,
    )
    entry = KernelEntry(
        kernel=launch.kernel,
        config=str(launch.config),
        arguments=tuple(ArgumentEntry(name=n, type=t, aligned=a) for n, t, a in variant.signature),
        constants=dict(variant.constants),
        warps=2,
        stages=3,
        binaries={"sm_90": binary},
    )
    sites = {"place": {"sm_90": ("m1_n64_w4_s3 parts=1", "m1_n32_w4_s3 parts=1")}}
    return Bundle(
        triton="3.9.0", gpus=("sm_90",), shards={}, weights={}, kernels={variant.key: entry}, sites=sites, sources={}
    )


def dispatcher(folder: Path, library: FakeLibrary, **options: Any) -> BundleDispatcher:
    made = bundle_of(small_launch(), folder, **{k: v for k, v in options.items() if k in ("shared", "code")})
    driver = Driver(CUDA, library)
    return BundleDispatcher(folder, made, options.get("gpu", "sm_90"), driver, lambda: 1234, options.get("fallback"))


def test_a_launch_passes_what_the_table_says(tmp_path: Path) -> None:
    library, launch = FakeLibrary(), small_launch()
    dispatcher(tmp_path, library).launch([launch, launch])
    assert [name for name, _ in library.calls] == ["cuModuleLoadData", "cuModuleGetFunction", *["cuLaunchKernel"] * 2]
    assert library.calls[0][1][1] == b"binary"
    assert library.calls[1][1][2] == b"kernel"
    function, sizes, stream, values, extra = library.calls[2][1]
    assert (function, sizes, stream, extra) == (77, [4, 5, 6, 64, 1, 1, 1024], 1234, None)
    x, out = launch.arguments["x"], launch.arguments["out"]
    assert isinstance(x, torch.Tensor)
    assert isinstance(out, torch.Tensor)
    assert values[:2] == [x.data_ptr(), out.data_ptr()]
    assert values[2] & 0xFFFFFFFF == 32
    assert values[3] & 0xFFFFFFFF == 0xFFFFFFFE
    assert values[4:] == [0, 0]  # the hidden pointers


def test_much_shared_memory_is_asked_for(tmp_path: Path) -> None:
    library = FakeLibrary()
    dispatcher(tmp_path, library, shared=64 << 10).launch([small_launch()])
    (asked,) = [arguments for name, arguments in library.calls if name == "cuFuncSetAttribute"]
    assert (asked[1], asked[2]) == (8, 64 << 10)


def test_a_changed_binary_is_not_loaded(tmp_path: Path) -> None:
    library = FakeLibrary()
    with pytest.raises(ArtifactError, match=r"k\.cubin was changed after it was written"):
        dispatcher(tmp_path, library, code=b"tampered").launch([small_launch()])
    assert library.calls == []


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("cuModuleLoadData", 209, "cuModuleLoadData failed: error 209, something broke"),
        ("cuLaunchKernel", 2, "the GPU is out of memory"),
    ],
)
def test_errors_of_the_driver(tmp_path: Path, name: str, status: int, says: str) -> None:
    with pytest.raises(ArtifactError, match=says):
        dispatcher(tmp_path, FakeLibrary({name: status})).launch([small_launch()])


def test_what_has_no_binary_is_compiled_just_in_time_or_said(tmp_path: Path) -> None:
    class Recorder(JustInTime):
        def launch(self, launches: Any) -> None:
            self.seen = launches

    recorder, other = Recorder(), Launch("family.other", {"M": 1}, {}, (1, 1, 1), Config(1, 1))
    dispatcher(tmp_path, FakeLibrary(), fallback=recorder).launch([other])
    assert recorder.seen == [other]
    with pytest.raises(ArtifactError, match=r"no binary of family.other for sm_90.*export with --gpu"):
        dispatcher(tmp_path, FakeLibrary()).launch([other])


def test_tuned_choices_come_first_and_compiled_ones_before_others(tmp_path: Path) -> None:
    first, second, third = Config(1, 128), Config(1, 64), Config(1, 32)
    made = dispatcher(tmp_path, FakeLibrary())
    assert made.choose("place", [first, second, third]) is second  # the first has no binary
    assert made.choose("elsewhere", [first, second]) is first
    Choices(gpus={"sm_90": {"place": ("m1_n32_w4_s3 parts=1", 3.5)}}).write(tmp_path)
    assert dispatcher(tmp_path, FakeLibrary()).choose("place", [first, second, third]) is third


def test_integers_that_do_not_fit() -> None:
    variant = Variant("family.kernel", (("M", "i32", False),), (), 4, 3)
    with pytest.raises(ArtifactError, match="M=3000000000 does not fit 32 bits"):
        pack_arguments({"M": 3_000_000_000}, variant, 0)


def test_tensors_that_are_too_large_are_refused() -> None:
    large = torch.empty(1 << 16, 1 << 15, device="meta")
    launch = Launch("family.kernel", {"x": large}, {}, (1, 1, 1), Config(1, 1))
    with pytest.raises(LoweringError, match="x has 2147483648 elements, kernels count to 2147483647"):
        check_sizes(launch)


def test_amd_is_called_by_its_names(tmp_path: Path) -> None:
    library = FakeLibrary()
    driver = Driver(HIP, library)
    function = driver.load(b"code", "kernel", 1 << 20)
    driver.launch(function, (1, 1, 1), 64, 0, 0, [ctypes.c_int32(1)])
    assert [name for name, _ in library.calls] == [
        "hipModuleLoadData",
        "hipModuleGetFunction",
        "hipFuncSetAttribute",
        "hipModuleLaunchKernel",
    ]


def test_a_library_that_is_missing() -> None:
    with pytest.raises(ArtifactError, match=r"libnothing\.so is not there .*; install the GPU's driver"):
        Driver(CUDA.__class__("libnothing.so", *["f"] * 5))
