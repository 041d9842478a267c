"""The keys of a run: what `train/*.py` read from `--config FILE.yaml` and `key=value`.

Defaults are for a 7B-sized model where the paper or SPIN says something (arXiv 2404.06390, 2401.01335) and marked
"choice" where neither does; `configs/` holds whole runs.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ldalign.config import above_up_to, at_least, between, group, non_negative, positive, setting


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled for training."""

    temperature: float = setting(1.0, "0 is greedy (choice: SPIN's vLLM scripts)", check=non_negative)
    top_k: int = setting(0, "sample among the k most likely tokens; 0: off", check=non_negative)
    top_p: float = setting(1.0, "sample within this mass; 1: off", check=above_up_to(0, 1))
    min_p: float = setting(
        0.0, "sample among tokens at least this share as likely as the most likely one; 0: off", check=between(0, 1)
    )
    repetition_penalty: float = setting(1.0, "divides the logits of tokens already there; 1: off", check=positive)
    stop: list[str] = setting([], "texts that end a response")
    batch_rows: int = setting(64, "rows generated at a time, on one rank", check=positive)
    cache_gib: float | None = setting(
        None, "most memory of the key/value cache, on one rank; null: half of what is free", check=positive
    )


@dataclass(frozen=True)
class Training:
    """How the policy is trained, in every stage that trains it."""

    epochs: int = setting(2, "passes over an iteration's pairs (SPIN's paper: 2)", check=positive)
    optimizer: Literal["adamw", "rmsprop"] = setting("rmsprop", "SPIN's is rmsprop")
    schedule: Literal["constant", "linear", "cosine"] = setting("linear", "of the learning rate, after warm-up")
    warmup_ratio: float = setting(0.1, "share of the steps that warm up", check=between(0, 1))
    weight_decay: float = setting(0.0, "of matrices; 0: off", check=non_negative)
    max_grad_norm: float = setting(1.0, "clip the global gradient norm; 0: off", check=non_negative)
    micro_tokens: int = setting(8192, "token budget of one micro-batch on one rank", check=positive)
    shard_ranks: int | None = setting(
        None, "ranks that share one copy of the model, such as a node's GPUs; null: all", check=positive
    )
    whole: Literal["nothing", "gradients", "all"] = setting(
        "gradients", "what a rank keeps whole between the micro-batches of a step; all: gathered weights too. Less is "
        "less memory and more communication"
    )  # fmt: skip
    checkpointing: Literal["none", "selective", "full"] = setting(
        "none", "recompute in the backward: selective, the feed-forwards' inner activations; full, whole blocks (least "
                "memory, one forward more)")  # fmt: skip
    master_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "of the weights the optimizer changes; bfloat16: rounded at random, less memory"
    )
    state_dtype: Literal["float32", "bfloat16"] = setting("float32", "of the optimizer's averages")


@dataclass(frozen=True)
class Sft:
    """Supervised fine-tuning: the start policy's warm-up, and the continual-SFT baseline."""

    epochs: int = setting(0, "passes over the data; 0: no SFT", check=non_negative)
    rows: int | None = setting(None, "first rows of the data to use; null: all", check=positive)
    learning_rate: float = setting(1e-5, "peak", check=positive)
    global_batch: int = setting(64, "rows an optimizer step", check=positive)


@dataclass(frozen=True)
class Guide:
    """The guiding model. `guide=FOLDER` sets `guide.folder`."""

    SHORTHAND: ClassVar[str] = "folder"

    folder: str | None = setting(None, "GPT-2 model folder to start from, or a trained guide to use as it is; "
                                 "null: a new one of the sizes below")  # fmt: skip
    layers: int = setting(4, "of each tower, when new (choice)", check=positive)
    width: int = setting(256, "of each tower, when new (choice)", check=positive)
    heads: int = setting(4, "when new (choice)", check=positive)
    vocabulary: int = setting(
        4096, "entries of the tokenizer trained on the data, when new (choice)", check=at_least(257)
    )
    latent_tokens: int = setting(1, "latent query tokens m (choice)", check=positive)
    latent_width: int = setting(256, "width k of each (choice)", check=positive)
    token_dropout: float = setting(
        0.5, "share of response tokens the decoder may not read (choice)", check=between(0, 1)
    )
    latent_dropout: float = setting(0.1, "share of examples trained without latent (choice)", check=between(0, 1))
    max_tokens: int = setting(512, "of prompt and response together, in the guide's tokens", check=at_least(8))
    epochs: int = setting(3, "passes over both responses of every row (choice)", check=positive)
    learning_rate: float = setting(
        1e-3, "peak, AdamW, cosine (choice; a pretrained GPT-2 wants about 1e-4)", check=positive
    )
    global_batch: int = setting(32, "rows (two examples each) an optimizer step (choice)", check=positive)
    heldout_fraction: float = setting(0.1, "share of the rows kept for the held-out losses", check=above_up_to(0, 0.5))


@dataclass(frozen=True)
class Checkpoint:
    """What is kept of a stage in training, so that it can be gone on with after a stop. It changes no result."""

    minutes: float | None = setting(10.0, "one every so many minutes; null: not by time", check=positive)
    steps: int | None = setting(None, "one every so many optimizer steps; null: not by steps", check=positive)
    keep: int = setting(2, "the newest ones, each as large as the weights and averages in training", check=at_least(2))


@dataclass(frozen=True)
class Evaluation:
    """What is measured after SFT and after every iteration."""

    rows: int = setting(200, "held-out rows; 0: no evaluation", check=non_negative)
    samples: int = setting(4, "sampled answers a prompt, for rows that a program can check", check=non_negative)
    temperature: float = setting(1.0, "of those samples", check=positive)


@dataclass(frozen=True)
class RunConfig:
    """One run of `train/align.py`; the other scripts read the keys they need."""

    run: str = setting("runs/align", "run folder: everything is written here")
    policy: str = setting(
        "smollm2-135m-instruct",
        "model folder, Hugging Face name (org/name), the embedded default, or toy (tiny, random)",
    )
    guide: Guide = group(Guide, "guiding model")
    data: str | list[str] = setting("embedded", "SFT data: file, folder or glob of JSON Lines or parquet, or a list of "
                                    "them; embedded: ldalign's own task rows")  # fmt: skip
    turns: Literal["first", "last", "all"] = setting("last", "which assistant turn is the response (first: SPIN's)")
    heldout: str | None = setting(None, "held-out data; null: heldout_fraction of `data` (embedded: its own split)")
    heldout_fraction: float = setting(0.1, "share of `data` held out where `heldout` is null", check=between(0, 0.5))
    responses: str | None = setting(
        None, "responses to use in the first iteration instead of sampling them: JSON Lines (docs/data.md)"
    )
    method: Literal["ld_align", "spin"] = setting("ld_align", "pair weights: latent distances, or 1")
    iterations: int = setting(3, "rounds of generate, score, align (the paper's 3)", check=at_least(0))
    max_rows: int | None = setting(None, "rows of the data an iteration uses; null: all", check=positive)
    max_new_tokens: int = setting(256, "longest sampled response (choice: SPIN's)", check=positive)
    max_length: int = setting(1024, "longest prompt and response together; the response is cut", check=at_least(2))
    global_batch: int = setting(64, "pairs an optimizer step, over all ranks", check=positive)
    learning_rate: float = setting(5e-7, "peak (the paper gives none: SPIN's)", check=positive)
    beta: float = setting(0.1, "strength of the pull to the reference (the paper gives none: SPIN's)", check=positive)
    reference: Literal["iteration", "initial"] = setting(
        "iteration", "reference policy: the iteration's start, or the run's"
    )
    seed: int = setting(0, "of everything random", check=non_negative)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: CUDA where there is one")
    dtype: Literal["auto", "bfloat16", "float32"] = setting(
        "auto", "of computing (master weights are float32); auto: bfloat16 where the machine has units for it"
    )
    policy_dtype: Literal["bfloat16", "float32"] = setting(
        "bfloat16", "of the policies written; float32 keeps small steps that bfloat16 rounds away, in twice the space"
    )
    sampling: Sampling = group(Sampling, "sampling of training responses")
    training: Training = group(Training, "training of the policy")
    sft: Sft = group(Sft, "warm-up of the start policy on the data")
    continual_sft: Sft = group(Sft, "baseline: more SFT from the same start, in the table beside the iterations")
    checkpoint: Checkpoint = group(Checkpoint, "checkpoints inside the stages that train; a stop writes one too")
    evaluation: Evaluation = group(Evaluation, "held-out evaluation")
    cache: str | None = setting(None, "where fetched models are kept; null: ~/.cache/ldalign")

    def problems(self) -> list[str]:
        """Contradictions between keys."""
        found = []
        if self.max_new_tokens >= self.max_length:
            found.append(f"max_new_tokens={self.max_new_tokens} must be below max_length={self.max_length}")
        if self.guide.width % self.guide.heads:
            found.append(f"guide.width={self.guide.width} must be a multiple of guide.heads={self.guide.heads}")
        return found
