"""Kernels: one operation per file, each with a plain PyTorch reference; see reference.py first.

Installed as `ldalign.kernels`.
"""
