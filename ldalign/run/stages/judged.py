"""The stage iteration_t/judged: which of two samples a judge prefers."""

import math
from pathlib import Path
from typing import cast

from ldalign.data.tokenizer import load_tokenizer, template_date
from ldalign.evaluation.embedding import (
    FOLDER_KEY,
    EmbeddingModel,
    check_embedding_model,
    naming_the_key,
)
from ldalign.evaluation.endpoint import Endpoint
from ldalign.evaluation.judges import (
    CHECKER,
    EMBEDDING,
    POLICY,
    Checker,
    EmbeddingJudge,
    EndpointJudge,
    Judge,
    ModelJudge,
)
from ldalign.evaluation.transformers_folder import need_transformers
from ldalign.models.mistral import Mistral
from ldalign.models.stored_tensors import read_config
from ldalign.models.weights import check_model, load_model
from ldalign.run.context import Context, file_hash, find_model
from ldalign.run.manifest import Parents, hash_model_folder
from ldalign.run.settings import RunConfig
from ldalign.run.stage import Cost, Stage
from ldalign.run.stages.responses import RESPONSES, Responses, response_texts
from ldalign.system import distributed
from ldalign.system.errors import InputError
from ldalign.system.files import again, read_jsonl, reading, write_jsonl
from ldalign.system.metrics import Metrics
from ldalign.system.partial_rows import FOLDER as PARTS

JUDGED = "judged.jsonl"  # in the stage folder
ANSWERS = "judge.jsonl"  # in the run folder: what an endpoint has answered


def _cost(ctx: Context, name: str) -> Cost:
    # Both orders of both answers.
    return Cost(scored=2 * ctx.used_tokens)


JUDGED_STAGE = Stage("judged", _cost)


def open_judge(ctx: Context, policy: Path, model: str | None = None) -> Judge:
    """The judge that the keys judge.* name; "policy" is the model folder
    `policy`. All ranks call it.

    model: POLICY or CHECKER, whatever the keys say. Raises InputError where it is no judge.
    """
    j = ctx.config.judge
    if model is None and j.endpoint is not None:
        url = j.endpoint
        return EndpointJudge(
            lambda: Endpoint(
                url,
                j.model,
                ctx.run.path / ANSWERS,
                token_cap=j.token_cap,
                concurrency=j.concurrency,
                answer_tokens=j.answer_tokens,
            )
        )
    if (model or j.model) == CHECKER:
        return Checker()
    if (model or j.model) == EMBEDDING:
        return EmbeddingJudge(EmbeddingModel(embedding_folder(ctx.config), ctx.device))
    folder = _folder(ctx, policy, model or j.model)
    loaded = cast(Mistral, load_model(folder, ctx.dtype, ctx.device))
    template = ctx.template if (model or j.model) == POLICY else None
    return ModelJudge(
        loaded,
        load_tokenizer(folder, template, ctx.run.began),
        ctx.config.training.micro_tokens,
        ctx.device,
    )


def check_judge(config: RunConfig) -> None:
    """Checks what can be wrong with the judge before anything is sampled. All ranks call it.

    Raises InputError where it is no judge, EnvironmentProblem for a missing package.
    """
    own = config.method == "self_reward" or config.judge.model in (CHECKER, POLICY)
    if own or config.judge.endpoint is not None:
        return
    if config.judge.model == EMBEDDING:
        check_embedding(config)
        return
    folder = find_model(config, config.judge.model)
    _check_kind(folder)
    check_model(folder)
    load_tokenizer(folder)


def check_embedding(config: RunConfig) -> None:
    """Checks the sentence-embedding model judge.folder. All ranks call it.

    Raises InputError where it is none, EnvironmentProblem without transformers.
    """
    need_transformers(FOLDER_KEY)
    check_embedding_model(embedding_folder(config))


def judge_parents(ctx: Context, policy: Path, model: str | None = None) -> Parents:
    """What a judge's verdicts depend on, for a stage's manifest; the arguments
    are those of `open_judge`.
    """
    j = ctx.config.judge
    if model is None and j.endpoint is not None:
        return ctx.keys("judge.model", "judge.endpoint", "judge.answer_tokens")
    if (model or j.model) == CHECKER:
        return {"judge.model": CHECKER}
    if (model or j.model) == EMBEDDING:
        found = hash_model_folder(embedding_folder(ctx.config))
        return {"judge.model": EMBEDDING, "judge.folder": found}
    folder = _folder(ctx, policy, model or j.model)
    if (model or j.model) == POLICY and ctx.template is not None:
        dated = ctx.tokenizer.template_parents
    else:
        dated = template_date(folder, ctx.run.began)
    return {"judge.model": hash_model_folder(folder), "dtype": str(ctx.dtype), **dated}


def embedding_folder(config: RunConfig) -> Path:
    """The folder of the sentence-embedding model that judge.folder stands for, fetched by rank 0
    where it is not there yet. All ranks call it.

    Raises InputError where there is none.
    """
    with naming_the_key():
        return find_model(config, str(config.judge.folder))


def _folder(ctx: Context, policy: Path, model: str) -> Path:
    if model == POLICY:
        return policy
    folder = find_model(ctx.config, model)
    _check_kind(folder)
    return folder


def _check_kind(folder: Path) -> None:
    kind = read_config(folder).get("model_type")
    if kind not in ("mistral", "llama"):
        raise InputError(
            f"{folder}: model_type {kind!r} cannot judge; give a mistral or llama folder "
            "(judge.model=PATH)"
        )


def judged_stage(
    ctx: Context, t: int, policy: Path, responses: Responses, judge: str | None
) -> list[float]:
    """Has both responses to every prompt judged; returns how surely the first is the better one, in
    [0, 1], nan where the judge gave no verdict.

    responses: two a row of `ctx.used`, one after the other. judge: the argument
    `model` of `open_judge`.
    """
    name, (rows, _) = JUDGED_STAGE.folder(t), ctx.used

    def make(folder: Path) -> Metrics:
        texts = response_texts(ctx, responses)
        preferences = open_judge(ctx, policy, judge).prefer(
            rows, texts[0::2], texts[1::2], folder / PARTS / "judge"
        )
        if distributed.rank() == 0:
            columns = zip(rows, preferences, strict=True)
            write_jsonl(
                folder / JUDGED,
                ({"id": r.id, "preference": None if math.isnan(p) else p} for r, p in columns),
            )
        sure = [abs(2 * p - 1) for p in preferences if not math.isnan(p)]
        return {
            "judged/ties": sum(s == 0 for s in sure) / len(rows),
            "judged/none": 1 - len(sure) / len(rows),
            "judged/sureness": sum(sure) / max(1, len(sure)),
        }

    parents: Parents = {
        "responses": file_hash(ctx, RESPONSES.format(t)),
        "data": ctx.used_hash,
        **judge_parents(ctx, policy, judge),
    }
    ctx.run.stage(name, parents, make, resume=True)
    path = ctx.run.path / name / JUDGED
    with reading(path, again(path.parent)):
        given = [r["preference"] for r in read_jsonl(path)]
        if len(given) != len(rows):
            raise ValueError(f"{len(given)} verdicts on {len(rows)} rows")
        return [math.nan if p is None else float(p) for p in given]
