"""What a model folder may say: every key of config.json is read, known or refused; no adapters, no
Git LFS pointers; names in an index that no shard holds are no matter.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_weights import GPT2_, MISTRAL, Q1, edit_json, refusal, write_folder

import ldalign
from ldalign.generation.generate import check_context
from ldalign.models import config_keys, gpt2, mistral
from ldalign.models.gpt2 import GPT2Config
from ldalign.models.mistral import Mistral, MistralConfig
from ldalign.models.stored_tensors import INDEX, SINGLE, weight_files
from ldalign.models.weights import build, context_length, load_model
from ldalign.system.errors import InputError
from ldalign.system.untrusted import LFS_POINTER

LLAMA = {**MISTRAL, "model_type": "llama"}
KINDS = {"mistral": (MISTRAL, mistral), "llama": (LLAMA, mistral), "gpt2": (GPT2_, gpt2)}
POINTER = LFS_POINTER + b"v1\noid sha256:" + b"0" * 63 + b"7\nsize 269060552\n"

# ----------------------------------------------------------------------------- keys of config.json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def known(kind: str) -> set[str]:
    _, module = KINDS[kind]
    read = GPT2Config.__dataclass_fields__ if module is gpt2 else mistral.READ
    return {*read, *module.HARMLESS, *module.OFF, *config_keys.HARMLESS, *config_keys.OFF}


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(st.text(min_size=1, max_size=12), JSON.filter(lambda value: value is not None))
def test_any_key_that_is_not_known_is_refused_by_name(kind: str, key: str, value: Any) -> None:
    if key in known(kind):
        return
    with pytest.raises(InputError) as caught:
        build({**KINDS[kind][0], key: value}, "config.json")
    assert str(caught.value) == (
        f"config.json: key {key!r} is not known here and may change the network; if it does not, "
        "remove it"
    )
    build({**KINDS[kind][0], key: None}, "config.json")  # a null says nothing


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(st.sampled_from(sorted(config_keys.HARMLESS - {"model_type"})), JSON)
def test_a_harmless_key_changes_nothing(kind: str, key: str, value: Any) -> None:
    raw = KINDS[kind][0]
    assert build({**raw, key: value}, "c").config == build(raw, "c").config


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(st.data())
def test_a_switch_is_off_or_refused_by_name(kind: str, data: st.DataObject) -> None:
    raw, module = KINDS[kind]
    switches = {**config_keys.OFF, **module.OFF}
    key = data.draw(st.sampled_from(sorted(switches)))
    value = data.draw(JSON | st.sampled_from([*switches[key], "on", 2]))
    off = value is None or any(
        type(value) is type(allowed) and value == allowed for allowed in switches[key]
    )
    if off:
        assert build({**raw, key: value}, "c").config == build(raw, "c").config
    elif not (isinstance(value, int) and not isinstance(value, bool) and value == 1):
        with pytest.raises(InputError, match=rf"^c: {key} .* is not supported; "):
            build({**raw, key: value}, "c")


@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig", "GPT2Config"])
def test_what_transformers_writes_is_known(name: str) -> None:
    import transformers

    raw = getattr(transformers, name)().to_dict()
    reader = GPT2Config if name == "GPT2Config" else MistralConfig
    reader.from_json({**raw, "architectures": ["X"]}, "config.json")


# As public folders have them, in the words of older and newer versions.
IN_USE = {
    "smollm2": LLAMA
    | {
        "rope_interleaved": False,
        "rope_scaling": None,
        "is_llama_config": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "torch_dtype": "bfloat16",
        "pretraining_tp": 1,
        "attention_bias": False,
        "hidden_act": "silu",
        "initializer_range": 0.04,
        "use_cache": True,
    },
    "zephyr": MISTRAL | {"_name_or_path": "x/y", "torch_dtype": "bfloat16", "pad_token_id": 2},
    "gpt2": GPT2_
    | {
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "n_ctx": 1024,
        "summary_type": "cls_index",
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "unsloth": MISTRAL | {"unsloth_fixed": True, "unsloth_version": "2024.9", "mlp_bias": False},
}


@pytest.mark.parametrize("name", IN_USE)
def test_configs_in_use_are_read(name: str) -> None:
    build(IN_USE[name], "config.json")


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 500000.0}}, 500000.0),
        ({"rope_scaling": {"type": "default", "rope_theta": 500000.0}}, 500000.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7.0),
        ({"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 7.0}, 7.0),
        ({"rope_parameters": {"rope_type": "default", "factor": 1.0}, "rope_theta": 5.0}, 5.0),
        ({"rope_theta": 9}, 9.0),
        ({}, 10000.0),
    ],
)
def test_the_rotary_base_is_read_where_it_stands(rope: dict[str, Any], theta: float) -> None:
    import transformers

    raw = {key: value for key, value in MISTRAL.items() if key != "rope_theta"} | rope
    config = build(raw, "config.json").config
    assert isinstance(config, MistralConfig) and config.rope_theta == theta
    peer = transformers.MistralConfig(**json.loads(json.dumps(raw)))
    assert peer.rope_parameters["rope_theta"] == theta


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 8.0},
            "rope_theta is given as 7 and as 8",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 7.0}}}, "key 'full_attention'"),
        ({"rope_scaling": {"rope_type": "default", "factor": 8.0}}, "rope_scaling: factor 8.0"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types asks for layers"),
        ({"layer_types": ["full_attention"]}, "layer_types asks for layers"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types asks for layers"),
        ({"layer_types": "full_attention"}, "layer_types asks for layers"),
        (
            {"layer_types": ["sliding_attention"] * 2},
            "layer_types asks for a window, sliding_window gives none",
        ),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({"rope_interleaved": True}, "rope_interleaved true is not supported; it must be false or"),
        ({"logit_scale": 0.1}, "key 'logit_scale' is not known"),
        ({"quantization_config": {"bits": 4}}, "give the unquantised weights"),
    ],
)
def test_keys_that_ask_for_another_network(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build({**MISTRAL, **changes}, "config.json")
    assert str(caught.value).startswith("config.json: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "window"), [("full_attention", None), ("sliding_attention", 8)])
def test_layers_of_one_kind(kind: str, window: int | None) -> None:
    config = build(MISTRAL | {"sliding_window": 8, "layer_types": [kind] * 2}, "c").config
    assert isinstance(config, MistralConfig) and config.sliding_window == window


# ---------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("weights", [True, False])
def test_an_adapter_is_refused(name: str, weights: bool, tmp_path: Path) -> None:
    write_folder(tmp_path)
    if not weights:
        (tmp_path / SINGLE).unlink()
    (tmp_path / name).write_text("{}")
    refusal(tmp_path, name, "is an adapter", "merge it into them", "or remove it")


def test_an_index_may_name_what_no_shard_holds(tmp_path: Path) -> None:
    """Older files list buffers; what the network needs is missed by its name."""
    model = write_folder(tmp_path, shard_bytes=2000)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    absent = ("model.layers.0.self_attn.rotary_emb.inv_freq", "of.no.use")
    edit_json(tmp_path / INDEX, weight_map=weight_map | dict.fromkeys(absent, weight_map[Q1]))
    state, loaded = model.state_dict(), load_model(tmp_path, torch.float32).state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    edit_json(tmp_path / "config.json", num_hidden_layers=3)
    names = {name.replace("layers.1.", "layers.2."): file for name, file in weight_map.items()}
    edit_json(tmp_path / INDEX, weight_map=weight_map | names)
    refusal(tmp_path, "missing (model.layers.2.")


@pytest.mark.parametrize("name", [SINGLE, "config.json", "model-00002-of-*.safetensors"])
def test_a_git_lfs_pointer_is_named(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path, shard_bytes=2000 if "*" in name else 10**9)
    path = next(tmp_path.glob(name))
    path.write_bytes(POINTER)
    refusal(tmp_path, f"{path}: is a Git LFS pointer, not the file itself; run 'git lfs pull'")


def test_a_git_lfs_pointer_in_place_of_the_tokenizer(chatml_folder: Path, tmp_path: Path) -> None:
    for path in chatml_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(InputError, match=r"tokenizer.json: is a Git LFS pointer.*git lfs pull"):
        ldalign.load_tokenizer(tmp_path)


@pytest.mark.parametrize(("shard_bytes", "count"), [(10**9, 1), (2000, 7)])
def test_the_files_of_the_weights(shard_bytes: int, count: int, tmp_path: Path) -> None:
    write_folder(tmp_path, shard_bytes=shard_bytes)
    files = weight_files(tmp_path)
    assert all((tmp_path / file).is_file() for file in files)
    assert (len(files) > 1) == (count > 1)
    assert set(files) == {path.name for path in tmp_path.glob("*.safetensors")}


@pytest.mark.parametrize("raw", [MISTRAL, GPT2_, MISTRAL | {"tie_word_embeddings": True}])
def test_a_model_is_saved_without_a_source(raw: dict[str, Any], tmp_path: Path) -> None:
    """Weights and config alone, which load again, here and in transformers."""
    from transformers import AutoModelForCausalLM

    model = write_folder(tmp_path / "made", raw)
    ldalign.save_model(model, tmp_path / "saved", dtype=torch.float32)
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {SINGLE, "config.json"}
    again = load_model(tmp_path / "saved", torch.float32)
    assert again.config == model.config
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3, 4]])
    logits = model(ids)
    assert isinstance(logits, torch.Tensor)
    torch.testing.assert_close(peer(ids).logits, logits, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------- the context


@pytest.mark.parametrize(
    ("raw", "context"),
    [
        (MISTRAL | {"max_position_embeddings": 64}, 64),
        (MISTRAL, 131072),
        (LLAMA, 2048),
        (GPT2_, 16),
    ],
)
def test_the_context_is_read(raw: dict[str, Any], context: int, tmp_path: Path) -> None:
    write_folder(tmp_path, raw)
    assert context_length(tmp_path) == context


def test_a_prompt_beyond_the_context_is_refused() -> None:
    check_context(64, "p", 64)
    with pytest.raises(
        InputError, match=r"^p: the prompt has 65 tokens.*\(max_position_embeddings"
    ):
        check_context(65, "p", 64)


def test_generate_refuses_a_prompt_beyond_the_context(chatml_folder: Path, tmp_path: Path) -> None:
    raw = MISTRAL | {"vocab_size": 500, "max_position_embeddings": 24}
    model, tokenizer = write_folder(tmp_path, raw), ldalign.load_tokenizer(chatml_folder)
    chat = [{"role": "user", "content": "one two three four five six seven eight nine ten"}]
    short = [{"role": "user", "content": "x"}]
    assert isinstance(model, Mistral)
    assert len(ldalign.generate(model, tokenizer, [short], max_new_tokens=2)) == 1
    with pytest.raises(InputError, match="conversation 1: the prompt has .* was made for 24 "):
        ldalign.generate(model, tokenizer, [short, chat], max_new_tokens=2)
