"""The exported policy in transformers: equal tensors, ids, logits, greedy text and ends."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from made_tokenizers import CHATML_TEMPLATE, byte_level_tokenizer, write_tokenizer_folder

import ldalign
from ldalign.models.stored_tensors import read_config
from ldalign.models.toy import random_mistral
from ldalign.models.weights import build, stored_state, write_weights

CONVERSATION = [
    {"role": "user", "content": "What is the capital of France? Answer with the name alone."}
]
NEW_TOKENS = 24


def peer_ids(folder: Path, conversation: list[dict[str, str]]) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


def test_smollm2_export_runs_in_transformers(smollm2_folder: Path, tmp_path: Path) -> None:
    """Weights changed as by training, written in bf16; transformers knows the
    folder and nothing of ours.
    """
    model = ldalign.load_model(smollm2_folder, torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.01 * torch.randn(p.shape, generator=generator))
    ldalign.save_model(model, tmp_path, source=smollm2_folder)
    changed = {
        name: p.bfloat16()
        for name, p in stored_state(model, dict(model.named_parameters())).items()
    }
    del model

    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for name, p in peer.named_parameters():
        assert torch.equal(p.bfloat16(), changed.pop(name)), name
    assert not changed
    ids = peer_ids(tmp_path, CONVERSATION)
    tokenizer = ldalign.load_tokenizer(tmp_path)
    assert tokenizer.prompt_ids(CONVERSATION) == ids[0].tolist()
    with torch.no_grad():
        theirs = peer(ids).logits
        written = peer.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS)[
            0, ids.shape[1] :
        ].tolist()
    del peer
    exported = ldalign.load_model(tmp_path, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(exported(ids), theirs, rtol=0, atol=2e-4)
    text = ldalign.generate(
        exported, tokenizer, [CONVERSATION], max_new_tokens=NEW_TOKENS, temperature=0.0
    )[0]
    assert text == tokenizer.decode(written)
    assert text
    assert len(written) < NEW_TOKENS and written[-1] in tokenizer.end_ids, (
        "the answer was meant to be short enough to end"
    )


@pytest.fixture(scope="module")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that names a window, a head of its own and two end tokens; weights do not matter."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer = byte_level_tokenizer()
    write_tokenizer_folder(folder, tokenizer, CHATML_TEMPLATE, eos_token="<|im_end|>")
    ends = [tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>")]
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 6,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": ends,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


@pytest.mark.parametrize("sharded", [False, True])
def test_tiny_mistral_export_runs_in_transformers(
    sharded: bool, tiny_source: Path, tmp_path: Path
) -> None:
    model = random_mistral(build(read_config(tiny_source), "").config, seed=3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6 if p.ndim == 2 else 0.8)
    ldalign.save_model(model, tmp_path, source=tiny_source)
    if sharded:
        write_weights(
            stored_state(model, model.state_dict()), tmp_path, torch.bfloat16, shard_bytes=10_000
        )
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    exported = ldalign.load_model(tmp_path, torch.float32)
    ids = peer_ids(tmp_path, CONVERSATION)
    with torch.no_grad():
        theirs = peer(ids).logits
        written = peer.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS)[
            0, ids.shape[1] :
        ].tolist()
        torch.testing.assert_close(exported(ids), theirs, rtol=0, atol=1e-4)
    assert theirs.std() > 0.5
    tokenizer = ldalign.load_tokenizer(tmp_path)
    text = ldalign.generate(
        exported, tokenizer, [CONVERSATION], max_new_tokens=NEW_TOKENS, temperature=0.0
    )[0]
    assert text == tokenizer.decode(written)


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_both_stop_at_every_declared_end(end: str, tiny_source: Path, tmp_path: Path) -> None:
    """A model that, whatever it reads, can only say `end`: one token, in transformers and here."""
    model = random_mistral(build(read_config(tiny_source), "").config, seed=3)
    end_id = byte_level_tokenizer().token_to_id(end)
    with torch.no_grad():
        # every token's state points along the first axis
        model.model.embed_tokens.weight[:, 0] = 1000.0
        model.lm_head.weight[:, 0] = -1.0
        model.lm_head.weight[end_id, 0] = 1.0
    ldalign.save_model(model, tmp_path, source=tiny_source)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = peer_ids(tmp_path, CONVERSATION)
    with torch.no_grad():
        written = peer.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS)[
            0, ids.shape[1] :
        ].tolist()
    assert written == [end_id]
    exported, tokenizer = (
        ldalign.load_model(tmp_path, torch.float32),
        ldalign.load_tokenizer(tmp_path),
    )
    assert ldalign.generate(
        exported, tokenizer, [CONVERSATION], max_new_tokens=NEW_TOKENS, temperature=0.0
    ) == [""]


def test_tiny_gpt2_export_runs_in_transformers(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_tokenizer_folder(source, byte_level_tokenizer(), CHATML_TEMPLATE, eos_token="<|im_end|>")
    sizes = {"vocab_size": 500, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0).save_pretrained(source)
    model = build(read_config(source), "")
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(p.shape, generator=generator) * 0.5
        for name, p in model.named_parameters()
    }
    model.load_state_dict(state, assign=True)
    ldalign.save_model(model, tmp_path / "made", source=source)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "made", dtype=torch.float32
    ).eval()
    ids = torch.randint(500, (2, 32), generator=generator)
    with torch.no_grad():
        theirs = peer(ids).logits
        torch.testing.assert_close(
            ldalign.load_model(tmp_path / "made", torch.float32)(ids), theirs, rtol=0, atol=1e-4
        )
    assert theirs.std() > 0.5
