"""GPT-2, whole (Radford et al. 2019): learned positions, pre-norm blocks, GELU, tied head.

Usable as a language model (`model(ids)`), and as the encoder and decoder of the guide, which feed
embeddings of their own (`model.hidden`). GELU is the tanh form. Parameter names are Hugging Face's;
the four matrices that its files keep transposed (`TRANSPOSED`) are turned on loading and saving.

Shapes: B sequences of T tokens; N flat tokens (N = B T, or whatever the layout holds), D width, H
heads, E head width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldalign.models.config_keys import check_keys
from ldalign.models.layout import Layout, Packed
from ldalign.models.recompute import recomputed
from ldalign.system.errors import InputError
from ldalign.system.seeds import normals

R = TypeVar("R")
gelu = partial(F.gelu, approximate="tanh")
# GPT-2's files keep these as (inputs, outputs); nn.Linear has (outputs, inputs).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# Keys of config.json that leave the network as it is, or do so with these values.
HARMLESS = frozenset(
    "n_ctx reorder_and_upcast_attn summary_activation summary_first_dropout "
    "summary_proj_to_labels summary_type summary_use_proj".split()
)
OFF: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "tie_word_embeddings": (True,),
}


@dataclass(frozen=True)
class GPT2Config:
    """The architecture, in config.json's own key names.

    Dropout is off everywhere: its keys are ignored, as in scoring.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5

    @property
    def inner(self) -> int:
        """The feed-forward width."""
        return self.n_inner or 4 * self.n_embd

    @classmethod
    def from_json(cls, raw: dict[str, Any], where: str) -> "GPT2Config":
        """Reads a parsed config.json.

        Raises InputError naming `where` and the key for what this code does not do.
        """
        check_keys(raw, where, cls.__dataclass_fields__, HARMLESS, OFF)
        known = {key: raw[key] for key in cls.__dataclass_fields__ if raw.get(key) is not None}
        missing = [key for key in ("vocab_size", "n_embd", "n_layer", "n_head") if key not in known]
        if missing:
            raise InputError(f"{where}: missing {', '.join(missing)}; a gpt2 config needs them")
        for key, value in known.items():
            if key == "layer_norm_epsilon":
                number = isinstance(value, int | float) and not isinstance(value, bool)
                if not number or not 0 < value < 1:
                    raise InputError(f"{where}: {key} is {value!r}, not a small positive number")
            elif type(value) is not int or not 1 <= value < 2**31:
                raise InputError(f"{where}: {key} is {value!r}, not a positive integer")
        config = cls(**known)
        if config.n_embd % config.n_head:
            raise InputError(
                f"{where}: n_embd {config.n_embd} must be a multiple of n_head {config.n_head}"
            )
        return config

    def to_json(self) -> dict[str, Any]:
        """Returns the config.json of a model built here."""
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
        } | asdict(self)


class Attention(nn.Module):
    """Multi-head attention with one fused projection for q, k and v."""

    def __init__(self, config: GPT2Config, index: int) -> None:
        super().__init__()
        self.index, self.heads = index, config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        qkv = self.c_attn(x).unflatten(-1, (3 * self.heads, -1))  # (N, 3H, E)
        out = layout.attend(self.index, qkv, self.heads, None, None)  # (N, H, E)
        return self.c_proj(out.flatten(1))  # (N, D)


class MLP(nn.Module):
    """Feed-forward with GELU."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.inner)
        self.c_proj = nn.Linear(config.inner, config.n_embd)

    def forward(self, x: Tensor, selective: bool = False) -> Tensor:
        inner = self.c_fc(x)
        activated = gelu(inner)
        with recomputed(selective, activated, gelu, inner):
            del inner  # freed here without a backward
            return self.c_proj(activated)  # (N, D)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the stream."""

    checkpointing: Literal["none", "selective", "full"] = "none"  # as in Mistral's blocks

    def __init__(self, config: GPT2Config, index: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, index)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        if self.checkpointing == "full" and torch.is_grad_enabled():
            return checkpoint(
                self._forward, x, layout, use_reentrant=False, preserve_rng_state=False
            )
        return self._forward(x, layout)

    def _forward(self, x: Tensor, layout: Layout) -> Tensor:
        selective = self.checkpointing == "selective"
        normed = self.ln_1(x)
        with recomputed(selective, normed, self.ln_1, x):
            x = x + self.attn(normed, layout)
        normed = self.ln_2(x)
        with recomputed(selective, normed, self.ln_2, x):
            return x + self.mlp(normed, selective)


class Transformer(nn.Module):
    """Embeddings, blocks and final norm: `transformer` in Hugging Face's parameter names."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        # Not nn.Embedding(...): its initialisation, on the meta device, imports all of
        # torch._dynamo, which takes 2 s for nothing.
        tokens = torch.empty(config.vocab_size, config.n_embd)  # (V, D)
        positions = torch.empty(config.n_positions, config.n_embd)
        self.wte = nn.Embedding.from_pretrained(tokens, freeze=False)
        self.wpe = nn.Embedding.from_pretrained(positions, freeze=False)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)


class GPT2(nn.Module):
    """The language model; `hidden` is the door for callers that bring their own embeddings."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)

    @property
    def blocks(self) -> list[Block]:
        """The transformer blocks: what FSDP wraps one by one."""
        return list(self.transformer.h)  # type: ignore[arg-type]

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding, (V, D)."""
        return self.transformer.wte

    @property
    def output_weight(self) -> Tensor:
        """The head's weight (V, D), always the token embedding."""
        return self.transformer.wte.weight

    def forward(
        self,
        ids: Tensor,
        layout: Packed | None = None,
        head: Callable[[Tensor, Tensor], R] | None = None,
    ) -> Tensor | R:
        """Returns logits (B, T, V) of ids (B, T) int64; or, given a head, what it makes.

        With `head`, ids may be flat (N,) in a layout; it is called as Mistral's.
        """
        shape = ids.shape
        layout = Packed([shape[1]] * shape[0], ids.device) if layout is None else layout
        x = self.hidden(self.embedding(ids.flatten()), layout)  # (N, D)
        if head is not None:
            return head(x, self.output_weight)
        return (x @ self.output_weight.T).unflatten(0, shape)

    def hidden(self, embeddings: Tensor, layout: Packed) -> Tensor:
        """Returns the final hidden states (N, D) of token embeddings (N, D).

        Position embeddings are added here. Raises InputError for a sequence
        longer than n_positions.
        """
        if layout.longest > self.config.n_positions:
            raise InputError(
                f"a sequence of {layout.longest} tokens is longer than GPT-2's "
                f"{self.config.n_positions} positions; shorten the rows (max_length)"
            )
        x = embeddings + self.transformer.wpe(layout.positions)  # (N, D)
        for block in self.transformer.h:
            x = block(x, layout)
        return self.transformer.ln_f(x)


def init_weights(model: GPT2, seed: int, stream: str = "gpt2") -> None:
    """Fills the model as GPT-2 was: N(0, 0.02), biases 0, norms 1; a function of `seed` and of the
    `stream`, the name of this model among those drawn from the seed.

    The two projections of a block that write to the stream are divided by sqrt(2 n_layer).
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".bias"):
                p.zero_()
            elif ".ln_" in name:
                p.fill_(1.0)
            else:
                # Two projections a block write to the stream: so its size does not grow with depth.
                residual = name.endswith("c_proj.weight")
                std = 0.02 / (2 * model.config.n_layer) ** 0.5 if residual else 0.02
                p.copy_(normals(seed, f"{stream}/{name}", *p.shape) * std)
