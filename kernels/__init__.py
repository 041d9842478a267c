"""Kernels: one operation per file, each with a plain PyTorch reference. Installed as
`ldalign.kernels`.
"""
