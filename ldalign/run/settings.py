"""The keys of a run: what `train/*.py` read from `--config FILE.yaml` and `key=value`, and which of
them contradict each other.

Those in groups are in `ldalign.run.keys`. Defaults are for a 7B-sized model where the paper or SPIN
says something (arXiv 2404.06390, 2401.01335) and marked "choice" where neither does; `configs/`
holds whole runs.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal

from ldalign.data.columns import Columns
from ldalign.run import foreign_names
from ldalign.run.keys import (
    SAMPLING_KEYS,
    AgreementKeys,
    BenchmarksKeys,
    CheckpointKeys,
    ColumnsKeys,
    EvaluationKeys,
    GuideKeys,
    HubKeys,
    JudgeKeys,
    LossKeys,
    RewardKeys,
    SamplingKeys,
    SftKeys,
    TrainingKeys,
    ValidationKeys,
)
from ldalign.system.config import (
    Check,
    above_up_to,
    at_least,
    between,
    each,
    group,
    non_negative,
    positive,
    setting,
)
from ldalign.system.sinks import SinkName


@dataclass(frozen=True)
class RunConfig:
    """One run of `train/align.py`; the other scripts read the keys they need."""

    FOREIGN: ClassVar[Mapping[str, str]] = foreign_names.FOREIGN
    MAIN: ClassVar[str] = "training"

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
    max_new_tokens: int = setting(
        256,
        "longest sampled response (choice: SPIN's); 0: from the data, enough for 95 % of the real "
        "responses",
        check=non_negative,
    )
    max_length: int = setting(
        1024,
        "longest prompt and response together; the response is cut; 0: from the data, enough for "
        "99.5 % of the rows with responses of max_new_tokens, at most what the policy reads",
        check=Check(lambda value: value == 0 or value >= 2, "0, or 2 or greater"),
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
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "auto: CUDA where there is one", instead={"gpu": "device=cuda"}
    )
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
    log: list[SinkName] = setting(
        [],
        "where else metrics go: tensorboard, wandb, trackio, each by the library of that name; "
        "none of them can stop a run",
        check=Check(lambda names: len({*names}) == len(names), "a list that names none twice"),
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
    hub: HubKeys = group(HubKeys, "pushing the run's policy to the Hugging Face hub")
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
        if self.max_new_tokens >= self.max_length > 0:
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
        found += self._folder_problems() + self._measuring_problems() + self._name_problems()
        return found + self._validation_problems()

    def _name_problems(self) -> list[str]:
        """A run folder of the policy's name would be read in place of that model, as paths win."""
        if Path(self.run) == Path(self.policy) and not Path(self.policy).exists():
            return [f"run={self.run}: is the policy's name too; give another, run=runs/{self.run}"]
        return []

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

    def _measuring_problems(self) -> list[str]:
        """The run's result may be any iteration, unless it is the last by name."""
        may_be_any = self.select != "last" and self.validation.rows != 0 and self.iterations > 1
        if self.evaluation.iterations == "last" and may_be_any:
            return [
                "evaluation.iterations=last: the best iteration by validation may be another; give "
                "select=last too"
            ]
        return []

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
    "sft/pairs": (*_OF_LD_ALIGN, *_OF_JUDGES, "mix_previous", "beta", "loss", "reference"),
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
