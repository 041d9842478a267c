"""Guides made, saved and loaded: new ones, ones that start as another model, trained ones."""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import cast

import tokenizers
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldalign.data.tokenizer import load_tokenizer
from ldalign.models.gpt2 import GPT2, GPT2Config, init_weights
from ldalign.models.guide import END, Guide, GuideConfig
from ldalign.models.mistral import Mistral
from ldalign.models.stored_tensors import read_config, read_header
from ldalign.models.weights import check_model, load_model, stored_state, write_weights
from ldalign.system.errors import InputError, is_failure
from ldalign.system.files import save_tensors
from ldalign.system.untrusted import MAX_TOKENIZER_BYTES, read_bytes, read_json, refuse_links_out

TOWERS = ("encoder", "decoder")  # their folders in a guide's
# GPT-2 draws its weights from N(0, 0.02), at width 768 in its smallest size.
GPT2_STD, GPT2_WIDTH = 0.02, 768


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
        tokenizer = tokenizers.Tokenizer.from_buffer(read_bytes(path, MAX_TOKENIZER_BYTES))
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


def new_guide(
    config: GuideConfig, seed: int, pretrained: Path | None, texts: Sequence[str], size: GPT2Config
) -> Guide:
    """Returns a guide to be trained, with both towers from a GPT-2 folder or new ones of `size`.

    seed: everything new is a function of it.
    pretrained: the GPT-2 model folder, whose tokenizer the guide gets; None: new towers.
    texts: what the tokenizer of new towers is trained on.

    Raises InputError where `pretrained` is no GPT-2 or its positions run out.
    """
    if pretrained is not None:
        if read_config(pretrained).get("model_type") != "gpt2":
            raise InputError(
                f"{pretrained}: guide must be a gpt2 model folder or a folder that train/guide.py "
                "wrote"
            )
        towers = [cast(GPT2, load_model(pretrained, torch.float32)) for _ in range(2)]
        tokenizer = read_guide_tokenizer(pretrained)
    else:
        tokenizer = train_tokenizer(texts, size.vocab_size)
        tokenizer.encode_special_tokens = True
        towers = []
        for i in range(2):
            tower = GPT2(replace(size, vocab_size=tokenizer.get_vocab_size()))
            _init_tower(tower, 2 * seed + i)
            towers.append(tower)
    _check_room(config, towers[0].config.n_positions, "the guide's GPT-2")
    return _init_latent(Guide(towers[0], towers[1], config, tokenizer), seed, GPT2_STD)


def policy_guide(config: GuideConfig, seed: int, policy: Path) -> Guide:
    """Returns a guide to be trained whose towers both start as `policy`, in float32.

    `policy` is a mistral or llama model folder. The guide reads text through its tokenizer; the end
    token is the first that it declares. What is new is a function of `seed`. Raises InputError
    where the folder is of another kind or its positions run out.
    """
    towers = [cast(Mistral, load_model(policy, torch.float32)) for _ in range(2)]
    if not isinstance(towers[0], Mistral):
        raise InputError(
            f"{policy}: guide.backbone=policy needs a mistral or llama folder; use "
            "guide.backbone=gpt2"
        )
    _check_room(config, towers[0].config.max_position_embeddings, "the policy")
    tokenizer = read_guide_tokenizer(policy)
    end = tokenizer.id_to_token(load_tokenizer(policy).end_ids[0])
    assert end is not None  # load_tokenizer has seen it
    guide = Guide(towers[0], towers[1], replace(config, end_token=end), tokenizer)
    return _init_latent(guide, seed, float(towers[0].embedding.weight.detach().std()))


def _check_room(config: GuideConfig, positions: int, whose: str) -> None:
    """Raises InputError where max_tokens and the latent take more positions than there are."""
    longest = positions - config.latent_tokens
    if config.max_tokens > longest:
        raise InputError(
            f"guide.max_tokens={config.max_tokens}: {whose} has room for {longest}; lower it"
        )


def _init_latent(guide: Guide, seed: int, std: float) -> Guide:
    """Fills what no model folder has with seeded values; returns the guide.

    std: the deviation of the queries, which is that of the encoder's token embeddings.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        guide.queries.copy_(torch.randn(guide.queries.shape, generator=generator) * std)
        for linear in (guide.to_latent, guide.from_latent):
            width = linear.in_features
            linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) / width**0.5)
            linear.bias.zero_()
    return guide


def _init_tower(tower: GPT2, seed: int) -> None:
    """GPT-2's initialisation, with the blocks' matrices scaled to the width.

    So a layer's output is as large at a small width as at GPT-2's own.
    """
    init_weights(tower, seed)
    with torch.no_grad():
        for p in tower.transformer.h.parameters():
            if p.ndim == 2:
                p.mul_((GPT2_WIDTH / tower.config.n_embd) ** 0.5)


def save_guide(guide: Guide, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Writes a guide folder, weights in float32.

    It holds encoder/ and decoder/ (model folders), latent.safetensors, guide.json, tokenizer.json.
    state: the whole guide's tensors by name, gathered; None: what the guide itself holds.
    """
    state = state if state is not None else guide.state_dict()
    for name, tower in zip(TOWERS, (guide.encoder, guide.decoder), strict=True):
        part = folder / name
        part.mkdir(parents=True, exist_ok=True)
        own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
        write_weights(stored_state(tower, own), part, torch.float32)
        config = json.dumps(tower.config.to_json(), indent=2) + "\n"
        (part / "config.json").write_text(config, encoding="utf-8")
    towers_own = tuple(f"{name}." for name in TOWERS)
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(towers_own)}
    latent = {name: tensor.float().cpu().contiguous() for name, tensor in rest.items()}
    save_tensors(latent, folder / "latent.safetensors")
    config = json.dumps(asdict(guide.config), indent=2) + "\n"
    (folder / "guide.json").write_text(config, encoding="utf-8")
    guide.tokenizer.save(str(folder / "tokenizer.json"))


def is_trained_guide(folder: Path) -> bool:
    """Says whether `folder` holds a whole guide, not a plain GPT-2."""
    return (folder / "guide.json").is_file()


def check_trained_guide(folder: Path) -> None:
    """Checks a trained guide's files without reading their weights.

    Raises InputError, as `check_model` does for each tower.
    """
    refuse_links_out(folder, *TOWERS)
    for name in TOWERS:
        check_model(folder / name)


def load_guide(folder: str | Path, device: str | torch.device = "cpu") -> Guide:
    """Loads a trained guide, float32, ready for `distance`.

    Raises InputError where a part is missing or does not fit.
    """
    folder = Path(folder)
    refuse_links_out(folder, *TOWERS)
    path = folder / "guide.json"
    try:
        raw = {"end_token": END} | read_json(path)
        config = GuideConfig(**{f.name: raw[f.name] for f in fields(GuideConfig)})
        sizes = (config.latent_tokens, config.latent_width, config.max_tokens)
        if not all(type(size) is int and 0 < size <= 2**20 for size in sizes):
            raise ValueError(f"sizes {sizes}")
    except (KeyError, TypeError, ValueError) as broken:
        if isinstance(broken, InputError):
            raise
        raise InputError(
            f"{path}: not a readable guide description ({broken!r}); make it with train/guide.py"
        ) from None
    towers = [load_model(folder / name, torch.float32, device) for name in TOWERS]
    guide = Guide(towers[0], towers[1], config, read_guide_tokenizer(folder))
    read_header(folder / "latent.safetensors")  # names what is wrong with it
    latent = load_file(folder / "latent.safetensors")
    towers_own = tuple(f"{name}." for name in TOWERS)
    state = guide.state_dict()
    own = {name: p for name, p in state.items() if not name.startswith(towers_own)}
    if latent.keys() != own.keys() or any(latent[name].shape != p.shape for name, p in own.items()):
        raise InputError(
            f"{folder / 'latent.safetensors'}: does not fit guide.json; make the guide again"
        )
    guide.load_state_dict(latent, strict=False)
    return guide.to(device).eval()
