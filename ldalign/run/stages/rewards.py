"""POLICY/reward, iteration_t/pair_rewards: a reward model's scores."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldalign.data.rows import Row, prompt_text
from ldalign.evaluation.reward import RewardModel, summary
from ldalign.run.context import Context, find_model
from ldalign.run.manifest import hash_model_folder
from ldalign.run.stages.responses import RESPONSES
from ldalign.system import distributed
from ldalign.system.files import hash_file, read_jsonl, write_jsonl
from ldalign.system.metrics import Metrics, say
from ldalign.system.partial_rows import FOLDER as PARTS


def reward_stage(ctx: Context, name: str, first: str) -> Metrics:
    """Rewards of the greedy answers in NAME/evaluation and of the real responses, in
    NAME/reward/rewards.jsonl.

    The real responses are scored once, with the policy called `first`; the others are also compared
    with it.
    """
    r = ctx.config.reward
    model = find_model(ctx.config, str(r.model))
    answers = ctx.run.path / name / "evaluation/answers.jsonl"
    before = ctx.run.path / first / "reward/rewards.jsonl" if first != name else None

    def make(folder: Path) -> Metrics:
        scorer = RewardModel(model, ctx.device, r.max_tokens, r.batch_tokens)
        questions = [prompt_text(row) for row in ctx.heldout.rows]
        ids = [row.id for row in ctx.heldout.rows]
        answered = [record["greedy"] for record in read_jsonl(answers)]
        generated = (
            scorer.score(questions, answered, ids, folder / PARTS / "generated").double().numpy()
        )
        old = read_jsonl(before) if before else []
        if before:
            real = np.array([record["real"] for record in old])
        else:
            responses = [row.response for row in ctx.heldout.rows]
            real = scorer.score(questions, responses, ids, folder / PARTS / "real").double().numpy()
        _write_rewards(folder, ctx.heldout.rows, generated, real)
        return summary(
            generated, real, np.array([record["generated"] for record in old]) if old else None
        )

    parents = {
        "reward.model": hash_model_folder(model),
        "answers": hash_file(answers),
        "data": ctx.heldout_hash,
        **ctx.keys("reward.max_tokens"),
        **({f"rewards of {first}": hash_file(before)} if before else {}),
    }
    metrics = ctx.run.stage(f"{name}/reward", parents, make, resume=True)
    say(
        f"{name}/reward: mean {metrics['reward/mean']:.3f}, real responses "
        f"{metrics['reward/real']:.3f}, better than these on {metrics['reward/win_rate']:.1%}"
    )
    return metrics


def pair_rewards_stage(ctx: Context, t: int) -> None:
    """Rewards of both sides of iteration t's pairs, in iteration_t/pair_rewards: what distances are
    compared with.
    """
    r, (rows, _) = ctx.config.reward, ctx.used
    model = find_model(ctx.config, str(r.model))
    responses = ctx.run.path / RESPONSES.format(t)

    def make(folder: Path) -> Metrics:
        scorer = RewardModel(model, ctx.device, r.max_tokens, r.batch_tokens)
        questions, ids = [prompt_text(row) for row in rows], [row.id for row in rows]
        sides = {
            "generated": [record["response"] for record in read_jsonl(responses)],
            "real": [row.response for row in rows],
        }
        generated, real = (
            scorer.score(questions, texts, ids, folder / PARTS / side).double().numpy()
            for side, texts in sides.items()
        )
        _write_rewards(folder, rows, generated, real)
        return {"reward/generated": float(generated.mean()), "reward/real": float(real.mean())}

    parents = {
        "reward.model": hash_model_folder(model),
        "responses": hash_file(responses),
        "data": ctx.used_hash,
        **ctx.keys("reward.max_tokens"),
    }
    ctx.run.stage(f"iteration_{t}/pair_rewards", parents, make, resume=True)


def _write_rewards(
    folder: Path, rows: Sequence[Row], generated: np.ndarray, real: np.ndarray
) -> None:
    """rewards.jsonl, a line a row."""
    if distributed.rank() == 0:
        columns = zip(rows, generated.tolist(), real.tolist(), strict=True)
        write_jsonl(
            folder / "rewards.jsonl",
            ({"id": row.id, "generated": g, "real": y} for row, g, y in columns),
        )
