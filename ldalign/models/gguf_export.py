"""A model folder written as one GGUF file, for llama.cpp and what is built on it (Ollama).

The layout is that of llama.cpp's converter for its `llama` architecture, which serves Mistral and
Llama alike (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). What its tokenizers cannot
do as tokenizer.json says is refused; where they come close, it is said.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch

from ldalign.data.tokenizer import Tokenizer, load_tokenizer
from ldalign.data.tokenizer_export import exported_templates
from ldalign.data.tokenizer_files import read_settings, read_tokenizer_json, special_names
from ldalign.models.gguf import (
    BLOCK_NAMES,
    BYTE_TOKEN,
    CONTROL_TOKEN,
    NORMAL_TOKEN,
    PRE_TOKENIZERS,
    TOP_NAMES,
    UNKNOWN_TOKEN,
    UNUSED_TOKEN,
    USER_TOKEN,
    half_split_to_interleaved,
)
from ldalign.models.mistral import Mistral, MistralConfig
from ldalign.models.stored_tensors import Stored, fill, new_buffer, stored_tensors
from ldalign.models.weights import check_model
from ldalign.system.errors import EnvironmentProblem, InputError
from ldalign.system.files import PARTIAL, sync, writing

GgufDtype = Literal["f32", "f16", "bf16", "q8_0"]
DTYPES: tuple[GgufDtype, ...] = ("f32", "f16", "bf16", "q8_0")
# The key general.file_type (llama.cpp's llama_ftype), and the type of the matrices.
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
Q8_0_MAX = 127 * 65504.0  # a block's scale is a float16
SPACE = "\u2581"  # what SentencePiece writes for a space


@dataclass(frozen=True)
class Written:
    """What `export_gguf` has written."""

    path: Path
    tensors: int
    size: int  # bytes
    notes: list[str]  # what llama.cpp does otherwise than transformers and ldalign, a sentence each


@dataclass
class Vocabulary:
    """A tokenizer as GGUF has it."""

    model: Literal["gpt2", "llama"]  # byte-level BPE, SentencePiece
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)  # gpt2 alone
    scores: list[float] = field(default_factory=list)  # llama alone
    space_prefix: bool = False
    notes: list[str] = field(default_factory=list)


def export_gguf(
    folder: Path, out: Path, dtype: GgufDtype = "bf16", name: str = "", force: bool = False
) -> Written:
    """Writes the model folder as the GGUF file `out`, wholly or not at all.

    dtype: of the matrices; norms stay float32, and so does what q8_0's blocks of 32 do not divide,
    as float16. One tensor at a time is in memory. name: general.name, which programs show.
    force: an existing file is replaced.

    Raises InputError for a folder that is no Mistral or Llama model, a tokenizer that llama.cpp
    does not have, and an existing file; EnvironmentProblem without the gguf package, or where the
    file cannot be written.
    """
    try:
        import gguf
    except ImportError as error:
        raise EnvironmentProblem(
            "package gguf is missing, which writes GGUF files; pip install gguf"
        ) from error
    refuse_existing(out, force)
    model = check_model(folder)
    if not isinstance(model, Mistral):
        raise InputError(f"{folder}: is a GPT-2; Mistral and Llama layouts are exported to GGUF")
    tokenizer = load_tokenizer(folder)
    vocabulary = read_vocabulary(folder, model.config.vocab_size)
    notes = [*vocabulary.notes, *_window_note(model.config)]
    partial = out.with_name(out.name + PARTIAL)
    tensors = _in_gguf_order(folder, model.config)
    size = sum(t.shape[0] * t.row_bytes for t in tensors.values())
    try:
        with writing(out, size), contextlib.closing(gguf.GGUFWriter(None, "llama")) as writer:
            writer.add_name(name or out.stem)
            _write_settings(writer, model.config, dtype)
            notes += _write_tokenizer(writer, tokenizer, vocabulary)
            kinds = {name: _kind(gguf, t.shape, dtype) for name, t in tensors.items()}
            for name, stored in tensors.items():
                _announce(gguf, writer, name, stored, kinds[name])
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, stored in tensors.items():
                heads = _heads(name, model.config)
                data: Any = _Bytes(_data(gguf, stored, heads, kinds[name]))
                writer.write_tensor_data(data)
            writer.close()
            sync(partial)
            partial.rename(out)
            sync(out.absolute().parent)
    finally:
        partial.unlink(missing_ok=True)
    return Written(out, len(tensors), out.stat().st_size, notes)


class _Bytes:
    """A tensor's data for the writer, which calls numpy's `tofile`: that loses the system's error,
    and would tell a full disk as a bug.
    """

    def __init__(self, data: Any) -> None:
        self.data, self.nbytes = np.ascontiguousarray(data), data.nbytes

    def tofile(self, file: IO[bytes]) -> None:
        """Writes all of it."""
        file.write(self.data.data)


def refuse_existing(out: Path, force: bool) -> None:
    """Raises InputError for a file that would be replaced, where `force` does not say so or where
    it is no GGUF file (a model's weights, say), and for a folder or none to write in.
    """
    if out.is_dir():
        raise InputError(f"{out}: is a folder; give the name of a file, such as {out / 'x.gguf'}")
    if out.exists() and not force:
        raise InputError(f"{out}: is there already; give another name, or --force to replace it")
    if out.exists() and not _may_go(out):
        raise InputError(f"{out}: is there already and no GGUF file; give another name")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: the folder {out.parent} is not there; make it first")


def _may_go(out: Path) -> bool:
    """Whether a file is one of GGUF's, or empty."""
    if not out.is_file():
        return False
    with out.open("rb") as file:
        return file.read(4) in (b"GGUF", b"")


# ------------------------------------------------------------------------------------------ weights


def _in_gguf_order(folder: Path, config: MistralConfig) -> dict[str, Stored]:
    """The folder's tensors by their GGUF names; a head that is the embedding once."""
    stored = stored_tensors(folder)
    top = {ours: theirs for theirs, ours in TOP_NAMES.items()}
    if config.tie_word_embeddings:
        del top["lm_head.weight"]
    names = {theirs: ours for ours, theirs in top.items()}
    for layer in range(config.num_hidden_layers):
        for theirs, ours in BLOCK_NAMES.items():
            names[f"blk.{layer}.{theirs}.weight"] = f"model.layers.{layer}.{ours}.weight"
    return {theirs: stored[ours] for theirs, ours in names.items()}


def _heads(name: str, config: MistralConfig) -> int | None:
    """The heads of a projection whose rows llama.cpp has in another order; None for others."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return heads.get(name.split(".")[-2])


def _data(gguf: Any, stored: Stored, heads: int | None, kind: Any) -> Any:
    """A tensor's data as GGUF has it, rows in llama.cpp's order.

    Raises InputError for NaN and Inf, also where they come of a narrower dtype.
    """
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind.name, torch.float32)
    weight = torch.empty(stored.shape, dtype=dtype)
    fill(weight, stored, new_buffer(stored))
    if heads is not None:
        weight = half_split_to_interleaved(weight, heads).contiguous()
    if kind.name == "BF16":
        return weight.view(torch.uint8).numpy()
    if kind.name == "Q8_0" and weight.abs().max() > Q8_0_MAX:
        raise InputError(f"{stored.where} reaches more than q8_0 holds; give dtype=bf16")
    return gguf.quants.quantize(weight.numpy(), kind)


def _kind(gguf: Any, shape: tuple[int, ...], dtype: GgufDtype) -> Any:
    """The GGUF type of a tensor: norms float32, rows of no whole blocks float16."""
    kinds = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return kinds.F32
    if dtype == "q8_0" and shape[-1] % gguf.GGML_QUANT_SIZES[kinds.Q8_0][0]:
        return kinds.F16
    return kinds[dtype.upper()]


def _announce(gguf: Any, writer: Any, name: str, stored: Stored, kind: Any) -> None:
    """Tells the writer a tensor's shape and size, before any tensor is read."""
    if kind.name in ("F32", "F16"):
        dtype, shape = np.dtype("float32" if kind.name == "F32" else "float16"), stored.shape
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
    else:  # bytes
        shape = gguf.quants.quant_shape_to_byte_shape(stored.shape, kind)
        writer.add_tensor_info(name, shape, np.dtype("uint8"), int(np.prod(shape)), kind)


def _write_settings(writer: Any, config: MistralConfig, dtype: GgufDtype) -> None:
    writer.add_type("model")
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(2)  # ggml's, of all its block formats today
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _context(config: MistralConfig) -> int:
    """The longest text: llama.cpp's llama has no window, and within the window there is none."""
    return min(config.max_position_embeddings, config.sliding_window or 2**62)


def _window_note(config: MistralConfig) -> Iterator[str]:
    if (window := config.sliding_window) and window < config.max_position_embeddings:
        yield (
            f"sliding_window={window}: llama.cpp has no window for this architecture; the file "
            f"says a context of {window} tokens, in which there is no difference"
        )


# ---------------------------------------------------------------------------------------- tokenizer


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """Returns a folder's tokenizer as GGUF has it, one token for each of the embedding's rows.

    Raises InputError for one that llama.cpp's tokenizers would not follow.
    """
    description = read_tokenizer_json(folder, read_settings(folder))
    model, where = description["model"], folder / "tokenizer.json"
    if model.get("type", "BPE") != "BPE":
        raise _unknown(where, f"a tokenizer of type {model['type']}")
    odd = [
        k for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(k)
    ]
    if odd:
        raise _unknown(where, f"a BPE with {odd[0]}={model[odd[0]]!r}")
    merges = [tuple(m.split(" ", 1) if isinstance(m, str) else m) for m in model["merges"]]
    if model.get("byte_fallback"):
        vocabulary = _sentencepiece(description, merges, where)
    else:
        vocabulary = _byte_level(description, merges, where)
    _number(vocabulary, description, rows, where)
    return vocabulary


def _unknown(where: Path, what: str) -> InputError:
    return InputError(
        f"{where}: llama.cpp would not make the same tokens of {what}; such a tokenizer is not "
        "exported to GGUF"
    )


def _number(vocabulary: Vocabulary, description: Mapping[str, Any], rows: int, where: Path) -> None:
    """Fills in every token's text, type and score, in the order of the ids."""
    model = description["model"]
    text = {i: token for token, i in model["vocab"].items()}
    added = {token["id"]: token for token in description["added_tokens"]}
    text |= {i: token["content"] for i, token in added.items()}
    top, score = max(text), {}
    if top >= rows:
        raise InputError(f"{where}: has a token with id {top}, the embedding {rows} rows")
    if vocabulary.model == "llama":
        score = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
        vocabulary.scores = []
    vocabulary.tokens = []
    for i in range(rows):
        token, kind = text.get(i), NORMAL_TOKEN
        if token is None:
            token, kind = f"[PAD{i}]", UNUSED_TOKEN
        elif vocabulary.model == "llama" and token == model.get("unk_token"):
            kind = UNKNOWN_TOKEN
        elif i in added:
            kind = CONTROL_TOKEN if added[i]["special"] else USER_TOKEN
        elif vocabulary.model == "llama" and re.fullmatch("<0x[0-9A-F]{2}>", token):
            kind = BYTE_TOKEN
        vocabulary.tokens.append(token)
        vocabulary.types.append(kind)
        if vocabulary.model == "llama":
            # What no merge makes is never merged to: below all that is.
            vocabulary.scores.append(score.get(token, 0.0 if kind != NORMAL_TOKEN else -1e9))


def _byte_level(
    description: Mapping[str, Any], merges: list[tuple[str, ...]], where: Path
) -> Vocabulary:
    """A BPE over bytes; llama.cpp knows how to split the text by the pre-tokenizer's name."""
    if description.get("normalizer") is not None:
        kind = description["normalizer"].get("type")
        raise _unknown(where, f"a byte-level BPE with the normalizer {kind}")
    steps = _steps(description.get("pre_tokenizer"), "pretokenizers")
    ignores = bool(description["model"].get("ignore_merges"))
    for pre, (known, merged_last) in PRE_TOKENIZERS.items():
        if steps == known:
            if ignores != merged_last:
                raise _unknown(where, f"the pre-tokenizer {pre} with ignore_merges={ignores}")
            return Vocabulary("gpt2", pre, [], [], [" ".join(merge) for merge in merges])
    shown = json.dumps(description.get("pre_tokenizer"), ensure_ascii=False)
    raise _unknown(where, f"a pre-tokenizer other than {', '.join(PRE_TOKENIZERS)}: {shown[:200]}")


def _steps(description: Any, inner: str) -> list[dict[str, Any]]:
    """The parts of a pre-tokenizer or normalizer, one after the other, without what changes no id.

    inner: what the library calls the parts of a Sequence.
    """
    if description is None:
        return []
    if description.get("type") == "Sequence":
        return [step for part in description[inner] for step in _steps(part, inner)]
    step = {key: value for key, value in description.items() if key != "trim_offsets"}
    if step["type"] == "ByteLevel":
        step = {"add_prefix_space": True, "use_regex": True} | step
    return [step]


def _sentencepiece(
    description: Mapping[str, Any], merges: list[tuple[str, ...]], where: Path
) -> Vocabulary:
    """A BPE that was SentencePiece's: llama.cpp merges to the piece with the best score, whatever
    its parts; the order of the merges has these scores, where all ways to a piece stand together.
    """
    prefix, notes = _space_prefix(description, where)
    vocabulary: Mapping[str, int] = description["model"]["vocab"]
    reached = list(dict.fromkeys("".join(merge) for merge in merges))
    blocks = [
        piece
        for i, merge in enumerate(merges)
        if (piece := "".join(merge)) != "".join(merges[i - 1]) or i == 0
    ]
    ways = {*merges}
    for piece in vocabulary:
        for at in range(1, len(piece)):
            way = (piece[:at], piece[at:])
            if way not in ways and way[0] in vocabulary and way[1] in vocabulary:
                raise _unknown(
                    where,
                    f"merges that are not SentencePiece's, by which {piece!r} is not made of "
                    f"{way[0]!r} and {way[1]!r}",
                )
    if blocks != reached:
        raise _unknown(where, "merges that are not SentencePiece's, in the order of no scores")
    scores = [-float(i) for i in range(len(reached))]
    return Vocabulary("llama", "default", reached, [], [], scores, prefix, notes)


def _space_prefix(description: Mapping[str, Any], where: Path) -> tuple[bool, list[str]]:
    """Whether a space is put before a text, and what llama.cpp does otherwise about it."""
    normalizer = _steps(description.get("normalizer"), "normalizers")
    before = _steps(description.get("pre_tokenizer"), "pretokenizers")
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if not before and normalizer == [{"type": "Prepend", "prepend": SPACE}, replaces]:
        return True, []
    if not before and normalizer == [replaces]:
        return False, []
    one = before[0] if len(before) == 1 and not normalizer else {}
    if one.get("type") != "Metaspace" or one.get("replacement") != SPACE or one.get("split", True):
        raise _unknown(where, "a BPE with byte fallback and this normalizer and pre-tokenizer")
    scheme = one.get("prepend_scheme", "always")
    if scheme == "never":
        return False, []
    when = "at the beginning alone" if scheme == "first" else "where there is none yet"
    return True, [
        f"the tokenizer puts a space before a text {when}; llama.cpp does so after every special "
        "token, and a few tokens there may differ"
    ]


def _write_tokenizer(writer: Any, tokenizer: Tokenizer, vocabulary: Vocabulary) -> list[str]:
    """Adds vocabulary, special tokens and chat templates; returns what is to be said of them."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
    settings = read_settings(tokenizer.folder)
    names = special_names(settings, tokenizer.folder / "tokenizer_config.json")
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    named = {role: ids[names[f"{role}_token"]] for role in ROLES if f"{role}_token" in names}
    ends = list(tokenizer.end_ids)
    if named.get("eos") in ends:  # the one that a template writes, most often, goes first
        ends.sort(key=lambda end: end != named["eos"])
    adders = {"bos": writer.add_bos_token_id, "unk": writer.add_unk_token_id}
    adders |= {"pad": writer.add_pad_token_id}
    for role, add in adders.items():
        if role in named:
            add(named[role])
    end_adders = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for end, add in zip(ends, end_adders, strict=False):
        add(end)
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    templates = exported_templates(tokenizer)
    if templates:
        writer.add_chat_template(
            [{"name": name, "template": text} for name, text in templates.items()]
        )
    rest = [vocabulary.tokens[end] for end in ends[len(end_adders) :]]
    if not rest:
        return []
    return [f"{', '.join(map(repr, rest))}: more end tokens than GGUF has places for; left out"]


ROLES = ("bos", "eos", "unk", "pad")
