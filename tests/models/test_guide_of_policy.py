"""A guide whose towers are the policy's own network: distances, folder, training, whole runs."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROOT, run_script
from safetensors.torch import load_file
from torch import Tensor

from ldalign.models.gpt2 import GPT2Config
from ldalign.models.guide import Guide, GuideConfig
from ldalign.models.guide_folder import load_guide, new_guide, policy_guide, save_guide
from ldalign.models.toy import write_toy_model
from ldalign.models.weights import load_model
from ldalign.run import context, dry_run
from ldalign.run.folder import RunFolder, stage_names
from ldalign.run.manifest import hash_model_folder
from ldalign.run.settings import RunConfig
from ldalign.system import distributed
from ldalign.system.config import load_config, to_yaml
from ldalign.system.errors import InputError
from ldalign.system.files import read_jsonl
from ldalign.train import align
from ldalign.training.guide import GuideTrainSettings, heldout_losses, train_guide

CPU = torch.device("cpu")
CONFIG = GuideConfig(latent_tokens=2, latent_width=12, max_tokens=60)
PROMPTS = ["Add 2 and 3.", "Write the words in reverse order: cat, dog.", "Add 2 and 3."]
REAL = ["The sum is 5.", "dog, cat", "No idea, sorry!"]
GENERATED = ["It is 6.", "cat, dog, and that is all there is to say", "The sum is 5."]
CONFIG_FILE = ROOT / "configs/toy.yaml"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention window and kinds of heads as the toy's, with a window that acts on these texts."""
    return write_toy_model(tmp_path_factory.mktemp("policy") / "model", seed=3, sliding_window=7)


@pytest.fixture(scope="module")
def guide(policy: Path) -> Guide:
    return policy_guide(CONFIG, 0, policy).eval()


# ---------------------------------------------------------------------------------------- distances


def plain_latent(folder: Path, ids: Sequence[int]) -> Tensor:
    """E of one example by the plainest means, float64, from the files of the guide's folder."""
    c = json.loads((folder / "encoder/config.json").read_text())
    w = {name: p.double() for name, p in load_file(folder / "encoder/model.safetensors").items()}
    own = {name: p.double() for name, p in load_file(folder / "latent.safetensors").items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return (
            x / (x.square().mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * w[f"{name}.weight"]
        )

    x = torch.cat([w["model.embed_tokens.weight"][torch.tensor(ids)], own["queries"]])
    n, width = len(x), c["head_dim"]
    gap = torch.arange(n)[:, None] - torch.arange(n)
    seen = (gap >= 0) & (gap < c["sliding_window"])
    steps = torch.arange(0, width, 2, dtype=torch.float64) / width
    angles = torch.cat(
        [torch.arange(n, dtype=torch.float64)[:, None] / c["rope_theta"] ** steps] * 2, dim=1
    )

    def turned(x: Tensor) -> Tensor:  # (heads, n, width)
        a, b = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()

    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        h = norm(x, f"{at}.input_layernorm")
        q, k, v = (
            (h @ w[f"{at}.self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, width)).transpose(0, 1)
            for p in "qkv"
        )
        groups = c["num_attention_heads"] // c["num_key_value_heads"]
        k, v = (t.repeat_interleave(groups, 0) for t in (turned(k), v))
        scores = (turned(q) @ k.transpose(1, 2) / width**0.5).masked_fill(~seen, -torch.inf)
        x = (
            x
            + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
            @ w[f"{at}.self_attn.o_proj.weight"].T
        )
        h = norm(x, f"{at}.post_attention_layernorm")
        gate, up = (h @ w[f"{at}.mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ w[f"{at}.mlp.down_proj.weight"].T
    z = (
        norm(x, "model.norm")[-len(own["queries"]) :] @ own["to_latent.weight"].T
        + own["to_latent.bias"]
    )
    return z.flatten()


def test_distances_are_those_of_a_plain_loop(guide: Guide, tmp_path: Path) -> None:
    """Packed, with shared prompts, in float32: as one example at a time in float64. And the same
    after loading.
    """
    save_guide(guide, tmp_path)
    latents = []
    for prompt, *responses in zip(PROMPTS, REAL, GENERATED, strict=True):
        chosen = [guide.example(prompt, response) for response in responses]
        latents.append([plain_latent(tmp_path, [*e.prompt, *e.response]) for e in chosen])
    d = guide.distance(PROMPTS, REAL, GENERATED)
    expected = torch.stack([(a - b).norm() for a, b in latents])
    assert bool((expected > 1e-2).all()) and expected.std() > 1e-2
    torch.testing.assert_close(d.double(), expected, rtol=1e-4, atol=0.0)
    cosine = guide.distance(PROMPTS, REAL, GENERATED, metric="cosine")
    expected = torch.stack([1 - torch.cosine_similarity(a, b, dim=0) for a, b in latents])
    torch.testing.assert_close(cosine.double(), expected, rtol=1e-4, atol=0.0)
    assert torch.equal(load_guide(tmp_path).distance(PROMPTS, REAL, GENERATED), d)


def test_it_starts_from_the_policy(guide: Guide, policy: Path, tmp_path: Path) -> None:
    """Both towers, its tokenizer, its end token; and the tower folders are model folders."""
    start = load_model(policy, torch.float32).state_dict()
    save_guide(guide, tmp_path)
    for tower, part in ((guide.encoder, "encoder"), (guide.decoder, "decoder")):
        assert all(torch.equal(p, start[name]) for name, p in tower.state_dict().items())
        saved = load_model(tmp_path / part, torch.float32).state_dict()
        assert saved.keys() == start.keys() and all(
            torch.equal(p, start[name]) for name, p in saved.items()
        )
    assert json.loads((tmp_path / "guide.json").read_text())["end_token"] == "<|im_end|>"
    response = load_guide(tmp_path).example("x", "a<|im_end|>b").response
    assert response[-1] == 2 and response.count(2) == 1 and len(response) > 4


def test_refusals(policy: Path, toy_cache: Path, tmp_path: Path) -> None:
    gpt2 = new_guide(CONFIG, 0, None, PROMPTS, GPT2Config(300, 64, 16, 1, 2))
    save_guide(gpt2, tmp_path)
    with pytest.raises(InputError, match=r"guide.max_tokens=511: the policy has room for 510"):
        policy_guide(replace(CONFIG, max_tokens=511), 0, policy)
    with pytest.raises(InputError, match="needs a mistral or llama folder"):
        policy_guide(CONFIG, 0, tmp_path / "encoder")
    for folder, more, message in (
        (policy, "guide.backbone=policy", "is no trained guide, and guide.backbone=policy"),
        (tmp_path, "guide.retrain=true", "is a trained guide, used as it is; guide.retrain=true"),
    ):
        with pytest.raises(InputError, match=message):
            open_toy(toy_cache, f"guide={folder}", more)


# ----------------------------------------------------------------------------------------- training


def test_training_lowers_the_loss(policy: Path, in_process: None) -> None:
    distributed.start("cpu")
    guide = policy_guide(CONFIG, 0, policy)
    texts = [("Say a number.", f"It is {i}.", f"No, {i + 3}!") for i in range(40)]
    rows = [(guide.example(x, y), guide.example(x, z)) for x, y, z in texts]
    with torch.no_grad():
        before = heldout_losses(guide, rows, 4000, CPU)
    settings = GuideTrainSettings(epochs=4, global_batch=8, learning_rate=3e-3, micro_tokens=300)
    train_guide(guide, rows, settings, device=CPU, seed=0)
    after = heldout_losses(guide, rows, 4000, CPU)
    assert after["true"] < before["true"] - 1


def test_gradient_reaches_every_part(policy: Path) -> None:
    guide = policy_guide(CONFIG, 0, policy)
    examples = [guide.example(x, y) for x, y in zip(PROMPTS, REAL, strict=True)]
    # a hidden token is a row of zeros
    hidden = torch.arange(sum(len(e.response) for e in examples)) % 2 == 0
    guide.loss(examples, torch.ones(3, dtype=torch.bool), hidden, -1.0).backward()
    for name, p in guide.named_parameters():
        if name != "encoder.lm_head.weight":  # the encoder predicts nothing
            assert (
                p.grad is not None
                and bool(p.grad.isfinite().all())
                and float(p.grad.abs().max()) > 1e-9
            ), name


# --------------------------------------------------------------------------------------- whole runs


def open_toy(cache: Path, *overrides: str) -> context.Context:
    config = load_config(
        RunConfig, CONFIG_FILE, [f"cache={cache}", f"run={cache / 'run'}", *overrides]
    )
    return context.open_context(RunFolder(Path(config.run), to_yaml(config)), config)


SMALL = (
    "guide.backbone=policy",
    "guide.retrain=true",
    "guide.global_batch=8",
    "distance=cosine",
    "max_rows=24",
    "max_new_tokens=8",
    "global_batch=8",
    "sft.epochs=0",
    "continual_sft.epochs=0",
    "evaluation.rows=0",
)


def parents(run: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / stage / "manifest.json").read_text())["parents"]
    return found


def test_a_run_that_retrains_a_guide_of_the_policys_kind(
    tmp_path: Path, toy_cache: Path, in_process: None
) -> None:
    """On two ranks and on one, with the same distances; every iteration has its own guide, each
    from the start.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    plan = ["--config", str(CONFIG_FILE), f"cache={toy_cache}", *SMALL]
    done = run_script(ROOT / "train/align.py", *plan, f"run={two}", "--debug", ranks=2)
    assert done.returncode == 0, done.stderr
    align.main([*plan, f"run={one}"])
    for run in (one, two):
        assert stage_names(run) == [
            "data",
            "iteration_0/responses",
            "guide",
            "iteration_0/distances",
            "iteration_0/reference",
            "iteration_0/policy",
            "iteration_1/responses",
            "iteration_1/guide",
            "iteration_1/distances",
            "iteration_1/reference",
            "iteration_1/policy",
        ]
    for t in (0, 1):
        distances = [
            [r["distance"] for r in read_jsonl(run / f"iteration_{t}/distances/distances.jsonl")]
            for run in (one, two)
        ]
        assert max(distances[0]) > 0 and (
            t or distances[1] == pytest.approx(distances[0], rel=5e-2, abs=1e-6)
        )
    start = hash_model_folder(toy_cache / "toy-1")
    for name in ("guide", "iteration_1/guide"):
        made = parents(one, name)
        assert (
            made["policy"] == start
            and made["guide.backbone"] == "policy"
            and "guide.latent_width" in made
        )
        assert (
            not {"pretrained", "guide.width", "guide.vocabulary", "guide.retrain", "guide.folder"}
            & made.keys()
        )
        assert (
            json.loads((one / name / "encoder/config.json").read_text())["model_type"] == "mistral"
        )
    assert parents(one, "guide")["responses"] != parents(one, "iteration_1/guide")["responses"]
    assert (
        parents(one, "iteration_0/distances")["guide"]
        != parents(one, "iteration_1/distances")["guide"]
    )
    assert "latent gain of its own guide" in (one / "report/table.md").read_text()
    with pytest.raises(InputError, match=r"distance was 'cosine', now 'euclidean'"):
        align.main([*plan, f"run={one}", "distance=euclidean"])


def test_plan_and_dry_run_count_it(toy_cache: Path) -> None:
    ctx = open_toy(toy_cache, "guide.backbone=policy", "guide.retrain=true")
    planned = align.planned(ctx.config)
    assert [name for name in planned if name.endswith("guide")] == ["guide", "iteration_1/guide"]
    assert planned.index("iteration_1/guide") == planned.index("iteration_1/distances") - 1
    text = dry_run.dry_run(ctx, planned)
    assert (
        "guide memory:" in text
        and ("iteration_1/guide: 2 optimizer steps") in text
        and "min without loading" in text
    )
    small = open_toy(toy_cache)
    assert "guide memory:" not in dry_run.dry_run(small, align.planned(small.config))
