"""Which loss a pair has: DPO's, or one of its relatives in the literature.

With Delta the margin of a pair (of the log-probs a token with `length_normalised`), x = beta Delta,
s its weight, S_r the winner's summed log-prob and n_r its tokens, a pair's loss is s l + nll_r:

    l      sigmoid: -log sigmoid(x) + label_smoothing x          ipo: (x - 1/2)^2 / beta^2
    nll_r  nll * -S_r / n_r

docs/kernels.md derives the gradients, docs/methods.md says whose losses these are.
"""

from typing import Literal, NamedTuple

Kind = Literal["sigmoid", "ipo"]
SMOOTHING_BOUND = 0.5  # from there on both responses would be preferred alike, or the loser more


class LossOptions(NamedTuple):
    """The options of the loss of a pair; the defaults are LD-Align's loss, DPO's with weights."""

    kind: Kind = "sigmoid"
    nll: float = 0.0  # weight of the winner's NLL, in nats a token; 0: off
    label_smoothing: float = 0.0  # probability that winner and loser are the wrong way round
    length_normalised: bool = False  # margins of log-probs a token, in place of sums

    def problem(self) -> str:
        """Why this is no loss, in one line; "" where it is one."""
        if self.kind not in ("sigmoid", "ipo"):
            return f"kind={self.kind!r} is neither sigmoid nor ipo"
        if not self.nll >= 0:
            return f"nll={self.nll} must be 0 or more"
        if not 0 <= self.label_smoothing < SMOOTHING_BOUND:
            return f"label_smoothing={self.label_smoothing} must be 0 or more, below 0.5"
        if self.kind == "ipo" and self.label_smoothing:
            return f"label_smoothing={self.label_smoothing} is of kind=sigmoid, not of ipo"
        return ""


DPO = LossOptions()
