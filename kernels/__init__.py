"""Kernels by backend; reference.py is the maths of them in plain PyTorch: read it first.

Installed as `ldalign.kernels`.
"""
