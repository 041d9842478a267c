"""The groups of keys that a run's settings are made of (`ldalign.run.settings`).

Defaults are for a 7B-sized model where the paper or SPIN says something (arXiv 2404.06390,
2401.01335) and marked "choice" where neither does; `configs/` holds whole runs.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ldalign.generation.decoders import Weights
from ldalign.kernels.loss_options import SMOOTHING_BOUND, Kind, LossOptions
from ldalign.models.guide import Injection, LatentNorm, Readout
from ldalign.system.config import (
    Check,
    above_up_to,
    at_least,
    at_least_below,
    between,
    non_negative,
    positive,
    setting,
)
from ldalign.system.hub import is_repository
from ldalign.training.latent_map import LatentMap
from ldalign.training.validation import Metric


@dataclass(frozen=True)
class ColumnsKeys:
    """What the data's own names of the keys are, where they are others (docs/data.md)."""

    prompt: str | None = setting(None, "text or turns that ask, such as question; null: prompt")
    response: str | None = setting(None, "the answer, such as answer; null: response")
    system: str | None = setting(None, "text of the system turn; null: system")
    messages: str | None = setting(None, "whole conversation; null: messages, conversations")
    chosen: str | None = setting(None, "preferred answer or conversation; null: chosen")
    rejected: str | None = setting(None, "the other one; null: rejected")
    id: str | None = setting(None, "name of a row; null: id")


@dataclass(frozen=True)
class SamplingKeys:
    """How responses are sampled for training."""

    temperature: float = setting(
        1.0, "0 is greedy (choice: SPIN's vLLM scripts)", check=non_negative
    )
    top_k: int = setting(0, "sample among the k most likely tokens; 0: off", check=non_negative)
    top_p: float = setting(1.0, "sample within this mass; 1: off", check=above_up_to(0, 1))
    min_p: float = setting(
        0.0,
        "sample among tokens at least this share as likely as the most likely one; 0: off",
        check=between(0, 1),
    )
    repetition_penalty: float = setting(
        1.0, "divides the logits of tokens already there; 1: off", check=positive
    )
    stop: list[str] = setting([], "texts that end a response")
    weights: Weights = setting(
        "exact",
        "int8: the policy's weights rounded to 8 bits, on CPUs: faster, from a distribution near "
        "the policy's (docs/generation.md); scores and the evaluation are of its own",
    )
    batch_rows: int = setting(64, "rows generated at a time, on one rank", check=positive)
    cache_gib: float | None = setting(
        None,
        "most memory of the key/value cache, on one rank; null: half of what is free",
        check=positive,
    )
    draft_tokens: int = setting(
        0,
        "on a CPU, tokens of the data's response that a step tries on the policy's, at most: the "
        "responses stay the same, and come sooner where the policy often says what the data says; "
        "0: off",
        check=non_negative,
    )


# What a response depends on; the others only move work about.
SAMPLING_KEYS = tuple(
    f"sampling.{key}"
    for key in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "weights")
)


@dataclass(frozen=True)
class TrainingKeys:
    """How the policy is trained in the iterations; epochs, steps, optimizer apart, in SFT too."""

    epochs: int = setting(2, "passes over an iteration's pairs (SPIN's paper: 2)", check=positive)
    steps: int | None = setting(
        None,
        "optimizer steps an iteration, in place of epochs: rows are passed over as often as it "
        "takes; null: off",
        check=positive,
    )
    optimizer: Literal["adamw", "rmsprop"] = setting(
        "rmsprop", "of the iterations (SPIN's is rmsprop); sft.* and continual_sft.* take adamw"
    )
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "linear", "of the learning rate, after warm-up"
    )
    warmup_ratio: float = setting(0.1, "share of the steps that warm up", check=between(0, 1))
    weight_decay: float = setting(0.0, "of matrices; 0: off", check=non_negative)
    max_grad_norm: float = setting(1.0, "clip the global gradient norm; 0: off", check=non_negative)
    micro_tokens: int = setting(8192, "token budget of one micro-batch on one rank", check=positive)
    shard_ranks: int | None = setting(
        None,
        "ranks that share one copy of the model, such as a node's GPUs; null: all",
        check=positive,
    )
    whole: Literal["nothing", "gradients", "all"] = setting(
        "gradients",
        "what a rank keeps whole between the micro-batches of a step; all: gathered weights too. "
        "Less is less memory and more communication",
    )
    checkpointing: Literal["none", "selective", "full"] = setting(
        "none",
        "recompute in the backward: selective, the norms and the feed-forwards' activation, no "
        "product (a third less memory for activations); full, whole blocks (least memory, one "
        "forward more)",
    )
    master_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "of the weights the optimizer changes; bfloat16: rounded at random, less memory"
    )
    state_dtype: Literal["float32", "bfloat16"] = setting("float32", "of the optimizer's averages")


@dataclass(frozen=True)
class LossKeys:
    """Options of the loss of a pair, other people's, all off by default (docs/methods.md)."""

    kind: Kind = setting(
        "sigmoid",
        "of the preference: sigmoid is DPO's; ipo draws margins towards 1/(2 beta), where DPO's "
        "has no end (arXiv 2310.12036)",
    )
    nll: float = setting(
        0.0,
        "weight of the winner's NLL, in nats a token, beside the preference; pair weights do not "
        "scale it (RPO, arXiv 2404.19733; TRL's rpo_alpha); 0: off",
        check=non_negative,
    )
    label_smoothing: float = setting(
        0.0,
        "of kind=sigmoid: probability that winner and loser are the wrong way round (conservative "
        "DPO); 0: off",
        check=at_least_below(0, SMOOTHING_BOUND),
    )
    length_normalised: bool = setting(
        False,
        "margins of log-probs a token, in place of a response's sums (arXiv 2411.15124); they are "
        "smaller, so beta wants to be larger",
    )

    @property
    def options(self) -> LossOptions:
        """The same, as training takes them."""
        return LossOptions(self.kind, self.nll, self.label_smoothing, self.length_normalised)


@dataclass(frozen=True)
class SftKeys:
    """Supervised fine-tuning: the start policy's warm-up, and the continual-SFT baseline."""

    epochs: int = setting(0, "passes over the data; 0: no SFT", check=non_negative)
    rows: int | None = setting(
        None, "first rows to use, as they are shuffled; null: all", check=positive
    )
    learning_rate: float = setting(1e-5, "peak", check=positive)
    global_batch: int = setting(64, "rows an optimizer step", check=positive)


@dataclass(frozen=True)
class GuideKeys:
    """The guiding model. `guide=FOLDER` sets `guide.folder`."""

    SHORTHAND: ClassVar[str] = "folder"

    folder: str | None = setting(
        None,
        "GPT-2 model folder to start from, or a trained guide to use as it is; null: none",
        path=True,
    )
    backbone: Literal["auto", "policy", "gpt2"] = setting(
        "auto",
        "what the towers start as: policy, the weights that self-play starts from; gpt2, those of "
        "`folder`, or a new one of the sizes below where there is none; auto: `folder` where it is "
        "given, else the policy, else (many rows and a large policy) a new one",
    )
    towers: Literal["auto", "frozen", "trained"] = setting(
        "auto",
        "frozen: one tower is encoder and decoder, and is not trained; trained: two, both trained "
        "(the paper's); auto: frozen where they start as another model",
    )
    layers: int = setting(4, "of each tower, when new (choice)", check=positive)
    width: int = setting(256, "of each tower, when new (choice)", check=positive)
    heads: int = setting(4, "when new (choice)", check=positive)
    vocabulary: int = setting(
        4096, "entries of the tokenizer trained on the data, when new (choice)", check=at_least(257)
    )
    readout: Readout = setting(
        "mean",
        "what becomes the latent: the mean of the response tokens' states, or the states of query "
        "tokens after the response (choice)",
    )
    latent_tokens: int = setting(1, "latent tokens m (choice)", check=positive)
    latent_width: int = setting(256, "width k of each (choice)", check=positive)
    latent_map: LatentMap | None = setting(
        None,
        "fitted: states become latents by a map that is fitted to them in closed form, and is not "
        "trained; tuned: it is trained from there on; drawn: it is drawn, and trained (choice); "
        "null: fitted with frozen towers, tuned with trained ones of another model, drawn with new "
        "ones, with readout=queries and with soft tokens (injection), which it cannot be fitted to",
    )
    latent_norm: LatentNorm | None = setting(
        None,
        "rms: every latent is scaled to a root mean square of 1; none: not (choice); null: rms "
        "where the towers start as another model, else none",
    )
    injection: Injection = setting(
        "output",
        "how the decoder gets the latent: it scales and shifts the states that the head reads, is "
        "soft tokens between prompt and response, or both (choice)",
    )
    contrast: float = setting(
        10.0,
        "weight of the sibling contrast, in nats a token: a response must be likelier with its own "
        "latent than with the other response's (choice); 0: the paper's loss alone",
        check=non_negative,
    )
    bag_of_words: float = setting(
        0.0,
        "weight of predicting a response's tokens from its latent alone (choice); 0: off",
        check=non_negative,
    )
    token_dropout: float | None = setting(
        None,
        "most of a response's tokens that the decoder may not read, a share drawn between 0 and it "
        "(choice); null: 0 with frozen towers, else 1",
        check=between(0, 1),
    )
    latent_dropout: float = setting(
        0.1, "share of responses read with no latent (choice)", check=between(0, 0.9)
    )
    latent_noise: float = setting(
        0.0,
        "deviation of the noise on latents, over their size (choice); 0: off",
        check=non_negative,
    )
    loss_tokens: int | None = setting(
        None,
        "most tokens of a response that the loss is taken of, drawn anew; null: all",
        check=positive,
    )
    max_tokens: int | None = setting(
        None,
        "of prompt and longer response together, in the guide's tokens; null: as max_length cuts "
        "them with the policy's towers, else 512",
        check=at_least(8),
    )
    epochs: int = setting(
        4, "passes over both responses of every row not held out (choice)", check=positive
    )
    learning_rate: float | None = setting(
        None,
        "peak, AdamW, cosine (choice); null: with a frozen tower 4e-3, or 2e-3 where the map to "
        "the latent is trained; 1e-3 with new ones, 1e-4 where those of another model are trained",
        check=positive,
    )
    global_batch: int = setting(
        8, "rows (two responses each) an optimizer step (choice)", check=positive
    )
    heldout_fraction: float = setting(
        0.1, "share of the rows kept for the held-out figures", check=above_up_to(0, 0.5)
    )
    gate: Literal["stop", "warn"] = setting(
        "stop",
        "where the guide does not tell a row's two responses apart (the sibling gain is below two "
        "standard errors): stop before any policy is trained by it, or warn",
    )
    retrain: bool = setting(
        False,
        "train a guide again in every iteration, from the first one's start (the paper's is "
        "trained once)",
    )


@dataclass(frozen=True)
class CheckpointKeys:
    """What is kept of a stage in training, so that it can be gone on with after a
    stop. It changes no result.
    """

    minutes: float | None = setting(
        10.0, "one every so many minutes; null: not by time", check=positive
    )
    steps: int | None = setting(
        None, "one every so many optimizer steps; null: not by steps", check=positive
    )
    keep: int = setting(
        2,
        "the newest ones, each as large as the weights and averages in training",
        check=at_least(2),
    )


@dataclass(frozen=True)
class EvaluationKeys:
    """What is measured of the start policy, after every iteration and of the baseline."""

    rows: int = setting(
        200, "most held-out rows; 0: nothing is held out or evaluated", check=non_negative
    )
    samples: int = setting(
        4, "sampled answers a prompt, for rows that a program can check", check=non_negative
    )
    temperature: float = setting(1.0, "of those samples", check=positive)
    iterations: Literal["every", "last"] = setting(
        "every", "whose policies are measured; last: the start, the last one and the baseline alone"
    )
    answers: Literal["checked", "greedy", "all"] = setting(
        "checked",
        "whose answers are asked for: of rows that a program can check; greedy: of the others the "
        "greedy answer, for the report to show; all: samples of every row too, as a comparison "
        "needs to measure how close they come to the real ones (judge.folder)",
    )


@dataclass(frozen=True)
class ValidationKeys:
    """What is measured of a policy while it is trained, in every stage that trains one, on held-out
    rows that the report leaves out; the best weights are what the stage writes (`select`).
    """

    rows: int | None = setting(
        None,
        "rows held out for it beside evaluation.rows; null: 32, or where so many are not to be had "
        "a quarter of what is held out, none below 8; 0: none",
        check=non_negative,
    )
    every: int | None = setting(
        None,
        "optimizer steps from one evaluation to the next; null: a quarter of the stage's",
        check=positive,
    )
    metric: Metric = setting(
        "nll",
        "which weights are the best: nll, those that find the real responses likeliest; accuracy, "
        "those whose greedy answers a program finds right most often (of as many, by nll)",
    )
    early_stop: int | None = setting(
        None,
        "evaluations in a row without a better one, after which the stage ends; null: off",
        check=positive,
    )


@dataclass(frozen=True)
class JudgeKeys:
    """Who decides which of two answers is better (docs/judges.md). `judge=NAME` sets
    `judge.model`.
    """

    SHORTHAND: ClassVar[str] = "model"

    model: str = setting(
        "checker",
        "checker: the embedded data's own; policy: the policy itself; embedding: closeness to the "
        "real response, by judge.folder; a model folder or name; with an endpoint, its name for "
        "the model",
        path=True,
    )
    folder: str | None = setting(
        None,
        "of judge=embedding: sentence-embedding model, folder or name, such as "
        "sentence-transformers/all-MiniLM-L6-v2",
        path=True,
    )
    endpoint: str | None = setting(
        None,
        "URL of an OpenAI-compatible endpoint, such as http://localhost:8000/v1; its key: "
        "OPENAI_API_KEY",
    )
    token_cap: int | None = setting(
        1_000_000,
        "most tokens the endpoint may read and write for a run; null: no bound",
        check=positive,
    )
    answer_tokens: int = setting(
        16, "longest answer of the endpoint; more for a model that thinks", check=positive
    )
    concurrency: int = setting(8, "questions to the endpoint at a time", check=positive)


@dataclass(frozen=True)
class AgreementKeys:
    """Whether latent distance and a judge agree on which of two samples is better:
    `train/judge.py`.
    """

    rows: int | None = setting(None, "first held-out prompts to use; null: all", check=positive)
    policy: str | None = setting(
        None,
        "model folder that answers, such as RUN/iteration_2/policy; null: the start",
        path=True,
    )


@dataclass(frozen=True)
class RewardKeys:
    """What scores every policy's held-out answers (docs/judges.md). `reward=NAME` sets
    `reward.model`.
    """

    SHORTHAND: ClassVar[str] = "model"

    model: str | None = setting(
        None,
        "sequence classifier with one logit, folder or name, such as OpenAssistant/"
        "reward-model-deberta-v3-large-v2; null: no rewards",
        path=True,
    )
    max_tokens: int = setting(
        512, "of question and answer together, in its tokens; the longer is cut", check=positive
    )
    batch_tokens: int = setting(
        8192, "tokens scored at a time, on one rank, padding counted", check=positive
    )


@dataclass(frozen=True)
class BenchmarksKeys:
    """Public benchmarks (docs/benchmarks.md), of every policy that is evaluated. `benchmarks=[...]`
    sets the tasks.
    """

    SHORTHAND: ClassVar[str] = "tasks"

    tasks: list[str] = setting([], "such as [piqa, arc_easy]; []: none")
    data: str | None = setting(
        None, "folder of local files, TASK.jsonl; null: the hub's data sets", path=True
    )
    limit: int | None = setting(None, "first rows of each task; null: all", check=positive)
    shots: int | None = setting(
        None, "examples in front of every row; null: the task's own", check=non_negative
    )
    chat_template: bool = setting(
        False, "put prompts into the chat template (the leaderboards do not)"
    )


@dataclass(frozen=True)
class HubKeys:
    """Where the run's policy is pushed when the run ends (docs/models.md)."""

    push: str | None = setting(
        None,
        "repository of the Hugging Face hub, OWNER/NAME; the token is HF_TOKEN's, or that of "
        "hf auth login; null: nothing is pushed",
        check=Check(is_repository, "OWNER/NAME, as the hub has them"),
    )
    private: bool = setting(True, "for nobody else to see")
