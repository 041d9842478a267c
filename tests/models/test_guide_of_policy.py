"""A guide whose towers are the policy's own network: distances, log-probs, folder, whole runs."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROOT, run_script
from safetensors.torch import load_file
from tiny_guides import config_of, own, policy_guide, stir, text_guide
from torch import Tensor
from toy_context import open_toy

from ldalign.data.pairs import Pair
from ldalign.data.rows import Message
from ldalign.data.tokenizer import load_tokenizer
from ldalign.models.guide import NO_LATENT, WAY_OUT, Guide, Reading
from ldalign.models.guide_folder import (
    identity_latent,
    load_guide,
    pooled_guide,
    pretrained_guide,
    save_guide,
)
from ldalign.models.toy import write_toy_model
from ldalign.models.weights import load_model
from ldalign.objective import Metric
from ldalign.run import dry_run
from ldalign.run.folder import stage_names
from ldalign.run.manifest import hash_model_folder
from ldalign.system.errors import InputError
from ldalign.system.files import read_jsonl
from ldalign.train import align

PROMPTS = ["Add 2 and 3.", "Write the words in reverse order: cat, dog.", "Add 2 and 3."]
REAL = ["The sum is 5.", "dog, cat", "No idea, sorry!"]
GENERATED = ["It is 6.", "cat, dog, and that is all there is to say", "The sum is 5."]
TEXTS = PROMPTS, REAL, GENERATED
CONFIG_FILE = ROOT / "configs/toy.yaml"
KINDS: list[tuple[bool, dict[str, Any]]] = [
    (True, {}),
    (True, {"readout": "queries", "injection": "both"}),
    (True, {"injection": "prefix", "latent_tokens": 3, "latent_norm": "rms"}),
    (False, {}),
    (False, {"readout": "queries", "injection": "prefix", "latent_tokens": 3}),
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention window and kinds of heads as the toy's, with a window that acts on these texts."""
    return write_toy_model(tmp_path_factory.mktemp("policy") / "model", seed=3, sliding_window=7)


def made(policy: Path, frozen: bool, kind: dict[str, Any]) -> Guide:
    """A guide whose latent part does not begin at zeros."""
    return stir(policy_guide(policy, frozen, **kind))


def pairs(guide: Guide) -> list[Pair]:
    return [guide.pair(str(i), *texts) for i, texts in enumerate(zip(*TEXTS, strict=True))]


# ------------------------------------------------------------------------- against plain arithmetic


def states(folder: Path, embedded: Tensor) -> Tensor:
    """The last states (n, D) float64 of one sequence of embeddings under the model in a folder, by
    the plainest means, from its files.
    """
    c = json.loads((folder / "config.json").read_text())
    w = weights(folder)

    def norm(x: Tensor, name: str) -> Tensor:
        return (
            x / (x.square().mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * w[f"{name}.weight"]
        )

    x = embedded
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
    return norm(x, "model.norm")


def weights(folder: Path, name: str = "model") -> dict[str, Tensor]:
    return {key: p.double() for key, p in load_file(folder / f"{name}.safetensors").items()}


class Plain:
    """A saved guide by the plainest means: one response at a time, no packing, dense logits."""

    def __init__(self, folder: Path) -> None:
        self.latent = weights(folder, "latent")
        self.config = json.loads((folder / "guide.json").read_text())
        self.towers = [folder / "encoder", folder / "decoder"]
        if self.config["shared"]:
            self.towers[1] = self.towers[0]

    def embedded(self, tower: int, ids: Sequence[int]) -> Tensor:
        return weights(self.towers[tower])["model.embed_tokens.weight"][torch.tensor(ids)]

    def z(self, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
        """E of one response, (Z,)."""
        w, m = self.latent, self.config["latent_tokens"]
        x = self.embedded(0, [*prompt, *response])
        if self.config["readout"] == "queries":
            x = torch.cat([x, w["queries"]])
            z = states(self.towers[0], x)[-m:] @ w["to_latent.weight"].T + w["to_latent.bias"]
            z = z.flatten()
        else:
            read = [states(self.towers[0], x)[len(prompt) + t] for t in range(len(response))]
            z = w["to_latent.weight"] @ (sum(read[1:], read[0]) / len(read)) + w["to_latent.bias"]
        if self.config["latent_norm"] == "rms":
            z = z / z.square().mean().sqrt()
        return z

    def logps(self, prompt: Sequence[int], response: Sequence[int], z: Tensor) -> Tensor:
        """D's log-probs (n,) of one response with the latent z."""
        w, m = self.latent, self.config["latent_tokens"]
        x, before = self.embedded(1, [*prompt, *response]), len(prompt)
        if self.config["injection"] != "output":
            soft = z.view(m, -1) @ w["to_prefix.weight"].T + w["to_prefix.bias"]
            soft = soft / soft.square().mean(1, keepdim=True).sqrt() * w["soft_size"]
            x, before = torch.cat([x[:before], soft, x[before:]]), before + m
        hidden = states(self.towers[1], x)
        if self.config["injection"] != "prefix":
            scale, shift = (WAY_OUT * (w[f"to_{name}.weight"] @ z) for name in ("scale", "output"))
            hidden = hidden * (1 + scale) + shift
        logits = hidden @ weights(self.towers[1])["lm_head.weight"].T
        table = logits.log_softmax(-1)
        return torch.stack([table[before - 1 + t, token] for t, token in enumerate(response)])


@pytest.mark.parametrize(("frozen", "kind"), KINDS)
def test_latents_and_log_probs_are_those_of_plain_arithmetic(
    frozen: bool, kind: dict[str, Any], policy: Path, tmp_path: Path
) -> None:
    """Packed, with shared prompts, in float32: as one response at a time in float64, each with its
    own latent, its sibling's, and none.
    """
    guide = made(policy, frozen, kind)
    save_guide(guide, tmp_path)
    plain, chosen = Plain(tmp_path), pairs(guide)
    responses = [(p.prompt, y) for p in chosen for y in p.responses]
    z = torch.stack([plain.z(*both) for both in responses])
    readings = [Reading(i, j) for i in range(6) for j in (i, i ^ 1, NO_LATENT)]
    expected = [
        plain.logps(*responses[i], z[j] if j >= 0 else plain.latent["null"]) for i, j in readings
    ]
    with torch.no_grad():
        logps, latents = guide(chosen, readings)
    torch.testing.assert_close(latents.double(), z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logps.double(), torch.cat(expected), rtol=1e-4, atol=1e-4)
    gaps = [a - b for a, b in zip(expected[0::3], expected[1::3], strict=True)]
    assert all(gap.abs().max() > 2e-3 for gap in gaps)  # the latent matters

    d = guide.distance(*TEXTS)
    euclidean = (z[0::2] - z[1::2]).norm(dim=1)
    assert bool((euclidean > 1e-2).all()) and euclidean.std() > 1e-2
    torch.testing.assert_close(d.double(), euclidean, rtol=1e-4, atol=0.0)
    cosine = 1 - torch.cosine_similarity(z[0::2], z[1::2])
    got = guide.distance(*TEXTS, metric="cosine").double()
    torch.testing.assert_close(got, cosine, rtol=1e-3, atol=0.0)
    assert torch.equal(load_guide(tmp_path).distance(*TEXTS), d)


def test_one_pass_is_two(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frozen tower's states serve encoder and decoder: as if the decoder read for itself."""
    guide = made(policy, True, {})
    chosen, read = pairs(guide), [0]

    def count(module: Any, given: Any) -> None:
        read[0] += len(given[0])

    guide.encoder.embedding.register_forward_pre_hook(count)
    readings = [Reading(i, j) for i in range(6) for j in (i, i ^ 1, NO_LATENT)]
    tokens = sum(p.tokens for p in chosen)
    with torch.no_grad():
        once, z = guide(chosen, readings)
        assert read[0] == tokens
        twice = guide.decode(chosen, guide.encode(chosen), readings)
        assert read[0] == 3 * tokens
        monkeypatch.setattr(Guide, "one_pass", False)
        apart, z_apart = guide(chosen, readings)
        assert read[0] == 5 * tokens
    assert torch.equal(z, z_apart)
    torch.testing.assert_close(once, twice, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(once, apart, rtol=1e-6, atol=1e-6)


def test_the_decoder_begins_as_the_policy(policy: Path) -> None:
    """Before training the shift is zero: its log-probs are the policy's own, whatever the latent.
    (With two towers, too.)
    """
    model = load_model(policy, torch.float32)
    for frozen in (True, False):
        guide = policy_guide(policy, frozen)
        chosen = pairs(guide)
        with torch.no_grad():
            logps, _ = guide(chosen, own(3))
            parts = logps.split([len(y) for p in chosen for y in p.responses])
            for (prompt, y), part in zip(
                ((p.prompt, y) for p in chosen for y in p.responses), parts, strict=True
            ):
                table = model(torch.tensor([[*prompt, *y]]))[0].log_softmax(-1)
                plain = table[len(prompt) - 1 : -1].gather(1, torch.tensor(y)[:, None])[:, 0]
                torch.testing.assert_close(part, plain, rtol=1e-5, atol=1e-5)


def test_a_pooled_guide_is_the_policys_mean_states(policy: Path) -> None:
    """No latent is drawn: z is the mean of the response tokens' states, of uncut texts."""
    guide = pooled_guide(policy, torch.float32)
    assert guide.config.max_tokens is None and guide.shared and not guide.training
    long = " ".join(f"word {i}" for i in range(60))
    chosen = [*pairs(guide), guide.pair("long", "Say it.", long, "No.")]
    assert len(chosen[-1].real) > 150
    expected = []
    for pair in chosen:
        table = weights(policy)["model.embed_tokens.weight"]
        means = [
            states(policy, table[torch.tensor([*pair.prompt, *y])])[len(pair.prompt) :].mean(0)
            for y in pair.responses
        ]
        expected.append((means[0] - means[1]).square().sum().sqrt())
    d = guide.pair_distances(chosen)
    torch.testing.assert_close(d.double(), torch.stack(expected), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_equal_responses_are_not_read(policy: Path, metric: Metric) -> None:
    """They are no distance apart, wherever they stand; the others are as far as without them."""
    guide, read = made(policy, True, {}), [0]
    chosen = pairs(guide)
    same = [replace(pair, generated=pair.real) for pair in chosen]
    alone = guide.pair_distances(chosen, 60, metric)

    def count(module: Any, given: Any) -> None:
        read[0] += len(given[0])

    guide.encoder.embedding.register_forward_pre_hook(count)
    mixed = guide.pair_distances([same[0], *chosen, *same[1:]], 60, metric)
    assert read[0] == sum(p.tokens for p in chosen)
    assert mixed[1:4].tolist() == alone.tolist() and min(alone) > 0
    assert not mixed[0] and not mixed[4:].any()
    assert guide.pair_distances(same, 60, metric).tolist() == [0.0] * 3


def test_one_reading_serves_several_maps_to_latents(policy: Path) -> None:
    """A column each, as if a guide had read for each of them."""
    guide, other = made(policy, True, {}), policy_guide(policy, True, 8)
    chosen, read = pairs(guide), [0]

    def count(module: Any, given: Any) -> None:
        read[0] += len(given[0])

    guide.encoder.embedding.register_forward_pre_hook(count)
    maps = [guide.latent, other.latent, identity_latent(guide)]
    table = guide.distances_by(maps, chosen, 60, "cosine")
    assert read[0] == sum(p.tokens for p in chosen) and table.shape == (3, 3)
    alone = (guide, other, pooled_guide(policy, torch.float32))
    for column, one in zip(table.unbind(1), alone, strict=True):
        assert torch.equal(column, one.pair_distances(chosen, 60, "cosine"))
    assert (table[:, 0] - table[:, 2]).abs().max() > 1e-3


# ------------------------------------------------------------------------------------ what it reads


def test_a_chat_guide_reads_the_template_and_cuts_one_prompt_for_both(policy: Path) -> None:
    """Both responses used to have a prompt of their own cut, and every response an end token."""
    guide, tokenizer = policy_guide(policy), load_tokenizer(policy)
    turns: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    pair = guide.pair("x", turns, "Yes.", "No, no.")
    shown = tokenizer.decode([*pair.prompt, *pair.real], skip_special_tokens=False)
    assert shown == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>"
    )
    assert guide.end_ids == tokenizer.end_ids == (2,) and guide.end_id == 2
    assert [y.count(2) for y in pair.responses] == [1, 1]
    assert [y[-1] for y in pair.responses] == [2, 2]
    cut = guide.pair("x", turns, "Yes.", "No, no.", (False, True))
    assert cut.real == pair.real[:-1] and cut.generated == pair.generated
    assert guide.pair("x", turns, "", "", (False, False)).real == [2]
    long = guide.pair("x", turns, "Yes.", "no " * 200, (True, True))
    assert long.real == pair.real and len(long.responses[1]) == 45
    assert 2 not in long.responses[1]  # its end was cut off, and the end token with it
    assert long.prompt == pair.prompt[-15:]
    response = guide.pair("x", "x", "a<|im_end|>b", "c").real
    assert response[-1] == 2 and response.count(2) == 1 and len(response) > 4


@pytest.mark.parametrize("frozen", [True, False])
def test_it_starts_from_the_policy(frozen: bool, policy: Path, tmp_path: Path) -> None:
    """Its towers, tokenizer, end token; and the tower folders are model folders: one where it is
    not trained, in its own dtype, which bfloat16 says exactly.
    """
    dtype = torch.bfloat16 if frozen else torch.float32
    guide = pretrained_guide(config_of(), 0, policy, frozen, torch.bfloat16)
    start = load_model(policy, dtype).state_dict()
    save_guide(guide, tmp_path)
    assert (tmp_path / "decoder").exists() == (not frozen)
    for tower in (guide.encoder, guide.decoder):
        assert all(torch.equal(p, start[name]) for name, p in tower.state_dict().items())
        assert all(p.requires_grad == (not frozen) for p in tower.parameters())
    for part in ("encoder",) if frozen else ("encoder", "decoder"):
        stored = load_file(tmp_path / part / "model.safetensors")
        assert {p.dtype for p in stored.values()} == {dtype}
        saved = load_model(tmp_path / part, dtype).state_dict()
        assert saved.keys() == start.keys() and all(
            torch.equal(p, start[name]) for name, p in saved.items()
        )
    described = json.loads((tmp_path / "guide.json").read_text())
    assert described["end_token"] == "<|im_end|>" and described["chat"]
    assert described["shared"] == frozen
    again = load_guide(tmp_path)
    assert again.shared == frozen and again.chat is not None
    assert again.pair("x", *PROMPTS) == guide.pair("x", *PROMPTS)


def test_refusals(policy: Path, toy_cache: Path, tmp_path: Path) -> None:
    save_guide(text_guide(), tmp_path)
    with pytest.raises(InputError, match=r"guide.max_tokens=513: .* has room for 512; lower it"):
        policy_guide(policy, max_tokens=513)
    policy_guide(policy, max_tokens=512)
    for keys in ({"readout": "queries"}, {"injection": "prefix"}):
        with pytest.raises(InputError, match="guide.max_tokens=511: .* has room for 510"):
            policy_guide(policy, max_tokens=511, latent_tokens=2, **keys)
    for folder, more, message in (
        (policy, "guide.backbone=policy", "is no trained guide, and guide.backbone=policy"),
        (tmp_path, "guide.retrain=true", "is a trained guide, used as it is; guide.retrain=true"),
    ):
        with pytest.raises(InputError, match=message):
            open_toy(toy_cache, f"guide={folder}", more)


# --------------------------------------------------------------------------------------- whole runs


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
    start = hash_model_folder(toy_cache / "toy-2")
    for name in ("guide", "iteration_1/guide"):
        made = parents(one, name)
        assert made["policy"] == start and made["towers"] == "policy" and made["frozen"] == "True"
        assert "guide.latent_width" in made
        assert (
            not {"pretrained", "guide.width", "guide.vocabulary", "guide.retrain", "guide.folder"}
            & made.keys()
        )
        assert (
            json.loads((one / name / "encoder/config.json").read_text())["model_type"] == "mistral"
        )
        assert not (one / name / "decoder").exists()  # one tower is both
    assert parents(one, "guide")["pairs"] != parents(one, "iteration_1/guide")["pairs"]
    assert (
        parents(one, "iteration_0/distances")["guide"]
        != parents(one, "iteration_1/distances")["guide"]
    )
    with pytest.raises(InputError, match=r"distance was 'cosine', now 'euclidean'"):
        align.main([*plan, f"run={one}", "distance=euclidean"])


def test_plan_and_dry_run_count_it(toy_cache: Path) -> None:
    ctx = open_toy(toy_cache, "guide.backbone=policy", "guide.retrain=true")
    planned = align.planned(ctx.config)
    assert [name for name in planned if name.endswith("guide")] == ["guide", "iteration_1/guide"]
    assert planned.index("iteration_1/guide") == planned.index("iteration_1/distances") - 1
    text = dry_run.dry_run(ctx, planned)
    assert "its towers are the policy that self-play starts from; not trained, one" in text
    assert "guide memory:" in text and "min without loading" in text
    ctx = open_toy(toy_cache, "guide.backbone=policy", "guide.retrain=true", "guide.towers=trained")
    text = dry_run.dry_run(ctx, planned)
    assert "starts from; both trained" in text
    assert "guide memory:" in text and "iteration_1/guide: 3 optimizer steps" in text
    small = open_toy(toy_cache)
    text = dry_run.dry_run(small, align.planned(small.config))
    assert "guide memory:" not in text and "min without the guide and loading" in text
