"""The choice of a backend: one place, no silent fallback, and backward follows forward."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from loretta_kernels import _dispatch, _torch, backend, tt_adapter, tt_linear, tt_lora

from .problems import CALL, TINY_DOWN, TINY_UP, adapter_problem, assert_equal, linear_problem, lora_problem, solve

LINEAR = linear_problem(TINY_DOWN, (4,), torch.float32)
CASES = [
    pytest.param(tt_linear, LINEAR, id="tt_linear"),
    pytest.param(
        tt_adapter, adapter_problem(TINY_DOWN, TINY_UP, (4,), torch.float32, residual="none"), id="tt_adapter"
    ),
    pytest.param(tt_lora, lora_problem(TINY_DOWN, TINY_UP, (4,), torch.float32), id="tt_lora"),
]


@pytest.mark.parametrize(("function", "problem"), CASES)
def test_a_forced_backend_that_cannot_serve_says_why(function, problem):
    with backend("triton"), pytest.raises(RuntimeError, match='"triton" was asked for, but cannot serve: '):
        function(**problem.tensors | problem.options)


@pytest.mark.parametrize("served", ["c", "torch"])
@pytest.mark.parametrize(("function", "problem"), CASES)
def test_serves_the_cpu_by_c_or_else_by_pytorch(monkeypatch, function, problem, served):
    with backend(served):
        wanted = solve(function, problem)
    if served == "torch":
        monkeypatch.setattr(_dispatch, "_why_no_library", lambda: "there is no C compiler")
        _dispatch._warn_of_the_slower_path.cache_clear()
        with pytest.warns(UserWarning, match="no C compiler: PyTorch serves .* on this CPU, which is slower"):
            solve(function, problem)
    assert_equal(solve(function, problem), wanted, 0)


@pytest.mark.parametrize(
    ("dtypes", "served"),
    [
        ((torch.float32,), "c"),
        ((torch.bfloat16, torch.float32), "c"),
        ((torch.float64, torch.float64), "torch"),
        ((torch.float16, torch.float32), "torch"),
        ((torch.float32, torch.float64), "torch"),
    ],
    ids=str,
)
def test_c_takes_fp32_and_bf16(dtypes, served):
    x, *others = (torch.ones(3, dtype=dtype) for dtype in dtypes)
    assert _dispatch.choose(x, None, *others) == served
    with backend("torch"):
        assert _dispatch.choose(x, *others) == "torch"
    if served == "torch":
        refused = pytest.raises(RuntimeError, match='"c" was asked for, but cannot serve: it takes fp32 and bf16')
        with backend("c"), refused:
            _dispatch.choose(x, *others)


def test_c_forced_says_why_it_cannot_serve(monkeypatch):
    with backend("c"), pytest.raises(RuntimeError, match="the tensors are on meta, not on the CPU"):
        _dispatch.choose(torch.ones(3, device="meta"))
    monkeypatch.setattr(_dispatch, "_why_no_library", lambda: "there is no C compiler")
    with backend("c"), pytest.raises(RuntimeError, match='"c" was asked for, but cannot serve: there is no C compiler'):
        _dispatch.choose(torch.ones(3))


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 0)


def on_gpu(dtype: torch.dtype) -> OnGPU:
    """A tensor of this dtype that says it is on a GPU."""
    return torch.ones(3, dtype=dtype).as_subclass(OnGPU)


@pytest.fixture
def has_triton(monkeypatch) -> None:
    monkeypatch.setattr(_dispatch, "_HAS_TRITON", True)


@pytest.fixture
def no_triton(monkeypatch) -> None:
    monkeypatch.setattr(_dispatch, "_HAS_TRITON", False)
    _dispatch._warn_of_the_slower_path.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_serves_a_gpu_by_triton(has_triton, dtype):
    assert _dispatch.choose(on_gpu(dtype), None, torch.ones(3)) == "triton"
    with backend("torch"):
        assert _dispatch.choose(on_gpu(dtype)) == "torch"


@pytest.mark.parametrize("tensors", [(torch.float64,), (torch.float32, torch.float64)], ids=["x", "cores"])
def test_serves_fp64_on_a_gpu_by_pytorch_and_refuses_it_where_triton_is_forced(has_triton, tensors):
    x, *others = map(on_gpu, tensors)
    assert _dispatch.choose(x, *others) == "torch"
    with backend("triton"), pytest.raises(RuntimeError, match="compute in fp32, and there are fp64 tensors"):
        _dispatch.choose(x, *others)


def test_compiled_code_that_counted_on_c_falls_back_or_says_why(monkeypatch):
    monkeypatch.setattr(_dispatch, "_why_no_library", lambda: "there is no C compiler")
    _dispatch._implementation.cache_clear()
    call = "tt_linear_fwd", LINEAR.tensors["x"], LINEAR.tensors["cores"], TINY_DOWN.spec, None
    try:
        with (
            backend("c"),
            pytest.raises(RuntimeError, match='"c" was asked for, but cannot serve: there is no C compiler'),
        ):
            _dispatch.run(*call, "c")
        assert torch.equal(_dispatch.run(*call, "c")[0], _dispatch.run(*call, "torch")[0])
    finally:
        _dispatch._implementation.cache_clear()


def test_says_once_that_a_gpu_without_triton_takes_the_slower_path(no_triton, recwarn):
    with pytest.warns(UserWarning, match="triton is not installed: PyTorch serves .* on this GPU, which is slower"):
        assert _dispatch.choose(on_gpu(torch.float32)) == "torch"
    assert _dispatch.choose(on_gpu(torch.float32)) == "torch"
    assert _dispatch.choose(on_gpu(torch.float64)) == "torch"
    assert not recwarn.list
    with backend("triton"), pytest.raises(RuntimeError, match="cannot serve: triton is not installed"):
        _dispatch.choose(on_gpu(torch.float32))


def test_rejects_another_name_and_keeps_the_old_choice():
    with backend("torch"):
        wrong = pytest.raises(ValueError, match=r"backend\(\) got 'cuda', expected one of auto, c, torch, triton")
        with wrong, backend("cuda"):
            pass
        assert _dispatch._choice.name == "torch"


def test_nests_and_comes_back_after_an_error():
    with backend("torch"):
        with pytest.raises(KeyError), backend("triton"):
            raise KeyError
        assert _dispatch._choice.name == "torch"
    assert _dispatch._choice.name == "auto"


def test_is_a_choice_of_one_thread():
    seen = []
    with backend("triton"):
        thread = threading.Thread(target=lambda: seen.append(tt_linear(**LINEAR.tensors | LINEAR.options)))
        thread.start()
        thread.join()
    assert len(seen) == 1


def test_backward_runs_where_forward_ran():
    with backend("torch"):
        x = LINEAR.tensors["x"].clone().requires_grad_()
        y = tt_linear(x, LINEAR.tensors["cores"], TINY_DOWN)
    with backend("triton"):
        y.sum().backward()
    assert x.grad is not None


def test_the_operator_runs_in_the_backend_it_is_told(monkeypatch):
    asked = []
    monkeypatch.setattr(_dispatch, "_implementation", lambda name: asked.append(name) or _torch)
    monkeypatch.setattr(_dispatch, "_why_not_triton", lambda device, dtypes: None)
    names = "c", "torch", "triton"
    for name in names:
        with backend(name):
            solve(tt_linear, LINEAR)
    assert asked == [name for name in names for _ in ("forward", "backward")]


def test_a_compiled_function_obeys_a_backend_chosen_after_it_was_compiled():
    compiled = torch.compile(tt_linear, fullgraph=True, backend="aot_eager")
    compiled(**LINEAR.tensors | LINEAR.options)
    with backend("triton"), pytest.raises(Exception, match="cannot serve"):
        compiled(**LINEAR.tensors | LINEAR.options)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new process."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def test_the_environment_forces_a_backend():
    forced = python(CALL, LORETTA_BACKEND="triton")
    assert 'RuntimeError: backend "triton" was asked for' in forced.stderr
    assert python(CALL, LORETTA_BACKEND="torch").stdout == "[[2.0, 2.0]]\n"


def test_a_wrong_name_in_the_environment_is_named_when_first_used():
    wrong = python(CALL, LORETTA_BACKEND="cuda")
    assert "ValueError: LORETTA_BACKEND got 'cuda', expected one of auto, c, torch, triton" in wrong.stderr


def test_imports_without_triton_and_without_the_layers_above():
    code = """
import sys
sys.modules["triton"] = None  # an import of it fails, as where it is not installed
import loretta_kernels
above = {"transformers", "peft", "loretta"} & set(sys.modules)
assert not above, above
"""
    outcome = python(code + CALL)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout == "[[2.0, 2.0]]\n"
    assert outcome.stderr == ""
