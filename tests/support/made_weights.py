"""Small model folders, and ways to spoil them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_tokenizers import CHATML_TEMPLATE, byte_level_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldalign.models.gguf import hugging_face_name
from ldalign.models.gpt2 import GPT2
from ldalign.models.mistral import Mistral
from ldalign.models.stored_tensors import SINGLE
from ldalign.models.weights import build, load_model, stored_state, write_weights
from ldalign.system.errors import InputError

MISTRAL: dict[str, Any] = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


GPT2_: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 40,
    "n_positions": 16,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
}


EMBEDDING, HEAD, Q1 = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.layers.1.self_attn.q_proj.weight",
)


def random_model(raw: dict[str, Any], seed: int = 0) -> Mistral | GPT2:
    model = build(raw, "config.json")
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()
    }
    model.load_state_dict(state, assign=True)
    return model.eval()


def write_folder(
    folder: Path,
    raw: dict[str, Any] = MISTRAL,
    shard_bytes: int = 10**9,
    dtype: torch.dtype = torch.float32,
) -> Mistral | GPT2:
    """A model folder without a tokenizer; the model that was written."""
    folder.mkdir(exist_ok=True)
    model = random_model(raw)
    write_weights(stored_state(model, model.state_dict()), folder, dtype, shard_bytes)
    (folder / "config.json").write_text(json.dumps(raw))
    return model


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any], file: str = SINGLE) -> None:
    """Applies `change` to the tensors of a safetensors file and writes it anew."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder: Path, *parts: str) -> str:
    """The message of the one-line InputError that loading must end in; it holds all of `parts`."""
    with pytest.raises(InputError) as caught:
        load_model(folder, torch.float32)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    for part in parts:
        assert part in message, f"{part!r} not in {message!r}"
    return message


HIDDEN, HEADS, KV_HEADS, LAYERS, WIDE = 64, 4, 2, 2, 96


def llama_cpp_permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py does to Q and K."""
    rows = weight.shape[0]
    return (
        weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def shapes() -> dict[str, tuple[int, ...]]:
    kv = HIDDEN // HEADS * KV_HEADS
    names = {"model.embed_tokens": (500, HIDDEN), "model.norm": (HIDDEN,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        names |= {
            f"{layer}.input_layernorm": (HIDDEN,),
            f"{layer}.post_attention_layernorm": (HIDDEN,),
        }
        names |= {
            f"{layer}.self_attn.{k}_proj": (HIDDEN if k in "qo" else kv, HIDDEN) for k in "qkvo"
        }
        names |= {f"{layer}.mlp.{k}_proj": (WIDE, HIDDEN) for k in ("gate", "up")}
        names |= {f"{layer}.mlp.down_proj": (HIDDEN, WIDE)}
    return {f"{name}.weight": shape for name, shape in names.items()}


def write_gguf(path, *, tied: bool):
    """Writes a tiny Llama as llama.cpp packs it (Q4_1 if rows allow); returns its weights."""
    import gguf

    rng = np.random.default_rng(1)
    weights = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes().items()
    }
    if not tied:
        weights["lm_head.weight"] = rng.standard_normal((500, HIDDEN)).astype(np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    model = json.loads(byte_level_tokenizer().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    tokens += [f"[unused{i}]" for i in range(len(tokens), 500)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    for name, token in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_chat_template(CHATML_TEMPLATE)
    names = {hugging_face_name(name): name for name in gguf_names(tied)}
    for name, weight in list(weights.items()):
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        stored = llama_cpp_permute(weight, heads) if heads else weight
        if weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            packed = gguf.quants.quantize(stored, kind)
            writer.add_tensor(names[name], packed, raw_dtype=kind)
            rounded = gguf.quants.dequantize(packed, kind)
            if heads:  # rounding is by blocks within a row, so rows can be put back one by one
                rounded = rounded[np.argsort(llama_cpp_permute(np.arange(len(weight)), heads))]
            weights[name] = rounded
        else:
            writer.add_tensor(names[name], stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights, tokens


def gguf_names(tied: bool) -> list[str]:
    parts = "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down".split()
    names = [f"blk.{i}.{part}.weight" for i in range(LAYERS) for part in parts]
    return names + ["token_embd.weight", "output_norm.weight"] + ([] if tied else ["output.weight"])
