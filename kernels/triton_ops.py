"""The Triton backend: every raw op for CUDA tensors, or for CPU tensors in Triton's interpreter.

Ask `available()` first: without Triton, or without a GPU and the interpreter, the ops are not here.
"""

import importlib.util
import os

import torch

OLDEST = (8, 0)  # compute capability: Ampere, the first whose tensor cores take bfloat16


def _why_not() -> str:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        return (
            f"the GPU has compute capability {capability[0]}.{capability[1]}; "
            "8.0 or newer is needed"
        )
    return ""


_REASON = _why_not()

if not _REASON:
    from ldalign.kernels.pieces import WORKSPACE_BYTES
    from ldalign.kernels.triton_attention import pair_attention, pair_attention_backward
    from ldalign.kernels.triton_common import INTERPRETED
    from ldalign.kernels.triton_decode import paged_attention, rope_to_pages, sample
    from ldalign.kernels.triton_elementwise import rope_, swiglu, swiglu_backward, weighted_dpo
    from ldalign.kernels.triton_head import (
        linear_logprob,
        linear_logprob_backward,
        pair_loss,
        sft_loss,
    )
    from ldalign.kernels.triton_norm import (
        add_rms_norm,
        add_rms_norm_backward,
        rms_norm,
        rms_norm_backward,
    )
    from ldalign.kernels.triton_optim import adamw_, rmsprop_

    __all__ = [
        "WORKSPACE_BYTES",
        "adamw_",
        "add_rms_norm",
        "add_rms_norm_backward",
        "available",
        "interpreted",
        "linear_logprob",
        "linear_logprob_backward",
        "paged_attention",
        "pair_attention",
        "pair_attention_backward",
        "pair_loss",
        "rms_norm",
        "rms_norm_backward",
        "rmsprop_",
        "rope_",
        "rope_to_pages",
        "sample",
        "sft_loss",
        "swiglu",
        "swiglu_backward",
        "weighted_dpo",
        "why_not",
    ]


def available() -> bool:
    """Says whether the ops can run here; told once, at import."""
    return not _REASON


def why_not() -> str:
    """Returns why `available()` is false, or ""."""
    return _REASON


def interpreted() -> bool:
    """Says whether the ops run in the interpreter, on CPU tensors, and not on a GPU."""
    return available() and bool(INTERPRETED)
