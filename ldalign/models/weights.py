"""Model folders in and out: Hugging Face layout, safetensors only, every name, shape and value
checked.

Reading: config.json names the architecture; `model.safetensors`, or the shards that
`model.safetensors.index.json` lists. Writing: bf16 by default, a tied head once, shards of at most
5 GB; what is written loads unchanged in transformers and vLLM. No pickle is ever read, and an index
can name no file outside its folder.

Files are read, not mapped: mapped pages would count as a second model in memory, and a file cut
short under a mapping kills the process.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ldalign.data.tokenizer import save_tokenizer_files
from ldalign.models.gpt2 import GPT2, TRANSPOSED, GPT2Config
from ldalign.models.mistral import Mistral, MistralConfig
from ldalign.models.stored_tensors import (
    DTYPE_NAMES,
    FLOATS,
    INDEX,
    SINGLE,
    Stored,
    fill,
    finite,
    first_few,
    new_buffer,
    read_config,
    same,
    stored_tensors,
)
from ldalign.system import distributed
from ldalign.system.errors import InputError, NumericsError
from ldalign.system.files import save_tensors
from ldalign.system.memory import naming
from ldalign.system.untrusted import refuse_links_out

LanguageModel = Mistral | GPT2
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")  # what `write_weights` calls its own
SHARD_BYTES = 5 * 10**9
MAX_LAYERS = 2000  # building a layer takes a millisecond; the deepest models have some 130
# What helps where the weights do not fit; training alone spreads them over the ranks.
LOWER = (
    "set dtype=bfloat16 (training.master_dtype=bfloat16, and more ranks, to train it), or give a "
    "smaller model"
)


def build(raw: Mapping[str, Any], where: str) -> LanguageModel:
    """The model that a parsed config.json describes, its weights not yet there (meta device)."""
    kind = raw.get("model_type")
    for key in ("num_hidden_layers", "n_layer"):
        if isinstance(raw.get(key), int) and raw[key] > MAX_LAYERS:
            raise InputError(f"{where}: {key} is {raw[key]}; at most {MAX_LAYERS} are built")
    try:
        with torch.device("meta"):
            if kind in ("mistral", "llama"):
                return Mistral(MistralConfig.from_json(dict(raw), where))
            if kind == "gpt2":
                return GPT2(GPT2Config.from_json(dict(raw), where))
    except (RuntimeError, OverflowError) as error:  # sizes whose product no tensor can have
        raise InputError(
            f"{where}: describes a network too large to be built ({' '.join(str(error).split())})"
        ) from None
    raise InputError(
        f"{where}: model_type {kind!r} is not supported; mistral, llama (no rope scaling) and gpt2 "
        "are"
    )


def load_model(
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    cut: Callable[[LanguageModel], Any] | None = None,
) -> LanguageModel:
    """The model of a folder, with its weights in `dtype` on `device`, in `eval` mode.

    cut: gets the model without its weights (meta device, `dtype`) and may shard it
    (`distributed.shard`); then this rank reads its own rows from the files, and nothing else. Peak
    memory is what this rank holds and a few READ_BYTES. Raises InputError naming the file and the
    tensor: missing, extra, misshaped, not finite, or stored as a pickle; OutOfMemory.
    """
    folder = Path(folder)
    model = build(read_config(folder), str(folder / "config.json")).to(dtype)
    stored = _match(model, stored_tensors(folder), folder)
    if cut is not None:
        cut(model)
    with naming(lambda: _too_large(model, folder, dtype, device), LOWER):
        # Made before they are filled, so that nothing lies between them.
        local = {name: _empty_share(p, device) for name, p in model.named_parameters()}
        parts = [
            part
            for name, p in model.named_parameters()
            for part in _parts(model, name, p, local[name], stored)
        ]
        buffer = new_buffer(*(source for _, source in parts))
        # In the order they lie on the disk, which a spinning or networked one rewards.
        for target, source in sorted(parts, key=lambda part: (part[1].path, part[1].offset)):
            fill(target, source, buffer)
    state = {name: _with_share(p, local[name]) for name, p in model.named_parameters()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _too_large(
    model: LanguageModel, folder: Path, dtype: torch.dtype, device: str | torch.device
) -> str:
    count = count_parameters(model)
    gib = count * dtype.itemsize / 2**30
    return (
        f"{folder}: {count / 1e6:.1f} million weights, {gib:.2f} GiB as {DTYPE_NAMES[dtype]}, on "
        f"{device}"
    )


def _empty_share(p: Tensor, device: str | torch.device) -> Tensor:
    """Room for this rank's rows of a parameter."""
    start, stop = distributed.local_rows(p)
    return torch.empty(stop - start, *p.shape[1:], dtype=p.dtype, device=device)


def _with_share(p: Tensor, local: Tensor) -> Tensor:
    """The parameter, its rows on this rank being `local`."""
    if not isinstance(p, DTensor):
        return local
    return DTensor.from_local(
        local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def _parts(
    model: LanguageModel, name: str, p: Tensor, local: Tensor, stored: Mapping[str, Stored]
) -> Iterator[tuple[Tensor, Stored]]:
    """What this rank reads for a parameter: (views of `local`, what the files keep for each)."""
    start, stop = distributed.local_rows(p)
    if isinstance(model, GPT2) and name.endswith(TRANSPOSED):
        if start < stop:
            yield local.T, stored[name].columns(start, stop)
        return
    at = 0  # the parameter's row at which the next stored tensor begins
    for part in stored_state(model, {name: torch.empty(p.shape, device="meta")}):
        rows = stored[part].shape[0]
        first, last = max(start, at), min(stop, at + rows)
        if first < last:
            yield local[first - start : last - start], stored[part].rows(first - at, last - at)
        at += rows


def check_model(folder: str | Path) -> LanguageModel:
    """The model of a folder without its weights (meta device), every tensor's name and shape
    checked in the headers.

    Raises InputError as `load_model` does, and for any link out of the folder; values are not read.
    """
    folder = Path(folder)
    model = build(read_config(folder), str(folder / "config.json"))
    _match(model, check_files(folder), folder)
    return model


def check_files(folder: Path) -> dict[str, Stored]:
    """What is checked of any model folder, whatever the network: its tensors by name, from the
    files' headers.

    Raises InputError: a link out of the folder, and as `stored_tensors`.
    """
    refuse_links_out(folder)
    return stored_tensors(folder)


def save_model(
    model: LanguageModel,
    folder: str | Path,
    source: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a model folder: weights in `dtype`, config.json of `source` with that dtype, and its
    tokenizer files.

    state: the full tensors by name where the model's own are sharded; `model.state_dict()` by
    default.
    """
    folder, source = Path(folder), Path(source)
    where = str(source / "config.json")
    raw = read_config(source)
    raw.pop("torch_dtype", None)  # the older name of the same key
    raw["dtype"] = DTYPE_NAMES[dtype]
    raw["tie_word_embeddings"] = isinstance(model, GPT2) or model.config.tie_word_embeddings
    if build(raw, where).config != model.config:
        raise InputError(
            f"{where}: describes another network than the one to be saved; give its own source "
            "folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(
        stored_state(model, state if state is not None else model.state_dict()), folder, dtype
    )
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    save_tokenizer_files(source, folder)


def stored_state(model: LanguageModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name -> the tensors that model files keep, as views: fused ones in parts,
    GPT-2's transposed.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if isinstance(model, GPT2):
            stored[name] = tensor.T if name.endswith(TRANSPOSED) else tensor
        elif parts := model.stored_parts(name):
            stored |= zip(parts, tensor.split(list(parts.values())), strict=True)
        else:
            stored[name] = tensor
    return stored


def write_weights(
    state: Mapping[str, Tensor], folder: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> None:
    """state (`stored_state`) as `model.safetensors`, or as shards with an index if larger than
    `shard_bytes`.

    Older weights of the same folder go, so that no loader can pick them up. Casts one shard at a
    time. Raises NumericsError for NaN and Inf, which no loader would take back.
    """
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, tensor in state.items():
        nbytes = tensor.numel() * dtype.itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + nbytes, total + nbytes
    files = (
        [SINGLE]
        if len(shards) == 1
        else [_shard_file(i, len(shards)) for i in range(1, len(shards) + 1)]
    )
    for file, names in zip(files, shards, strict=True):
        cast = {name: state[name].detach().to("cpu", dtype) for name in names}
        for name, tensor in cast.items():
            if not finite(tensor):
                raise NumericsError(
                    f"{folder / file}: tensor {name} holds NaN or Inf as {DTYPE_NAMES[dtype]}; not "
                    "saved"
                )
        save_tensors({name: t.contiguous() for name, t in cast.items()}, folder / file)
    if len(shards) > 1:
        weight_map = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        files.append(INDEX)
    for path in folder.iterdir():
        if path.name not in files and (path.name in (SINGLE, INDEX) or SHARD.fullmatch(path.name)):
            path.unlink()


def _shard_file(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _match(model: LanguageModel, tensors: Mapping[str, Stored], folder: Path) -> dict[str, Stored]:
    """Name as `stored_state` has it -> stored tensor. Raises InputError for what does not fit,
    before any is read.
    """
    wanted = {
        name: p.shape for name, p in stored_state(model, dict(model.named_parameters())).items()
    }
    stored: dict[str, Stored] = {}
    for theirs, tensor in tensors.items():
        ours = _our_name(model, theirs)
        if ours in stored:
            raise InputError(
                f"{tensor.where} is the same weight as {stored[ours].name}; keep one of them"
            )
        if ours is not None:
            stored[ours] = tensor
    head = stored.pop("lm_head.weight", None) if "lm_head.weight" not in wanted else None
    problems = []
    for word, names in (
        ("missing", wanted.keys() - stored.keys()),
        ("extra", stored.keys() - wanted.keys()),
    ):
        if names:
            problems.append(f"{len(names)} {word} ({first_few(sorted(names))})")
    odd = [
        t
        for name, t in stored.items()
        if name in wanted and (t.shape != wanted[name] or t.dtype not in FLOATS)
    ]
    if odd:
        first = [f"{t.name} {t.dtype} {list(t.shape)} in {t.path.name}" for t in odd]
        needs = list(wanted[_our_name(model, odd[0].name) or ""])
        problems.append(
            f"{len(odd)} of wrong shape or dtype ({first_few(first)}; the first should be a float "
            f"{needs})"
        )
    if problems:
        raise InputError(
            f"{folder}: tensors do not fit config.json: {' and '.join(problems)}; is it the right "
            "config?"
        )
    # Of several ranks, which all read the same files, one compares.
    if head is not None and distributed.rank() == 0:
        embedding = stored[
            "transformer.wte.weight" if isinstance(model, GPT2) else "model.embed_tokens.weight"
        ]
        if not same(head, embedding):
            raise InputError(
                f"{head.where} differs from {embedding.name}, but config.json ties them; is "
                "tie_word_embeddings right?"
            )
    return stored


def _our_name(model: LanguageModel, name: str) -> str | None:
    """A tensor's name in a file -> as `stored_state` has it; None for buffers
    that are no weights.
    """
    if not isinstance(model, GPT2):
        return None if name.endswith(".rotary_emb.inv_freq") else name
    if name.endswith((".attn.bias", ".attn.masked_bias")):
        return None
    # Files of the bare GPT2Model, the `gpt2` repository's among them, leave the prefix out.
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def count_parameters(model: nn.Module) -> int:
    """The number of weights, a tied head counted once."""
    return sum(p.numel() for p in model.parameters())
