"""The guiding model: a conditional autoencoder whose latent space measures how far two responses
are apart.

Encoder: GPT-2 reads [x; y; m query embeddings]; their final hidden states are projected to z (m x
k). Decoder: GPT-2 reads [W z as m prefix embeddings; x; y] and predicts y (LD-Align, arXiv
2404.06390, sections 3 and 4.1; m, k and the dropouts are ldalign's choices, see `GuideConfig`). The
distance of two responses to one prompt is ||E(x, y) - E(x, y')||_2 over the whole latent, in
float32. Other choices: both towers start as the policy (`policy_guide`), and the angle instead of
the length (`cosine_distance`).

A strong decoder can ignore z and predict y from its own past. Against that, training hides a share
of the response tokens the decoder reads (word dropout, arXiv 1511.06349), and the held-out losses
always say whether z is used: `latent_gain` = loss with another row's z - loss with the true z, in
nats per token. A new guide's blocks start wider than GPT-2's 0.02 (`new_guide`): at small widths,
0.02 leaves z without a trace of the text for hundreds of steps.

The guide reads text through a tokenizer of its own: that of the model its towers start from, or a
byte-level BPE trained on the data. It adds no chat template and no BOS.

Shapes: N flat tokens, D width, Z = m k latent width, B examples, V vocabulary.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, cast

import tokenizers
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ldalign import ops
from ldalign.data.tokenizer import load_tokenizer
from ldalign.gpt2 import GPT2, GPT2Config, init_weights
from ldalign.layout import Packed
from ldalign.mistral import Mistral
from ldalign.system.errors import InputError, is_failure
from ldalign.system.files import save_tensors
from ldalign.system.memory import naming
from ldalign.system.partial_rows import table
from ldalign.system.untrusted import MAX_TOKENIZER_BYTES, read_bytes, read_json, refuse_links_out
from ldalign.weights import (
    LanguageModel,
    check_model,
    load_model,
    read_config,
    read_header,
    stored_state,
    write_weights,
)

END = "<|endoftext|>"
TOWERS = ("encoder", "decoder")  # their folders in a guide's
# GPT-2 draws its weights from N(0, 0.02), at width 768 in its smallest size
GPT2_STD, GPT2_WIDTH = 0.02, 768
NO_LATENT = -1

Metric = Literal["euclidean", "cosine"]


@dataclass(frozen=True)
class GuideConfig:
    """What the two towers do not say themselves; kept in the guide folder's guide.json."""

    latent_tokens: int = 1  # m
    latent_width: int = 256  # k
    token_dropout: float = 0.5  # share of response tokens hidden from the decoder in training
    # share of training examples without z, so that the loss without z means something
    latent_dropout: float = 0.1
    max_tokens: int = 512  # prompt and response together; the prompt loses its beginning first
    end_token: str = END  # of prompts and responses, in the tokenizer; guide.json may lack it


@dataclass(frozen=True)
class Example:
    """One (prompt, response) in the guide's own token ids; response ends with the end token unless
    it was cut.
    """

    prompt: list[int]
    response: list[int]


class Guide(nn.Module):
    """Encoder, latent, decoder. `forward` gives the reconstruction log-probs, so that FSDP gathers
    weights for it.
    """

    def __init__(
        self,
        encoder: LanguageModel,
        decoder: LanguageModel,
        config: GuideConfig,
        tokenizer: tokenizers.Tokenizer,
    ) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.encoder, self.decoder = encoder, decoder
        width = encoder.embedding.embedding_dim
        self.queries = nn.Parameter(torch.zeros(config.latent_tokens, width))
        self.to_latent = nn.Linear(width, config.latent_width)
        self.from_latent = nn.Linear(config.latent_width, decoder.embedding.embedding_dim)
        end = tokenizer.token_to_id(config.end_token)
        if end is None:
            raise InputError(
                f"the guide's tokenizer has no {config.end_token} token; use the tokenizer.json "
                "its weights came with"
            )
        self.end_id: int = end

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks of both towers: what FSDP wraps one by one."""
        return [*self.encoder.blocks, *self.decoder.blocks]

    def example(self, prompt: str, response: str) -> Example:
        """Token ids of a pair of texts: [prompt, end] and [response, end], cut to `max_tokens` in
        all.

        The end token serves as separator too. An over-long response keeps its beginning and loses
        its end token; an over-long prompt keeps its end.
        """
        x = [*self.tokenizer.encode(prompt, add_special_tokens=False).ids, self.end_id]
        y = [*self.tokenizer.encode(response, add_special_tokens=False).ids, self.end_id]
        y = y[: self.config.max_tokens * 3 // 4] if len(x) + len(y) > self.config.max_tokens else y
        return Example(x[-max(1, self.config.max_tokens - len(y)) :], y)

    def encode(self, examples: Sequence[Example]) -> Tensor:
        """The latents (B, Z) float32 of B examples. A prompt that several of them share is read
        once.
        """
        device, m = self.queries.device, self.config.latent_tokens
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for i, example in enumerate(examples):
            by_prompt.setdefault(tuple(example.prompt), []).append(i)
        ids: list[int] = []
        at: list[list[int]] = [[]] * len(examples)  # the query positions of each example
        for prompt, members in by_prompt.items():
            ids += prompt
            for i in members:
                # id 0 where a query goes; its embedding is replaced
                ids += [*examples[i].response, *[0] * m]
                at[i] = list(range(len(ids) - m, len(ids)))
        layout = Packed(
            [
                [len(x), *(len(examples[i].response) + m for i in own)]
                for x, own in by_prompt.items()
            ],
            device,
        )
        queries = torch.tensor(at, device=device).flatten()  # (B m,)
        embedded = self.encoder.embedding(torch.tensor(ids, device=device))
        embedded = embedded.index_copy(
            0, queries, self.queries.to(embedded.dtype).repeat(len(examples), 1)
        )
        hidden = self.encoder.hidden(embedded, layout)[queries]
        return self.to_latent(hidden).float().unflatten(0, (len(examples), m)).flatten(1)

    def decode(
        self,
        examples: Sequence[Example],
        latents: Tensor,
        hidden_tokens: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """(M,) float32 log-probs of all response tokens, given latents (B, Z); with a scale, their
        sum times -scale ().

        hidden_tokens (M,) bool: the response tokens the decoder may not read; None: it reads them
        all.
        """
        device, m = latents.device, self.config.latent_tokens
        sizes = [m + len(e.prompt) + len(e.response) for e in examples]
        ids = torch.tensor(
            [t for e in examples for t in (*[0] * m, *e.prompt, *e.response)], device=device
        )
        ends = torch.tensor(sizes, device=device).cumsum(0)
        starts = ends - torch.tensor(sizes, device=device)
        prefix = (starts[:, None] + torch.arange(m, device=device)).flatten()
        lengths = torch.tensor([len(e.response) for e in examples], device=device)
        response = _ranges(ends - lengths, lengths)  # (M,) positions of the response tokens
        embedded = self.decoder.embedding(ids)
        if hidden_tokens is not None:
            embedded = embedded.index_fill(0, response[hidden_tokens], 0.0)
        prefix_embeddings = self.from_latent(
            latents.unflatten(1, (m, -1)).to(embedded.dtype)
        ).flatten(0, 1)
        embedded = embedded.index_copy(0, prefix, prefix_embeddings.to(embedded.dtype))
        hidden = self.decoder.hidden(embedded, Packed(sizes, device))
        head = hidden[response - 1], self.decoder.output_weight, ids[response]
        return ops.linear_logprob(*head) if scale is None else ops.sft_loss(*head, scale)[0]

    def forward(
        self,
        examples: Sequence[Example],
        latents_of: Sequence[int] | None = None,
        dropout: tuple[Tensor, Tensor] | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """(M,) float32 log-probs of the examples' response tokens; with a scale, their sum times
        -scale ().

        latents_of: whose latent each example is decoded with, as an index into `examples`;
        NO_LATENT: zeros; None: its own. dropout: in training, which latents to keep (B,) bool and
        which response tokens to hide (M,) bool.
        """
        latents = self.encode(examples)
        if latents_of is not None:
            index = torch.tensor(list(latents_of), device=latents.device)
            latents = latents[index.clamp(min=0)] * (index != NO_LATENT)[:, None]
        if dropout is None:
            return self.decode(examples, latents, scale=scale)
        kept, hidden_tokens = dropout
        return self.decode(examples, latents * kept[:, None].to(latents), hidden_tokens, scale)

    @torch.no_grad()
    def distance(
        self,
        prompts: Sequence[str],
        real: Sequence[str],
        generated: Sequence[str],
        batch_tokens: int = 8192,
        metric: Metric = "euclidean",
        ids: Sequence[str] | None = None,
        path: Path | None = None,
        progress: Callable[[int], None] = lambda rows: None,
    ) -> Tensor:
        """(N,) float32 on the CPU: ||E(x, y) - E(x, y')||_2 of N prompts with two responses each;
        no dropout.

        metric "cosine": `cosine_distance` of E(x, y) and E(x, y') instead. All ranks call it with
        the same rows and share the work; the batches, and so the result, are the same for any
        number of them. ids: of the rows, for errors; None: their numbers. path: as in
        `partial_rows.table`, for a stage that can be gone on with. Raises NumericsError naming a
        row whose distance is not finite, OutOfMemory.
        """
        pairs = [
            (self.example(x, y), self.example(x, g))
            for x, y, g in zip(prompts, real, generated, strict=True)
        ]
        costs = [_size(real) + _size(other) for real, other in pairs]
        names = range(len(pairs)) if ids is None else ids

        def measure(batch: Sequence[int]) -> Tensor:
            what = f"latents of {len(batch)} pairs of {sum(costs[i] for i in batch)} tokens"
            with naming(
                lambda: what, "lower training.micro_tokens, or guide.max_tokens for another guide"
            ):
                z = self.encode([e for i in batch for e in pairs[i]])  # (2 rows, Z)
                a, b = z[0::2], z[1::2]
                d = cosine_distance(a, b) if metric == "cosine" else (a - b).norm(dim=1).float()
                return d[:, None].cpu()

        def refusal(i: int, value: float) -> str:
            return (
                f"row {names[i]}: the latent distance is {value}; look at its texts and at the "
                "guide's losses"
            )

        batches = _runs(
            sorted(range(len(pairs)), key=lambda i: (-costs[i], i)), costs, batch_tokens
        )
        return table(batches, measure, 1, refusal, path, progress)[:, 0].float()

    def save(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Writes encoder/ and decoder/ (model folders, float32), latent.safetensors, guide.json,
        tokenizer.json.
        """
        state = state if state is not None else self.state_dict()
        for name, tower in (("encoder", self.encoder), ("decoder", self.decoder)):
            part = folder / name
            part.mkdir(parents=True, exist_ok=True)
            own = {
                k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")
            }
            write_weights(stored_state(tower, own), part, torch.float32)
            (part / "config.json").write_text(
                json.dumps(tower.config.to_json(), indent=2) + "\n", encoding="utf-8"
            )
        latent = {
            k: v.float().cpu().contiguous()
            for k, v in state.items()
            if not k.startswith(("encoder.", "decoder."))
        }
        save_tensors(latent, folder / "latent.safetensors")
        (folder / "guide.json").write_text(
            json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8"
        )
        self.tokenizer.save(str(folder / "tokenizer.json"))


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """(N,) float32: 1 - cos(a_i, b_i) of (N, Z) latents, between 0 and 2, exactly 0 where they are
    equal.

    A zero vector is at distance 1 from any other vector (cos taken as 0) and at 0 from another zero
    vector.
    """
    a, b = a.double(), b.double()
    lengths = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    # Half the squared distance of the unit vectors: 1 - cos would lose small distances to rounding,
    # or its sign.
    a, b = (x / length.where(length > 0, 1.0) for x, length in zip((a, b), lengths, strict=True))
    half = (a - b).square().sum(dim=1) / 2
    one_is_zero = ((lengths[0] == 0) != (lengths[1] == 0))[:, 0]
    return half.where(~one_is_zero, 1.0).clamp(max=2.0).float()


def _size(example: Example) -> int:
    return len(example.prompt) + len(example.response)


def _runs(items: Sequence[int], costs: Sequence[int], budget: int) -> list[list[int]]:
    """Consecutive items in runs of at most `budget` cost; a dearer item gets a run of its own."""
    runs: list[list[int]] = []
    room = 0
    for i in items:
        if not runs or costs[i] > room:
            runs.append([])
            room = budget
        runs[-1].append(i)
        room -= costs[i]
    return runs


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """[s, s + 1, ..., s + n - 1] for each start s and length n, end to end."""
    offsets = lengths.cumsum(0) - lengths
    steps = torch.arange(int(lengths.sum()), device=starts.device)
    return steps + (starts - offsets).repeat_interleave(lengths)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    """GPT-2's kind of tokenizer (byte-level BPE, no normalisation), trained on texts; at most
    vocab_size entries.
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
    """The guide's own tokenizer. Raises InputError where there is none that can be read."""
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
    """A guide to be trained: both towers from a GPT-2 model folder, or new ones of `size`, with a
    tokenizer for texts.

    Everything new is a function of `seed`. Raises InputError where `pretrained` is no GPT-2 or its
    positions run out.
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
            tower = GPT2(GPT2Config(**(asdict(size) | {"vocab_size": tokenizer.get_vocab_size()})))
            _init_tower(tower, 2 * seed + i)
            towers.append(tower)
    _check_room(config, towers[0].config.n_positions, "the guide's GPT-2")
    return _init_latent(Guide(towers[0], towers[1], config, tokenizer), seed, GPT2_STD)


def policy_guide(config: GuideConfig, seed: int, policy: Path) -> Guide:
    """A guide to be trained whose towers both start as `policy`, a mistral or llama model folder,
    in float32.

    It reads text through the policy's tokenizer; the end token is the first that the policy
    declares. What is new is a function of `seed`. Raises InputError where the folder is of another
    kind or its positions run out.
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
    longest = positions - config.latent_tokens
    if config.max_tokens > longest:
        raise InputError(
            f"guide.max_tokens={config.max_tokens}: {whose} has room for {longest}; lower it"
        )


def _init_latent(guide: Guide, seed: int, std: float) -> Guide:
    """Seeded values for what no model folder has; std: of the queries, as the encoder's token
    embeddings'.
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
    """GPT-2's initialisation, with the blocks' matrices scaled to the width: a layer's output keeps
    its size.
    """
    init_weights(tower, seed)
    with torch.no_grad():
        for p in tower.transformer.h.parameters():
            if p.ndim == 2:
                p.mul_((GPT2_WIDTH / tower.config.n_embd) ** 0.5)


def is_trained_guide(folder: Path) -> bool:
    """Whether `folder` holds a whole guide, not a plain GPT-2."""
    return (folder / "guide.json").is_file()


def check_trained_guide(folder: Path) -> None:
    """A trained guide's files, without their weights. Raises InputError, as `check_model` does for
    each tower.
    """
    refuse_links_out(folder, *TOWERS)
    for name in TOWERS:
        check_model(folder / name)


def load_guide(folder: str | Path, device: str | torch.device = "cpu") -> Guide:
    """A trained guide, float32, ready for `distance`. Raises InputError where a part is missing or
    does not fit.
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
    own = {
        name: p
        for name, p in guide.state_dict().items()
        if not name.startswith(("encoder.", "decoder."))
    }
    if latent.keys() != own.keys() or any(latent[name].shape != p.shape for name, p in own.items()):
        raise InputError(
            f"{folder / 'latent.safetensors'}: does not fit guide.json; make the guide again"
        )
    guide.load_state_dict(latent, strict=False)
    return guide.to(device).eval()
