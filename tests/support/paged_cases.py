"""Rows over a paged cache, for attention: what no query may see is NaN."""

from typing import NamedTuple

import torch
from torch import Tensor

PAGE = 16
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, keys, values, rows, pages


class Case(NamedTuple):
    rows: tuple[tuple[int, int], ...]  # new tokens, and those before them
    window: int | None = None
    K: int = 1
    G: int = 1  # query heads of a key head
    E: int = 16
    splits: int = 1  # runs that a row's keys are cut into, in decoding
    scale: float = 1.0

    def inputs(self, dtype: torch.dtype, device: str) -> Inputs:
        """Pages lie anywhere, in any order."""
        make = torch.Generator().manual_seed(len(self.rows))
        R, used = len(self.rows), [-(-(new + before) // PAGE) for new, before in self.rows]
        order = torch.randperm(sum(used) + 3, generator=make)  # the last three are nobody's
        pool = torch.full((len(order), PAGE, self.K, self.E), torch.nan, dtype=torch.float64)
        keys, values = pool.clone(), pool.clone()
        pages = order[-1].repeat(R, max(used, default=0) + 1)
        for r, own in enumerate(order[: sum(used)].split(used)):
            pages[r, : len(own)] = own
            slots = (own[:, None] * PAGE + torch.arange(PAGE)).flatten()[: sum(self.rows[r])]
            for x in (keys, values):
                x.flatten(0, 1)[slots] = torch.randn(
                    len(slots), self.K, self.E, generator=make, dtype=torch.float64
                )
        rows = torch.tensor(self.rows, dtype=torch.int64).view(-1, 2)
        N = int(rows[:, 0].sum())
        q = self.scale * torch.randn(
            N, self.K * self.G, self.E, generator=make, dtype=torch.float64
        )
        q, keys, values = (x.to(device, dtype) for x in (q, keys, values))
        return q, keys, values, rows.to(device), pages.to(device, torch.int32)
