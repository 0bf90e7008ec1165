"""The tests of PEFT that cannot pass with trained LayerNorms, each with its reason.

LoRETTA trains the norms through `modules_to_save`. A test is here for one of two reasons only: it asserts that nothing
without the method's prefix gets a gradient, or it uses two adapters at once, and a norm can follow only one. Each is a
strict xfail: one that passes after all is reported as a failure.
"""

from __future__ import annotations

_GRADIENT = "asserts that no parameter without the method's prefix has a gradient; the trained norms have one"
_TWO_ADAPTERS = "uses two adapters at once; a trained norm serves one"

TRAINED_NORMS: dict[str, str] = {}
