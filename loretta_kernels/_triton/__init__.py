"""The operator as Triton kernels: one launch forward, one backward, from the cores. The only folder that needs triton.

The plan (`plan`, `side`) is plain Python; what launches is `adapter`.
"""
