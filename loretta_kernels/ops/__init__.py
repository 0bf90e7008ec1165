"""The operators' contracts: arguments, registration with torch, gradients."""
