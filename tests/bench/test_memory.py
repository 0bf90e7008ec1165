"""Bytes kept, the peak and large allocations, of computations whose memory is known."""

from __future__ import annotations

import torch

from bench.memory import Allocations, peak_bytes, saved_bytes


def test_a_storage_kept_twice_counts_once_and_a_parameter_not_at_all():
    x, weight = torch.randn(10, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    assert saved_bytes(lambda: (x * x.view(10, 4)) @ weight, [weight]) == 2 * 160  # x, and its square
    assert saved_bytes(lambda: (x * x.view(10, 4)) @ weight, []) == 2 * 160 + 64


def test_the_peak_is_what_lives_at_once():
    def run() -> None:
        for _ in range(3):
            held = torch.empty(2**20, dtype=torch.uint8)
            del held
        both = torch.empty(2**20, dtype=torch.uint8), torch.empty(2**19, dtype=torch.uint8)
        del both

    assert peak_bytes(run, torch.device("cpu")) == 2**20 + 2**19


def test_new_large_tensors_count_and_views_or_small_ones_do_not():
    with Allocations(64) as allocations:
        small = torch.zeros(8, 4)
        large = torch.zeros(8, 8)
        large.t().add_(1)
        large.view(64)
    assert small.numel() == 32
    assert allocations.shapes == [(8, 8)]
