"""TensorRT's flavours: which are installed, their properties, and their differences at run time."""

from __future__ import annotations

import importlib
import logging
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.errors import BackendError, BundleError, MissingDependencyError, PlanError
from latentrt.runtime.tensorrt import library as trt
from latentrt.runtime.tensorrt.library import LIBRARIES, Library, open_library, wanted_key
from latentrt.runtime.tensorrt.plans import weights_digest
from tests.support.gpu.fakes import fake_tensorrt
from tests.support.gpu.fakes.fake_tensorrt import FakeTensorRt

GPU: Any = SimpleNamespace(name="NVIDIA H200", compute_capability=(9, 0), driver="13.0")


@pytest.fixture(scope="module")
def rtx() -> Library:
    pytest.importorskip("tensorrt_rtx")
    return open_library("tensorrt-rtx")


def library(name: str, version: str, **module: Any) -> Library:
    return Library(name, SimpleNamespace(**module), version, tuple(map(int, version.split("."))))


# Opening


def test_an_installed_library_is_opened(rtx: Library) -> None:
    assert rtx.module is sys.modules["tensorrt_rtx"]
    assert rtx.version == rtx.module.__version__
    assert rtx.numbers == tuple(map(int, rtx.version.split(".")))
    assert rtx.builds


def test_an_unknown_library_is_refused() -> None:
    with pytest.raises(BackendError, match=r"'cudnn'.*tensorrt, tensorrt-rtx, tensorrt-lean"):
        open_library("cudnn")


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize(
    ("error", "needed"),
    [
        (ModuleNotFoundError("No module named 'tensorrt'"), "the Python package tensorrt"),
        (
            ImportError("libnvinfer.so.11: cannot open shared object file: No such file or directory"),
            "the shared library libnvinfer.so.11",
        ),
        (
            OSError("/usr/lib/libnvinfer_builder_resource.so.10.3.0: file too short"),
            "the shared library libnvinfer_builder_resource.so.10.3.0",
        ),
    ],
)
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception, needed: str) -> None:
    def missing(module: str) -> Any:
        raise error

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingDependencyError) as caught:
        open_library(name)
    assert caught.value.needed.startswith(needed)
    assert str(error) in caught.value.found
    assert caught.value.fix == trt.INSTALL[name]


def test_versions_with_a_suffix_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(__version__="10.14.1.48.post1")
    monkeypatch.setattr(importlib, "import_module", lambda name: module)
    opened = open_library("tensorrt")
    assert (opened.version, opened.numbers) == ("10.14.1.48.post1", (10, 14, 1, 48))
    assert not opened.builds


# What it says


@pytest.mark.parametrize("flavour", ["real", "fake"])
def test_errors_are_kept_and_the_rest_is_quiet(
    flavour: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    module = request.getfixturevalue("rtx").module if flavour == "real" else FakeTensorRt()
    logger = Library("tensorrt", module, "11.4", (11, 4)).logger()
    assert isinstance(logger, module.ILogger)
    severity = module.ILogger.Severity
    with caplog.at_level(logging.DEBUG):
        logger.log(severity.ERROR, "no memory ")
        logger.log(severity.INTERNAL_ERROR, "lost")
        logger.log(severity.ERROR, "no memory")
        logger.log(severity.WARNING, "slow")
        logger.log(severity.INFO, "loaded")
        logger.log(severity.VERBOSE, "all of it")
    assert logger.take_errors() == "no memory; lost"
    assert logger.take_errors() == ""
    assert max(record.levelno for record in caplog.records) == logging.INFO
    assert [record.message for record in caplog.records if record.levelno == logging.INFO] == ["slow"]


def test_only_the_last_errors_are_kept() -> None:
    logger = FakeTensorRt().library.logger()
    for i in range(100):
        logger.log(fake_tensorrt.Severity.ERROR, str(i))
    assert logger.take_errors() == "; ".join(map(str, range(80, 100)))


def test_tensorrts_own_words_reach_us(rtx: Library) -> None:
    logger = rtx.logger()
    assert rtx.runtime(logger).deserialize_cuda_engine(b"no plan" * 100) is None
    assert "header.magicTag == kEXPECTED_MAGIC_TAG failed" in logger.take_errors()


# Run time


def test_a_runtime_loads_no_host_code(rtx: Library) -> None:
    runtime = rtx.runtime(rtx.logger())
    assert runtime.engine_host_code_allowed is False
    assert runtime.tempfile_control_flags == 0


def test_a_runtime_that_does_not_start_says_why() -> None:
    fake = FakeTensorRt()

    class Null:
        """A null pointer in disguise: to touch it ends the process."""

        def __setattr__(self, name: str, value: Any) -> None:
            raise AssertionError(name)

    def failing(logger: Any) -> Any:
        logger.log(fake_tensorrt.Severity.ERROR, "CUDA initialization failure with error: 35")
        return Null()

    fake.Runtime = failing  # type: ignore[method-assign]
    with pytest.raises(BackendError, match=r"cannot start \(CUDA init.*error: 35\).*driver.*tensorrt-cu12"):
        fake.library.runtime(fake.library.logger())


def test_8_6_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="8.6.1"))
    with pytest.raises(MissingDependencyError, match=r"tensorrt is 8\.6\.1. Needed: 10 or newer"):
        trt.open_library("tensorrt")


def test_dtypes_are_numpys(rtx: Library) -> None:
    for name, dtype in trt.DTYPES.items():
        real = getattr(rtx.module.DataType, name)
        assert rtx.dtype(real) == np.dtype(dtype)
        assert rtx.dtype(real) == np.dtype(rtx.module.nptype(real))
    with pytest.raises(PlanError, match="BF16"):
        rtx.dtype(rtx.module.DataType.BF16)


# Keys


def test_the_wanted_key_is_of_here_and_now() -> None:
    bundle = Bundle.open(check_hashes=False)
    key = wanted_key(bundle, "unet", "fp32", library("tensorrt", "10.13.3.9"), GPU)
    assert (key.network, key.precision, key.options, key.profiles) == ("unet", "fp32", (), ())
    assert key.graph == bundle.files["unet/model.onnx"].sha256
    assert key.weights == weights_digest(bundle, bundle.spec.graphs()["unet"])
    assert (key.library, key.version) == ("tensorrt", "10.13.3.9")
    assert (key.gpu, key.compute_capability, key.driver) == ("NVIDIA H200", "9.0", "13.0")


def test_a_bundle_without_the_network_has_no_key() -> None:
    with pytest.raises(BundleError, match="has no text_encoder_2"):
        wanted_key(Bundle.open(check_hashes=False), "text_encoder_2", "fp32", library("tensorrt", "11.4"), GPU)
