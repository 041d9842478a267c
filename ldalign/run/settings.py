"""The keys of a run: what `train/*.py` read from `--config FILE.yaml` and `key=value`.

Defaults are for a 7B-sized model where the paper or SPIN says something (arXiv 2404.06390,
2401.01335) and marked "choice" where neither does; `configs/` holds whole runs.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal, get_args, get_type_hints

from ldalign.data.columns import Columns
from ldalign.kernels.loss_options import SMOOTHING_BOUND, Kind, LossOptions
from ldalign.models.guide import Injection, LatentNorm, Readout
from ldalign.system.config import (
    above_up_to,
    at_least,
    at_least_below,
    between,
    each,
    group,
    non_negative,
    not_empty,
    positive,
    setting,
)
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
    batch_rows: int = setting(64, "rows generated at a time, on one rank", check=positive)
    cache_gib: float | None = setting(
        None,
        "most memory of the key/value cache, on one rank; null: half of what is free",
        check=positive,
    )


# What a response depends on; the others only move work about.
SAMPLING_KEYS = tuple(
    f"sampling.{key}"
    for key in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop")
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
        "recompute in the backward: selective, the feed-forwards' inner activations; full, whole "
        "blocks (least memory, one forward more)",
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
class RunConfig:
    """One run of `train/align.py`; the other scripts read the keys they need."""

    run: str = setting("runs/align", "run folder: everything is written here", path=True)
    policy: str = setting(
        "smollm2-135m-instruct",
        "model folder, Hugging Face name (org/name), the embedded default, or toy (tiny, random)",
        path=True,
    )
    template: str | None = setting(
        None,
        "file of the chat template (jinja) to use in place of the policy's own, and to write into "
        "the policies made; null: the policy's",
        path=True,
    )
    guide: GuideKeys = group(GuideKeys, "guiding model")
    data: str | list[str] = setting(
        "embedded",
        "SFT data: file, folder, glob, or name on the Hugging Face hub (org/name:config:split), or "
        "a list of them; embedded: ldalign's own task rows; embedded-wordings: the same tasks, "
        "answered in one of several right wordings",
        path=True,
    )
    columns: ColumnsKeys = group(ColumnsKeys, "the data's names of the keys that are read")
    ignore_columns: list[str] = setting(
        [], "keys of rows and turns to leave out, which are refused otherwise, such as tools"
    )
    turns: Literal["first", "last", "all"] = setting(
        "last", "which assistant turn is the response (first: SPIN's)"
    )
    data_shares: list[float] | None = setting(
        None,
        "share of each entry of `data` in the rows that are trained on: as many rows as the entry "
        "that runs out first allows; null: all rows of all",
        check=each(positive),
    )
    shuffle: bool = setting(
        True,
        "put the rows into a random order (seed) before any of them is left out; false: the files'",
    )
    long_prompts: Literal["drop", "error", "truncate"] = setting(
        "drop",
        "a row whose prompt alone fills max_length: left out and counted; an error; or without its "
        "first turns, then without the last question's beginning",
    )
    bad_rows: Literal["error", "skip"] = setting(
        "error", "a row that cannot be used; skip: leave it out and count it, up to 1 % of the rows"
    )
    heldout: str | None = setting(
        None,
        "held-out data; null: heldout_fraction of `data` (the embedded sets: a split of their own)",
        path=True,
    )
    heldout_fraction: float = setting(
        0.1,
        "share of `data` held out where `heldout` is null, at most evaluation.rows; rows of one "
        "conversation or one prompt stay together",
        check=between(0, 0.5),
    )
    responses: str | None = setting(
        None,
        "responses to use in the first iteration instead of sampling them: JSON Lines "
        "(docs/generation.md)",
        path=True,
    )
    method: Literal["ld_align", "spin", "dpo", "sft", "self_reward", "rlaif"] = setting(
        "ld_align", "which pairs are trained on (docs/methods.md)"
    )
    sft_prompts: Literal["all", "pairs"] = setting(
        "all",
        "prompts that method=sft trains on: all, or those on which the other methods have a pair, "
        "where the policy's own response differs from the data's",
    )
    distance: Literal["euclidean", "cosine"] = setting(
        "euclidean",
        "of two latents: length of their difference (the paper's), or 1 - cos of their angle",
        instead={"pooled": "weights=pooled"},
    )
    weights: Literal[
        "latent", "uniform", "shuffled", "length", "inverse", "semantic", "pooled", "oracle"
    ] = setting(
        "latent",
        "of ld_align's pairs: the method's, or a control in its place (docs/methods.md); with no "
        "guide: uniform, length, semantic (distance of sentence embeddings, judge.folder), pooled "
        "(of the start policy's mean states), oracle (the checker's verdict)",
    )
    oracle_contrast: float = setting(
        0.9,
        "c of weights=oracle: a pair whose loser is wrong has 1 + c, one whose loser is right "
        "1 - c, both over their mean",
        check=above_up_to(0, 1),
    )
    weight_clip: float | None = setting(
        None, "most that a pair weighs (the mean is 1); null: off", check=positive
    )
    mix_previous: bool = setting(
        False,
        "spin: from iteration 1 on, train on the previous iteration's pairs too, as SPIN's scripts "
        "do",
    )
    iterations: int = setting(
        3, "rounds of generate, score, align (the paper's 3)", check=at_least(0)
    )
    max_rows: int | None = setting(
        None, "rows of the data an iteration uses; null: all", check=positive
    )
    max_new_tokens: int = setting(256, "longest sampled response (choice: SPIN's)", check=positive)
    max_length: int = setting(
        1024, "longest prompt and response together; the response is cut", check=at_least(2)
    )
    global_batch: int = setting(64, "pairs an optimizer step, over all ranks", check=positive)
    learning_rate: float | list[float] = setting(
        5e-7, "peak (the paper gives none: SPIN's); a list: one an iteration", check=each(positive)
    )
    beta: float | list[float] = setting(
        0.1,
        "strength of the pull to the reference (the paper gives none: SPIN's); a list: one an "
        "iteration",
        check=each(positive),
    )
    reference: Literal["iteration", "initial"] = setting(
        "iteration", "reference policy: the iteration's start, or the run's"
    )
    seed: int = setting(0, "of everything random", check=non_negative)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: CUDA where there is one")
    timeout_minutes: float = setting(
        30,
        "longest that ranks wait for one another inside a step (docs/run-folder.md)",
        check=positive,
    )
    dtype: Literal["auto", "bfloat16", "float32"] = setting(
        "auto",
        "of computing (the weights in training: training.master_dtype); auto: bfloat16 where the "
        "machine has units for it",
    )
    policy_dtype: Literal["bfloat16", "float32"] = setting(
        "bfloat16",
        "of the policies written; float32 keeps small steps that bfloat16 rounds away, in twice "
        "the space",
    )
    report: Literal["page", "table"] = setting(
        "page",
        "at the end: report.html with its figures (where matplotlib is installed) and table.md, or "
        "table.md alone",
    )
    sampling: SamplingKeys = group(SamplingKeys, "sampling of training responses")
    training: TrainingKeys = group(TrainingKeys, "training of the policy")
    loss: LossKeys = group(LossKeys, "options of the loss of a pair")
    sft: SftKeys = group(SftKeys, "warm-up of the start policy on the data")
    continual_sft: SftKeys = group(
        SftKeys, "baseline: more SFT from the same start, in the table beside the iterations"
    )
    checkpoint: CheckpointKeys = group(
        CheckpointKeys, "checkpoints inside the stages that train; a stop writes one too"
    )
    evaluation: EvaluationKeys = group(EvaluationKeys, "held-out evaluation")
    validation: ValidationKeys = group(ValidationKeys, "evaluation during training")
    select: Literal["last", "best"] | None = setting(
        None,
        "the weights of a stage that become its policy, and the iteration whose policy is the "
        "run's result (selected.json): the last, or the best by validation; null: best where there "
        "is a validation, else last",
    )
    judge: JudgeKeys = group(JudgeKeys, "which of two answers is better")
    agreement: AgreementKeys = group(AgreementKeys, "agreement of latent distance with the judge")
    reward: RewardKeys = group(RewardKeys, "rewards of held-out answers")
    benchmarks: BenchmarksKeys = group(BenchmarksKeys, "public benchmarks")
    cache: str | None = setting(
        None, "where fetched models and data are kept; null: ~/.cache/ldalign", path=True
    )

    def at(self, name: Literal["learning_rate", "beta"], t: int) -> float:
        """The value of a key in iteration t."""
        value: float | list[float] = getattr(self, name)
        return value[t] if isinstance(value, list) else value

    @property
    def data_columns(self) -> Columns:
        """What is said about the keys of rows, as the reader takes it."""
        named = {key: name for key, name in vars(self.columns).items() if name is not None}
        return Columns(named, frozenset(self.ignore_columns))

    @property
    def cache_folder(self) -> Path:
        """Where fetched models and data are kept."""
        return Path(self.cache).expanduser() if self.cache else Path.home() / ".cache" / "ldalign"

    @property
    def needs_guide(self) -> bool:
        """Whether the weights come of a guide."""
        return self.method == "ld_align" and self.weights in GUIDED

    def problems(self) -> list[str]:
        """The contradictions between keys, a sentence each; [] where there are none."""
        found = self.data_columns.problems()
        for name in ("learning_rate", "beta"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != self.iterations:
                found.append(
                    f"{name}: {len(value)} values for iterations={self.iterations}; give one an "
                    "iteration"
                )
        if self.method != "ld_align" and self.weights != "latent":
            found.append(
                f"weights={self.weights}: method={self.method} weighs all pairs alike; leave "
                "weights out"
            )
        if self.method != "ld_align" and self.weight_clip is not None:
            found.append(f"weight_clip: method={self.method} weighs all pairs alike; leave it out")
        if self.method != "ld_align" and (self.distance != "euclidean" or self.guide.retrain):
            found.append(
                f"distance, guide.retrain: method={self.method} has no guide; leave them out"
            )
        if self.loss.kind == "ipo" and self.loss.label_smoothing:
            found.append(
                f"loss.label_smoothing={self.loss.label_smoothing}: loss.kind=ipo has none; leave "
                "one of them out"
            )
        if self.method == "sft" and self.reference != "iteration":
            found.append(f"reference={self.reference}: method=sft has none; leave it out")
        if self.method != "spin" and self.mix_previous:
            found.append(f"mix_previous=true: is for method=spin, not {self.method}")
        if self.method != "sft" and self.sft_prompts != "all":
            found.append(f"sft_prompts={self.sft_prompts}: is for method=sft, not {self.method}")
        same = self.method == "dpo" or (self.method == "sft" and self.sft_prompts == "all")
        if same and self.iterations > 1:
            found.append(
                f"iterations={self.iterations}: method={self.method} has the same pairs in each; "
                "give iterations=1 and training.epochs"
            )
        if self.method == "self_reward" and self.judge.model not in ("checker", "policy"):
            found.append(
                f"judge.model={self.judge.model}: method=self_reward judges by itself; give "
                "method=rlaif"
            )
        if self.responses and reader(self.method, self.sft_prompts) not in SELF_PLAY:
            found.append(
                f"responses={self.responses}: method={self.method} takes none; leave it out"
            )
        entries = 1 if isinstance(self.data, str) else len(self.data)
        if self.data_shares is not None and len(self.data_shares) != entries:
            found.append(
                f"data_shares: {len(self.data_shares)} shares for {entries} entries of data; give "
                "one an entry"
            )
        if self.max_new_tokens >= self.max_length:
            found.append(
                f"max_new_tokens={self.max_new_tokens} must be below max_length={self.max_length}; "
                f"the nearest: max_length={self.max_new_tokens + 1} or "
                f"max_new_tokens={self.max_length - 1}"
            )
        without = self.method == "ld_align" and not self.needs_guide
        if without and self.distance != "euclidean":
            found.append(
                f"distance={self.distance}: weights={self.weights} has a distance of its own; "
                "leave distance out"
            )
        if without and (self.guide.folder is not None or self.guide.retrain):
            found.append(
                f"guide.folder, guide.retrain: weights={self.weights} come of no guide; leave them "
                "out"
            )
        usual = RunConfig.oracle_contrast
        if "oracle" not in self._kinds and self.oracle_contrast != usual:
            found.append(
                f"oracle_contrast={self.oracle_contrast:g}: is read by weights=oracle alone; leave "
                "it out"
            )
        new = self.guide.backbone == "gpt2" and self.guide.folder is None
        if new and self.guide.towers == "frozen":
            found.append(
                "guide.towers=frozen: a new GPT-2 knows nothing and must be trained; give "
                "guide.folder or guide.backbone=policy"
            )
        fitted = self.guide.latent_map in ("fitted", "tuned")
        if fitted and (self.guide.readout, self.guide.injection) != ("mean", "output"):
            found.append(
                f"guide.latent_map={self.guide.latent_map}: is fitted to mean states, and gives no "
                "soft tokens; give guide.readout=mean and guide.injection=output, or leave it out"
            )
        if self.guide.latent_tokens * self.guide.latent_width < 2:
            found.append(
                "guide.latent_width=1: one number has no direction; the nearest: "
                "guide.latent_width=2"
            )
        if self.guide.bag_of_words and self.guide.injection == "prefix":
            found.append(
                "guide.bag_of_words: predicts through what guide.injection=output adds; give "
                "guide.injection=both"
            )
        if self.guide.width % self.guide.heads:
            nearest = self.guide.heads * max(1, round(self.guide.width / self.guide.heads))
            found.append(
                f"guide.width={self.guide.width} must be a multiple of "
                f"guide.heads={self.guide.heads}; the nearest: guide.width={nearest}"
            )
        if self.judge.endpoint is not None:
            if not self.judge.endpoint.startswith(("http://", "https://")):
                found.append(
                    f"judge.endpoint={self.judge.endpoint} must be a URL, http:// or https://"
                )
            if self.judge.model in ("checker", "policy", "embedding"):
                found.append(
                    f"judge.model={self.judge.model} must be the endpoint's name for a model"
                )
        return found + self._folder_problems() + self._validation_problems()

    def _validation_problems(self) -> list[str]:
        """The contradictions between keys about evaluation during training."""
        v, found = self.validation, []
        if v.rows and not self.evaluation.rows:
            found.append(
                f"validation.rows={v.rows}: evaluation.rows=0 holds nothing out; give "
                "evaluation.rows=200, say, or leave it out"
            )
        if v.rows == 0 or not self.evaluation.rows:
            asked = {
                "validation.every": v.every,
                "validation.early_stop": v.early_stop,
                "validation.metric": None if v.metric == "nll" else v.metric,
                "select": None if self.select == "last" else self.select,
            }
            given = [f"{key}={value}" for key, value in asked.items() if value is not None]
            if given:
                found.append(
                    f"{', '.join(given)}: no rows are set aside for validation; give "
                    "validation.rows=32, say, or leave out"
                )
        return found

    @property
    def _kinds(self) -> Collection[str]:
        """The kinds of weights that are made, as the key `weights` names them."""
        return (self.weights,)

    def _folder_problems(self) -> list[str]:
        """The contradictions about judge.folder between what reads it and what is given."""
        found = []
        readers = {
            "judge=embedding": self.judge.model == "embedding",
            "weights=semantic": "semantic" in self._kinds,
        }
        for reader, reads in readers.items():
            if reads and self.judge.folder is None:
                found.append(
                    f"{reader}: needs the folder of a sentence-embedding model; give judge.folder"
                )
        if self.judge.folder is not None and not any(readers.values()):
            found.append(
                f"judge.folder={self.judge.folder}: is read by {' and '.join(readers)} alone; "
                "leave it out"
            )
        return found


# The values of the key `weights` that are made of a guide's distances.
GUIDED = ("latent", "shuffled", "inverse")
# The methods whose first iteration samples from the start policy, so that `responses` may be given;
# they share the samples, so `train/compare.py` compares them.
SELF_PLAY = ("ld_align", "spin", "sft/pairs")

# What `train/align.py` does not read, by method: keys, and groups of keys.
_OF_LD_ALIGN = ("guide", "distance", "weights", "weight_clip", "oracle_contrast")
_OF_JUDGES = ("judge", "agreement")
_OF_SFT = ("sft_prompts",)
UNREAD: dict[str, tuple[str, ...]] = {
    # judge.folder is what weights=semantic reads; elsewhere it is refused (`RunConfig.problems`)
    "ld_align": (
        "mix_previous",
        *(f"judge.{key.name}" for key in fields(JudgeKeys) if key.name != "folder"),
        "agreement",
        *_OF_SFT,
    ),
    "spin": (*_OF_LD_ALIGN, *_OF_JUDGES, *_OF_SFT),
    "dpo": (*_OF_LD_ALIGN, *_OF_JUDGES, *_OF_SFT, *SAMPLING_KEYS, "mix_previous", "responses"),
    "sft": (
        *_OF_LD_ALIGN,
        *_OF_JUDGES,
        *SAMPLING_KEYS,
        "mix_previous",
        "responses",
        "beta",
        "loss",
        "reference",
    ),
    "sft/pairs": (*_OF_LD_ALIGN, *_OF_JUDGES, "mix_previous", "beta", "reference"),
    "self_reward": (*_OF_LD_ALIGN, *_OF_JUDGES, *_OF_SFT, "mix_previous", "responses"),
    "rlaif": (*_OF_LD_ALIGN, *_OF_SFT, "agreement", "mix_previous", "responses"),
}


def reader(method: str, sft_prompts: str = "all") -> str:
    """The name of a method in `UNREAD`: sft reads more with sft_prompts=pairs."""
    return f"{method}/pairs" if method == "sft" and sft_prompts == "pairs" else method


def unread(method: str, keys: Iterable[str]) -> list[str]:
    """Those of the dotted keys that `train/align.py` does not read with this method, a `reader`."""
    return [
        key
        for key in keys
        if any(key == name or key.startswith(f"{name}.") for name in UNREAD[method])
    ]


# What may be compared beside ld_align/WEIGHTS, with all WEIGHTS that the key `weights` has.
COMPARABLE = ("sft", "sft/pairs", "spin", "ld_align", "ld_align/retrained")


@dataclass(frozen=True)
class CompareKeys:
    """What is compared, and how learning rates are chosen."""

    methods: list[str] = setting(
        ["sft", "spin", "ld_align/shuffled", "ld_align"],
        "sft, sft/pairs (sft_prompts=pairs), spin, ld_align, ld_align/retrained "
        "(guide.retrain=true), ld_align/WEIGHTS (weights=WEIGHTS)",
        check=not_empty,
    )
    seeds: list[int] = setting(
        [0, 1, 2],
        "of sampling, guide and row order; the first one's runs choose the learning rates",
        check=not_empty,
    )
    only: list[int] = setting(
        [],
        "those of the seeds that this process trains, while others train the rest of the same run; "
        "[]: all",
    )
    policies: Literal["keep", "remove"] = setting(
        "keep",
        "the weights of the policies that are trained; remove: each training's, once it is "
        "evaluated and no other needs it",
    )
    primary: list[str] | None = setting(
        None,
        "differences named in advance, such as [ld_align - spin]: printed first, a family of tests "
        "of their own; null: ld_align - spin and ld_align - ld_align/shuffled, where compared",
    )
    learning_rates: list[float] = setting(
        [5e-6, 1.5e-5, 4.5e-5], "tried for every method", check=each(positive)
    )
    validation_rows: int = setting(
        80, "held-out rows that learning rates are chosen on; the rest is reported", check=positive
    )


@dataclass(frozen=True)
class CompareConfig(RunConfig):
    """Keys of `train/compare.py`: a run's, and what is compared. method, weights, seed,
    learning_rate are set by it.
    """

    compare: CompareKeys = group(CompareKeys, "the comparison")

    @property
    def _kinds(self) -> Collection[str]:
        return {name.partition("/")[2] or "latent" for name in self.compare.methods}

    def _folder_problems(self) -> list[str]:
        """As `RunConfig`'s; where no weights need it, the comparison's table of distances reads
        judge.folder.
        """
        if "semantic" in self._kinds and self.judge.folder is None:
            return [
                "compare.methods: ld_align/semantic needs the folder of a sentence-embedding "
                "model; give judge.folder"
            ]
        return []

    def _arm_problems(self) -> list[str]:
        """The contradictions between what is compared."""
        found, names = [], self.compare.methods
        kinds = get_args(get_type_hints(RunConfig)["weights"])
        known = {*COMPARABLE, *(f"ld_align/{kind}" for kind in kinds)}
        for name in dict.fromkeys(names):
            if name not in known:
                found.append(
                    f"compare.methods: {name!r} is not one of {', '.join(COMPARABLE)}, "
                    f"ld_align/WEIGHTS with weights of {', '.join(kinds)}"
                )
            if names.count(name) > 1:
                found.append(f"compare.methods: {name!r} is there twice; leave one out")
        if "ld_align/retrained" in names and self.iterations < 2:
            found.append(
                f"iterations={self.iterations}: ld_align/retrained differs from ld_align from the "
                "second iteration on; give iterations=2, or leave it out"
            )
        for key in ("seeds", "only"):
            seeds = getattr(self.compare, key)
            if len(set(seeds)) < len(seeds):
                found.append(f"compare.{key}: a seed is there twice; leave one out")
        strange = [n for n in self.compare.only if n not in self.compare.seeds]
        if strange:
            found.append(
                f"compare.only: {strange[0]} is none of compare.seeds={self.compare.seeds}; give "
                "some of them"
            )
        for name in self.compare.primary or ():
            sides = name.split(" - ")
            if len(sides) != 2 or sides[0] == sides[1] or not {*sides} <= {*names, "start"}:
                found.append(
                    f"compare.primary: {name!r} is not METHOD - METHOD, two of compare.methods or "
                    "start"
                )
        return found

    @property
    def primary(self) -> list[tuple[str, str]]:
        """The differences named in advance: (first, second), first minus second."""
        usual = ["ld_align - spin", "ld_align - ld_align/shuffled"]
        given = usual if self.compare.primary is None else self.compare.primary
        pairs = [(a, b) for a, _, b in (name.partition(" - ") for name in given)]
        return [(a, b) for a, b in pairs if {a, b} <= {*self.compare.methods, "start"}]

    def problems(self) -> list[str]:
        """The contradictions between keys, a sentence each; [] where there are none."""
        found = super().problems() + self._arm_problems()
        for key in ("method", "sft_prompts", "weights", "weight_clip", "mix_previous", "responses"):
            if getattr(self, key) != getattr(RunConfig, key):
                found.append(f"{key}: compare.methods says what is compared; leave {key} out")
        if self.validation != ValidationKeys() or self.select is not None:
            found.append(
                "validation, select: all methods take the same steps, and the last weights are "
                "compared; leave them out"
            )
        if self.guide.retrain:
            found.append("guide.retrain: give ld_align/retrained in compare.methods; leave it out")
        if self.iterations < 1:
            found.append(f"iterations={self.iterations}: a comparison needs 1 or more")
        if self.training.steps is None:
            found.append("training.steps: must be given, so that all methods have the same budget")
        if self.compare.validation_rows >= self.evaluation.rows:
            found.append(
                f"compare.validation_rows={self.compare.validation_rows}: leaves none of "
                "evaluation.rows="
                f"{self.evaluation.rows} to report"
            )
        return found
