"""GGUF files: the same logits by our reader and by transformers', the same tokens as llama.cpp's
algorithms make, and clear refusals.
"""

import hashlib
import itertools
import json
import os
import resource
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from made_tokenizers import CORPUS, ZEPHYR_TEMPLATE, sentencepiece_tokenizer, write_tokenizer_folder
from tokenizers import models, normalizers, pre_tokenizers

import ldalign
from ldalign.models.gguf import PRE_TOKENIZERS, convert_gguf
from ldalign.models.gguf_export import DTYPES, export_gguf, read_vocabulary
from ldalign.models.stored_tensors import read_config
from ldalign.models.toy import CONFIG, random_mistral, write_toy_model
from ldalign.models.weights import build, save_model
from ldalign.system.errors import EnvironmentProblem, InputError
from ldalign.train import export

IDS = torch.randint(512, (2, 40), generator=torch.Generator().manual_seed(0))


def lively(folder: Path, seed: int = 3) -> Path:
    """Gives the folder weights whose logits differ from token to token, norms included."""
    model = random_mistral(build(read_config(folder), "").config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6) if p.ndim == 2 else p.mul_(
                1 + 0.2 * torch.randn(p.shape, generator=generator)
            )
    save_model(model, folder, folder)
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped queries, a window of 48, a head of its own; the pre-tokenizer is GPT-2's."""
    return lively(write_toy_model(tmp_path_factory.mktemp("toy") / "policy"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama's layout as SmolLM2 has it: a tied head, no window, digits split one by one; heads
    whose width is not that of hidden_size / heads, and rows of the vocabulary that no token has.
    """
    sizes = {"model_type": "llama", "tie_word_embeddings": True, "sliding_window": None}
    sizes |= {"hidden_size": 96, "head_dim": 32, "num_key_value_heads": 1, "vocab_size": 520}
    folder = write_toy_model(tmp_path_factory.mktemp("tied") / "policy", **sizes)
    description = json.loads((folder / "tokenizer.json").read_text())
    steps = [{"type": "Digits", "individual_digits": True}, description["pre_tokenizer"]]
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    (folder / "tokenizer.json").write_text(json.dumps(description))
    return lively(folder)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return ldalign.load_model(folder, torch.float32)(IDS)


def read(path: Path) -> dict[str, Any]:
    return {key: value.contents() for key, value in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", ["toy", "tied"])
def test_our_reader_finds_the_same_logits(
    name: str, dtype: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """To the bit: the policy is bfloat16, and no export rounds it further."""
    folder = request.getfixturevalue(name)
    export_gguf(folder, tmp_path / "x.gguf", dtype)
    convert_gguf(tmp_path / "x.gguf", tmp_path / "back")
    assert torch.equal(logits(tmp_path / "back"), logits(folder))
    assert logits(folder).std() > 0.5
    ours, theirs = (ldalign.load_tokenizer(one) for one in (folder, tmp_path / "back"))
    text = "Add 12 and 345, it's naïve: 🙂\n\n ok"
    assert ours.encode(text) == theirs.encode(text)
    said = [{"role": "user", "content": text}]
    assert ours.prompt_ids(said) == theirs.prompt_ids(said) and ours.end_ids == theirs.end_ids


@pytest.mark.parametrize(("dtype", "most"), [("f32", 0.0), ("f16", 0.0), ("q8_0", 0.2)])
@pytest.mark.parametrize("name", ["toy", "tied"])
def test_transformers_finds_the_same_logits(
    name: str, dtype: Any, most: float, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    export_gguf(folder, tmp_path / "x.gguf", dtype)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        theirs = peer(IDS).logits
    torch.testing.assert_close(theirs, logits(folder), rtol=0, atol=1e-4 + most * theirs.std())
    if most:
        assert not torch.allclose(theirs, logits(folder), rtol=0, atol=1e-5), "nothing was rounded"


def test_types_of_the_tensors(toy: Path, tmp_path: Path) -> None:
    """Norms stay float32; q8_0 is what the gguf package makes of the permuted rows."""
    sizes = {}
    for dtype in DTYPES:
        done = export_gguf(toy, tmp_path / f"{dtype}.gguf", dtype)
        sizes[dtype] = done.size
        tensors = {t.name: t for t in gguf.GGUFReader(done.path).tensors}
        kinds = {t.tensor_type.name for name, t in tensors.items() if "norm" not in name}
        assert kinds == {dtype.upper()} and len(tensors) == done.tensors
        assert tensors["blk.1.ffn_norm.weight"].tensor_type.name == "F32"
    assert sizes["q8_0"] < 0.6 * sizes["bf16"] and sizes["f16"] == sizes["bf16"]
    whole = gguf.GGUFReader(tmp_path / "f32.gguf").tensors
    for exact, blocks in zip(whole, gguf.GGUFReader(tmp_path / "q8_0.gguf").tensors, strict=True):
        if "norm" not in exact.name:
            wanted = gguf.quants.quantize(np.array(exact.data), gguf.GGMLQuantizationType.Q8_0)
            assert np.array_equal(blocks.data, wanted), exact.name


def test_rows_that_no_block_divides_are_float16(tmp_path: Path) -> None:
    folder = lively(write_toy_model(tmp_path / "policy", intermediate_size=104))
    done = export_gguf(folder, tmp_path / "x.gguf", "q8_0")
    tensors = {t.name: t for t in gguf.GGUFReader(done.path).tensors}
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"


def test_settings_and_special_tokens(toy: Path, tmp_path: Path) -> None:
    done = export_gguf(toy, tmp_path / "x.gguf", name="a name")
    found = read(done.path)
    wanted = {
        "general.architecture": "llama",
        "general.name": "a name",
        "general.file_type": 32,
        "llama.block_count": 2,
        "llama.context_length": 48,  # the window: within it there is none
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 512,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": (toy / "chat_template.jinja").read_text(),
    }
    assert {key: found.get(key) for key in wanted} == wanted
    assert "tokenizer.ggml.bos_token_id" not in found
    assert found["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert len(done.notes) == 1 and "sliding_window=48" in done.notes[0]


def test_rows_without_a_token_and_ends(tied: Path, tmp_path: Path) -> None:
    """Of several end tokens the one of the template is eos; the others have a place each."""
    folder = tmp_path / "policy"
    ldalign.save_model(ldalign.load_model(tied), folder, source=tied)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1, 2, 7]}))
    done = export_gguf(folder, tmp_path / "x.gguf")
    found = read(done.path)
    assert found["tokenizer.ggml.tokens"][511:] == [
        found["tokenizer.ggml.tokens"][511],
        *(f"[PAD{i}]" for i in range(512, 520)),
    ]
    assert set(found["tokenizer.ggml.token_type"][512:]) == {5}
    assert [found[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot", "eom")] == [2, 0, 1]
    assert len(done.notes) == 1 and "more end tokens" in done.notes[0]


# --------------------------------------------------------------------------------------- tokenizers


def as_sentencepiece_has_it(made: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Completes the merges: every way to a piece, the pieces in the order of their scores."""
    description = json.loads(made.to_str())
    model = description["model"]
    pieces = dict.fromkeys("".join(merge) for merge in model["merges"])
    model["merges"] = [
        [piece[:at], piece[at:]]
        for piece in pieces
        for at in range(1, len(piece))
        if piece[:at] in model["vocab"] and piece[at:] in model["vocab"]
    ]
    return tokenizers.Tokenizer.from_str(json.dumps(description))


def llama_cpp_ids(found: dict[str, Any], text: str) -> list[int]:
    """llama.cpp's SentencePiece tokenizer: of all neighbours those are joined whose piece has the
    best score, the leftmost first; what is no piece at last is bytes.
    """
    tokens = found["tokenizer.ggml.tokens"]
    ids = {token: i for i, token in enumerate(tokens)}
    scores = found["tokenizer.ggml.scores"]
    text = (" " if found["tokenizer.ggml.add_space_prefix"] else "") + text
    parts = list(text.replace(" ", "▁"))
    while True:
        joined = [a + b for a, b in itertools.pairwise(parts)]
        known = [(-scores[ids[piece]], at) for at, piece in enumerate(joined) if piece in ids]
        if not known:
            break
        _, at = min(known)
        parts[at : at + 2] = [joined[at]]
    out = []
    for part in parts:
        out += [ids[part]] if part in ids else [ids[f"<0x{b:02X}>"] for b in part.encode()]
    return out


TEXTS = [*CORPUS, "lazy clips altogether  sold", " in front", "Größe 42\n\n🙂", "a", "soldsold"]


def test_sentencepiece_tokens_are_those_of_llama_cpp(tmp_path: Path) -> None:
    made = as_sentencepiece_has_it(sentencepiece_tokenizer())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    folder = write_tokenizer_folder(tmp_path / "policy", made, ZEPHYR_TEMPLATE, **names)
    sizes = CONFIG | {"vocab_size": made.get_vocab_size() + 3, "bos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(sizes))
    done = export_gguf(lively(folder), tmp_path / "x.gguf")
    found = read(done.path)
    for text in TEXTS:
        assert llama_cpp_ids(found, text) == made.encode(text, add_special_tokens=False).ids, text
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.pre"] == "default"
    assert found["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 6, 6]
    assert found["tokenizer.ggml.bos_token_id"] == 1 and found["tokenizer.ggml.add_bos_token"]
    assert "bos_token" in found["tokenizer.chat_template"], "as the model was trained"
    # transformers builds merges of its own from the scores
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    for text in TEXTS[:3]:
        theirs = peer.encode(text, add_special_tokens=False)
        assert theirs == made.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize(("scheme", "prefix", "noted"), [("first", True, 1), ("never", False, 0)])
def test_the_space_before_a_text(scheme: str, prefix: bool, noted: int, tmp_path: Path) -> None:
    made = as_sentencepiece_has_it(sentencepiece_tokenizer(scheme))
    write_tokenizer_folder(tmp_path, made, "", eos_token="</s>")
    vocabulary = read_vocabulary(tmp_path, made.get_vocab_size())
    assert (vocabulary.space_prefix, len(vocabulary.notes)) == (prefix, noted)


def split_by(pre: str) -> tokenizers.Tokenizer:
    """A byte-level BPE that splits as tokenizer.json of such models says."""
    made = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    steps = PRE_TOKENIZERS[pre][0]
    kind = {"type": "Sequence", "pretokenizers": [{**step, "trim_offsets": True} for step in steps]}
    description = json.loads(made.to_str()) | {"pre_tokenizer": kind}
    description["model"]["ignore_merges"] = PRE_TOKENIZERS[pre][1]
    return tokenizers.Tokenizer.from_str(json.dumps(description))


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_pre_tokenizers_are_known_by_what_they_do(pre: str, tmp_path: Path) -> None:
    write_tokenizer_folder(tmp_path, split_by(pre), "", eos_token="b")
    assert read_vocabulary(tmp_path, 3).pre == pre


def _changed(**changes: Any) -> tokenizers.Tokenizer:
    made = split_by("gpt-2")
    for name, value in changes.items():
        setattr(made, name, value)
    return made


REFUSED = {
    "a normalizer": (_changed(normalizer=normalizers.NFC()), "with the normalizer NFC"),
    "another pattern": (
        _changed(pre_tokenizer=pre_tokenizers.Split(tokenizers.Regex(r"\d"), "isolated")),
        "a pre-tokenizer other than smollm, gpt-2",
    ),
    "a space of its own": (
        _changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "a pre-tokenizer other than",
    ),
    "words first": (
        _changed(model=models.BPE({"a": 0, "b": 1}, [], ignore_merges=True)),
        "gpt-2 with ignore_merges=True",
    ),
    "no BPE": (tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")), "of type WordLevel"),
    "merges of a BPE": (sentencepiece_tokenizer(), "merges that are not SentencePiece's"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tokenizer_that_llama_cpp_lacks(case: str, tmp_path: Path) -> None:
    made, message = REFUSED[case]
    end = "</s>" if made.token_to_id("</s>") is not None else "b"
    write_tokenizer_folder(tmp_path, made, "", eos_token=end)
    with pytest.raises(InputError, match=message) as caught:
        read_vocabulary(tmp_path, 1000)
    assert str(caught.value).startswith(f"{tmp_path / 'tokenizer.json'}: llama.cpp would not")


# ---------------------------------------------------------------------------------- files, refusals


def test_a_write_that_fails_leaves_nothing(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.gguf"
    count = 0

    def fails(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > 5:
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fails)
    with pytest.raises(EnvironmentProblem, match=r"x.gguf: cannot be written: No space left"):
        export_gguf(toy, out)
    assert count == 6 and not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_kept(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    out.write_text("mine")
    with pytest.raises(InputError, match=r"x.gguf: is there already; .*--force"):
        export_gguf(toy, out)
    with pytest.raises(InputError, match=r"x.gguf: is there already and no GGUF file"):
        export_gguf(toy, out, force=True)  # a model's own weights, say
    assert out.read_text() == "mine"
    out.write_bytes(b"GGUF of an earlier time")
    with pytest.raises(InputError, match=r"x.gguf: is there already; .*--force"):
        export_gguf(toy, out)
    export_gguf(toy, out, force=True)
    assert out.stat().st_size > 1000 and list(tmp_path.iterdir()) == [out]


def test_a_disk_that_is_full_is_said(toy: Path, tmp_path: Path) -> None:
    """Not a failure that a test makes, but one that the system tells, in a tensor's data."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(EnvironmentProblem, match=r"x.gguf: cannot be written: File too large"):
            export_gguf(toy, tmp_path / "x.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_weights_beyond_float16_are_refused(toy: Path, tmp_path: Path) -> None:
    model = ldalign.load_model(toy)
    with torch.no_grad():
        model.lm_head.weight[3, 5] = 1e5
    ldalign.save_model(model, tmp_path / "policy", source=toy)
    with pytest.raises(InputError, match=r"lm_head.weight holds NaN or Inf as float16"):
        export_gguf(tmp_path / "policy", tmp_path / "x.gguf", "f16")
    with torch.no_grad():
        model.lm_head.weight[3, 5] = 1e8
    ldalign.save_model(model, tmp_path / "policy", source=toy)
    with pytest.raises(InputError, match=r"more than q8_0 holds; give dtype=bf16"):
        export_gguf(tmp_path / "policy", tmp_path / "x.gguf", "q8_0")


def test_the_script(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into the folder beside the policy, or where it is told; a run stands for its result."""
    export.main(["gguf", str(toy), "dtype=f16"])
    beside = toy.parent / "policy-f16.gguf"
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"{beside}: 21 tensors as f16, ") and "sliding_window" in said[0]
    assert read(beside)["general.name"].endswith("-" + toy.parent.name)
    beside.unlink()
    (toy / "below").mkdir()
    monkeypatch.chdir(toy / "below")
    export.main(["gguf", "..", "dtype=f16"])
    (toy / "below").rmdir()
    beside.unlink()
    run = tmp_path / "run"
    (run / "iteration_0").mkdir(parents=True)
    (run / "iteration_0/policy").symlink_to(toy)
    (run / "selected.json").write_text(json.dumps({"folder": "iteration_0/policy"}))
    export.main(["gguf", str(run), str(tmp_path / "a=b.gguf")])
    assert read(tmp_path / "a=b.gguf")["general.name"] == "run-iteration_0"
    export.main(["--help"])
    assert "train/export.py gguf FOLDER" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"^what is to be written\? give: gguf FOLDER"),
        (["onnx", "x"], "^onnx: what is to be written"),
        (["gguf"], r"gguf: give FOLDER \[OUT.gguf\], one or two names; there are 0"),
        (["gguf", "nowhere"], "model 'nowhere': no such folder"),
        (["gguf", "x", "dtype=q4"], "dtype=q4: expected one of f32, f16, bf16, q8_0"),
        (["gguf", "x", "dtyp=f16"], "dtyp=f16: dtyp: unknown key"),
        (["gguf", "x", "-f"], "-f: unknown option"),
        (["gguf", "TOY", "no/such/folder/x.gguf"], "the folder no/such/folder is not there"),
        (["gguf", "TOY", "."], r"^\.: is a folder"),
        (["gguf", "TMP"], "has no config.json; expected a model folder"),
    ],
)
def test_the_script_refuses(arguments: list[str], message: str, toy: Path, tmp_path: Path) -> None:
    places = {"TOY": str(toy), "TMP": str(tmp_path)}
    with pytest.raises(InputError, match=message):
        export.main([places.get(argument, argument) for argument in arguments])


def test_a_gpt2_is_refused(tmp_path: Path) -> None:
    from tiny import gpt2

    save_model(gpt2(), tmp_path / "gpt2")
    with pytest.raises(InputError, match=r"gpt2: is a GPT-2; Mistral and Llama"):
        export_gguf(tmp_path / "gpt2", tmp_path / "x.gguf")


# ------------------------------------------------------------------------------------------ SmolLM2

# By what llama.cpp's converter knows a pre-tokenizer: the sha256 of this text's ids.
CHECKED_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis "
    "concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български ''''''```````"
    "\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make "
    "it, 'D you like some tea? We'Ve a'lL"
)
SMOLLM = "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249"


def test_smollm2_is_what_llama_cpp_takes_it_for(smollm2_folder: Path) -> None:
    assert read_vocabulary(smollm2_folder, 49152).pre == "smollm"
    ids = ldalign.load_tokenizer(smollm2_folder).encode(CHECKED_TEXT)
    assert hashlib.sha256(str(ids).encode()).hexdigest() == SMOLLM


@pytest.mark.slow
def test_smollm2_there_and_back(smollm2_folder: Path, tmp_path: Path) -> None:
    """Read back, every file is the same to the byte, and so are the logits."""
    export_gguf(smollm2_folder, tmp_path / "x.gguf")
    convert_gguf(tmp_path / "x.gguf", tmp_path / "back")
    for path in (tmp_path / "back").iterdir():
        assert path.read_bytes() == (smollm2_folder / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_smollm2_in_transformers(smollm2_folder: Path, tmp_path: Path) -> None:
    """Eight bits move the logits little, and the likeliest token hardly ever."""
    export_gguf(smollm2_folder, tmp_path / "x.gguf", "q8_0")
    ids = torch.tensor([ldalign.load_tokenizer(smollm2_folder).encode("\n".join(CORPUS))])
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        theirs = peer(ids).logits
        del peer
        ours = ldalign.load_model(smollm2_folder, torch.float32)(ids)
    assert (theirs - ours).pow(2).mean().sqrt() < 0.05 * ours.std()
    assert (theirs.argmax(-1) == ours.argmax(-1)).float().mean() > 0.9
