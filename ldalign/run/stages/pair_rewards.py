"""The stage iteration_t/pair_rewards: what a reward model gives both responses of every pair."""

from pathlib import Path

from ldalign.data.rows import prompt_text
from ldalign.evaluation.reward import RewardModel
from ldalign.run.context import Context, find_model
from ldalign.run.manifest import hash_model_folder
from ldalign.run.stage import Stage
from ldalign.run.stages.responses import RESPONSES
from ldalign.run.stages.reward import write_rewards
from ldalign.system.files import again, hash_file, read_jsonl, reading
from ldalign.system.metrics import Metrics
from ldalign.system.partial_rows import FOLDER as PARTS

PAIR_REWARDS_STAGE = Stage("pair_rewards")


def pair_rewards_stage(ctx: Context, t: int) -> None:
    """Scores both sides of iteration t's pairs with the reward model, into
    iteration_t/pair_rewards: what the report compares distances with.
    """
    r, (rows, _) = ctx.config.reward, ctx.used
    model = find_model(ctx.config, str(r.model))
    responses = ctx.run.path / RESPONSES.format(t)

    def make(folder: Path) -> Metrics:
        scorer = RewardModel(model, ctx.device, r.max_tokens, r.batch_tokens)
        questions, ids = [prompt_text(row) for row in rows], [row.id for row in rows]
        with reading(responses, again(responses.parent)):
            generated_texts = [str(record["response"]) for record in read_jsonl(responses)]
        sides = {
            "generated": generated_texts,
            "real": [row.response for row in rows],
        }
        generated, real = (
            scorer.score(questions, texts, ids, folder / PARTS / side).double().numpy()
            for side, texts in sides.items()
        )
        write_rewards(folder, rows, generated, real)
        return {"reward/generated": float(generated.mean()), "reward/real": float(real.mean())}

    parents = {
        "reward.model": hash_model_folder(model),
        "responses": hash_file(responses),
        "data": ctx.used_hash,
        **ctx.keys("reward.max_tokens"),
    }
    ctx.run.stage(PAIR_REWARDS_STAGE.folder(t), parents, make, resume=True)
