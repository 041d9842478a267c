"""The guide's work on transformers' GPT-2, padded: the same weights, texts, batches, losses.

Encoder: [x; y; queries], right-padded; decoder: [W z; x; y], right-padded, with word dropout; all
logits, one softmax. Float32, as the guide is.
"""

from itertools import pairwise
from pathlib import Path
from time import perf_counter

import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, GPT2Model
from worker import Job, Result, main, optimizer_of, settle, timed

END = "<|endoftext|>"
TOKEN_DROPOUT, LATENT_DROPOUT = 0.5, 0.1  # the guide's defaults


class Guide(nn.Module):
    """The two GPT-2s and the projections between them, from a guide folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        options = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "dtype": torch.float32}
        self.encoder = GPT2Model.from_pretrained(folder / "encoder", **options)
        self.decoder = GPT2LMHeadModel.from_pretrained(folder / "decoder", **options)
        latent = load_file(folder / "latent.safetensors")
        self.queries = nn.Parameter(latent["queries"])
        for name in ("to_latent", "from_latent"):
            weight, bias = latent[f"{name}.weight"], latent[f"{name}.bias"]
            linear = nn.Linear(weight.shape[1], weight.shape[0])
            linear.load_state_dict({"weight": weight, "bias": bias})
            self.add_module(name, linear)

    def encode(self, examples: list[tuple[list[int], list[int]]]) -> Tensor:
        """The latents (B, Z)."""
        device, m = self.queries.device, len(self.queries)
        lengths = torch.tensor([len(x) + len(y) for x, y in examples], device=device)
        ids, seen = _padded([x + y + [0] * m for x, y in examples], device)
        at = lengths[:, None] + torch.arange(m, device=device)  # (B, m)
        rows = torch.arange(len(examples), device=device)[:, None]
        embedded = self.encoder.wte(ids).index_put(
            (rows, at), self.queries.expand(len(examples), -1, -1)
        )
        hidden = self.encoder(
            inputs_embeds=embedded, attention_mask=seen, use_cache=False
        ).last_hidden_state
        return self.to_latent(hidden[rows, at]).flatten(1)

    def loss(self, examples: list[tuple[list[int], list[int]]]) -> Tensor:
        """Summed negative log-likelihood of the responses, in training."""
        device, m = self.queries.device, len(self.queries)
        latents = self.encode(examples)
        latents = latents * (torch.rand(len(examples), 1, device=device) >= LATENT_DROPOUT)
        ids, seen = _padded([[0] * m + x + y for x, y in examples], device)
        response, _ = _padded([[0] * (m + len(x)) + [1] * len(y) for x, y in examples], device)
        hidden = (response == 1) & (torch.rand(response.shape, device=device) < TOKEN_DROPOUT)
        embedded = self.decoder.transformer.wte(ids).masked_fill(hidden[..., None], 0.0)
        prefix = self.from_latent(latents.unflatten(1, (m, -1)))
        embedded = torch.cat([prefix, embedded[:, m:]], dim=1)
        logits = self.decoder(inputs_embeds=embedded, attention_mask=seen, use_cache=False).logits
        targets = ids.masked_fill(response == 0, -100)[:, 1:]
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
        )


def guide_training(job: Job) -> Result:
    """Times optimizer steps over the job's batches, in micro-batches of `rows` rows.

    A step lasts from the end of the one before to its own.
    """
    device = torch.device(job["device"])
    guide = Guide(Path(job["guide"])).to(device).train()
    rows = _examples(job)
    optimizer = optimizer_of(guide, "adamw", job["learning_rate"])
    ends = []
    for batch in job["batches"]:
        examples = [example for i in batch for example in rows[i]]
        divisor = sum(len(y) for _, y in examples)
        for start in range(0, len(examples), 2 * job["rows"]):
            (guide.loss(examples[start : start + 2 * job["rows"]]) / divisor).backward()
        torch.nn.utils.clip_grad_norm_(guide.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        settle(device)
        ends.append(perf_counter())
    return {"seconds": [b - a for a, b in pairwise(ends)]}


@torch.no_grad()
def guide_distance(job: Job) -> Result:
    """||E(x, y) - E(x, y')|| of the job's texts, `rows` at a time; the first time warms up."""
    device = torch.device(job["device"])
    guide = Guide(Path(job["guide"])).to(device).eval()
    seconds: list[float] = []
    for _ in range(job["repeat"] + 1):
        out: list[float] = []
        with timed(seconds, device):
            rows = _examples(job)
            for start in range(0, len(rows), job["rows"]):
                z = guide.encode(
                    [example for row in rows[start : start + job["rows"]] for example in row]
                )
                out += (z[0::2] - z[1::2]).norm(dim=1).tolist()
    return {"seconds": seconds[1:], "distances": out}


def _examples(job: Job) -> list[tuple[tuple[list[int], list[int]], tuple[list[int], list[int]]]]:
    """Each row's real and generated example, ids as the guide makes them."""
    tokenizer = tokenizers.Tokenizer.from_file(str(Path(job["guide"]) / "tokenizer.json"))
    end = tokenizer.token_to_id(END)

    def ids(text: str) -> list[int]:
        return [*tokenizer.encode(text, add_special_tokens=False).ids, end]

    texts = zip(job["prompts"], job["real"], job["generated"], strict=True)
    return [((ids(x), ids(y)), (ids(x), ids(other))) for x, y, other in texts]


def _padded(sequences: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences], device=device)
    seen = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences], device=device)
    return ids, seen


if __name__ == "__main__":
    main({"guide_training": guide_training, "guide_distance": guide_distance})
