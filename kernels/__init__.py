"""Triton kernels of vllm-ssd, installed as ``vllm_ssd.kernels``.

Each kernel stands beside a plain PyTorch reference of the same signature, so that it can be tested in
Triton's interpreter on a machine without a GPU.
"""
