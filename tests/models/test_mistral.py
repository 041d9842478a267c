"""The hand-written Mistral against transformers, on random weights that make all parts matter."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from ldalign.data.tokenizer import load_tokenizer
from ldalign.kernels import reference
from ldalign.models.layout import Packed
from ldalign.models.mistral import Mistral, MistralConfig, rope_tables
from ldalign.models.weights import load_model, stored_state
from ldalign.system.errors import InputError

TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not 48 / 4
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
WINDOW, LENGTH = 5, 37
TEXT = (
    "The tide tables on the harbour wall gave two high waters for the ninth of March: 04:52 and "
    "17:16. Marta read them "
    "twice, multiplied 3.7 by 12, and wrote the answer (44.4) under the list of names: Aino, "
    "Bjørn, Chidi, Dana. "
    'def f(x): return {"depth": x ** 2}'
)


def random_peer(config: Any, seed: int = 0) -> Any:
    """Makes a float32 transformers model with logits of several units and sharp attention."""
    peer = (
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        .float()
        .eval()
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in peer.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.3 * noise if p.ndim == 1 else noise * 1.5 / p.shape[1] ** 0.5)
    return peer


def mistral_config(**changes: Any) -> transformers.MistralConfig:
    rope = {"rope_type": "default", "rope_theta": 50_000.0}
    return transformers.MistralConfig(
        **{**TINY, "sliding_window": WINDOW, "rope_parameters": rope, **changes}
    )


def llama_config(**changes: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        **{**TINY, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, **changes}
    )


CONFIGS = {
    "window": mistral_config(),
    "no window, tied": mistral_config(sliding_window=None, tie_word_embeddings=True),
    "window longer than the text, one key head": mistral_config(
        sliding_window=LENGTH + 1, num_key_value_heads=1
    ),
    "llama, a key head each": llama_config(num_key_value_heads=4, head_dim=None),
    "llama, tied": llama_config(tie_word_embeddings=True),
}


def old_rope_form(folder: Path) -> None:
    """Rewrites config.json as transformers 4 had it: rope_theta at the top, no rope_parameters."""
    raw = json.loads((folder / "config.json").read_text())
    raw["rope_theta"] = raw.pop("rope_parameters")["rope_theta"]
    (folder / "config.json").write_text(json.dumps(raw))


def tokens(*shape: int, seed: int = 1, vocabulary: int = 101) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Mistral:
    folder = tmp_path_factory.mktemp("windowed")
    random_peer(mistral_config()).save_pretrained(folder)
    return load_model(folder, torch.float32)


@pytest.mark.parametrize("rope_form", ["rope_parameters", "rope_theta"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str, rope_form: str, tmp_path: Path) -> None:
    peer = random_peer(CONFIGS[name])
    peer.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1, "the weights are meant to be sharded"
    if rope_form == "rope_theta":
        old_rope_form(tmp_path)
    model = load_model(tmp_path, torch.float32)
    ids = tokens(2, LENGTH)
    with torch.no_grad():
        ours, theirs = model(ids), peer(ids).logits
    assert theirs.std() > 1, "logits this small would hide errors"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_gradients_equal_transformers(tmp_path: Path) -> None:
    peer = random_peer(mistral_config())
    peer.save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.float32)
    ids = tokens(2, LENGTH)
    upstream = torch.randn(2, LENGTH, 101, generator=torch.Generator().manual_seed(5))
    model(ids).backward(upstream)
    peer(ids).logits.backward(upstream)
    theirs = {name: p.grad for name, p in peer.named_parameters()}
    ours = stored_state(model, {name: p.grad for name, p in model.named_parameters()})
    assert theirs.keys() == ours.keys()
    for parameter_name, expected in theirs.items():
        assert expected.norm() > 1e-3, parameter_name
        assert (ours[parameter_name] - expected).norm() <= 1e-5 * expected.norm(), parameter_name


def test_bf16_is_no_worse_than_transformers(tmp_path: Path) -> None:
    """Error against float64 at most twice that of transformers in bf16 (with SDPA, its default)."""
    peer = random_peer(mistral_config()).bfloat16()
    peer.save_pretrained(tmp_path)
    ids = tokens(4, LENGTH)
    with torch.no_grad():
        exact = load_model(tmp_path, torch.float64)(ids)
        ours = (load_model(tmp_path, torch.bfloat16)(ids) - exact).norm()
        theirs = (peer(ids).logits - exact).norm()
    assert ours <= 2 * theirs, (
        f"relative error {ours / exact.norm():.4f}, of transformers {theirs / exact.norm():.4f}"
    )
    assert theirs < 0.1 * exact.norm(), "the yardstick itself is off"


def exact_rotary(
    self: torch.nn.Module, x: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' tables, of the same float32 angles, rounded once: theirs are a last bit off."""
    inv_freq = self.inv_freq
    assert isinstance(inv_freq, torch.Tensor)
    angles = position_ids[:, :, None].float() * inv_freq.float()  # (B, N, E/2)
    exact = torch.cat((angles, angles), -1).double().numpy()
    cos, sin = (torch.from_numpy(f(exact)).float().to(x.dtype) for f in (np.cos, np.sin))
    return cos, sin


def exact_llama_norm(self: Any, x: Tensor) -> Tensor:
    """transformers' RMSNorm rounds to float32 whatever the model's dtype; this one does not."""
    return reference.rms_norm(x, self.weight, self.variance_epsilon)


def test_smollm2_logits_equal_transformers(
    smollm2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On logits up to 40 float32 rounding alone is near 1e-4, so float64 judges too: same function,
    error no larger.
    """
    ids = torch.tensor([load_tokenizer(smollm2_folder).encode(TEXT)])
    assert ids.shape[1] > 80
    with torch.no_grad():
        peer = transformers.AutoModelForCausalLM.from_pretrained(
            smollm2_folder, dtype=torch.float32
        ).eval()
        theirs = peer(ids).logits
        norm = type(peer.model.norm)
        monkeypatch.setattr(norm, "forward", exact_llama_norm)
        monkeypatch.setattr(type(peer.model.rotary_emb), "forward", exact_rotary)
        exact = peer.double()(ids).logits
        del peer
        model = load_model(smollm2_folder, torch.float32)
        ours = model(ids)
        torch.testing.assert_close(model.double()(ids), exact, rtol=0, atol=1e-9)
    assert exact.abs().max() > 20
    error, their_error = (ours - exact).abs().max(), (theirs - exact).abs().max()
    assert error <= 2 * their_error, f"{error:.2e} against float64, transformers {their_error:.2e}"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_no_token_sees_the_future_or_past_the_window(windowed: Mistral) -> None:
    ids = tokens(1, LENGTH)
    # each layer carries a token's effect window - 1 further
    t, reach = 4, TINY["num_hidden_layers"] * (WINDOW - 1)
    changed = ids.clone()
    changed[0, t] = (ids[0, t] + 1) % 101
    with torch.no_grad():
        moved = (windowed(ids) - windowed(changed))[0].abs().amax(-1) > 1e-7
    assert moved.nonzero().flatten().tolist() == list(range(t, t + reach + 1))


def test_packed_equals_batched_equals_one_by_one(windowed: Mistral) -> None:
    lengths = [7, 1, LENGTH, 2, WINDOW, 19]
    rows = [tokens(n, seed=n) for n in lengths]
    with torch.no_grad():
        alone = [windowed(row[None])[0] for row in rows]
        packed = windowed(
            torch.cat(rows), Packed(lengths), lambda hidden, weight: hidden @ weight.T
        ).split(lengths)
        batch = windowed(torch.stack([rows[2], rows[2].flip(0)]))
    for one, row in zip(alone, packed, strict=True):
        torch.testing.assert_close(row, one, rtol=0, atol=2e-5)
    torch.testing.assert_close(batch[0], alone[2], rtol=0, atol=2e-5)


def test_head_gets_final_states_and_output_weight(windowed: Mistral) -> None:
    ids = tokens(6)
    layout = Packed([4, 2])
    got: list[Tensor] = []
    assert (
        windowed(ids, layout, lambda hidden, weight: got.extend((hidden, weight)) or "made")
        == "made"
    )
    hidden, weight = got
    assert hidden.shape == (6, TINY["hidden_size"])
    assert weight is windowed.output_weight is windowed.lm_head.weight


def unfused(model: Mistral, ids: Tensor, layout: Packed) -> Tensor:
    """The final states (N, D) by additions and norms of their own."""
    c = model.config
    cos, sin = rope_tables(layout.positions, c.head_dim, c.rope_theta)
    x = model.embedding(ids)
    for block in model.blocks:
        x = x + block.self_attn(block.input_layernorm(x), cos, sin, layout)
        x = x + block.mlp(block.post_attention_layernorm(x))
    return model.model.norm(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_within_norms_are_the_plain_ones(windowed: Mistral, dtype: torch.dtype) -> None:
    """The same states to the bit. A gradient is rounded once for twice: it is no further from
    float64's.
    """
    ids, layout = tokens(LENGTH), Packed([(20, 6, 7), 4])
    upstream = torch.randn(LENGTH, 48, generator=torch.Generator().manual_seed(3))
    model = copy.deepcopy(windowed).to(dtype)
    wide = copy.deepcopy(model).double()

    def run(states: Callable[..., Tensor], model: Mistral) -> tuple[Tensor, Tensor]:
        out = states(model, ids, layout)
        used = [p for name, p in model.named_parameters() if name != "lm_head.weight"]
        gradients = torch.autograd.grad(out, used, upstream.to(out.dtype))
        return out, torch.cat([g.double().flatten() / g.double().norm() for g in gradients])

    (ours, gradient), (plain, plainly), (_, exact) = (
        run(lambda model, ids, layout: model(ids, layout, lambda hidden, weight: hidden), model),
        run(unfused, model),
        run(unfused, wide),
    )
    assert torch.equal(ours, plain)
    assert (gradient - exact).norm() <= 1.2 * (plainly - exact).norm() < 0.05 * exact.norm()


def test_checkpointing_changes_no_gradient(
    windowed: Mistral, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = type(windowed.blocks[0])._forward
    monkeypatch.setattr(
        type(windowed.blocks[0]), "_forward", lambda *a: calls.append(1) or original(*a)
    )
    ids, upstream = (
        tokens(2, LENGTH),
        torch.randn(2, LENGTH, 101, generator=torch.Generator().manual_seed(3)),
    )
    gradients, forwards = [], []
    for on in (False, True):
        for block in windowed.blocks:
            monkeypatch.setattr(block, "checkpointing", "full" if on else "none")
        calls.clear()
        gradients.append(torch.autograd.grad(windowed(ids), list(windowed.parameters()), upstream))
        forwards.append(len(calls))
    assert forwards == [3, 6], "with checkpointing every block should run twice"
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def test_rope_tables_are_the_angles_of_the_paper() -> None:
    positions = torch.tensor([0, 1, 2, 1000, 8191])
    cos, sin = rope_tables(positions, 8, 10_000.0)
    frequencies = torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)
    angles = positions.double()[:, None] * frequencies
    assert cos.dtype == sin.dtype == torch.float32
    # float32 angles of up to 8191 radians are themselves right to 5e-4 only
    torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=1e-3)
    torch.testing.assert_close(sin.double(), angles.sin(), rtol=0, atol=1e-3)
    torch.testing.assert_close(cos[:3].double(), angles[:3].cos(), rtol=0, atol=1e-6)


def test_rope_tables_are_rounded_once() -> None:
    """The nearest float32 numbers, which no library's last bit can change."""
    cos, sin = rope_tables(torch.arange(200), 64, 10_000.0)
    steps = torch.arange(0, 64, 2, dtype=torch.float32) / 64
    angles = torch.arange(200.0)[:, None] * (1.0 / 10_000.0**steps)
    for table, function in ((cos, math.cos), (sin, math.sin)):
        exact = [function(angle) for angle in angles.flatten().tolist()]
        assert torch.equal(table.flatten(), torch.tensor(exact, dtype=torch.float64).float())


# -------------------------------------------------------------------------------------- config.json


def read(**changes: Any) -> MistralConfig:
    raw = {**TINY, "model_type": "mistral", "rope_theta": 1e4, "sliding_window": 7, **changes}
    return MistralConfig.from_json(
        {key: value for key, value in raw.items() if value != "absent"}, "config.json"
    )


def test_absent_keys_mean_what_transformers_takes_them_to_mean() -> None:
    """Checked against the peer's own defaults, for the keys old configs leave out."""
    peer = transformers.MistralConfig(
        **{k: v for k, v in TINY.items() if k not in ("head_dim", "num_key_value_heads")}
    )
    config = read(
        sliding_window="absent", head_dim="absent", num_key_value_heads=None, rope_theta="absent"
    )
    assert config.sliding_window == peer.sliding_window == 4096
    assert config.head_dim == peer.head_dim == 12
    assert config.rope_theta == peer.rope_parameters["rope_theta"] == 10_000.0
    assert config.num_key_value_heads == 4
    # the peer's default, for 4 heads
    with pytest.raises(InputError, match="multiple of num_key_value_heads 8"):
        read(num_key_value_heads="absent")
    llama = read(model_type="llama", num_key_value_heads="absent")
    assert (llama.num_key_value_heads, llama.sliding_window) == (4, None)
    assert read(sliding_window=None).sliding_window is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling: rope scaling 'linear'",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' is not supported"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rope_parameters: rope scaling 'yarn'",
        ),
        (
            {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "dynamic"}},
            "rope_parameters: rope scaling 'dynamic'",
        ),
        ({"rope_scaling": "linear"}, "rope scaling 'linear'"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4}},
            "partial_rotary_factor",
        ),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"vocab_size": "absent"}, "'vocab_size' is missing"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"intermediate_size": "80"}, "intermediate_size is '80'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"sliding_window": -1}, "sliding_window is -1"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "multiple of num_key_value_heads 4"),
        ({"head_dim": 15}, "head_dim 15 even"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'"),
        ({"rope_theta": 0}, "rope_theta is 0"),
    ],
)
def test_config_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(**changes)
    assert str(caught.value).startswith("config.json: ")
    assert "\n" not in str(caught.value)
