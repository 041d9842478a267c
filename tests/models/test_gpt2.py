"""The hand-written GPT-2 against transformers: tiny ones of every form, and 124M once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldalign.models.gpt2 import GPT2, TRANSPOSED, GPT2Config, init_weights
from ldalign.models.layout import Packed
from ldalign.models.weights import load_model
from ldalign.system.errors import InputError

TINY: dict[str, Any] = {
    "vocab_size": 101,
    "n_positions": 48,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
}
LENGTH = 29


def random_peer(seed: int = 0, **changes: Any) -> Any:
    """A transformers model whose weights, biases among them, make logits of several units."""
    config = transformers.GPT2Config(**{**TINY, "bos_token_id": 0, "eos_token_id": 0, **changes})
    peer = (
        transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager")
        .float()
        .eval()
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in peer.named_parameters():
            scale = {"wte": 0.5, "wpe": 0.5}.get(
                name.split(".")[1], p.shape[0] ** -0.5 if p.ndim == 2 else 0.3
            )
            noise = torch.randn(p.shape, generator=generator).mul_(scale)
            p.copy_(1 + noise if ".ln_" in name and name.endswith("weight") else noise)
    return peer


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(101, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    folder = tmp_path_factory.mktemp("gpt2")
    random_peer().save_pretrained(folder)
    return load_model(folder, torch.float32)


@pytest.mark.parametrize("form", ["GPT2LMHeadModel", "GPT2Model with buffers", "sharded"])
@pytest.mark.parametrize(
    "changes", [{}, {"n_inner": 20, "layer_norm_epsilon": 1e-3, "activation_function": "gelu_new"}]
)
def test_logits_equal_transformers(form: str, changes: dict[str, Any], tmp_path: Path) -> None:
    peer = random_peer(**changes)
    peer.save_pretrained(tmp_path, max_shard_size="20KB" if form == "sharded" else "5GB")
    # as the `gpt2` repository has it: no prefix, the causal masks stored
    if form == "GPT2Model with buffers":
        stored = load_file(tmp_path / "model.safetensors")
        stored = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
        for i in range(TINY["n_layer"]):
            stored[f"h.{i}.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
            stored[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        save_file(stored, tmp_path / "model.safetensors")
    ids = tokens(2, LENGTH)
    with torch.no_grad():
        ours, theirs = load_model(tmp_path, torch.float32)(ids), peer(ids).logits
    assert theirs.std() > 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_logits_equal_transformers_at_full_size(tmp_path: Path) -> None:
    """124M random weights, the default config.json that transformers writes, 50,257 tokens."""
    transformers.GPT2Config().save_pretrained(tmp_path)
    with torch.device("meta"):
        peer = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, p in peer.named_parameters():
        noise = torch.empty(p.shape).normal_(std=0.05, generator=generator)
        state[name] = noise.add_(1) if ".ln_" in name and name.endswith("weight") else noise
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert sum(p.numel() for p in state.values()) == 124_439_808
    state.clear()
    ids = torch.randint(50257, (1, 48), generator=generator)
    with torch.no_grad():
        peer = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
        theirs = peer(ids).logits
        del peer
        ours = load_model(tmp_path, torch.float32)(ids)
    assert theirs.std() > 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_gradients_equal_transformers(tmp_path: Path) -> None:
    peer = random_peer()
    peer.save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.float32)
    ids, upstream = (
        tokens(2, LENGTH),
        torch.randn(2, LENGTH, 101, generator=torch.Generator().manual_seed(5)),
    )
    model(ids).backward(upstream)
    peer(ids).logits.backward(upstream)
    theirs = {
        name: p.grad.T if name.endswith(TRANSPOSED) else p.grad
        for name, p in peer.named_parameters()
    }
    for name, p in model.named_parameters():
        expected = theirs[name]
        assert expected.norm() > 1e-3, name
        assert (p.grad - expected).norm() <= 2e-5 * expected.norm(), name


def test_no_token_sees_the_future(tiny: GPT2) -> None:
    ids = tokens(1, LENGTH)
    t = 11
    changed = ids.clone()
    changed[0, t] = (ids[0, t] + 1) % 101
    with torch.no_grad():
        moved = (tiny(ids) - tiny(changed))[0].abs().amax(-1) > 1e-7
    assert moved.tolist() == [i >= t for i in range(LENGTH)]


def test_packed_equals_batched_equals_one_by_one(tiny: GPT2) -> None:
    lengths = [3, LENGTH, 1, 8]
    rows = [tokens(n, seed=n) for n in lengths]
    with torch.no_grad():
        alone = [tiny(row[None])[0] for row in rows]
        packed = tiny(
            torch.cat(rows), Packed(lengths), lambda hidden, weight: hidden @ weight.T
        ).split(lengths)
        batch = tiny(torch.stack([rows[1].flip(0), rows[1]]))
    for one, row in zip(alone, packed, strict=True):
        torch.testing.assert_close(row, one, rtol=0, atol=2e-5)
    torch.testing.assert_close(batch[1], alone[1], rtol=0, atol=2e-5)


def test_hidden_takes_embeddings_of_the_callers_own(tiny: GPT2) -> None:
    """The guide's door: from token embeddings, without positions, to the states before the head."""
    ids = tokens(1, LENGTH)
    with torch.no_grad():
        states = tiny.hidden(tiny.transformer.wte(ids[0]), Packed([LENGTH]))
        torch.testing.assert_close(states @ tiny.output_weight.T, tiny(ids)[0], rtol=0, atol=1e-5)


def test_checkpointing_changes_no_gradient(tiny: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = type(tiny.blocks[0])._forward
    monkeypatch.setattr(
        type(tiny.blocks[0]), "_forward", lambda *a: calls.append(1) or original(*a)
    )
    ids, upstream = (
        tokens(2, LENGTH),
        torch.randn(2, LENGTH, 101, generator=torch.Generator().manual_seed(3)),
    )
    gradients, forwards = [], []
    for on in (False, True):
        for block in tiny.blocks:
            monkeypatch.setattr(block, "checkpointing", "full" if on else "none")
        calls.clear()
        gradients.append(torch.autograd.grad(tiny(ids), list(tiny.parameters()), upstream))
        forwards.append(len(calls))
    assert forwards == [3, 6], "with checkpointing every block should run twice"
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def test_longer_than_the_positions_is_refused(tiny: GPT2) -> None:
    assert tiny(tokens(1, 48)).shape == (1, 48, 101)
    with pytest.raises(InputError, match="49 tokens is longer than GPT-2's 48 positions"):
        tiny(tokens(1, 49))


def test_init_weights() -> None:
    """GPT-2's deviations, the same values for the same seed, and a model nearly
    uniform over its vocabulary.
    """
    models = []
    for seed in (7, 7, 8):
        models.append(GPT2(GPT2Config(**{**TINY, "n_embd": 128})))
        init_weights(models[-1], seed)
    first, again, other = (dict(m.named_parameters()) for m in models)
    for name, p in first.items():
        assert torch.equal(p, again[name]), name
        if p.ndim == 2:
            expected = 0.02 / 6**0.5 if "c_proj" in name else 0.02
            assert abs(p.std() / expected - 1) < 0.05, name
            assert not torch.equal(p, other[name]), name
        else:
            assert torch.equal(
                p, torch.ones_like(p) if name.endswith("weight") else torch.zeros_like(p)
            ), name
    logp = models[0](tokens(1, 20)).log_softmax(-1)
    assert abs(logp.mean() + torch.tensor(101.0).log()) < 0.1


# -------------------------------------------------------------------------------------- config.json


def test_config_survives_its_json() -> None:
    config = GPT2Config(**{**TINY, "n_inner": 77, "layer_norm_epsilon": 1e-6})
    raw = json.loads(json.dumps(config.to_json()))
    assert GPT2Config.from_json(raw, "config.json") == config
    assert (config.inner, GPT2Config().inner) == (77, 3072)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "relu"}, "activation_function 'relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx true"),
        ({"add_cross_attention": True}, "add_cross_attention true"),
        ({"scale_attn_weights": False}, "scale_attn_weights false"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings false"),
        ({"n_embd": None}, "missing n_embd"),
        ({"vocab_size": None, "n_layer": None}, "missing vocab_size, n_layer"),
        ({"n_embd": "32"}, "n_embd is '32'"),
        ({"n_layer": 0}, "n_layer is 0"),
        ({"n_head": 5}, "n_embd 32 must be a multiple of n_head 5"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5'"),
    ],
)
def test_config_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        GPT2Config.from_json({**TINY, "model_type": "gpt2", **changes}, "config.json")
    assert str(caught.value).startswith("config.json: ")
