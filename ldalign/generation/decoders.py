"""Running a Mistral on new tokens over a paged cache: the half of generation that computes.

`Decoder.step` takes the new tokens of many rows at once, one for a row in the middle of its
response and a run of them for a prompt, and gives the next-token logits. Two implementations:
`PackedDecoder`, the whole of it in C++ with weights laid out for it, on CPUs; `ModuleDecoder`, the
very modules that are trained, with attention through the page table, anywhere.

Shapes: N new tokens, R rows, P pages a row, L layers, D width, H query heads, K key/value heads,
E head width, V vocabulary.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldalign import ops
from ldalign.generation.paged_cache import PAGE
from ldalign.kernels import cpp
from ldalign.models.mistral import Mistral, rope_tables

PANEL = 32  # rows of a weight that are packed together, as csrc/kernels.h has it


class Decoder(Protocol):
    """What the engine needs of the part that computes."""

    device: torch.device
    row_exact: bool  # a row's logits have the same bits whatever rows it is computed with

    def page_bytes(self) -> int:
        """Returns the bytes that one page takes, keys and values of all layers."""
        ...

    def allocate(self, pages: int, longest: int) -> None:
        """Makes a cache of so many pages, for rows of at most `longest` tokens."""
        ...

    def step(self, ids: Tensor, rows: Tensor, pages: Tensor, last: Tensor) -> Tensor:
        """Returns the logits after the new tokens numbered `last`: (len(last), V) float32.

        Their keys and values are in the cache afterwards.

        ids (N,) int64: the new tokens, row after row.
        rows (R, 2) int64: how many new tokens a row has, and how many are in its cache.
        pages (R, P) int32: a row's pages, in order.
        last (len(last),) int64: places in `ids`.

        All four are on the CPU; the logits are on the decoder's device.
        """
        ...


def new_decoder(model: Mistral, release: bool = False) -> Decoder:
    """Returns the fastest decoder there is for the model's device and dtype.

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
        """Says whether this machine, the model's dtype and its widths allow it."""
        weight, c = model.output_weight, model.config
        return (
            weight.device.type == "cpu"
            and weight.dtype in (torch.float32, torch.bfloat16)
            and c.hidden_size % 2 == c.intermediate_size % 2 == 0
            and ops.choose("sample", "cpu") == "cpp"
        )

    @torch.no_grad()
    def __init__(self, model: Mistral, release: bool = False) -> None:
        self.config, self.device = model.config, torch.device("cpu")
        self.dtype = model.output_weight.dtype
        # The order that `cpp.decode_layers` reads them in.
        self.packed: list[Tensor] = []  # 4 L
        self.norms: list[Tensor] = []  # 2 L + 1, float32
        for block in model.blocks:
            attention, mlp = block.self_attn, block.mlp
            for linear in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj):
                self.packed.append(self._take(linear, release))
            self.norms.append(block.input_layernorm.weight.float())
            self.norms.append(block.post_attention_layernorm.weight.float())
        self.norms.append(model.model.norm.weight.float())
        tied = self.config.tie_word_embeddings
        # A tied embedding is read out of the packed head (`_embed`), so that it exists once.
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
        key_and_value = c.head_dim + self._value_width()
        numbers = c.num_hidden_layers * c.num_key_value_heads * PAGE * key_and_value
        return numbers * self.dtype.itemsize

    def _value_width(self) -> int:
        """A value's width in the cache: E, padded to whole vectors of 16."""
        return -(-self.config.head_dim // PAGE) * PAGE

    def allocate(self, pages: int, longest: int) -> None:
        c = self.config
        shape = (c.num_hidden_layers, pages, c.num_key_value_heads)
        self.keys = self.values = torch.empty(0)  # an earlier cache is gone before there is another
        # Not zeros: the system gives no memory to a page that was never written to.
        # Keys (L, pages, K, E, 16): one load takes the same element of 16 keys.
        self.keys = torch.empty(*shape, c.head_dim, PAGE, dtype=self.dtype)
        # Values (L, pages, K, 16, E padded): a value's elements lie together.
        self.values = torch.empty(*shape, PAGE, self._value_width(), dtype=self.dtype)
        self.cos, self.sin = rope_tables(torch.arange(longest), c.head_dim, c.rope_theta)

    def step(self, ids: Tensor, rows: Tensor, pages: Tensor, last: Tensor) -> Tensor:
        c = self.config
        weights, cache = (self.packed, self.norms), (self.keys, self.values)
        hidden = cpp.decode_layers(
            self._embed(ids),
            *weights,
            *cache,
            rows,
            pages,
            self.cos,
            self.sin,
            c.num_attention_heads,
            c.sliding_window,
            c.rms_norm_eps,
        )  # (N, D)
        return cpp.packed_linear(hidden[last], self.head, c.vocab_size, wide_out=True)

    def _embed(self, ids: Tensor) -> Tensor:
        if self.embedding is not None:
            return F.embedding(ids, self.embedding)
        # `pack_weight` undone for these rows alone: a panel's last axis is its 32 rows.
        words = self.head.view(torch.int32).view(len(self.head), -1, PANEL)  # 4 bytes of a row each
        return words[ids // PANEL, :, ids % PANEL].view(self.dtype)


def pack_weight(weight: Tensor) -> Tensor:
    """Packs a weight so that a product reads it once, from front to back.

    (N, K) float32 or bfloat16, K even -> (ceil(N / 32), K, 32): panels of 32 rows, which lie in
    turns of 4 bytes each. Rows that the last panel lacks are zeros.
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
        # On a CPU only in tests, which run the standing step without a graph.
        self.graphs = self.device.type == "cuda" if graphs is None else graphs
        self._standing: dict[tuple[int, int], _StandingStep] = {}

    def page_bytes(self) -> int:
        c = self.model.config
        numbers = c.num_hidden_layers * PAGE * c.num_key_value_heads * c.head_dim
        return 2 * numbers * self.model.output_weight.itemsize  # keys and values

    def allocate(self, pages: int, longest: int) -> None:
        c = self.model.config
        self._standing = {}
        self.keys = self.values = torch.empty(0)  # an earlier cache is gone before there is another
        self.spare = pages  # the number of one page more, for rows that fill up a graph
        # Zeros: a position not yet written has probability 0, and 0 times NaN would be NaN.
        shape = (c.num_hidden_layers, pages + 1, PAGE, c.num_key_value_heads, c.head_dim)
        self.keys, self.values = (self.model.output_weight.new_zeros(shape) for _ in range(2))

    @torch.no_grad()
    def step(self, ids: Tensor, rows: Tensor, pages: Tensor, last: Tensor) -> Tensor:
        if self.graphs and len(last) == len(rows) == len(ids):  # one new token in every row
            size = bucket(len(rows)), bucket(pages.shape[1])
            if size not in self._standing:
                self._standing[size] = _StandingStep(self, *size)
            return self._standing[size].run(ids, rows, pages)
        layout = Paged(self.keys, self.values, rows, pages)
        last = last.to(self.device)

        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            return (hidden[last] @ weight.T).float()  # (len(last), V)

        return self.model(ids.to(self.device), layout, head)


def bucket(n: int) -> int:
    """Returns the next size up of 1, 2, 4, 8, 16, 24, 32, ...: from 16 on, at most 7 too many."""
    return 1 << (n - 1).bit_length() if n <= 16 else -(-n // 8) * 8


class _StandingStep:
    """One decoding step for `rows` rows of `width` pages, captured once and replayed.

    Its inputs and outputs stay where they are in memory, which a CUDA graph needs.
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
        """Returns the logits (R, V) of R rows; the next step overwrites them."""
        self.ids[: len(ids)].copy_(ids, non_blocking=True)
        self.layout.copy_(Paged(self.layout.keys, self.layout.values, *self._filled(rows, pages)))
        if self.graph is None:
            self.logits = self._forward()
        else:
            self.graph.replay()
        return self.logits[: len(ids)]

    def _filled(self, rows: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Fills rows and pages up to the graph's size.

        A row that is not there has one new token, nothing before it, and lies in the spare page.
        """
        table = torch.full((self.rows, self.width), self.spare, dtype=torch.int32)
        table[: len(pages), : pages.shape[1]] = pages
        counts = torch.tensor([[1, 0]]).repeat(self.rows, 1)  # (rows, 2)
        counts[: len(rows)] = rows
        return counts, table

    def _forward(self) -> Tensor:
        return self.model(self.ids, self.layout, lambda hidden, weight: (hidden @ weight.T).float())


class Paged:
    """The layout (`ldalign.models.layout.Layout`) of one step over the pages.

    keys, values: (L, pages, 16, K, E). rows, pages: as in `Decoder.step`.
    """

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, pages: Tensor) -> None:
        self.keys, self.values, device = keys, values, keys.device
        counts, held = rows.unbind(1)  # (R,) new tokens, and those in the cache
        first = counts.cumsum(0) - counts  # (R,) where a row's new tokens begin among the N
        # A new token stands behind those its row holds.
        positions = torch.arange(int(counts.sum())) + (held - first).repeat_interleave(counts)
        row = torch.arange(len(rows)).repeat_interleave(counts)  # (N,)
        page = pages[row, positions // PAGE].long()  # (N,)
        self.slots = (page * PAGE + positions % PAGE).to(device)  # (N,) into the flattened pages
        self.positions = positions.to(device)  # (N,)
        self.rows, self.pages = rows.to(device), pages.to(device)
        self.longest = int(counts.max())  # new tokens of a row

    def copy_(self, other: "Paged") -> None:
        """Takes over the numbers of another step of the same shapes, in place."""
        for name in ("slots", "positions", "rows", "pages"):
            getattr(self, name).copy_(getattr(other, name), non_blocking=True)

    def attend(self, layer: int, qkv: Tensor, heads: int, window: int | None) -> Tensor:
        """Attention of the new tokens: qkv (N, H + 2K, E) -> (N, H, E).

        Each sees its row's cache and the row's new tokens before it.
        """
        k, v = qkv[:, heads:].chunk(2, 1)  # (N, K, E) each
        # Written first: a prompt's tokens see each other through the cache, too.
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
