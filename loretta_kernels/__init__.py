"""Tensor-train operators for fine-tuning: tensors in, tensors out."""
