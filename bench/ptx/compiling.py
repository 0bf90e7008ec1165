"""The PTX of a launch, compiled by Triton for an architecture that need not be there, and kept for other processes.

Triton's own pipeline without its last stage: no ptxas, no GPU. The process must not have TRITON_INTERPRET.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from bench.ptx.library import cache_folder


def ptx_of(launch: Any, arch: str) -> tuple[str, int]:
    """The PTX of a launch's kernel for sm_80, sm_90, ..., and how many bytes of shared memory it takes."""
    import triton
    from triton.compiler import ASTSource

    if not hasattr(launch.kernel, "cache_key"):
        raise RuntimeError("PTX is compiled, and this process interprets kernels: unset TRITON_INTERPRET")
    source = ASTSource(**launch.source())
    key = "\0".join([triton.__version__, arch, source.hash(), json.dumps(launch.options(), sort_keys=True)])
    path = cache_folder() / "ptx" / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.json.gz"
    if path.exists():
        kept = json.loads(gzip.decompress(path.read_bytes()))
        return kept["ptx"], kept["shared"]
    ptx, shared = _compiled(source, arch, launch.options())
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as new:
        new.write(gzip.compress(json.dumps({"ptx": ptx, "shared": shared}).encode(), 5))
    os.replace(new.name, path)  # at once: other processes may be doing the same
    return ptx, shared


def _compiled(source: Any, arch: str, options: dict[str, Any]) -> tuple[str, int]:
    """What `triton.compile` does up to PTX."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    backend = make_backend(target)
    parsed = backend.parse_options({**options, **source.parse_options()})
    stages: dict[str, Any] = {}
    backend.add_stages(stages, parsed, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    code_generation, modules = backend.get_codegen_implementation(parsed), backend.get_module_map()
    module = source.make_ir(target, parsed, code_generation, modules, context)
    metadata: dict[str, Any] = {"target": target, **parsed.__dict__}
    for name in ("ttir", "ttgir", "llir", "ptx"):
        module = stages[name](module, metadata)
    return module, metadata["shared"]


def folder() -> Path:
    """Where PTX is kept."""
    return cache_folder() / "ptx"
