"""pytest plugin: run PEFT's own tests on LoRETTA.

For each test module of PEFT it puts the rows of `cases` into the matrices (in place of the other methods, whose tests
are PEFT's business), keeps a few LoRA rows as control, opens the gates of `gates`, marks what `expected` lists, and
counts the outcomes per file and method.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections import Counter, defaultdict
from types import ModuleType

import pytest
import torch
from cases import INLINE, LISTS, config_class, controls
from expected import TRAINED_NORMS
from gates import OURS, edit_row, learning_rate, open_gates, skip_reason, stands_in_for
from peft import LoraConfig
from tiny_hub import MODELS

# Imported by the helpers of PEFT's tests, needed by none of the five files.
_UNUSED_IMPORTS = {"diffusers": ["StableDiffusionPipeline"], "datasets": ["load_dataset"]}
_prepared: set[str] = set()
_filled: set[int] = set()
_outcomes: defaultdict[tuple[str, str], Counter] = defaultdict(Counter)


def pytest_configure(config):
    """Import the helpers of the tests without `diffusers` and `datasets`, and open their gates."""
    pytest.register_assert_rewrite("tests.testing_common")
    stubbed = {name: _stub(name, attributes) for name, attributes in _UNUSED_IMPORTS.items() if name not in sys.modules}
    sys.modules.update(stubbed)
    try:
        common = importlib.import_module("tests.testing_common")
        utils = importlib.import_module("tests.testing_utils")
    finally:
        for name in stubbed:
            del sys.modules[name]
    open_gates(common)
    # `hub_online_once` goes online for a model that it has not seen: ours are all in the cache.
    utils._HUB_MODEL_ACCESSES.update(dict.fromkeys(MODELS, 0))


def _stub(name: str, attributes: list[str]) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
    for attribute in attributes:
        setattr(module, attribute, type(attribute, (), {}))
    return module


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    """Fill the matrices before pytest reads them from the marks."""
    module = metafunc.module
    name = module.__name__.rpartition(".")[2]
    if name not in _prepared:
        _prepared.add(name)
        open_gates(module)
        for attribute, rows in LISTS.get(name, {}).items():
            _fill(getattr(module, attribute), rows)
    if inline := INLINE.get(metafunc.function.__name__):
        for mark in metafunc.definition.iter_markers("parametrize"):
            _fill(mark.args[1], inline)


def _fill(matrix: list, rows: list) -> None:
    if id(matrix) not in _filled:
        _filled.add(id(matrix))
        matrix[:] = controls(matrix) + rows


def _config_class(item: pytest.Function) -> type | None:
    """The method that a test was parametrised with."""
    callspec = getattr(item, "callspec", None)
    values = callspec.params.values() if callspec else ()
    return next((found for found in map(config_class, values) if found), None)


def _group(config_cls: type, item: pytest.Function) -> str:
    """The column of the summary that a test counts in."""
    if config_cls is LoraConfig:
        return "LoRA (control)"
    return f"{config_cls.__name__}, {'trained' if _trains_norms(item) else 'frozen'} norms"


def _trains_norms(item: pytest.Function) -> bool:
    """Whether the row asks for trained norms (the rows on models without norms do not)."""
    options = item.callspec.params.get("config_kwargs")
    return isinstance(options, dict) and bool(options.get("train_layernorm"))


def pytest_collection_modifyitems(config, items):
    """Keep our tests and the controls; mark the expected failures."""
    kept, dropped = [], []
    for item in items:
        config_cls = _config_class(item)
        if config_cls is None or config_cls not in (*OURS, LoraConfig):
            dropped.append(item)
            continue
        kept.append(item)
        item.user_properties.append(("group", _group(config_cls, item)))
        if config_cls in OURS and _trains_norms(item) and item.originalname in TRAINED_NORMS:
            item.add_marker(TRAINED_NORMS[item.originalname])
        edit_row(item.originalname, config_cls, item.callspec.params)
        if skip := skip_reason(item.originalname, config_cls, item.callspec.params.get("model_id")):
            item.add_marker(pytest.mark.skip(reason=skip))
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def pytest_runtest_logreport(report):
    """Count a test once: its call, or the set-up that skipped it or broke."""
    if report.when == "call" or (report.when == "setup" and not report.passed):
        outcome = "xfailed" if report.skipped and hasattr(report, "wasxfail") else report.outcome
        _outcomes[report.fspath, dict(report.user_properties)["group"]][outcome] += 1


def pytest_terminal_summary(terminalreporter):
    """Print the outcomes per file and method."""
    terminalreporter.section("outcomes per file and method")
    for (file, group), counts in sorted(_outcomes.items()):
        outcomes = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
        terminalreporter.write_line(f"{file:44} {group:36} {outcomes}")


@pytest.fixture(autouse=True)
def _stand_in(request, monkeypatch):
    """Let the tests that ask for one config class by name take the method of ours that belongs with it."""
    config_cls = _config_class(request.node)
    if name := stands_in_for(request.node.originalname, config_cls):
        for module in (request.module, sys.modules["tests.testing_common"]):
            monkeypatch.setattr(module, name, config_cls, raising=False)


class _FiniteSGD(torch.optim.SGD):
    """SGD whose steps must leave finite parameters: NaN would pass for a changed one."""

    def step(self, closure=None):
        loss = super().step(closure)
        assert all(p.isfinite().all() for group in self.param_groups for p in group["params"])
        return loss


@pytest.fixture(autouse=True)
def _learning_rate(request, monkeypatch):
    """Train our rows finitely, at our learning rate where PEFT's table has none for us."""
    node = request.node
    config_cls = _config_class(node)
    if config_cls in OURS:
        own = learning_rate(node.originalname, config_cls, node.callspec.params.get("model_id"))
        monkeypatch.setattr(torch.optim, "SGD", lambda params, lr: _FiniteSGD(params, lr=own or lr))
