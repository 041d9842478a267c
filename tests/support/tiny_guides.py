"""Tiny guides of every kind for the tests, made on the spot: new ones, and ones of a policy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ldalign.data.pairs import Pair
from ldalign.models.gpt2 import GPT2Config
from ldalign.models.guide import Guide, GuideConfig, GuideLoss, Reading
from ldalign.models.guide_folder import new_guide, pretrained_guide
from ldalign.system.seeds import normals
from ldalign.training.guide import GuideTrainSettings

TEXTS = [
    "Add 2 and 3.",
    "The sum is 5.",
    "Write the words in reverse order: cat, dog.",
    "dog, cat",
    "No idea, sorry!",
]
SIZE = GPT2Config(300, 80, 32, 2, 4)
SMALL: dict[str, Any] = {"latent_tokens": 2, "latent_width": 12, "max_tokens": 60}
CPU = torch.device("cpu")


def config_of(**changes: Any) -> GuideConfig:
    return GuideConfig(**(SMALL | changes))


def text_guide(seed: int = 0, texts: Sequence[str] = TEXTS, **changes: Any) -> Guide:
    """A guide that reads text: two new GPT-2, trained together with the latent."""
    return new_guide(config_of(**changes), seed, texts, SIZE)


def policy_guide(folder: Path, frozen: bool = True, seed: int = 0, **changes: Any) -> Guide:
    """A guide of the policy in `folder`, in float32."""
    return pretrained_guide(config_of(**changes), seed, folder, frozen, torch.float32)


def stir(guide: Guide, scale: float = 0.3) -> Guide:
    """Moves every weight of the latent part, some of which begin at zero; returns the guide."""
    with torch.no_grad():
        for name, p in guide.latent.named_parameters():
            p.add_(scale * normals(9, name, *p.shape))
    return guide.eval()


def pairs(guide: Guide, count: int = 5) -> list[Pair]:
    """Pairs of uneven lengths; the responses of each differ."""
    return [
        guide.pair(f"row-{i}", TEXTS[i % 5], TEXTS[(i + 1) % 5] + "!" * i, TEXTS[(i + 3) % 5])
        for i in range(count)
    ]


def own(count: int) -> list[Reading]:
    """The readings of the responses of `count` pairs, each with its own latent."""
    return [Reading(i, i) for i in range(2 * count)]


def settings_of(**changes: Any) -> GuideTrainSettings:
    """The settings of a short training; keys of GuideLoss are among the changes."""
    loss = {k: changes.pop(k) for k in list(changes) if k in GuideLoss.__dataclass_fields__}
    plan: dict[str, Any] = {
        "epochs": 1,
        "global_batch": 4,
        "learning_rate": 1e-3,
        "micro_tokens": 100_000,
    }
    return GuideTrainSettings(**(plan | changes), loss=GuideLoss(**loss))
