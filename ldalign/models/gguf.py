"""GGUF files: whether one is whole, and the model folder that it becomes.

A file is checked before the gguf package reads it, which believes every count and length it finds.
Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little endian: magic, version,
number of tensors, number of key/value pairs; the pairs (key, type, value); for each tensor name,
dimensions, type, offset; then, aligned, the tensors' data. Every count here is held against the
bytes that are left in the file.
"""

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ldalign.system.errors import EnvironmentProblem, InputError, LdalignError, is_failure
from ldalign.system.files import sync

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

# Value type -> bytes.
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4


def check_gguf(path: Path, block_sizes: Mapping[int, tuple[int, int]]) -> None:
    """Raises InputError, with file and byte, where a file is not whole GGUF of version 2 or 3.

    block_sizes: tensor type -> (elements a block, bytes a block), as the gguf package lists them.
    """
    with path.open("rb") as file:
        scan = _Scan(path, file)
        magic, version = scan.take(4), scan.number("<I")
        if magic != b"GGUF" or version not in (2, 3):
            raise scan.broken("not a GGUF file of version 2 or 3")
        tensors, pairs = scan.count("<Q", least=24), scan.count("<Q", least=13)
        for _ in range(pairs):
            scan.text()
            scan.value(scan.number("<I"))
        ends = [0]
        for _ in range(tensors):
            scan.text()
            dimensions = [scan.number("<Q") for _ in range(scan.number("<I", most=MAX_DIMENSIONS))]
            kind, offset = scan.number("<I"), scan.number("<Q")
            if kind not in block_sizes:
                raise scan.broken(f"tensor type {kind} is not known")
            elements, size = block_sizes[kind]
            ends.append(offset + math.prod(dimensions) // elements * size)
        if scan.file.tell() + max(ends) > scan.size:
            raise scan.broken(
                f"the tensors end at byte {scan.file.tell() + max(ends)} or later, the file has "
                f"{scan.size}"
            )


class _Scan:
    """Reads a file from front to back, and raises InputError where it cannot go on."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.size = path, file, path.stat().st_size

    def broken(self, what: str) -> InputError:
        """The error to raise, with the byte at which the reading stands."""
        return InputError(
            f"{self.path}: byte {self.file.tell()}: broken GGUF: {what}; download the file again"
        )

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > self.size - self.file.tell():
            raise self.broken(f"{count} bytes should follow, {self.size - self.file.tell()} do")
        return self.file.read(count)

    def number(self, form: str, most: int = 2**64) -> int:
        """The next number, of a format of `struct`."""
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        if value > most:
            raise self.broken(f"{value} is more than {most}")
        return value

    def count(self, form: str, least: int) -> int:
        """A number of things that each take `least` bytes or more, and so fit the file."""
        value = self.number(form)
        if value * least > self.size - self.file.tell():
            raise self.broken(
                f"{value} entries cannot be in the {self.size - self.file.tell()} bytes that follow"
            )
        return value

    def text(self) -> None:
        """Steps over a text."""
        self.take(self.number("<Q"))

    def value(self, kind: int) -> None:
        """Steps over a value of this type."""
        if kind in SCALARS:
            self.take(SCALARS[kind])
        elif kind == STRING:
            self.text()
        elif kind == ARRAY:
            inner = self.number("<I")
            # The gguf package does not read arrays of arrays rightly.
            if inner not in SCALARS and inner != STRING:
                raise self.broken(f"array of type {inner}")
            length = self.count("<Q", least=SCALARS.get(inner, 8))
            for _ in range(length if inner == STRING else 0):
                self.text()
            self.take(SCALARS.get(inner, 0) * length)
        else:
            raise self.broken(f"value type {kind} is not known")


# Token types of ggml (gguf.TokenType). Those of control and user tokens are matched as whole
# strings, before any merge.
NORMAL_TOKEN, UNKNOWN_TOKEN, CONTROL_TOKEN, USER_TOKEN, UNUSED_TOKEN, BYTE_TOKEN = range(1, 7)

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}  # GPT-2's pattern


def _split(pattern: str) -> list[dict[str, Any]]:
    """A pre-tokenizer that splits by a pattern, then writes bytes as characters."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return [{**split, "invert": False}, {**_BYTE_LEVEL, "use_regex": False}]


# Pre-tokenizers by llama.cpp's names (`tokenizer.ggml.pre`): how they split a text, as
# tokenizer.json says it (its src/llama-vocab.cpp has the same patterns), and whether a word that is
# a token as it is becomes that one, whatever the merges make of it (ignore_merges).
PRE_TOKENIZERS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    # SmolLM splits digits one by one
    "smollm": ([{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL], False),
    "gpt-2": ([_BYTE_LEVEL], False),
    "llama-bpe": (
        _split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        True,
    ),
    "tekken": (
        _split(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
            r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        True,
    ),
}


def convert_gguf(source: Path, folder: Path) -> None:
    """Writes a llama-architecture GGUF file as a Hugging Face model folder, weights in bf16.

    Raises InputError where the file is damaged or another network's, EnvironmentProblem
    without the gguf package.
    """
    try:
        import gguf
    except ImportError as error:
        raise EnvironmentProblem(
            "package gguf is missing, which reads the default model; pip install gguf"
        ) from error
    check_gguf(source, {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()})
    try:
        write_model_folder(gguf.GGUFReader(source), folder)
    except (LdalignError, OSError):
        raise
    except BaseException as error:  # of the package or of ours, by values that no whole file has
        if not is_failure(error):
            raise
        raise InputError(
            f"{source}: broken GGUF: {one_line(error)}; download the file again"
        ) from error


def write_model_folder(reader: "GGUFReader", folder: Path) -> None:
    """Writes what `reader` has open as a Hugging Face model folder, weights in bf16.

    Raises InputError for a network or tokenizer other than Llama's with byte-level BPE.
    """
    from safetensors.torch import save_file

    metadata = {key: field.contents() for key, field in reader.fields.items()}
    kinds = metadata.get("general.architecture"), metadata.get("tokenizer.ggml.model")
    if kinds != ("llama", "gpt2"):
        raise InputError(
            f"{folder}: the GGUF file is not a llama-architecture model with a byte-level BPE "
            "tokenizer"
        )
    folder.mkdir(parents=True)
    tensors = _tensors(reader, metadata)
    config = model_config(metadata, tied="lm_head.weight" not in tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    os.chmod(folder / "model.safetensors", 0o644)  # safetensors creates it for the owner only
    write_json(folder / "config.json", config)
    ids = {key: config[key] for key in CONFIG_IDS if key in config}
    write_json(folder / "generation_config.json", ids)
    _write_tokenizer(metadata, folder)


def model_config(metadata: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Returns the config.json of a LlamaForCausalLM, from GGUF metadata.

    tied: the head is the embedding.
    """
    hidden, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    ids = {key: metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in CONFIG_IDS.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata.get("llama.attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": metadata["llama.context_length"],
        "rope_theta": metadata["llama.rope.freq_base"],
        # GGUF stores fp32: 9.999999747378752e-06 is 1e-5 again at fp32's seven digits.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        **{key: value for key, value in ids.items() if value is not None},
        "torch_dtype": "bfloat16",
    }


# Keys of config.json, and GGUF's names of these tokens; a file may lack some.
CONFIG_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hugging_face_name(name: str) -> str:
    """Returns a tensor's name in Hugging Face's layout.

    `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`. Raises InputError for a
    tensor that a Llama model does not have.
    """
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in BLOCK_NAMES:
        raise InputError(f"GGUF tensor {name!r} has no place in a Llama model")
    return f"model.layers.{match[1]}.{BLOCK_NAMES[match[2]]}.weight"


def _tensors(reader: "GGUFReader", metadata: dict[str, Any]) -> "dict[str, torch.Tensor]":
    """Every tensor dequantised in fp32, then rounded to bf16, under its Hugging Face name."""
    import torch
    from gguf.quants import dequantize

    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    tensors = {}
    for entry in reader.tensors:
        # A copy: what the package gives lies in the mapped file.
        weight = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy())
        part = entry.name.split(".")[-2]
        if part in heads:
            weight = interleaved_to_half_split(weight, heads[part])
        tensors[hugging_face_name(entry.name)] = weight.to(torch.bfloat16).contiguous()
    return tensors


def interleaved_to_half_split(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Undoes llama.cpp's permutation of a Q or K projection (heads * head_dim, hidden).

    llama.cpp rotates neighbouring rows (0, 1), (2, 3), ... of a head; Hugging Face rotates row i
    with row i + head_dim / 2. So row 2 i + j of a head goes back to row j * head_dim / 2 + i.
    """
    rows, columns = weight.shape
    neighbours = weight.reshape(heads, rows // heads // 2, 2, columns)
    return neighbours.transpose(1, 2).reshape(rows, columns)


def half_split_to_interleaved(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Gives the rows of a Q or K projection the order of llama.cpp: `interleaved_to_half_split`,
    undone.
    """
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def _write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    template = metadata["tokenizer.chat_template"]
    tokens = metadata["tokenizer.ggml.tokens"]
    _build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
    special = {
        f"{role}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    write_json(folder / "special_tokens_map.json", special)
    settings = {
        # The class that takes tokenizer.json as it is; others rebuild the pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        "add_prefix_space": bool(metadata.get("tokenizer.ggml.add_space_prefix", False)),
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "chat_template": template,
    }
    write_json(folder / "tokenizer_config.json", settings)


def _build_tokenizer(metadata: dict[str, Any]) -> Any:
    """The byte-level BPE of the GGUF vocabulary, as a `tokenizers.Tokenizer`."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise InputError(
            f"GGUF pre-tokenizer {pre!r} is not known; expected {', '.join(PRE_TOKENIZERS)}"
        )
    steps, ignores_merges = PRE_TOKENIZERS[pre]
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, merges, ignore_merges=ignores_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([_step(step) for step in steps])
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True):
        if kind in (CONTROL_TOKEN, USER_TOKEN):
            special = kind == CONTROL_TOKEN
            tokenizer.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)])
    return tokenizer


def _step(step: dict[str, Any]) -> Any:
    """One step of PRE_TOKENIZERS, as the tokenizers library has it."""
    from tokenizers import Regex, pre_tokenizers

    arguments = {key: value for key, value in step.items() if key != "type"}
    if step["type"] == "Split":
        arguments |= {"pattern": Regex(step["pattern"]["Regex"]), "behavior": "isolated"}
    return getattr(pre_tokenizers, step["type"])(**arguments)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, indented, and has the disk keep it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(path)


def one_line(error: BaseException) -> str:
    """Returns an error's type and message in one line, 300 characters of it at most."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
