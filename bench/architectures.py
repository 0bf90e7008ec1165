"""The GPU architectures that the kernels are compiled for, their limits, and occupancy by them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """What a multiprocessor (AMD: a compute unit) has, and what a program may take of it.

    Args:
        lanes: threads of a warp.
        shared_limit: bytes of shared memory that one program may have.
        shared: bytes of shared memory; each program takes `shared_reserved` more than it asks for.
        warps, programs: how many are resident at most.
        registers: 32-bit registers, of all lanes, allocated to a warp `register_step` a lane at a time.
    """

    name: str
    lanes: int
    shared_limit: int
    shared: int
    shared_reserved: int
    warps: int
    programs: int
    registers: int
    register_step: int

    def occupancy(self, registers: int, shared: int, num_warps: int) -> float:
        """The share of the resident warps that programs of this size can fill."""
        step = self.register_step
        per_warp = -(-max(registers, 1) // step) * step * self.lanes
        by_registers = self.registers // per_warp // num_warps
        by_shared = self.shared // (shared + self.shared_reserved) if shared + self.shared_reserved else self.programs
        resident = min(by_registers, by_shared, self.warps // num_warps, self.programs)
        return resident * num_warps / self.warps


def _cuda(capability: int, shared_limit: int, warps: int = 64, programs: int = 32) -> Architecture:
    return Architecture(
        f"sm_{capability}",
        32,
        shared_limit=shared_limit * 1024,
        shared=(shared_limit + 1) * 1024,
        shared_reserved=1024,
        warps=warps,
        programs=programs,
        registers=65536,
        register_step=8,
    )


# CUDA C++ Programming Guide, compute capabilities; AMD Instinct MI300 ISA, and its four SIMDs of 512 registers a lane.
ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        _cuda(80, 163),
        _cuda(86, 99, warps=48, programs=16),
        _cuda(89, 99, warps=48, programs=24),
        _cuda(90, 227),
        _cuda(100, 227),
        _cuda(120, 99, warps=48, programs=24),
        Architecture(
            "gfx942",
            64,
            shared_limit=65536,
            shared=65536,
            shared_reserved=0,
            warps=32,
            programs=32,
            registers=4 * 512 * 64,
            register_step=8,
        ),
    )
}
