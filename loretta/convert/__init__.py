"""Adapters that something else wrote, as adapters of this package."""

from .upstream import Converted, MissingParameters, convert_upstream

__all__ = ["Converted", "MissingParameters", "convert_upstream"]
