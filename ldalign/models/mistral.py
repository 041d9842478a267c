"""Mistral, whole: RMSNorm, rotary embedding, grouped-query attention with a window, SwiGLU.

Loads `model_type` mistral (arXiv 2310.06825) and the Llama layout without rope scaling, which is
the same network with no window. Parameter names and the half-split rotary layout are Hugging
Face's, but for two: q, k and v are one parameter, and gate and up. Files keep the separate tensors
(`Mistral.stored_parts`).

`hidden` is the door for callers that bring their own embeddings, as the guide's towers do.

Shapes: B sequences of T tokens; N flat tokens (N = B T, or whatever the layout holds),
D width, H query heads, K key/value heads (H a multiple of K), E head width, F
feed-forward width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldalign import ops
from ldalign.models.config_keys import check_keys
from ldalign.models.layout import Layout, Packed
from ldalign.models.recompute import recomputed
from ldalign.system.errors import InputError

R = TypeVar("R")


@dataclass(frozen=True)
class MistralConfig:
    """The architecture, read from a model folder's config.json and from nowhere else."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None
    tie_word_embeddings: bool
    max_position_embeddings: int

    @classmethod
    def from_json(cls, raw: dict[str, Any], where: str) -> "MistralConfig":
        """Reads a parsed config.json.

        Raises InputError naming `where` and the key for what this code does not do.
        """
        llama = raw["model_type"] == "llama"
        check_keys(raw, where, READ, HARMLESS, OFF)
        heads = _size(raw, "num_attention_heads", where)
        width = _size(raw, "hidden_size", where)
        # An absent key means what it means to transformers: for Mistral, a window of 4096 and 8
        # key/value heads; for Llama, as many key/value heads as query heads, and never a window.
        windowed = not llama and raw.get("sliding_window", 4096) is not None
        windowed = _window_of_layers(raw, where, windowed)
        one_each = llama or "num_key_value_heads" in raw
        config = cls(
            vocab_size=_size(raw, "vocab_size", where),
            hidden_size=width,
            intermediate_size=_size(raw, "intermediate_size", where),
            num_hidden_layers=_size(raw, "num_hidden_layers", where),
            num_attention_heads=heads,
            num_key_value_heads=_size(raw, "num_key_value_heads", where, heads if one_each else 8),
            head_dim=_size(raw, "head_dim", where, width // heads),
            rms_norm_eps=_positive(raw.get("rms_norm_eps", 1e-6), "rms_norm_eps", where),
            rope_theta=_rope_theta(raw, where),
            sliding_window=_size(raw, "sliding_window", where, 4096) if windowed else None,
            tie_word_embeddings=_flag(raw, "tie_word_embeddings", where),
            max_position_embeddings=_size(
                raw, "max_position_embeddings", where, 2048 if llama else 131072
            ),
        )
        if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
            raise InputError(
                f"{where}: num_attention_heads {config.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {config.num_key_value_heads}, and head_dim {config.head_dim} "
                "even"
            )
        return config

    def to_json(self) -> dict[str, Any]:
        """Returns a config.json of this network.

        It says mistral for a Llama layout too, which is the same network without a window.
        """
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_act": "silu",
        } | asdict(self)


# What config.json says of this network; `ldalign.models.config_keys` has what it says beside that.
READ = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim rms_norm_eps rope_theta rope_scaling rope_parameters "
    "sliding_window tie_word_embeddings max_position_embeddings layer_types".split()
)
HARMLESS = frozenset({"original_max_position_embeddings"})
OFF: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
}
# What the rotary embedding's own object may say; its type is looked at first.
ROPE_READ = ("rope_type", "type", "rope_theta")
ROPE_OFF: dict[str, tuple[Any, ...]] = {
    "factor": (1.0,),
    "partial_rotary_factor": (1.0,),
}


def _rope_theta(raw: dict[str, Any], where: str) -> float:
    """The rotary base, from wherever the file keeps it: that of its object goes first.

    Raises InputError for rotary embeddings of another kind, and for two bases.
    """
    for key in ("rope_scaling", "rope_parameters"):  # an older name, a newer name
        rope = raw.get(key) or {}
        kind = rope
        if isinstance(rope, dict):
            kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise InputError(
                f"{where}: {key}: rope scaling {kind!r} is not supported; use a model with plain "
                "rotary embeddings"
            )
        check_keys(rope, f"{where}: {key}", ROPE_READ, HARMLESS, ROPE_OFF)
    places = [raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}, raw]
    given = [place["rope_theta"] for place in places if place.get("rope_theta") is not None]
    bases = [_positive(value, "rope_theta", where) for value in given or [10000.0]]
    if len(set(bases)) > 1:
        raise InputError(
            f"{where}: rope_theta is given as {bases[0]:g} and as {bases[1]:g}; keep the one that "
            "the model was trained with"
        )
    return bases[0]


def _window_of_layers(raw: dict[str, Any], where: str, windowed: bool) -> bool:
    """Whether all layers have the window; InputError for layers that differ."""
    kinds = raw.get("layer_types")
    if kinds is None:
        return windowed
    layers = raw.get("num_hidden_layers")
    known = isinstance(kinds, list) and all(
        kind in ("full_attention", "sliding_attention") for kind in kinds
    )
    if not known or len(kinds) != layers or len(set(kinds)) > 1:
        raise InputError(
            f"{where}: layer_types asks for layers of several kinds, or is not one of "
            f"full_attention and sliding_attention for each of {layers} layers; all layers are "
            "alike here"
        )
    if "sliding_attention" in kinds and not windowed:
        raise InputError(f"{where}: layer_types asks for a window, sliding_window gives none")
    return "sliding_attention" in kinds


def _flag(raw: dict[str, Any], key: str, where: str) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{where}: {key} is {value!r}; expected true or false")
    return bool(value)


def _size(raw: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    """raw[key], or `default` where it is absent or null; a positive integer or an InputError."""
    value = default if raw.get(key) is None else raw[key]
    if value is None:
        raise InputError(f"{where}: key {key!r} is missing; a {raw['model_type']} config needs it")
    if type(value) is not int or not 1 <= value < 2**31:
        raise InputError(
            f"{where}: {key} is {value!r}, not a positive integer; compare with the model's "
            "original config"
        )
    return value


def _positive(value: Any, key: str, where: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf"):
        raise InputError(
            f"{where}: {key} is {value!r}, not a positive number; compare with the model's "
            "original config"
        )
    return float(value)


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv 1910.07467) over the last axis; float32 inside."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the norm of x + residual, and that sum; all (N, D). None counts as zeros."""
        if residual is None:
            return self(x), x
        return ops.add_rms_norm(x, residual, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention; which token sees which is the layout's business."""

    def __init__(self, config: MistralConfig, index: int) -> None:
        super().__init__()
        self.index, self.window = index, config.sliding_window
        self.head_dim = config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        # One product for all three: the small ones for k and v use a machine badly.
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, H + 2K, E)
        out = layout.attend(self.index, qkv, self.heads, self.window, (cos, sin))  # (N, H, E)
        return self.o_proj(out.flatten(1))  # (N, D)


class MLP(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202)."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, selective: bool = False) -> Tensor:
        gate_up = self.gate_up_proj(x)  # (N, 2F)
        gated = ops.swiglu(gate_up)  # (N, F)
        with recomputed(selective, gated, ops.swiglu, gate_up):
            del gate_up  # the widest one: without a backward it is freed before the last product
            return self.down_proj(gated)  # (N, D)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the stream."""

    # What the backward computes again: nothing; what takes no product (the norms' results and the
    # feed-forward's activation); or all but the first sum. It happens inside the block's backward,
    # where FSDP has gathered the weights.
    checkpointing: Literal["none", "selective", "full"] = "none"

    def __init__(self, config: MistralConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, update: Tensor, stream: Tensor | None, cos: Tensor, sin: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor]:
        """Returns this block's update of the stream, and the stream without it: (N, D) each.

        update, stream: of the block before. The sum of both is left to the next norm, which makes
        it in the same pass. The first block has the embeddings for update, and None for stream.
        """
        normed, stream = self.input_layernorm.add(update, stream)
        rest = self._forward
        if self.checkpointing == "full" and torch.is_grad_enabled():
            rest = partial(checkpoint, self._forward, use_reentrant=False, preserve_rng_state=False)
        with recomputed(self.checkpointing != "none", normed, self.input_layernorm, stream):
            return rest(normed, stream, cos, sin, layout)

    def _forward(
        self, normed: Tensor, stream: Tensor, cos: Tensor, sin: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor]:
        # The attention's output has no name, so that it is freed before the mlp.
        normed, stream = self.post_attention_layernorm.add(
            self.self_attn(normed, cos, sin, layout), stream
        )
        selective = self.checkpointing == "selective"
        with recomputed(selective, normed, self.post_attention_layernorm, stream):
            return self.mlp(normed, selective), stream


class Transformer(nn.Module):
    """Embedding, blocks and final norm: `model` in Hugging Face's parameter names."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        # Not nn.Embedding(...): its initialisation, on the meta device, imports all of
        # torch._dynamo, which takes 2 s for nothing.
        empty = torch.empty(config.vocab_size, config.hidden_size)  # (V, D)
        self.embed_tokens = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Mistral(nn.Module):
    """The language model.

    `model(ids)` gives logits; training passes `head` and never makes them.
    """

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def blocks(self) -> list[Block]:
        """The transformer blocks: what FSDP wraps one by one."""
        return list(self.model.layers)  # type: ignore[arg-type]

    def stored_parts(self, name: str) -> dict[str, int]:
        """Returns the tensors that model files keep for a parameter: {name: rows}.

        They lie one below the other in it, in this order. Empty where the file keeps it as it is.
        """
        c = self.config
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        fused = {
            "qkv_proj": {"q_proj": q, "k_proj": kv, "v_proj": kv},
            "gate_up_proj": {"gate_proj": c.intermediate_size, "up_proj": c.intermediate_size},
        }
        own = name.split(".")[-2]  # the module: "qkv_proj" of "...self_attn.qkv_proj.weight"
        return {name.replace(own, part): rows for part, rows in fused.get(own, {}).items()}

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding, (V, D)."""
        return self.model.embed_tokens

    @property
    def output_weight(self) -> Tensor:
        """The head's weight (V, D): the embedding itself where they are tied."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def forward(
        self,
        ids: Tensor,
        layout: Layout | None = None,
        head: Callable[[Tensor, Tensor], R] | None = None,
    ) -> Tensor | R:
        """Returns logits (B, T, V) of ids (B, T) int64; or, given a head, what it makes.

        With `head`, ids may be flat (N,) in a layout. head(hidden (N, D), output weight (V, D))
        runs inside the forward, where FSDP has gathered the weight.
        """
        shape = ids.shape
        layout = Packed([shape[1]] * shape[0], ids.device) if layout is None else layout
        x = self.hidden(self.embedding(ids.flatten()), layout)  # (N, D)
        if head is not None:
            return head(x, self.output_weight)
        return (x @ self.output_weight.T).unflatten(0, shape)

    def hidden(self, embeddings: Tensor, layout: Layout) -> Tensor:
        """Returns the final hidden states (N, D) of token embeddings (N, D).

        Positions, and which token sees which, are the layout's.
        """
        cos, sin = rope_tables(layout.positions, self.config.head_dim, self.config.rope_theta)
        update, stream = embeddings, None
        for block in self.model.layers:
            update, stream = block(update, stream, cos, sin, layout)
        return self.model.norm.add(update, stream)[0]


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Returns cos and sin, each (N, E/2) float32, of the angles position * theta^(-2e/E).

    Source: RoFormer (arXiv 2104.09864).
    """
    even = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    steps = even / head_dim  # (E/2,) 2e / E
    # 1 / theta^steps, not theta^-steps: one last bit, times position 2000, turns the angle by 1e-4.
    angles = positions.to(torch.float32)[:, None] * (1.0 / theta**steps)  # (N, E/2)
    if angles.device.type != "cpu":
        return angles.cos(), angles.sin()
    # Not by torch's cosine (2.13, MKL): in the first call of some processes, up to one in three, it
    # is less exact, in float64 too, and all samples of a seed are others then. This is libm's.
    both = torch.polar(torch.ones_like(angles, dtype=torch.float64), angles.double())
    return both.real.float(), both.imag.float()
