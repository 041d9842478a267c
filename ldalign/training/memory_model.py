"""The memory that training takes, computed from a model's shape before anything is loaded."""

from dataclasses import dataclass

from ldalign import ops
from ldalign.models.mistral import Mistral, MistralConfig
from ldalign.models.weights import count_parameters

# As measured: the heap that activations of many sizes take, over the sum of these sizes; and the
# same for gradients, which lie where the first micro-batch's activations were.
HOLES, SCATTERED = 1.15, 1.5


@dataclass(frozen=True)
class TrainingShape:
    """What the memory of training depends on, beside the model. Bytes are a weight's."""

    weight_bytes: int  # of the weights that the optimizer changes, and of their gradients
    state_bytes: int  # of all averages of the optimizer together
    compute_bytes: int
    checkpointing: str
    tokens: int  # of the largest micro-batch on one rank
    responses: int  # tokens of it that the head predicts
    micros: int = 1  # micro-batches of a step on one rank
    ranks: int = 1
    shards: int = 1  # ranks that share one copy of the model
    whole: str = "gradients"  # `distributed.Sharding.whole`
    device: str = "cpu"
    logits: int | None = None  # most bytes of them at once; None: as this machine's kernels have it

    @property
    def workspace(self) -> int:
        """The most bytes of logits that the head holds at once."""
        return ops.workspace_bytes(self.device) if self.logits is None else self.logits


def training_memory(model: Mistral, shape: TrainingShape) -> dict[str, float]:
    """Peak bytes of one rank by part, beside the program itself; they add up.

    The peak is reached at the start of the backward, all activations there, or at its end, all
    gradients there.
    """
    config, itemsize, tokens = model.config, shape.compute_bytes, shape.tokens
    parameters, block = count_parameters(model), count_parameters(model.blocks[0])
    rest = parameters - block * len(model.blocks)  # embedding, head, last norm
    head = model.output_weight.numel() * itemsize
    several = shape.ranks > 1
    wrapped = several or shape.weight_bytes != itemsize
    kept, again = activation_bytes(config, itemsize, shape.checkpointing)
    logits = min(shape.workspace, 4 * config.vocab_size * shape.responses)
    # The gradient of the head's weight is made in the forward, beside its hidden states and theirs.
    at_head = head + logits + 2 * itemsize * config.hidden_size * shape.responses
    # A block's backward: gradients of the feed-forward's inner activations, of the stream and of q,
    # k, v.
    inner = 3 * config.intermediate_size + 4 * config.hidden_size
    at_block = tokens * (again + itemsize * inner)
    gathered = 0.0
    if wrapped:
        # Several ranks gather a block and the one ahead, out of a buffer of its size; a rank alone
        # keeps its casts.
        held = parameters if not several or shape.whole == "all" else rest + 4 * block
        gathered = itemsize * min(parameters, held)
    own = parameters * shape.weight_bytes / shape.shards  # gradients as the optimizer sees them
    before, after = 0.0, own
    if shape.micros > 1:
        before = SCATTERED * own
        if wrapped and shape.whole != "nothing":
            before, after = 4.0 * parameters, max(own, 4.0 * parameters)
    if wrapped:  # the largest group's gradients on their way: as they were made, cast, and reduced
        after += rest * (itemsize + 4) + 4 * rest / shape.shards
    activations = tokens * kept * HOLES
    # flat buffers of whole groups do not fit into the places that activations leave, one by one
    if wrapped:
        moment = {
            "gradients": after,
            "activations": activations,
            "head and one block": max(at_head, head + at_block),
        }
    elif before + activations + max(at_head, head + at_block) >= after + 2 * head + at_block:
        moment = {
            "gradients": before,
            "activations": activations,
            "head and one block": max(at_head, head + at_block),
        }
    else:  # with the embedding's gradient, which is made whole before it is added
        moment = {"gradients": after, "head and one block": 2 * head + at_block}
    return {
        "weights": parameters * shape.weight_bytes / shape.shards,
        "optimizer": parameters * shape.state_bytes / shape.shards,
        "weights gathered": gathered,
        **moment,
    }


def frozen_guide_memory(model: Mistral, shape: TrainingShape) -> dict[str, float]:
    """Peak bytes of one rank by part while it trains a guide whose one tower is `model`, as it is:
    forward passes, and two readings of every response by the head.
    """
    config, itemsize, tokens = model.config, shape.compute_bytes, shape.tokens
    parameters, block = count_parameters(model), count_parameters(model.blocks[0])
    rest = parameters - block * len(model.blocks)
    gathered = min(parameters, rest + 2 * block) * itemsize if shape.ranks > 1 else 0
    logits = min(shape.workspace, 8 * config.vocab_size * shape.responses)
    # The head's input and its gradient of each reading, and the float32 sums they are made by.
    head = 2 * shape.responses * config.hidden_size * (2 * itemsize + 8)
    inner = tokens * itemsize * (3 * config.intermediate_size + 4 * config.hidden_size)
    return {
        "weights": parameters * itemsize / shape.shards,
        "weights gathered": float(gathered),
        "states": float(tokens * config.hidden_size * (itemsize + 4)),
        "head or one block": float(max(head + logits, inner)),
    }


def guide_memory(model: Mistral, shape: TrainingShape) -> dict[str, float]:
    """`training_memory` of a guide with two towers like `model`; shape.tokens
    are those of both together.

    A rank loads both towers whole before it keeps its part.
    """
    parts = training_memory(model, shape)
    parts = {
        name: 2 * size if name in ("weights", "optimizer", "gradients") else size
        for name, size in parts.items()
    }
    whole = {"both towers whole, on loading": 2.0 * shape.weight_bytes * count_parameters(model)}
    return whole if sum(whole.values()) > sum(parts.values()) else parts


def activation_bytes(config: MistralConfig, itemsize: int, checkpointing: str) -> tuple[int, int]:
    """Bytes per token of a micro-batch: those kept for the backward; those made again there, a
    block at a time.

    Counted over the tensors that the blocks save.
    """
    width, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    # Each norm's input and result, the turned q, k, v, attention's result, gate and up, their
    # product; all in the compute dtype. In float32: a scale for each norm and a log-sum-exp for
    # each head.
    block = itemsize * (4 * width + 2 * heads + 2 * kv + 3 * inner) + 4 * (
        2 + config.num_attention_heads
    )
    stream = itemsize * width + 4  # the first norm's input and scale
    # the last norm's input and scale, the rotary tables, the ids
    outside = stream + 4 * config.head_dim + 8
    dropped, again = {
        "none": (0, 0),
        # The norms' results and the product of gate and up, one of the three at a time.
        "selective": (itemsize * (2 * width + inner), itemsize * max(width, inner)),
        "full": (block - stream, block - stream),
    }[checkpointing]
    return config.num_hidden_layers * (block - dropped) + outside, again
