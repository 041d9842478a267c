"""Model folders in and out: Hugging Face layout, safetensors only, everything checked.

Reading: config.json names the architecture; `model.safetensors`, or the shards that
`model.safetensors.index.json` lists. Every name, shape and value is checked. Writing: bf16 by
default, a tied head once, shards of at most 5 GB; what is written loads unchanged in
transformers. No pickle is ever read, and an index can name no file outside its folder.

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

from ldalign.data.tokenizer_export import save_tokenizer_files
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
from ldalign.system.metrics import Bar
from ldalign.system.untrusted import refuse_links_out

LanguageModel = Mistral | GPT2
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")  # what `write_weights` calls its own
SHARD_BYTES = 5 * 10**9
MAX_LAYERS = 2000  # building a layer takes a millisecond; the deepest models have some 130
# What helps where the weights do not fit; training alone spreads them over the ranks.
LOWER_FOR_WEIGHTS = (
    "set dtype=bfloat16 (training.master_dtype=bfloat16, and more ranks, to train it), or give a "
    "smaller model"
)


def build(raw: Mapping[str, Any], where: str) -> LanguageModel:
    """Returns the model that a parsed config.json describes, without its weights (meta device).

    Raises InputError naming `where` for a network that is not supported or too large.
    """
    for key in ("num_hidden_layers", "n_layer"):
        if isinstance(raw.get(key), int) and raw[key] > MAX_LAYERS:
            raise InputError(f"{where}: {key} is {raw[key]}; at most {MAX_LAYERS} are built")
    try:
        with torch.device("meta"):
            config = _architecture(raw, where)
            return GPT2(config) if isinstance(config, GPT2Config) else Mistral(config)
    except (RuntimeError, OverflowError) as error:  # sizes whose product no tensor can have
        raise InputError(
            f"{where}: describes a network too large to be built ({' '.join(str(error).split())})"
        ) from None


def _architecture(raw: Mapping[str, Any], where: str) -> MistralConfig | GPT2Config:
    kind = raw.get("model_type")
    if kind in ("mistral", "llama"):
        return MistralConfig.from_json(dict(raw), where)
    if kind == "gpt2":
        return GPT2Config.from_json(dict(raw), where)
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
    """Loads the model of a folder: weights in `dtype` on `device`, `eval` mode.

    cut: gets the model without its weights (meta device, `dtype`) and may shard it
        (`distributed.shard`); then this rank reads its own rows from the files, and nothing else.

    Peak memory is what this rank holds and a few READ_BYTES. Raises InputError naming the file and
    the tensor: missing, extra, misshaped, not finite, or stored as a pickle; OutOfMemory.
    """
    folder = Path(folder)
    model = build(read_config(folder), str(folder / "config.json")).to(dtype)
    stored = _match(model, stored_tensors(folder), folder)
    if cut is not None:
        cut(model)
    with naming(lambda: _too_large(model, folder, dtype, device), LOWER_FOR_WEIGHTS):
        # All made before any is filled, so that no buffer comes to lie between them in memory.
        local = {name: _empty_share(p, device) for name, p in model.named_parameters()}
        parts = [
            part
            for name, p in model.named_parameters()
            for part in _parts(model, name, p, local[name], stored)
        ]
        buffer = new_buffer(*(source for _, source in parts))
        # In the order in which they lie on the disk, which a spinning or networked one rewards.
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
    """The parameter whose rows on this rank are `local`."""
    if not distributed.is_sharded(p):
        return local
    from torch.distributed.tensor import DTensor

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
    """Checks a model folder by its files' headers; returns the model without its weights.

    Every tensor's name and shape is checked; values are not read. Raises InputError as `load_model`
    does, and for any link out of the folder.
    """
    folder = Path(folder)
    model = build(read_config(folder), str(folder / "config.json"))
    _match(model, check_files(folder), folder)
    return model


def check_files(folder: Path) -> dict[str, Stored]:
    """Checks what any model folder must have; returns its tensors by name, from the headers.

    Raises InputError for a link out of the folder, and as `stored_tensors` does.
    """
    refuse_links_out(folder)
    return stored_tensors(folder)


def save_model(
    model: LanguageModel,
    folder: str | Path,
    source: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    state: Mapping[str, Tensor] | None = None,
    template: str | None = None,
) -> None:
    """Writes a model folder: weights in `dtype`, config.json and tokenizer files of `source`.

    source: None: weights and a config.json of the network alone, without a tokenizer.
    state: the full tensors by name where the model's own are sharded; None: `model.state_dict()`.
    template: the chat template's text, where it is not that of `source`.
    Raises InputError where `source` describes another network, NumericsError for NaN and Inf.
    """
    folder = Path(folder)
    raw = model.config.to_json() if source is None else _config_of(model, Path(source))
    raw["dtype"] = DTYPE_NAMES[dtype]
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if state is None else state
    write_weights(stored_state(model, state), folder, dtype)
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    if source is not None:
        save_tokenizer_files(source, folder, template)


def _config_of(model: LanguageModel, source: Path) -> dict[str, Any]:
    """The config.json of `source`, which must describe `model`."""
    where = str(source / "config.json")
    raw = read_config(source)
    raw.pop("torch_dtype", None)  # the older name of dtype
    raw["tie_word_embeddings"] = isinstance(model, GPT2) or model.config.tie_word_embeddings
    if build(raw, where).config != model.config:
        raise InputError(
            f"{where}: describes another network than the one to be saved; give its own source "
            "folder"
        )
    return raw


def context_length(folder: Path) -> int:
    """Returns how many tokens a folder's model was made for: max_position_embeddings, n_positions.

    Raises InputError as `build` does.
    """
    config = _architecture(read_config(folder), str(folder / "config.json"))
    return config.n_positions if isinstance(config, GPT2Config) else config.max_position_embeddings


def stored_state(model: LanguageModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors that model files keep, by name, as views of the parameters.

    Fused parameters come in parts (`Mistral.stored_parts`), GPT-2's four matrices transposed.
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
    """Writes a state (`stored_state`) as `model.safetensors`, or as shards with an index.

    There are shards if it is larger than `shard_bytes`. Older weights of the same folder go, so
    that no loader can pick them up. Casts one shard at a time. Raises NumericsError for NaN and
    Inf, which no loader would take back.
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
    count = len(shards)
    files = [SINGLE] if count == 1 else [_shard_file(i + 1, count) for i in range(count)]
    with Bar(f"{folder}: weights written", total >> 20, "MiB") as progress:
        for file, names in zip(files, shards, strict=True):
            # One shard at a time: a whole second model in `dtype` may not fit.
            cast = {name: state[name].detach().to("cpu", dtype) for name in names}
            for name, tensor in cast.items():
                if not finite(tensor):
                    raise NumericsError(
                        f"{folder / file}: tensor {name} holds NaN or Inf as {DTYPE_NAMES[dtype]}; "
                        "not saved"
                    )
            save_tensors({name: t.contiguous() for name, t in cast.items()}, folder / file)
            progress((folder / file).stat().st_size >> 20, 0)
    if count > 1:
        named = zip(files, shards, strict=True)
        weight_map = {name: file for file, names in named for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        files.append(INDEX)
    for path in folder.iterdir():
        if path.name not in files and (path.name in (SINGLE, INDEX) or SHARD.fullmatch(path.name)):
            path.unlink()


def _shard_file(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _match(model: LanguageModel, tensors: Mapping[str, Stored], folder: Path) -> dict[str, Stored]:
    """The stored tensors by the names that `stored_state` gives them.

    Raises InputError for what does not fit, before any is read.
    """
    parameters = stored_state(model, dict(model.named_parameters()))
    wanted = {name: p.shape for name, p in parameters.items()}
    stored: dict[str, Stored] = {}
    for theirs, tensor in tensors.items():
        ours = _our_name(model, theirs)
        if ours in stored:
            raise InputError(
                f"{tensor.where} is the same weight as {stored[ours].name}; keep one of them"
            )
        if ours is not None:
            stored[ours] = tensor
    # Older files keep a tied head twice; it may go if it is what it should be.
    head = stored.pop("lm_head.weight", None) if "lm_head.weight" not in wanted else None
    if problems := _misfits(model, wanted, stored):
        raise InputError(
            f"{folder}: tensors do not fit config.json: {' and '.join(problems)}; is it the right "
            "config?"
        )
    # One rank compares: all of them read the same files.
    if head is not None and distributed.rank() == 0:
        gpt2 = isinstance(model, GPT2)
        embedding = stored["transformer.wte.weight" if gpt2 else "model.embed_tokens.weight"]
        if not same(head, embedding):
            raise InputError(
                f"{head.where} differs from {embedding.name}, but config.json ties them; is "
                "tie_word_embeddings right?"
            )
    return stored


def _misfits(
    model: LanguageModel, wanted: Mapping[str, torch.Size], stored: Mapping[str, Stored]
) -> list[str]:
    """What does not fit, in words: tensors missing, extra, or of the wrong shape or dtype."""
    problems = []
    missing, extra = wanted.keys() - stored.keys(), stored.keys() - wanted.keys()
    for word, names in (("missing", missing), ("extra", extra)):
        if names:
            problems.append(f"{len(names)} {word} ({first_few(sorted(names))})")
    both = ((t, wanted[name]) for name, t in stored.items() if name in wanted)
    odd = [t for t, shape in both if t.shape != shape or t.dtype not in FLOATS]
    if odd:
        first = [f"{t.name} {t.dtype} {list(t.shape)} in {t.path.name}" for t in odd]
        needs = list(wanted[_our_name(model, odd[0].name) or ""])
        problems.append(
            f"{len(odd)} of wrong shape or dtype ({first_few(first)}; the first should be a float "
            f"{needs})"
        )
    return problems


def _our_name(model: LanguageModel, name: str) -> str | None:
    """A file's name of a tensor as `stored_state` has it; None for buffers, no weights."""
    if not isinstance(model, GPT2):
        return None if name.endswith(".rotary_emb.inv_freq") else name
    if name.endswith((".attn.bias", ".attn.masked_bias")):
        return None
    # Files of the bare GPT2Model, the `gpt2` repository's among them, leave the prefix out.
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def count_parameters(model: nn.Module) -> int:
    """Returns the number of weights, a tied head counted once."""
    return sum(p.numel() for p in model.parameters())
