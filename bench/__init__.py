"""Instruments: what the kernels cost and whether they are right. Run from the repository's root."""
