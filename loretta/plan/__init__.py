"""Will a training run fit: memory counted from a model's configuration, without a weight."""

from loretta.plan.count import CHECKPOINTING, Batch, StepCounter
from loretta.plan.groups import count_groups
from loretta.plan.memory import Devices, Memory, largest_batch, memory
from loretta.plan.quantised import QUANTS, quantise

__all__ = [
    "CHECKPOINTING",
    "QUANTS",
    "Batch",
    "Devices",
    "Memory",
    "StepCounter",
    "count_groups",
    "largest_batch",
    "memory",
    "quantise",
]
