"""Every operator against its definition, on this machine: what `loretta check`, the benchmarks and the tests run."""

from loretta_kernels.selfcheck.cases import DTYPES, Case, adapter_case, check_cases, linear_case, lora_case
from loretta_kernels.selfcheck.judge import Row, check, error, judged
from loretta_kernels.selfcheck.problem import Answers, Problem, exact_problem, random_problem
from loretta_kernels.selfcheck.report import report, text_table
from loretta_kernels.selfcheck.timing import Timing, time_against_copy

__all__ = [
    "DTYPES",
    "Answers",
    "Case",
    "Problem",
    "Row",
    "Timing",
    "adapter_case",
    "check",
    "check_cases",
    "error",
    "exact_problem",
    "judged",
    "linear_case",
    "lora_case",
    "random_problem",
    "report",
    "text_table",
    "time_against_copy",
]
