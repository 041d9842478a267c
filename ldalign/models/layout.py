"""How the tokens of a flat batch see each other.

The models work on flat tokens (N, D) and leave attention to a *layout*, which knows where the
sequences begin and end. `Packed` serves training, scoring and the guide: sequences end to end, no
padding. Generation has a layout of its own over the key/value cache. Of a layout a model needs
`positions` and `attend`.

Shapes: N flat tokens, D width, H query heads, K key/value heads, E head width, S segments (the
parts of all sequences).
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ldalign import ops
from ldalign.system.transfer import to_device

Rotary = tuple[Tensor, Tensor]  # cos and sin (N, E/2) of the tokens' rotary embedding


class Layout(Protocol):
    """What a model needs to know of its batch."""

    positions: Tensor  # (N,) int64, restarting at each sequence

    def attend(
        self, layer: int, qkv: Tensor, heads: int, window: int | None, rotary: Rotary | None
    ) -> Tensor:
        """Returns the attention of one layer: qkv (N, H + 2K, E) -> (N, H, E).

        The first H = `heads` heads are queries, then K keys, K values. With a window, a token sees
        that many: itself and those before it. rotary: queries and keys turn first, in place.
        """
        ...


class Packed:
    """Causal sequences laid end to end, blind to each other.

    A sequence is given by its length, or by the lengths (prompt, response, response, ...) of its
    parts: then every response continues the prompt, at the positions after it, and is blind to the
    other responses. So a pair's prompt is computed once; the result is that of separate sequences
    [prompt | response]. Raises ValueError for a part without tokens.
    """

    def __init__(
        self, lengths: Sequence[int | Sequence[int]], device: torch.device | str = "cpu"
    ) -> None:
        parts = [(n,) if isinstance(n, int) else tuple(n) for n in lengths]
        if any(n < 1 for sequence in parts for n in sequence):
            raise ValueError(
                "every part of a packed sequence needs at least one token, got lengths "
                f"{list(lengths)}"
            )
        self.lengths = [sum(sequence) for sequence in parts]  # tokens of each sequence, all parts
        # The most tokens of a prompt and one response: positions are below it.
        self.longest = max((p + max(rest, default=0) for p, *rest in parts), default=0)
        self.segments = _segments(parts)
        begin, end, prefix_begin, prefix_end = self.segments.unbind(1)  # (S,) each
        # Token i of a segment stands at position (length of its prefix) + i - begin.
        offsets = (prefix_end - prefix_begin - begin).repeat_interleave(end - begin)  # (N,)
        positions = torch.arange(sum(self.lengths)) + offsets  # (N,)
        (self.positions,) = to_device(torch.device(device), positions)

    def attend(
        self, layer: int, qkv: Tensor, heads: int, window: int | None, rotary: Rotary | None
    ) -> Tensor:
        """Attention within each sequence: qkv (N, H + 2K, E) -> (N, H, E)."""
        return ops.pair_attention(qkv, heads, self.segments, window, rotary)


def _segments(sequences: Sequence[Sequence[int]]) -> Tensor:
    """begin, end, prefix_begin, prefix_end of every part, (S, 4) int64 on the CPU.

    It is what `ops.pair_attention` wants.
    """
    rows = []
    begin = 0
    for prompt, *responses in sequences:
        start, after = begin, begin + prompt
        rows.append((start, after, start, start))  # a prompt has an empty prefix
        begin = after
        for length in responses:
            rows.append((begin, begin + length, start, after))
            begin += length
    return torch.tensor(rows, dtype=torch.int64).view(-1, 4)
