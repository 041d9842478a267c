"""Guides made, saved and loaded: new ones, ones that start as another model, trained ones."""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

import tokenizers
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldalign.data.tokenizer import load_tokenizer
from ldalign.data.tokenizer_growth import check_growth
from ldalign.models.gpt2 import GPT2, GPT2Config, init_weights
from ldalign.models.guide import (
    END,
    Guide,
    GuideConfig,
    Injection,
    Latent,
    LatentNorm,
    Readout,
)
from ldalign.models.stored_tensors import read_header
from ldalign.models.weights import (
    LanguageModel,
    check_model,
    load_model,
    save_model,
    stored_state,
    write_weights,
)
from ldalign.system.errors import InputError, is_failure
from ldalign.system.files import save_tensors
from ldalign.system.seeds import normals
from ldalign.system.untrusted import (
    MAX_TOKENIZER_BYTES,
    parse_json,
    read_bytes,
    read_json,
    refuse_links_out,
)

TOWERS = ("encoder", "decoder")  # their folders in a guide's; one that serves as both is encoder/
DESCRIPTION, LATENT = "guide.json", "latent.safetensors"
# GPT-2 draws its weights from N(0, 0.02), at width 768 in its smallest size.
GPT2_WIDTH = 768


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Trains a tokenizer of GPT-2's kind on texts: byte-level BPE, no normalisation.

    It has at most vocab_size entries, the end token `END` among them.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def read_guide_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """Reads the guide's own tokenizer, tokenizer.json of the folder.

    Raises InputError where there is none that can be read.
    """
    path = folder / "tokenizer.json"
    try:
        content = read_bytes(path, MAX_TOKENIZER_BYTES)
        check_growth(parse_json(content, path), path)
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except FileNotFoundError:
        raise InputError(
            f"{folder}: has no tokenizer.json; the guide reads text through a tokenizer of its own"
        ) from None
    except BaseException as broken:
        if isinstance(broken, InputError) or not is_failure(broken):
            raise
        raise InputError(
            f"{path}: not a readable tokenizer ({broken}); the guide needs one beside its weights"
        ) from None
    tokenizer.encode_special_tokens = True  # the text of an end token inside a response is text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


# --------------------------------------------------------------------------------------- new guides


def new_guide(config: GuideConfig, seed: int, texts: Sequence[str], size: GPT2Config) -> Guide:
    """Returns a guide to be trained with two new towers of `size`, float32; everything new is a
    function of `seed`.

    texts: what its tokenizer is trained on. Raises InputError where positions run out.
    """
    tokenizer = train_tokenizer(texts, size.vocab_size)
    tokenizer.encode_special_tokens = True
    towers = []
    for name in TOWERS:
        tower = GPT2(replace(size, vocab_size=tokenizer.get_vocab_size()))
        _init_tower(tower, seed, f"guide/{name}")
        towers.append(tower)
    check_room(config, size.n_positions, "the guide's GPT-2")
    return _init_latent(Guide(towers[0], towers[1], config, tokenizer), seed)


def pretrained_guide(
    config: GuideConfig,
    seed: int,
    folder: Path,
    frozen: bool,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    template: str | None = None,
) -> Guide:
    """Returns a guide to be trained whose towers start as the model in `folder`, a GPT-2, or a
    mistral or llama such as the policy; what is new is a function of `seed`.

    frozen: one tower, in `dtype`, is encoder and decoder and is not trained; else they are two in
    float32, and both are. A guide of a GPT-2 reads plain text through the folder's tokenizer; one
    of a policy reads its chat template (`template`, where it is another than the folder's), and the
    end token is the first that it declares. Raises InputError where the folder cannot be used or
    its positions run out.
    """
    towers = [
        load_model(folder, dtype if frozen else torch.float32, device)
        for _ in range(1 if frozen else 2)
    ]
    if frozen:
        towers[0].requires_grad_(False)
    tokenizer, chat = read_guide_tokenizer(folder), None
    if isinstance(towers[0], GPT2):
        check_room(config, towers[0].config.n_positions, f"{folder}")
    else:
        check_room(config, towers[0].config.max_position_embeddings, f"{folder}")
        chat = load_tokenizer(folder, template)
        end = tokenizer.id_to_token(chat.end_ids[0])
        if end is None:
            raise InputError(
                f"{folder}/tokenizer.json: has no token {chat.end_ids[0]}, which ends an answer; "
                "download the model again"
            )
        config = replace(config, end_token=end)
    return _init_latent(Guide(towers[0], towers[-1], config, tokenizer, chat), seed).to(device)


def pooled_guide(
    folder: Path,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    template: str | None = None,
) -> Guide:
    """Returns a guide that was never trained and draws nothing: a response's latent is the mean of
    its tokens' states under the policy in `folder`. template: as of `pretrained_guide`.
    """
    config = GuideConfig(max_tokens=None)
    guide = pretrained_guide(config, 0, folder, True, dtype, device, template)
    guide.latent = identity_latent(guide).to(device)
    return guide.eval()


def identity_latent(guide: Guide) -> Latent:
    """Returns the map that leaves a guide's mean states as they are."""
    width = guide.encoder.embedding.embedding_dim
    config = replace(
        guide.config,
        readout="mean",
        latent_tokens=1,
        latent_width=width,
        latent_norm="none",
        injection="output",
    )
    latent = Latent(config, width, width)
    with torch.no_grad():
        for p in latent.parameters():
            p.zero_()
        latent.to_latent.weight.copy_(torch.eye(width))
    return latent


def redrawn(guide: Guide, seed: int, begun: Path | None) -> Guide:
    """Returns a trained guide as it was before training; it may hold the same frozen tower.

    begun: the model folder that two trained towers began as; None: they were new ones.
    """
    if guide.shared:
        towers = [guide.encoder]
    elif begun is not None:
        dtype, device = guide.encoder.embedding.weight.dtype, guide.encoder.embedding.weight.device
        towers = [load_model(begun, dtype, device) for _ in TOWERS]
    else:
        towers = []
        for name in TOWERS:
            assert isinstance(guide.encoder, GPT2)  # `new_guide` makes no others
            tower = GPT2(guide.encoder.config)
            _init_tower(tower, seed, f"guide/{name}")
            towers.append(tower.to(guide.encoder.embedding.weight))
    again = Guide(towers[0], towers[-1], guide.config, guide.tokenizer, guide.chat)
    return _init_latent(again, seed).to(guide.latent.null.device).eval()


def check_room(config: GuideConfig, positions: int, whose: str) -> None:
    """Raises InputError where max_tokens and the latent take more positions than there are.

    whose: the positions, for the message.
    """
    # Soft tokens and queries have positions of their own.
    own = config.readout == "queries" or config.injection != "output"
    longest = positions - (config.latent_tokens if own else 0)
    if config.max_tokens is not None and config.max_tokens > longest:
        raise InputError(
            f"guide.max_tokens={config.max_tokens}: {whose} has room for {longest}; lower it"
        )


def _init_latent(guide: Guide, seed: int) -> Guide:
    """Fills what no model folder has with seeded values, each tensor from a stream of its own;
    returns the guide.

    Queries, soft tokens and the mask are as large as the towers' token embeddings, and no prefix
    is ever exactly zero: through the norms of many blocks, the gradient of a zero stream is not
    finite. The shift begins at zero, so that the decoder begins as the model that it is.
    """
    latent = guide.latent

    def draw(name: str, p: Tensor) -> Tensor:
        return normals(seed, f"guide/latent/{name}", *p.shape)

    def size(tower: LanguageModel) -> float:
        return float(tower.embedding.weight.detach().float().square().mean().sqrt())

    with torch.no_grad():
        for name, p in latent.named_parameters():
            if name in ("to_latent.weight", "to_prefix.weight"):
                p.copy_(draw(name, p) / p.shape[1] ** 0.5)
            elif name == "null":
                p.copy_(draw(name, p))
            elif name == "mask":
                p.copy_(draw(name, p) * size(guide.decoder))
            elif name == "queries":
                p.copy_(draw(name, p) * size(guide.encoder))
            elif name == "soft_size":
                p.fill_(size(guide.decoder))
            else:
                p.zero_()
    return guide


def _init_tower(tower: GPT2, seed: int, stream: str) -> None:
    """GPT-2's initialisation, with the blocks' matrices scaled to the width.

    So a layer's output is as large at a small width as at GPT-2's own: at small widths, 0.02 leaves
    the latent without a trace of the text for hundreds of steps.
    """
    init_weights(tower, seed, stream)
    with torch.no_grad():
        for p in tower.transformer.h.parameters():
            if p.ndim == 2:
                p.mul_((GPT2_WIDTH / tower.config.n_embd) ** 0.5)


# ------------------------------------------------------------------------------------------ folders


def save_guide(guide: Guide, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Writes a guide folder: encoder/ and decoder/ (model folders; one alone where it is both),
    latent.safetensors, guide.json, tokenizer.json.

    Trained towers are written in float32, a frozen one as it is. state: the whole guide's tensors
    by name, gathered; None: what the guide itself holds.
    """
    state = state if state is not None else dict(guide.named_parameters())
    towers = [guide.encoder] if guide.shared else [guide.encoder, guide.decoder]
    for name, tower in zip(TOWERS, towers, strict=False):
        part = folder / name
        part.mkdir(parents=True, exist_ok=True)
        own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
        dtype = next(tower.parameters()).dtype if guide.shared else torch.float32
        if guide.chat is not None:
            save_model(tower, part, guide.chat.folder, dtype, own, guide.chat.template)
            continue
        write_weights(stored_state(tower, own), part, dtype)
        config = json.dumps(tower.config.to_json(), indent=2) + "\n"
        (part / "config.json").write_text(config, encoding="utf-8")
    latent = {
        name.removeprefix("latent."): tensor.detach().float().cpu().contiguous()
        for name, tensor in state.items()
        if name.startswith("latent.")
    }
    save_tensors(latent, folder / LATENT)
    described = asdict(guide.config) | {"shared": guide.shared, "chat": guide.chat is not None}
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    guide.tokenizer.save(str(folder / "tokenizer.json"))


def is_trained_guide(folder: Path) -> bool:
    """Says whether `folder` holds a whole guide, not a plain model."""
    return (folder / DESCRIPTION).is_file()


def check_trained_guide(folder: Path) -> None:
    """Checks a trained guide's files without reading their weights.

    Raises InputError, as `check_model` does for each tower.
    """
    _, shared, _ = _description(folder)
    refuse_links_out(folder, *TOWERS)
    for name in TOWERS[: 1 if shared else 2]:
        check_model(folder / name)


def load_guide(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Guide:
    """Loads a trained guide, its towers in `dtype`, ready for `distance`.

    Raises InputError where a part is missing or does not fit.
    """
    folder = Path(folder)
    refuse_links_out(folder, *TOWERS)
    config, shared, chat = _description(folder)
    towers = [load_model(folder / name, dtype, device) for name in TOWERS[: 1 if shared else 2]]
    guide = Guide(
        towers[0],
        towers[-1],
        config,
        read_guide_tokenizer(folder),
        load_tokenizer(folder / TOWERS[0]) if chat else None,
    )
    read_header(folder / LATENT)  # names what is wrong with it
    latent, own = load_file(folder / LATENT), guide.latent.state_dict()
    if latent.keys() != own.keys() or any(latent[name].shape != p.shape for name, p in own.items()):
        raise InputError(f"{folder / LATENT}: does not fit {DESCRIPTION}; make the guide again")
    guide.latent.load_state_dict(latent)
    return guide.to(device).eval()


def _description(folder: Path) -> tuple[GuideConfig, bool, bool]:
    """What guide.json says: the config, whether one tower is both, and whether prompts are read
    through a chat template. Raises InputError.
    """
    path = folder / DESCRIPTION
    try:
        raw = read_json(path)
        config = GuideConfig(**{f.name: raw[f.name] for f in fields(GuideConfig)})
        sizes: list[Any] = [config.latent_tokens, config.latent_width, config.max_tokens or 1]
        if not all(type(size) is int and 0 < size <= 2**20 for size in sizes):
            raise ValueError(f"sizes {sizes}")
        chosen = (config.readout, config.injection, config.latent_norm)
        for value, allowed in zip(chosen, (Readout, Injection, LatentNorm), strict=True):
            if value not in get_args(allowed):
                raise ValueError(f"{value!r} is none of {', '.join(get_args(allowed))}")
        return config, bool(raw["shared"]), bool(raw["chat"])
    except (KeyError, TypeError, ValueError) as broken:
        if isinstance(broken, InputError):
            raise
        raise InputError(
            f"{path}: not a readable guide description ({broken!r}); make it with train/guide.py"
        ) from None
