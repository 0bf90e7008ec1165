"""Threads share the rows: whatever their number, the same answers."""

from __future__ import annotations

import threading

import pytest
import torch

from loretta_kernels import TTShape, backend, tt_adapter

from ..kernels.problems import Answers, Problem, adapter_problem, assert_equal, solve

DOWN, UP = TTShape.for_matrix(512, 16, 3), TTShape.for_matrix(16, 512, 3)


def problem_of(rows: int, **options) -> Problem:
    """A fixed problem of so many rows."""
    torch.manual_seed(rows)
    return adapter_problem(DOWN, UP, (rows,), torch.float32, activation="gelu", **options)


def answers(rows: int, threads: int, **options) -> Answers:
    """Those of this problem by so many threads."""
    torch.set_num_threads(threads)
    with backend("c"):
        return solve(tt_adapter, problem_of(rows, **options))


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.4, "seed": 3}], ids=["plain", "dropout"])
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200, 1000])
def test_the_answers_do_not_depend_on_the_number_of_threads(rows, options):
    alone = answers(rows, 1, **options)
    for threads in (2, 3, 7):
        together = answers(rows, threads, **options)
        assert torch.equal(together["y"], alone["y"])
        assert torch.equal(together["dx"], alone["dx"])
        assert_equal(together, alone, 1e-5)
        assert_equal(answers(rows, threads, **options), together, 0)


def test_threads_of_python_have_memory_of_their_own():
    sizes = 40, 300, 1000, 650
    wanted = {rows: answers(rows, 1) for rows in sizes}
    problems = {rows: problem_of(rows) for rows in sizes}
    found: dict[int, list[Answers]] = {rows: [] for rows in sizes}

    def work(rows: int) -> None:
        with backend("c"):
            for _ in range(20):
                found[rows].append(solve(tt_adapter, problems[rows]))

    workers = [threading.Thread(target=work, args=(rows,)) for rows in sizes]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for rows in sizes:
        assert len(found[rows]) == 20
        for each in found[rows]:
            assert_equal(each, wanted[rows], 0)
