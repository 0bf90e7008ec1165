"""Triton's interpreter, without what it does again at every call of a device function: two thirds of a small launch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Let triton.language be replaced by the interpreter's once a launch, and dtypes be looked up."""
    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[tuple[int, ...]] = set()
    scalar_dtype = cache(interpreter._get_np_dtype)

    def replace_once(fn):
        modules = tuple(id(value) for value in fn.__globals__.values() if inspect.ismodule(value))
        languages = tuple(module for module in modules if module in (id(tl), id(tl.core)))
        if languages in replaced:
            return interpreter._LangPatchScope()
        replaced.add(languages)
        return replace(fn)

    def dtype(of):
        element = of.element_ty if isinstance(of, tl.block_type) else of
        return np.dtype(np.uint64) if isinstance(element, tl.pointer_type) else scalar_dtype(element)

    def launch_anew(self, *args, **kwargs):
        replaced.clear()
        return launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        patch.setattr(interpreter, "_get_np_dtype", dtype)
        yield
