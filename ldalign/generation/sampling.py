"""How tokens are chosen: the settings, and one draw for each row."""

import math
from dataclasses import dataclass

from torch import Tensor

from ldalign import ops
from ldalign.kernels import cpp


@dataclass(frozen=True)
class Sampling:
    """What is done to a model's distribution over the next token, in this order.

    repetition_penalty divides the positive logits of tokens already in prompt or response, and
        multiplies the negative ones (Keskar et al., arXiv 1909.05858). 1: off.
    temperature divides the logits. 0: greedy, and what follows does not matter.
    top_k keeps the k most likely tokens. 0: off.
    top_p keeps the fewest tokens that hold this mass (Holtzman et al., arXiv 1904.09751). 1: off.
    min_p keeps tokens at least this share as likely as the most likely one (Nguyen et al., arXiv
        2407.01082). 0: off.

    A response ends with an end id, with one of the `stop` strings, or after max_new_tokens. Raises
    ValueError for a setting out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sound = (
            self.max_new_tokens >= 1
            and 0 <= self.temperature < math.inf
            and self.top_k >= 0
            and 0 < self.top_p <= 1
            and 0 <= self.min_p <= 1
            and 0 < self.repetition_penalty < math.inf
            and all(self.stop)
        )
        if not sound:
            raise ValueError(
                f"bad sampling settings {self}: max_new_tokens >= 1, temperature >= 0, top_k >= 0, "
                "0 < top_p <= 1, 0 <= min_p <= 1, repetition_penalty > 0, no empty stop string"
            )


@dataclass(frozen=True)
class Response:
    """One sampled response.

    ids hold the end token where the model gave one; a response cut at its length has none. logp is
    in natural logs, summed over ids, under the distribution sampled from, temperature and cuts
    included; None for a response made elsewhere. With the default settings and in float32 it equals
    the training path's to about 1e-4, but not to the bit: the reference pass computes its own, so
    that step 0 compares like with like.
    """

    ids: list[int]
    finish_reason: str  # "stop" or "length"
    logp: float | None


def sample(
    logits: Tensor, uniform: Tensor, sampling: Sampling, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draws one token a row; returns ids (R,) int64 and their log-probs (R,) float32.

    logits (R, V) float32; overwritten.
    uniform (R,) float64 in [0, 1): the draws.
    seen (R, T) int64: the tokens that a repetition penalty counts, filled up with -1.
    """
    s = sampling
    return ops.sample(
        logits, uniform, s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty, seen
    )


def blank_unsound(logits: Tensor) -> Tensor:
    """Says of each row of logits (R, V) whether all of them are finite: (R,) bool. The other rows
    are set to 0, in place: NaN would have a sampler look for a token beyond the last.
    """
    if logits.device.type == "cpu" and cpp.available():
        sound = cpp.all_finite(logits)
        if bool(sound.all()):
            return sound
    return blank_unread(logits)


def blank_unread(logits: Tensor) -> Tensor:
    """`blank_unsound` without anything that the host would wait for."""
    smallest, largest = logits.aminmax(dim=-1)  # NaN where a row has one
    sound = smallest.isfinite() & largest.isfinite()
    logits.masked_fill_(~sound[:, None], 0.0)
    return sound
