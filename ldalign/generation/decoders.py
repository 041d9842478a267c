"""Running a Mistral on new tokens over a paged cache: the half of generation that computes.

`Decoder.step` takes the new tokens of many rows at once, one for a row in the middle of its
response and a run of them for a prompt, and gives the next-token logits. Two implementations:
`PackedDecoder`, the whole of it in C++ with weights laid out for it, on CPUs; `ModuleDecoder`, the
very modules that are trained, with attention through the page table, anywhere.

Shapes: N new tokens, R rows, P pages a row, D width, H query heads, K key/value heads, E head
width, V vocabulary.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldalign import ops
from ldalign.generation.paged_cache import PAGE
from ldalign.kernels import cpp
from ldalign.models.mistral import Mistral, rope_tables

PANEL = 32  # rows of a weight that are packed together (csrc/kernels.h)


class Decoder(Protocol):
    """What the engine needs."""

    device: torch.device
    row_exact: bool  # a row's logits have the same bits whatever rows it is computed with

    def page_bytes(self) -> int:
        """Of one page, over all layers."""
        ...

    def allocate(self, pages: int, longest: int) -> None:
        """Makes a cache of so many pages, for rows of at most `longest` tokens."""
        ...

    def step(self, ids: Tensor, rows: Tensor, pages: Tensor, last: Tensor) -> Tensor:
        """Logits (len(last), V) float32 after the new tokens numbered `last`; the new keys and
        values are cached.

        ids (N,) int64: row after row. rows (R, 2) int64: a row's number of new tokens, and of those
        in its cache. pages (R, P) int32: its pages, in order. All but `last`, which is on the CPU
        as well, are on the CPU.
        """
        ...


def new_decoder(model: Mistral, release: bool = False) -> Decoder:
    """The fastest decoder there is for the model's device and dtype.

    release: the model may lose its weights, so that there are never two copies of them.
    """
    return PackedDecoder(model, release) if PackedDecoder.able(model) else ModuleDecoder(model)


class PackedDecoder:
    """Everything in C++ (`csrc/decode.cpp`), from weights packed for few rows.

    A row's result has the same bits whatever rows it is computed with, in float32 and in bfloat16:
    every sum runs in one fixed order.
    """

    row_exact = True

    @staticmethod
    def able(model: Mistral) -> bool:
        """Whether this machine, the model's dtype and its widths allow it."""
        weight, c = model.output_weight, model.config
        return (
            weight.device.type == "cpu"
            and weight.dtype in (torch.float32, torch.bfloat16)
            and c.hidden_size % 2 == c.intermediate_size % 2 == 0
            and ops.choose("sample", "cpu") == "cpp"
        )

    @torch.no_grad()
    def __init__(self, model: Mistral, release: bool = False) -> None:
        self.config, self.device, self.dtype = (
            model.config,
            torch.device("cpu"),
            model.output_weight.dtype,
        )
        packed: list[Tensor] = []
        norms: list[Tensor] = []
        for block in model.blocks:
            for linear in (
                block.self_attn.qkv_proj,
                block.self_attn.o_proj,
                block.mlp.gate_up_proj,
                block.mlp.down_proj,
            ):
                packed.append(self._take(linear, release))
            norms += [
                block.input_layernorm.weight.float(),
                block.post_attention_layernorm.weight.float(),
            ]
        self.packed, self.norms = packed, [*norms, model.model.norm.weight.float()]
        tied = self.config.tie_word_embeddings
        self.embedding = None if tied else model.model.embed_tokens.weight.detach()
        self.head = self._take(model.model.embed_tokens if tied else model.lm_head, release)

    def _take(self, module: nn.Module, release: bool) -> Tensor:
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        packed = pack_weight(weight.detach())
        if release:
            weight.data = weight.new_empty(0)
        return packed

    def page_bytes(self) -> int:
        c = self.config
        width = -(-c.head_dim // PAGE) * PAGE  # values are padded to whole vectors, 16 wide
        return (
            c.num_hidden_layers
            * c.num_key_value_heads
            * PAGE
            * (c.head_dim + width)
            * self.dtype.itemsize
        )

    def allocate(self, pages: int, longest: int) -> None:
        c = self.config
        shape = (c.num_hidden_layers, pages, c.num_key_value_heads)
        self.keys = self.values = torch.empty(0)  # an earlier cache is gone before there is another
        # Not zeros: memory that is never written to is never there.
        self.keys = torch.empty(*shape, c.head_dim, PAGE, dtype=self.dtype)
        self.values = torch.empty(*shape, PAGE, -(-c.head_dim // PAGE) * PAGE, dtype=self.dtype)
        self.cos, self.sin = rope_tables(torch.arange(longest), c.head_dim, c.rope_theta)

    def step(self, ids: Tensor, rows: Tensor, pages: Tensor, last: Tensor) -> Tensor:
        c = self.config
        hidden = cpp.decode_layers(
            self._embed(ids),
            self.packed,
            self.norms,
            self.keys,
            self.values,
            rows,
            pages,
            self.cos,
            self.sin,
            c.num_attention_heads,
            c.sliding_window,
            c.rms_norm_eps,
        )
        return cpp.packed_linear(hidden[last], self.head, c.vocab_size, wide_out=True)

    def _embed(self, ids: Tensor) -> Tensor:
        if self.embedding is not None:
            return F.embedding(ids, self.embedding)
        words = self.head.view(torch.int32).view(len(self.head), -1, PANEL)
        return words[ids // PANEL, :, ids % PANEL].view(self.dtype)


def pack_weight(weight: Tensor) -> Tensor:
    """(N, K) float32 or bfloat16, K even -> (ceil(N / 32), K, 32): panels of 32 rows, 4 bytes of
    each row by turns.

    So a product reads the weight once, from front to back. The rows of the last panel that are not
    there are zeros.
    """
    if len(weight) % PANEL:
        weight = F.pad(weight, (0, 0, 0, -len(weight) % PANEL))
    words = weight.contiguous().view(torch.int32).unflatten(0, (-1, PANEL))
    return words.transpose(1, 2).contiguous().view(weight.dtype).view(-1, weight.shape[1], PANEL)


class ModuleDecoder:
    """The model's own forward, with a layout that keeps keys and values in pages.

    On a GPU a step in which every row has one new token is a CUDA graph: launching a model's
    thousand small kernels one by one takes longer than they do. There is one graph for each of a
    few numbers of rows and pages, captured when first needed; rows and pages that are not there are
    filled up with a page that nobody reads.
    """

    row_exact = False  # a product's last bits change with its shape

    def __init__(self, model: Mistral, graphs: bool | None = None) -> None:
        self.model, self.device = model, model.output_weight.device
        self.graphs = (
            self.device.type == "cuda" if graphs is None else graphs
        )  # on a CPU only for tests: they replay it
        self._standing: dict[tuple[int, int], _StandingStep] = {}

    def page_bytes(self) -> int:
        c = self.model.config
        return (
            2
            * c.num_hidden_layers
            * PAGE
            * c.num_key_value_heads
            * c.head_dim
            * self.model.output_weight.itemsize
        )

    def allocate(self, pages: int, longest: int) -> None:
        c = self.model.config
        self._standing = {}
        self.keys = self.values = torch.empty(0)  # an earlier cache is gone before there is another
        self.spare = pages  # one page more: for rows that fill up a graph
        shape = (c.num_hidden_layers, pages + 1, PAGE, c.num_key_value_heads, c.head_dim)
        self.keys, self.values = (self.model.output_weight.new_zeros(shape) for _ in range(2))

    @torch.no_grad()
    def step(self, ids: Tensor, rows: Tensor, pages: Tensor, last: Tensor) -> Tensor:
        if self.graphs and len(last) == len(rows) == len(ids):
            size = bucket(len(rows)), bucket(pages.shape[1])
            if size not in self._standing:
                self._standing[size] = _StandingStep(self, *size)
            return self._standing[size].run(ids, rows, pages)
        layout = Paged(self.keys, self.values, rows, pages)
        last = last.to(self.device)
        return self.model(
            ids.to(self.device), layout, lambda hidden, weight: (hidden[last] @ weight.T).float()
        )


def bucket(n: int) -> int:
    """The next size up of 1, 2, 4, 8, 16, 24, 32, ...: at most 7 too many from 16 on."""
    return 1 << (n - 1).bit_length() if n <= 16 else -(-n // 8) * 8


class _StandingStep:
    """One decoding step whose inputs and outputs stay where they are, so that it can be captured
    and replayed.
    """

    def __init__(self, decoder: ModuleDecoder, rows: int, width: int) -> None:
        self.model, self.spare, self.rows, self.width = decoder.model, decoder.spare, rows, width
        self.ids = torch.zeros(rows, dtype=torch.int64, device=decoder.device)
        self.layout = Paged(
            decoder.keys, decoder.values, *self._filled(torch.empty(0, 2), torch.empty(0, width))
        )
        self.graph: torch.cuda.CUDAGraph | None = None
        if decoder.device.type == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # kernels are compiled and chosen before anything is captured
                    self._forward()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self._forward()

    def run(self, ids: Tensor, rows: Tensor, pages: Tensor) -> Tensor:
        """The logits (R, V) of R rows; they are overwritten by the next step."""
        self.ids[: len(ids)].copy_(ids, non_blocking=True)
        self.layout.copy_(Paged(self.layout.keys, self.layout.values, *self._filled(rows, pages)))
        if self.graph is None:
            self.logits = self._forward()
        else:
            self.graph.replay()
        return self.logits[: len(ids)]

    def _filled(self, rows: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        """rows and pages with rows that are not there: one new token, nothing before it, in the
        spare page.
        """
        table = torch.full((self.rows, self.width), self.spare, dtype=torch.int32)
        table[: len(pages), : pages.shape[1]] = pages
        counts = torch.tensor([[1, 0]]).repeat(self.rows, 1)
        counts[: len(rows)] = rows
        return counts, table

    def _forward(self) -> Tensor:
        return self.model(self.ids, self.layout, lambda hidden, weight: (hidden @ weight.T).float())


class Paged:
    """The layout (`ldalign.models.layout.Layout`) of one step over the pages; see `Decoder.step`
    for rows and pages.

    keys, values: (L, pages, 16, K, E).
    """

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, pages: Tensor) -> None:
        self.keys, self.values, device = keys, values, keys.device
        counts, held = rows.unbind(1)
        first = counts.cumsum(0) - counts
        positions = torch.arange(int(counts.sum())) + (held - first).repeat_interleave(counts)
        row = torch.arange(len(rows)).repeat_interleave(counts)
        # (N,)
        self.slots = (pages[row, positions // PAGE].long() * PAGE + positions % PAGE).to(device)
        self.positions, self.rows, self.pages = (
            positions.to(device),
            rows.to(device),
            pages.to(device),
        )
        self.longest = int(counts.max())

    def copy_(self, other: "Paged") -> None:
        """Takes the numbers of another step of the same shapes, in place."""
        for name in ("slots", "positions", "rows", "pages"):
            getattr(self, name).copy_(getattr(other, name), non_blocking=True)

    def attend(self, layer: int, qkv: Tensor, heads: int, window: int | None) -> Tensor:
        """qkv (N, H + 2K, E) of the new tokens -> (N, H, E), over the row's cache and the new
        tokens before each.
        """
        k, v = qkv[:, heads:].chunk(2, 1)
        self.keys[layer].flatten(0, 1)[self.slots] = k
        self.values[layer].flatten(0, 1)[self.slots] = v
        return ops.paged_attention(
            qkv[:, :heads],
            self.keys[layer],
            self.values[layer],
            self.rows,
            self.pages,
            self.longest,
            window,
        )
