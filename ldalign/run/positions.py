"""How many tokens a policy reads, held against the rows and prompts it gets.

Beyond `max_position_embeddings` a network still computes: at positions it was never trained on,
where its text falls apart without a word.
"""

from pathlib import Path

from ldalign.models.weights import context_length
from ldalign.system.errors import InputError
from ldalign.system.metrics import say


def reads(folder: Path, positions: int) -> str:
    """The bound in words, for messages."""
    return f"the policy reads {positions} (max_position_embeddings in {folder}/config.json)"


def for_longer_rows(folder: Path, max_length: int) -> str:
    """What helps where max_length cuts responses: no other, where the policy in `folder` reads no
    more.
    """
    positions = context_length(folder)
    if max_length < positions:
        return "raise max_length, or give 0 (from the data)"
    return f"{reads(folder, positions)}: shorten the rows"


def check_rows(folder: Path, max_length: int, longest: int) -> None:
    """Raises InputError where the longest row, cut to max_length, is longer than the policy in
    `folder` reads.
    """
    positions = context_length(folder)
    if longest > positions:
        raise InputError(
            f"max_length={max_length}: the longest row has {longest} tokens, and "
            f"{reads(folder, positions)}; give max_length={positions} or less"
        )


def warn_of_answers(folder: Path, longest_prompt: int, max_new_tokens: int) -> None:
    """Warns where an answer may be sampled beyond what the policy in `folder` reads."""
    positions = context_length(folder)
    if longest_prompt + max_new_tokens > positions:
        say(
            f"policy: WARNING: the longest prompt has {longest_prompt} tokens, with "
            f"max_new_tokens={max_new_tokens} up to {longest_prompt + max_new_tokens}, and "
            f"{reads(folder, positions)}; lower max_new_tokens, or drop long prompts"
        )
