"""Keys arrive: each key of a run's settings that a stage hands on is set off its default, and what
the function behind the stage is given is compared; a key of which nobody has thought is an error.

The stages are real and work on the toy run's rows; what they call is caught, and nothing computed.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any, NamedTuple

import pytest
import torch
from caught import Caught, Run
from toy_context import config_of, open_toy

from ldalign.data.pairs import Pairs, with_losers
from ldalign.data.ragged import TokenLists
from ldalign.evaluation import held_out
from ldalign.generation.sampling import Response
from ldalign.kernels.loss_options import LossOptions
from ldalign.run import context, methods, prepared
from ldalign.run.context import Context
from ldalign.run.measures import measurements
from ldalign.run.settings import RunConfig
from ldalign.run.stages import (
    agreement_samples,
    benchmarks,
    distances,
    evaluation,
    guide,
    judged,
    policy,
    responses,
    reward,
)
from ldalign.system import distributed
from ldalign.system.errors import NumericsError
from ldalign.train import align, judge
from ldalign.training import policy as training

# ------------------------------------------------------------------------------------------- scenes
#
# A stage of a run, with what it calls caught.


class Done(Exception):
    """What was to be seen has been seen."""


def no_further(given: Namespace) -> None:
    raise Done


def losing(ctx: Context) -> Pairs:
    """The rows' pairs, each against the response of the next row."""
    pairs = ctx.used[1]
    real = [list(pair.real) for pair in pairs]
    return with_losers(pairs, TokenLists.of(iter([*real[1:], real[0]])), ctx.config.max_length)


def _training(caught: Caught) -> None:
    caught(policy, "file_hash", result="")
    caught(policy, "load_model", "save_model", "best_weights")
    caught(policy, "train", result={})
    caught(distributed, "full_state")


def of_policy(ctx: Context, caught: Caught) -> None:
    _training(caught)
    policy.policy_stage(ctx, 1, ctx.start, losing(ctx), {})


def of_sft(ctx: Context, caught: Caught) -> None:
    _training(caught)
    policy.sft_stage(ctx, "sft", ctx.start)


def of_continual_sft(ctx: Context, caught: Caught) -> None:
    _training(caught)
    policy.sft_stage(ctx, "continual_sft", ctx.start)


ANSWER = '{"finish_reason": "stop", "token_ids": [5, 6]}\n'  # a record of a response


def of_responses(ctx: Context, caught: Caught) -> None:
    def answers(given: Namespace) -> list[dict[str, Any]]:
        given.new_engine("decoder")
        ids = ctx.tokenizer.encode("one STOP two")
        given.record = given.record(given.requests[0], Response(ids, "stop", 0.0))["response"]
        given.path.write_text(ANSWER * len(given.requests))
        return []

    caught(responses, "load_model", "new_decoder", "Engine")
    caught(responses, "make_answers", result=answers)
    caught(responses, "read_losers", result=no_further)
    with contextlib.suppress(Done):
        responses.responses_stage(ctx, 0, ctx.start)


def of_guide(ctx: Context, caught: Caught) -> None:
    made = Namespace(to=lambda device: None)
    caught(guide, "new_guide", result=made)
    caught(guide, "pretrained_guide", "save_guide")
    caught(guide, "guide_pairs", result=lambda given: given.pairs)
    caught(guide, "split", result=("seen", "unseen"))
    caught(guide, "train_guide", result=0)
    figures = {"rows": 9.0, "differing": 9.0, "sibling_gain": 0.0, "sibling_gain_se": 1.0}
    caught(guide, "heldout_figures", result=figures)
    caught(guide, "sentence", result="")
    caught(distributed, "full_state")
    given = ctx.config.guide.folder
    if given is not None:
        caught(guide, "hash_model_folder", result="")
    try:
        guide.guide_stage(ctx, 0, ctx.start, losing(ctx))
        caught.calls.stopped = False
    except NumericsError:
        caught.calls.stopped = True


def of_distances(ctx: Context, caught: Caught) -> None:
    count = len(ctx.used[0])

    def distances_by(latents, pairs, batch_tokens, metric, path, progress) -> torch.Tensor:
        caught.calls.distances_by = Namespace(batch_tokens=batch_tokens, metric=metric)
        return torch.ones(count, 1)

    def weighted(given: Namespace) -> tuple[torch.Tensor, int]:
        return torch.ones(count, dtype=torch.float64), 0

    caught(distances, "file_hash", "guide_hash", result="")
    caught(distances, "open_guide", result=Namespace(latent=None, distances_by=distances_by))
    caught(distances, "guide_pairs", result=lambda given: given.pairs)
    caught(distances, "right_losers", result=[True] * count)
    caught(distances, "oracle_distance", result=torch.ones(count, dtype=torch.float64))
    caught(distances, "pair_weights", result=weighted)
    distances.distances_stage(ctx, 1, ctx.run.path, ctx.start, losing(ctx))


def of_method(ctx: Context, caught: Caught) -> None:
    """Iteration 1 of the method, from the pairs it makes to the reference that scores them."""
    real = ctx.used[1].real
    sampled = responses.Responses(real, ["stop"] * len(real))
    caught(methods, "responses_stage", "read_responses", result=sampled)
    caught(methods, "guide_stage", result=Path("guide"))
    caught(methods, "distances_stage")
    caught(methods, "reference_stage", result=lambda given: given.pairs)
    caught(methods, "file_hash", result="")
    caught(methods, "with_losers", result=lambda given: given.pairs.changed(generated=real))
    methods.SOURCES[ctx.config.method](ctx, 1, Path("policy"), Path("start"))


def of_evaluation(ctx: Context, caught: Caught) -> None:
    caught(evaluation, "load_model")
    caught(evaluation, "evaluate", result=({"nll/real": 0.0}, []))
    evaluation.evaluation_stage(ctx, "start", ctx.start)


def of_endpoint(ctx: Context, caught: Caught) -> None:
    caught(judged, "Endpoint", result=Namespace(ask=lambda questions, progress: []))
    judged.open_judge(ctx, ctx.start).prefer([], [], [])


def of_embedding(ctx: Context, caught: Caught) -> None:
    caught(judged, "find_model", "EmbeddingModel")
    judged.open_judge(ctx, ctx.start)


def of_agreement(ctx: Context, caught: Caught) -> None:
    caught(agreement_samples, "load_model", "new_decoder")
    caught(agreement_samples, "make_answers", result=[])
    caught(agreement_samples, "read_jsonl", result=[])
    agreement_samples.agreement_samples_stage(ctx, ctx.start)
    caught(judge, "find_guide", "agreement_stage")
    caught(judge, "start_stage", result=ctx.start)
    judge.judge(ctx)


def of_reward(ctx: Context, caught: Caught) -> None:
    caught(reward, "RewardModel", result=no_further)
    caught(reward, "find_model")
    caught(reward, "hash_model_folder", "hash_file", result="")
    with pytest.raises(Done):
        reward.reward_stage(ctx, "start", "start")


def of_data(ctx: Context, caught: Caught) -> None:
    caught(prepared, "say_files")
    caught(prepared, "files_of", result=lambda given: [Path(given.spec)])
    caught(prepared, "read_splits")
    prepared.read_data(ctx.config, ctx.tokenizer)


def of_model(ctx: Context, caught: Caught) -> None:
    caught(context, "resolve_model", result="found")
    caught(context, "load_tokenizer")
    context.find_model(ctx.config, ctx.config.policy)
    context.open_tokenizer(ctx.config, Path("folder"))
    caught.calls.dtype = context.choose_dtype(ctx.config, torch.device("cpu"))


def of_plan(ctx: Context, caught: Caught) -> None:
    caught.calls.planned = align.planned(ctx.config)
    caught.calls.measured = measurements(ctx.config, "iteration_0")
    caught.calls.benchmarks = benchmarks.wanted(ctx.config)


# -------------------------------------------------------------------------------------------- cases


class Case(NamedTuple):
    key: str
    value: str  # as on the command line
    scene: Callable[[Context, Caught], None]
    arrives: str | Callable[[Namespace], Any]  # of what was caught: the argument's name, say
    expected: Any
    more: Sequence[str] = ()  # other keys, which stand in the run it is compared with too


def cases_of_training() -> list[Case]:
    """The policy's training, in the iterations and in both stages of SFT."""
    cases = []
    for scene in (of_policy, of_sft, of_continual_sft):
        cases += [
            Case("training.schedule", "cosine", scene, "train.settings.schedule", "cosine"),
            Case("training.warmup_ratio", "0.25", scene, "train.settings.warmup_ratio", 0.25),
            Case("training.weight_decay", "0.07", scene, "train.settings.weight_decay", 0.07),
            Case("training.max_grad_norm", "0.3", scene, "train.settings.max_grad_norm", 0.3),
            Case("training.micro_tokens", "999", scene, "train.settings.micro_tokens", 999),
            Case("training.checkpointing", "full", scene, "train.settings.checkpointing", "full"),
            Case(
                "training.state_dtype",
                "bfloat16",
                scene,
                "train.settings.state_dtype",
                torch.bfloat16,
            ),
            Case(
                "training.master_dtype",
                "bfloat16",
                scene,
                "load_model.dtype",
                torch.bfloat16,
            ),
            Case(
                "training.shard_ranks",
                "1",
                scene,
                "train.settings.sharding.ranks",
                1,
            ),
            Case(
                "training.whole",
                "all",
                scene,
                "train.settings.sharding.whole",
                "all",
            ),
            Case("seed", "5", scene, "train.seed", 5),
            Case(
                "dtype",
                "bfloat16",
                scene,
                "train.compute_dtype",
                torch.bfloat16,
            ),
            Case(
                "policy_dtype",
                "bfloat16",
                scene,
                lambda calls: (calls.save_model.dtype, calls.train.validation.dtype),
                (torch.bfloat16, torch.bfloat16),
            ),
            Case("checkpoint.minutes", "3", scene, "train.checkpoints.minutes", 3),
            Case("checkpoint.steps", "4", scene, "train.checkpoints.steps", 4),
            Case("checkpoint.keep", "5", scene, "train.checkpoints.keep", 5),
            Case("validation.every", "2", scene, "train.validation.every", 2),
            Case(
                "validation.early_stop",
                "3",
                scene,
                "train.validation.early_stop",
                3,
            ),
            Case(
                "validation.metric",
                "accuracy",
                scene,
                lambda calls: calls.train.validation.accuracy is not None,
                True,
            ),
            Case("select", "last", scene, "train.validation.keep", None),
        ]
    for group, scene in (("sft", of_sft), ("continual_sft", of_continual_sft)):
        cases += [
            Case(f"{group}.epochs", "7", scene, "train.settings.epochs", 7),
            Case(f"{group}.learning_rate", "0.25", scene, "train.settings.learning_rate", 0.25),
            Case(f"{group}.global_batch", "9", scene, "train.settings.global_batch", 9),
            Case(f"{group}.rows", "20", scene, lambda calls: len(calls.train.pairs), 20),
        ]
    return cases


EMBEDDING = ("judge.model=embedding", "judge.folder=one")
REWARD = ("reward.model=one",)
PIQA = ("benchmarks.tasks=[piqa]",)
ENDPOINT = ("judge.model=big", "judge.endpoint=http://one/v1")
FILES = ("data=a.jsonl",)
POLICY_TOWERS = ("guide.backbone=policy",)
CASES = [
    *cases_of_training(),
    Case("beta", "0.3", of_policy, "train.settings.beta", 0.3),
    Case("beta", "[0.3, 0.4]", of_policy, "train.settings.beta", 0.4),
    Case("learning_rate", "0.25", of_policy, "train.settings.learning_rate", 0.25),
    Case("learning_rate", "[0.25, 0.5]", of_policy, "train.settings.learning_rate", 0.5),
    Case("global_batch", "9", of_policy, "train.settings.global_batch", 9),
    Case("training.epochs", "7", of_policy, "train.settings.epochs", 7),
    Case("training.steps", "5", of_policy, "train.settings.steps", 5),
    Case("training.optimizer", "rmsprop", of_policy, "train.settings.optimizer", "rmsprop"),
    Case("loss.kind", "ipo", of_policy, "train.settings.loss", LossOptions("ipo")),
    Case("loss.nll", "0.5", of_policy, "train.settings.loss", LossOptions(nll=0.5)),
    Case(
        "loss.label_smoothing",
        "0.1",
        of_policy,
        "train.settings.loss",
        LossOptions(label_smoothing=0.1),
    ),
    Case(
        "loss.length_normalised",
        "true",
        of_policy,
        "train.settings.loss",
        LossOptions(length_normalised=True),
    ),
    Case("reference", "initial", of_policy, "train.step0_is_reference", False),
    Case("reference", "initial", of_method, "reference_stage.policy", Path("start")),
    Case("max_length", "130", of_method, "with_losers.max_length", 130),
    Case(
        "mix_previous",
        "true",
        of_method,
        lambda calls: len(calls.reference_stage.pairs),
        96,
        ("method=spin",),
    ),
    Case("guide.retrain", "true", of_method, "guide_stage.t", 1),
    Case("weights", "uniform", of_method, "distances_stage.guide", None),
    # sampling
    Case("sampling.temperature", "0.7", of_responses, "Engine.sampling.temperature", 0.7),
    Case("sampling.top_k", "11", of_responses, "Engine.sampling.top_k", 11),
    Case("sampling.top_p", "0.8", of_responses, "Engine.sampling.top_p", 0.8),
    Case("sampling.min_p", "0.05", of_responses, "Engine.sampling.min_p", 0.05),
    Case(
        "sampling.repetition_penalty",
        "1.3",
        of_responses,
        "Engine.sampling.repetition_penalty",
        1.3,
    ),
    Case("sampling.stop", "[STOP]", of_responses, "Engine.sampling.stop", ("STOP",)),
    Case("sampling.stop", "[STOP]", of_responses, "make_answers.record", "one "),
    Case("sampling.weights", "int8", of_responses, "new_decoder.weights", "int8"),
    Case("sampling.weights", "int8", of_agreement, "new_decoder.weights", "int8"),
    Case("sampling.batch_rows", "5", of_responses, "Engine.rows", 5),
    Case("sampling.cache_gib", "2", of_responses, "Engine.cache_bytes", 2 * 2**30),
    Case("sampling.draft_tokens", "4", of_responses, "Engine.draft_tokens", 4),
    Case("max_new_tokens", "9", of_responses, "Engine.sampling.max_new_tokens", 9),
    Case("seed", "5", of_responses, "Engine.seed", 5),
    Case("max_rows", "20", of_responses, lambda calls: len(calls.make_answers.requests), 20),
    Case(
        "responses", "given.jsonl", of_responses, lambda calls: hasattr(calls, "read_losers"), True
    ),
    # the guide
    Case("guide.layers", "3", of_guide, "new_guide.size.n_layer", 3),
    Case("guide.width", "64", of_guide, "new_guide.size.n_embd", 64),
    Case("guide.heads", "4", of_guide, "new_guide.size.n_head", 4),
    Case("guide.vocabulary", "300", of_guide, "new_guide.size.vocab_size", 300),
    Case("guide.readout", "queries", of_guide, "new_guide.config.readout", "queries"),
    Case("guide.latent_tokens", "3", of_guide, "new_guide.config.latent_tokens", 3),
    Case("guide.latent_width", "8", of_guide, "new_guide.config.latent_width", 8),
    Case("guide.latent_norm", "rms", of_guide, "new_guide.config.latent_norm", "rms"),
    Case("guide.injection", "both", of_guide, "new_guide.config.injection", "both"),
    Case("guide.max_tokens", "99", of_guide, "new_guide.config.max_tokens", 99),
    Case("guide.latent_map", "tuned", of_guide, "train_guide.settings.latent_map", "tuned"),
    Case("guide.contrast", "2.5", of_guide, "train_guide.settings.loss.contrast", 2.5),
    Case("guide.bag_of_words", "0.5", of_guide, "train_guide.settings.loss.bag_of_words", 0.5),
    Case("guide.token_dropout", "0.3", of_guide, "train_guide.settings.loss.token_dropout", 0.3),
    Case("guide.latent_dropout", "0.2", of_guide, "train_guide.settings.loss.latent_dropout", 0.2),
    Case("guide.latent_noise", "0.4", of_guide, "train_guide.settings.loss.latent_noise", 0.4),
    Case("guide.loss_tokens", "6", of_guide, "train_guide.settings.loss.tokens", 6),
    Case("guide.epochs", "7", of_guide, "train_guide.settings.epochs", 7),
    Case("guide.learning_rate", "0.25", of_guide, "train_guide.settings.learning_rate", 0.25),
    Case("guide.global_batch", "9", of_guide, "train_guide.settings.global_batch", 9),
    Case("guide.heldout_fraction", "0.3", of_guide, "split.fraction", 0.3),
    Case("guide.gate", "stop", of_guide, "stopped", True),
    Case(
        "guide.backbone", "policy", of_guide, lambda calls: hasattr(calls, "pretrained_guide"), True
    ),
    Case("guide.towers", "trained", of_guide, "pretrained_guide.frozen", False, POLICY_TOWERS),
    Case(
        "guide.folder",
        "some/gpt2",
        of_guide,
        "pretrained_guide.folder",
        Path("some/gpt2"),
        ("guide.backbone=auto",),
    ),
    Case(
        "seed",
        "5",
        of_guide,
        lambda calls: (calls.new_guide.seed, calls.split.seed, calls.train_guide.seed),
        (5, 5, 5),
    ),
    Case("training.micro_tokens", "999", of_guide, "train_guide.settings.micro_tokens", 999),
    Case("checkpoint.steps", "4", of_guide, "train_guide.checkpoints.steps", 4),
    Case("dtype", "bfloat16", of_guide, "train_guide.compute_dtype", torch.bfloat16),
    # distances and weights
    Case("distance", "cosine", of_distances, "distances_by.metric", "cosine"),
    Case("weights", "inverse", of_distances, "pair_weights.kind", "inverse"),
    Case("weight_clip", "1.5", of_distances, "pair_weights.clip", 1.5),
    Case("seed", "5", of_distances, "pair_weights.seed", 6),  # plus the iteration
    Case(
        "oracle_contrast", "0.4", of_distances, "oracle_distance.contrast", 0.4, ("weights=oracle",)
    ),
    Case("training.micro_tokens", "999", of_distances, "distances_by.batch_tokens", 999),
    # evaluation
    Case(
        "evaluation.temperature",
        "0.7",
        of_evaluation,
        "evaluate.settings.sampling.temperature",
        0.7,
    ),
    Case("evaluation.samples", "5", of_evaluation, "evaluate.settings.samples", 5),
    Case("evaluation.answers", "all", of_evaluation, "evaluate.settings.unchecked", "samples"),
    Case("max_new_tokens", "9", of_evaluation, "evaluate.settings.sampling.max_new_tokens", 9),
    Case("sampling.batch_rows", "5", of_evaluation, "evaluate.settings.batch_rows", 5),
    Case("training.micro_tokens", "999", of_evaluation, "evaluate.settings.micro_tokens", 999),
    Case("seed", "5", of_evaluation, "evaluate.settings.seed", 5),
    # judges and rewards
    Case("judge.model", "other", of_endpoint, "Endpoint.model", "other", ENDPOINT),
    Case("judge.endpoint", "http://two/v1", of_endpoint, "Endpoint.url", "http://two/v1", ENDPOINT),
    Case("judge.token_cap", "77", of_endpoint, "Endpoint.token_cap", 77, ENDPOINT),
    Case("judge.answer_tokens", "55", of_endpoint, "Endpoint.answer_tokens", 55, ENDPOINT),
    Case("judge.concurrency", "3", of_endpoint, "Endpoint.concurrency", 3, ENDPOINT),
    Case("judge.folder", "other", of_embedding, "find_model.name", "other", EMBEDDING),
    Case("agreement.rows", "3", of_agreement, lambda calls: len(calls.make_answers.requests), 6),
    Case("agreement.policy", "other", of_agreement, "agreement_stage.policy", Path("other")),
    Case("reward.model", "other", of_reward, "find_model.name", "other", REWARD),
    Case("reward.max_tokens", "99", of_reward, "RewardModel.max_tokens", 99, REWARD),
    Case("reward.batch_tokens", "77", of_reward, "RewardModel.batch_tokens", 77, REWARD),
    # data
    Case(
        "data",
        "[a.jsonl, b.jsonl]",
        of_data,
        "read_splits.data.entries",
        ((Path("a.jsonl"),), (Path("b.jsonl"),)),
        FILES,
    ),
    Case(
        "heldout",
        "c.jsonl",
        of_data,
        lambda calls: calls.read_splits.heldout and calls.read_splits.heldout.entries,
        ((Path("c.jsonl"),),),
        FILES,
    ),
    Case("data_shares", "[2.0]", of_data, "read_splits.plan.shares", (2.0,), FILES),
    Case("shuffle", "false", of_data, "read_splits.plan.shuffle", False, FILES),
    Case("heldout_fraction", "0.3", of_data, "read_splits.plan.heldout_fraction", 0.3, FILES),
    Case("evaluation.rows", "17", of_data, "read_splits.plan.heldout_rows", 17, FILES),
    Case("validation.rows", "9", of_data, "read_splits.plan.validation_rows", 9, FILES),
    Case("max_rows", "70", of_data, "read_splits.plan.most", 70),
    Case("sft.rows", "70", of_data, "read_splits.plan.most", 70),
    Case("continual_sft.rows", "70", of_data, "read_splits.plan.most", 70),
    Case("seed", "5", of_data, "read_splits.plan.seed", 5),
    Case("method", "dpo", of_data, "read_splits.plan.preference", True, ("iterations=1",)),
    Case("max_length", "130", of_data, "read_splits.plan.fitting.max_length", 130),
    Case("long_prompts", "error", of_data, "read_splits.plan.fitting.long_prompts", "error"),
    Case("turns", "all", of_data, "read_splits.reading.turns", "all"),
    Case("bad_rows", "skip", of_data, "read_splits.reading.bad_rows", "skip"),
    *(
        Case(
            f"columns.{name}",
            "other",
            of_data,
            lambda calls: dict(calls.read_splits.reading.columns.named),
            {name: "other"},
        )
        for name in ("prompt", "response", "system", "messages", "chosen", "rejected", "id")
    ),
    Case("ignore_columns", "[tools]", of_data, "read_splits.reading.columns.ignored", {"tools"}),
    # the model
    Case("policy", "other", of_model, "resolve_model.name", "other"),
    Case("cache", "elsewhere", of_model, "resolve_model.cache", Path("elsewhere")),
    Case("template", "TEMPLATE", of_model, "load_tokenizer.template", "{{ a }}"),
    Case("dtype", "bfloat16", of_model, "dtype", torch.bfloat16),
    # which stages there are
    Case("sft.epochs", "0", of_plan, lambda calls: "sft/policy" in calls.planned, False),
    Case(
        "continual_sft.epochs",
        "0",
        of_plan,
        lambda calls: "continual_sft/policy" in calls.planned,
        False,
    ),
    Case("iterations", "1", of_plan, lambda calls: "iteration_1/policy" in calls.planned, False),
    Case("method", "spin", of_plan, lambda calls: "guide" in calls.planned, False),
    Case("weights", "uniform", of_plan, lambda calls: "guide" in calls.planned, False),
    Case(
        "guide.retrain", "true", of_plan, lambda calls: "iteration_1/guide" in calls.planned, True
    ),
    Case(
        "sft_prompts",
        "pairs",
        of_plan,
        lambda calls: "iteration_0/responses" in calls.planned,
        True,
        ("method=sft", "iterations=1"),
    ),
    Case(
        "evaluation.rows",
        "0",
        of_plan,
        lambda calls: "iteration_0/evaluation" in calls.measured,
        False,
    ),
    Case("evaluation.iterations", "last", of_plan, "measured", [], ("select=last",)),
    Case(
        "reward.model", "one", of_plan, lambda calls: "iteration_0/reward" in calls.measured, True
    ),
    Case(
        "benchmarks.tasks",
        "[piqa]",
        of_plan,
        lambda calls: [b.name for b in calls.benchmarks],
        ["piqa"],
    ),
    Case(
        "benchmarks.data",
        "folder",
        of_plan,
        lambda calls: [b.data for b in calls.benchmarks],
        [Path("folder")],
        PIQA,
    ),
    Case(
        "benchmarks.shots",
        "3",
        of_plan,
        lambda calls: [b.shots for b in calls.benchmarks],
        [3],
        PIQA,
    ),
]

# Keys that are handed to no stage, or whose arrival another test sees.
ELSEWHERE = {
    "run": "the folder itself: tests/faults/test_faults_config.py",
    "device": "there is one kind here: tests/system/test_distributed.py",
    "timeout_minutes": "of the process group: tests/system/test_distributed.py",
    "report": "read by the command when all stages are done: tests/repo/test_scripts.py",
    "log": "opens sinks: tests/system/test_sinks.py",
    "hub.push": "read when all stages are done: tests/system/test_push.py",
    "hub.private": "the same",
    "benchmarks.limit": "needs lm-eval: tests/evaluation/test_benchmarks.py",
    "benchmarks.chat_template": "the same",
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return open_toy(tmp_path_factory.mktemp("plumbing"))


def seen(case: Case, toy: Context, folder: Path, overrides: Sequence[str]) -> Any:
    """What arrives with these keys set; nothing, where that was not called."""
    folder.mkdir()
    config = config_of(folder, "dtype=float32", *case.more, *overrides)
    dtype = context.choose_dtype(config, toy.device)
    ctx = replace(toy, config=config, dtype=dtype, run=Run(folder))
    with pytest.MonkeyPatch.context() as patch:
        caught = Caught(patch)
        case.scene(ctx, caught)
    arrives = attrgetter(case.arrives) if isinstance(case.arrives, str) else case.arrives
    try:
        return arrives(caught.calls)
    except AttributeError:
        return "nothing"


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.key}={case.value}-{case.scene.__name__}"
)
def test_a_key_arrives(case: Case, toy: Context, tmp_path: Path) -> None:
    value = case.value
    if value == "TEMPLATE":
        (tmp_path / value).write_text("{{ a }}")
        value = str(tmp_path / value)
    before = seen(case, toy, tmp_path / "before", ())
    assert before != case.expected, "it proves nothing: so it is without the key"
    assert seen(case, toy, tmp_path / "after", (f"{case.key}={value}",)) == case.expected


def test_the_guide_is_trained_on_what_is_not_held_out(toy: Context, tmp_path: Path) -> None:
    ctx = replace(toy, run=Run(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        caught = Caught(patch)
        of_guide(ctx, caught)
    given = caught.calls
    assert given.train_guide.pairs == "seen" and given.heldout_figures.pairs == "unseen"
    assert given.split.stage == given.train_guide.stage == "guide"


def test_the_keys_of_what_is_drawn(toy: Context, tmp_path: Path) -> None:
    """A sample's random numbers are those of its key: iteration, row, and which of two it is; a
    held-out answer's do not name the policy, so that all policies meet the same.
    """
    ctx, asked = replace(toy, run=Run(tmp_path)), []
    ids, heldout = [row.id for row in ctx.used[0]], [row.id for row in ctx.heldout.rows]

    def answers(given: Namespace) -> list[Any]:
        asked.append([request.key for request in given.requests])
        given.path.parent.mkdir(parents=True, exist_ok=True)
        given.path.write_text(ANSWER * len(given.requests))
        return []

    with pytest.MonkeyPatch.context() as patch:
        caught = Caught(patch)
        for module in (responses, agreement_samples, held_out):
            caught(module, "new_decoder")
            caught(module, "make_answers", result=answers)
        for module in (responses, agreement_samples, evaluation):
            caught(module, "load_model")
        logps = torch.zeros(len(heldout), 1)
        caught(held_out, "response_logps", result=logps)
        responses.responses_stage(ctx, 1, ctx.start)
        responses.responses_stage(ctx, 0, ctx.start, samples=2)
        agreement_samples.agreement_samples_stage(ctx, ctx.start)
        with pytest.raises(ValueError, match="zip"):  # there are no answers
            evaluation.evaluation_stage(ctx, "start", ctx.start)
    assert asked == [
        [f"iteration/1/{name}" for name in ids],
        [f"iteration/0/{name}/{n}" for name in ids for n in (0, 1)],
        [f"agreement/{name}/{n}" for name in heldout for n in (0, 1)],
        [f"greedy/{name}" for name in heldout],
        [f"sample/{name}/{n}" for name in heldout for n in (0, 1)],
    ]


def keys_of(cls: type, prefix: str = "") -> list[str]:
    found = []
    for one in fields(cls):
        inner = one.type if isinstance(one.type, type) else None
        nested = inner is not None and is_dataclass(inner)
        found += keys_of(inner, f"{prefix}{one.name}.") if nested else [f"{prefix}{one.name}"]
    return found


def test_every_key_has_a_case() -> None:
    """A new key needs one, or a reason in ELSEWHERE."""
    keys = keys_of(RunConfig)
    assert len(keys) > 120 and "sampling.top_k" in keys
    cases = {case.key for case in CASES}
    assert sorted(cases | ELSEWHERE.keys()) == sorted(keys) and not cases & ELSEWHERE.keys()


# ------------------------------------------------------------ what training makes of its settings


LOOP = {
    "global_batch": 2,
    "learning_rate": 0.25,
    "schedule": "cosine",
    "warmup_ratio": 0.5,
    "max_grad_norm": 0.3,
}
OPTIMIZER = {
    "optimizer": ("name", "rmsprop"),
    "learning_rate": ("learning_rate", 0.25),
    "weight_decay": ("weight_decay", 0.07),
    "state_dtype": ("state_dtype", torch.bfloat16),
}


def test_training_hands_its_settings_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each to the loop, the optimizer, the sharding or the loss; none is left over."""
    import tiny

    caught = Caught(monkeypatch)
    caught(training, "make_optimizer")
    caught(training, "optimize", result={"sums": {}, "counted": 1, "tokens": 0, "step": 0})
    caught(distributed, "shard")
    model, pairs = tiny.mistral(), tiny.pairs(6)
    given = {
        **LOOP,
        **{name: value for name, (_, value) in OPTIMIZER.items()},
        "epochs": 3,
        "micro_tokens": 99,
        "beta": 0.3,
        "loss": LossOptions("ipo"),
        "checkpointing": "full",
        "sharding": distributed.Sharding(1, "all"),
    }
    asked = training.TrainSettings(**given)
    where = {"compute_dtype": torch.float32, "device": torch.device("cpu"), "stage": "s"}
    training.train(model, pairs, asked, seed=7, **where)
    calls = caught.calls
    loop = calls.optimize.settings
    assert {name: getattr(loop, name) for name in LOOP} == LOOP
    assert (loop.rows, loop.epochs, loop.steps, loop.stop) == (6, 3, 9, 9)
    for argument, value in OPTIMIZER.values():
        assert getattr(calls.make_optimizer, argument) == value
    assert calls.make_optimizer.seed == calls.optimize.seed == 7
    assert calls.optimize.task.settings == asked and calls.shard.sharding == asked.sharding
    assert {block.checkpointing for block in model.blocks} == {"full"}
    training.train(model, pairs, replace(asked, steps=7, max_steps=5), seed=7, **where)
    loop = calls.optimize.settings
    assert (loop.epochs, loop.steps, loop.stop) == (3, 7, 5)
    assert {one.name for one in fields(asked)} == {*given, "steps", "max_steps"}
    defaults = training.TrainSettings(1, 1, 1, 1.0)
    assert all(getattr(defaults, name) != value for name, value in given.items())
