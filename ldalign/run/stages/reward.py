"""The stage POLICY/reward: what a reward model gives the greedy answers to held-out prompts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldalign.data.rows import Row, prompt_text
from ldalign.evaluation.reward import RewardModel, summary
from ldalign.run.context import Context, find_model
from ldalign.run.manifest import hash_model_folder
from ldalign.run.stage import Stage
from ldalign.run.stages.evaluation import answers_file
from ldalign.system import distributed
from ldalign.system.files import again, hash_file, read_jsonl, reading, write_jsonl
from ldalign.system.metrics import Metrics, say
from ldalign.system.partial_rows import FOLDER as PARTS

REWARD_STAGE = Stage("reward")
REWARDS = "rewards.jsonl"


def reward_stage(ctx: Context, name: str, first: str) -> Metrics:
    """Scores the greedy answers in NAME/evaluation and the real responses with the reward model,
    into NAME/reward/rewards.jsonl; returns the figures.

    The real responses are scored once, with the policy called `first`; the others
    are also compared with it.
    """
    r, stage = ctx.config.reward, REWARD_STAGE.folder(name)
    model = find_model(ctx.config, str(r.model))
    answers = answers_file(ctx.run.path / name)
    before = ctx.run.path / REWARD_STAGE.folder(first) / REWARDS if first != name else None

    def make(folder: Path) -> Metrics:
        scorer = RewardModel(model, ctx.device, r.max_tokens, r.batch_tokens)
        questions = [prompt_text(row) for row in ctx.heldout.rows]
        ids = [row.id for row in ctx.heldout.rows]
        with reading(answers, again(answers.parent)):
            answered = [str(record["greedy"]) for record in read_jsonl(answers)]
        generated = (
            scorer.score(questions, answered, ids, folder / PARTS / "generated").double().numpy()
        )
        old = read_jsonl(before) if before else []
        if before:
            real = np.array([record["real"] for record in old])
        else:
            responses = [row.response for row in ctx.heldout.rows]
            real = scorer.score(questions, responses, ids, folder / PARTS / "real").double().numpy()
        write_rewards(folder, ctx.heldout.rows, generated, real)
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
    metrics = ctx.run.stage(stage, parents, make, resume=True)
    say(
        f"{stage}: mean {metrics['reward/mean']:.3f}, real responses "
        f"{metrics['reward/real']:.3f}, better than these on {metrics['reward/win_rate']:.1%}"
    )
    return metrics


def write_rewards(
    folder: Path, rows: Sequence[Row], generated: np.ndarray, real: np.ndarray
) -> None:
    """Writes rewards.jsonl into a stage's folder, a line a row. Rank 0 does it.

    generated, real: (N,), the rewards of both responses in the order of the rows.
    """
    if distributed.rank() == 0:
        columns = zip(rows, generated.tolist(), real.tolist(), strict=True)
        write_jsonl(
            folder / REWARDS,
            ({"id": row.id, "generated": g, "real": y} for row, g, y in columns),
        )
