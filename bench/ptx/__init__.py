"""The PTX that Triton compiles, executed on the CPU; no GPU is needed: see README.md."""

from bench.ptx.executor import Executed, Executor, Finding, execute, executing

__all__ = ["Executed", "Executor", "Finding", "execute", "executing"]
