"""LD-Align, the whole method (arXiv 2404.06390): `torchrun train/align.py [--config FILE.yaml] [key=value ...]`.

Stage by stage: SFT warm-up (optional), then for every iteration: sample, guide (once), distances, reference, align,
evaluate; at the end the report. Every stage leaves its files with a manifest in the run folder; running the same
command again goes on after the last finished stage.
"""

import torch

from ldalign import errors
from ldalign.command import run_stages
from ldalign.context import Context
from ldalign.settings import RunConfig
from ldalign.stages import (
    distances_stage,
    evaluation_stage,
    guide_stage,
    policy_stage,
    reference_stage,
    responses_stage,
    sft_stage,
    start_name,
    start_stage,
)


def main(argv: list[str]) -> None:
    """Reads the settings and runs all stages that are not done."""
    run_stages(argv, __doc__ or "", align, planned)


def align(ctx: Context) -> str:
    """The method: from the start policy to the last iteration's, and the baseline beside it."""
    config = ctx.config
    start = start_stage(ctx)
    evaluation_stage(ctx, start_name(config), start)

    policy, guide = start, None
    for t in range(config.iterations):
        responses = responses_stage(ctx, t, policy)
        weights = torch.ones(len(responses))
        if config.method == "ld_align":
            guide = guide or guide_stage(ctx)
            weights = distances_stage(ctx, t, guide, responses)
        pairs = reference_stage(ctx, t, policy if config.reference == "iteration" else start, responses)
        policy = policy_stage(ctx, t, policy, pairs, weights)
        evaluation_stage(ctx, f"iteration_{t}", policy)

    if config.continual_sft.epochs:
        baseline = sft_stage(ctx, "continual_sft", start)
        evaluation_stage(ctx, "continual_sft", baseline)
    return f"The aligned policy: {policy}" if config.iterations else f"The policy: {policy}"


def planned(config: RunConfig) -> list[str]:
    """The stages of the whole run, by name."""
    names = ["sft/policy"] if config.sft.epochs else []
    names.append(f"{start_name(config)}/evaluation")
    steps = ["responses", *(["distances"] if config.method == "ld_align" else []), "reference", "policy", "evaluation"]
    names += [f"iteration_{t}/{step}" for t in range(config.iterations) for step in steps]
    if config.iterations and config.method == "ld_align":
        names.insert(names.index("iteration_0/distances"), "guide")
    if config.continual_sft.epochs:
        names += ["continual_sft/policy", "continual_sft/evaluation"]
    return names


if __name__ == "__main__":
    errors.run(main)
