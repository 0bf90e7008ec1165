"""The choice of a backend: one place, no silent fallback, and backward follows forward."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from loretta_kernels import _dispatch, backend, tt_linear
from loretta_kernels.selfcheck import random_problem

from .problems import CALL, OPERATORS, TINY_DOWN, assert_equal, call_of, tiny_problem

LINEAR = random_problem("tt_linear", (TINY_DOWN,), 4, torch.float32)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_forced_backend_that_cannot_serve_tells_why(operator):
    with backend("triton"), pytest.raises(RuntimeError, match='"triton" was asked for, but cannot serve: '):
        tiny_problem(operator, dtype=torch.float32).run()


class OnGPU(torch.Tensor):
    """A tensor that claims to be on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 0)


def call_on_gpu(dtype: torch.dtype):
    """A call whose x claims to be on a GPU."""
    call = call_of(LINEAR.to(dtype))
    return call._replace(x=call.x.as_subclass(OnGPU))


@pytest.fixture
def has_triton(monkeypatch) -> None:
    monkeypatch.setattr(_dispatch, "why_no_triton", lambda: None)


def served_by(call) -> str:
    package, *_ = _dispatch._serving(call).__name__.removeprefix("loretta_kernels._").split(".")
    return package


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_serves_a_gpu_by_triton(has_triton, dtype):
    assert served_by(call_on_gpu(dtype)) == "triton"
    with backend("torch"):
        assert served_by(call_on_gpu(dtype)) == "torch"


def test_serves_a_cpu_by_pytorch(has_triton):
    assert served_by(call_of(LINEAR)) == "torch"


def test_serves_fp64_on_a_gpu_by_pytorch_and_refuses_it_where_triton_is_forced(has_triton):
    fp64 = call_on_gpu(torch.float64)
    mixed = call_on_gpu(torch.float32)._replace(down=LINEAR.down.cores.double())
    for call in (fp64, mixed):
        assert served_by(call) == "torch"
        with backend("triton"), pytest.raises(RuntimeError, match="compute in fp32, and there are fp64 tensors"):
            served_by(call)


@pytest.mark.parametrize(
    "reason", ["triton is not installed", "triton 3.5.0 is too old for the kernels, which need 3.6 or later"]
)
def test_warns_once_that_a_gpu_without_triton_takes_the_slower_path(monkeypatch, recwarn, reason):
    monkeypatch.setattr(_dispatch, "why_no_triton", lambda: reason)
    _dispatch._warn_of_the_slower_path.cache_clear()
    with pytest.warns(UserWarning, match=f"{reason}: PyTorch serves .* on this GPU, which is slower"):
        assert served_by(call_on_gpu(torch.float32)) == "torch"
    assert served_by(call_on_gpu(torch.float32)) == "torch"
    assert not recwarn.list
    with backend("triton"), pytest.raises(RuntimeError, match=f"cannot serve: {reason}"):
        served_by(call_on_gpu(torch.float32))


@pytest.mark.parametrize(("version", "usable"), [("3.5.1", False), ("3.6.0", True), ("3.10.0+git1", True)])
def test_a_triton_that_is_too_old_is_a_reason_and_no_error(monkeypatch, version, usable):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    _dispatch.why_no_triton.cache_clear()
    try:
        assert (_dispatch.why_no_triton() is None) == usable
    finally:
        _dispatch.why_no_triton.cache_clear()


def test_rejects_another_name_and_keeps_the_old_choice():
    with backend("torch"):
        wrong = pytest.raises(ValueError, match=r"backend\(\) got 'cuda', expected one of auto, torch, triton")
        with wrong, backend("cuda"):
            pass
        assert _dispatch.forced() == "torch"


def test_nests_and_comes_back_after_an_error():
    with backend("torch"):
        with pytest.raises(KeyError), backend("triton"):
            raise KeyError
        assert _dispatch.forced() == "torch"
    assert _dispatch.forced() == "auto"


def test_is_a_choice_of_one_thread():
    seen = []
    with backend("triton"):
        thread = threading.Thread(target=lambda: seen.append(LINEAR.run()))
        thread.start()
        thread.join()
    assert len(seen) == 1


def test_backward_runs_where_forward_ran():
    with backend("torch"):
        x = LINEAR.x.clone().requires_grad_()
        y = tt_linear(x, LINEAR.down)
    with backend("triton"):
        y.sum().backward()
    assert x.grad is not None


def test_compiled_code_obeys_a_backend_chosen_after_it_was_compiled():
    compiled = torch.compile(tt_linear, fullgraph=True, backend="aot_eager")
    compiled(LINEAR.x, LINEAR.down)
    with backend("triton"), pytest.raises(Exception, match="cannot serve"):
        compiled(LINEAR.x, LINEAR.down)


def test_an_exported_graph_holds_no_backend():
    class Linear(torch.nn.Module):
        def forward(self, x, train):
            return tt_linear(x, train)

    with backend("torch"):
        exported = torch.export.export(Linear(), (LINEAR.x, LINEAR.down))
    calls = [node for node in exported.graph.nodes if "loretta" in str(node.target)]
    assert [str(node.target) for node in calls] == ["loretta.adapter_forward.default"]
    assert not {"torch", "triton", "auto"} & {arg for node in calls for arg in node.args if isinstance(arg, str)}
    assert_equal({"y": exported.module()(LINEAR.x, LINEAR.down)}, {"y": LINEAR.run()}, 0)
    with backend("triton"), pytest.raises(RuntimeError, match="cannot serve"):
        exported.module()(LINEAR.x, LINEAR.down)


@pytest.fixture
def environment_says(monkeypatch):
    """Lets every thread find this name in the environment, as at the import."""

    def says(name: str) -> None:
        monkeypatch.setenv("LORETTA_BACKEND", name)
        monkeypatch.setattr(_dispatch, "_choice", _dispatch._Choice())

    return says


def test_the_environment_forces_a_backend(environment_says):
    environment_says("triton")
    with pytest.raises(RuntimeError, match='backend "triton" was asked for'):
        LINEAR.run()
    environment_says("torch")
    assert _dispatch.forced() == "torch"
    LINEAR.run()


def test_a_wrong_name_in_the_environment_is_named_when_first_used(environment_says):
    environment_says("cuda")
    with pytest.raises(ValueError, match="LORETTA_BACKEND got 'cuda', expected one of auto, torch, triton"):
        LINEAR.run()


def test_imports_with_torch_alone():
    code = """
import sys
for absent in ("triton", "numpy", "transformers", "peft", "safetensors"):
    sys.modules[absent] = None  # an import of it fails, as where it is not installed
import loretta_kernels, loretta_kernels.nn, loretta_kernels.selfcheck
assert "loretta" not in sys.modules
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}  # torch warns of numpy
    outcome = subprocess.run([sys.executable, "-c", code + CALL], capture_output=True, text=True, env=environment)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout == "[[2.0, 2.0]]\n"
    assert outcome.stderr == ""
