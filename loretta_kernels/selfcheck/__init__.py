"""Every operator against its definition, on this machine: what `loretta check` and `python -m bench.selfcheck` run."""

from loretta_kernels.selfcheck.cases import Case, adapter_case, linear_case, lora_case
from loretta_kernels.selfcheck.errors import DRAWS, DTYPES, Row, check
from loretta_kernels.selfcheck.report import report, text_table
from loretta_kernels.selfcheck.timing import Timing, time_against_copy

__all__ = [
    "DRAWS",
    "DTYPES",
    "Case",
    "Row",
    "Timing",
    "adapter_case",
    "check",
    "linear_case",
    "lora_case",
    "report",
    "text_table",
    "time_against_copy",
]
