"""The guide's work on transformers, padded: the same weights, token ids, batches, losses.

A latent is a linear map of the mean of the response tokens' last states, of [x; y] right-padded;
what is made of it scales and shifts the states that the decoder's head reads.
"""

from itertools import pairwise
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel
from worker import Job, Result, main, optimizer_of, padded, settle, timed

Row = dict[str, list[int]]  # prompt, real, generated: token ids


class Encoder(nn.Module):
    """The network of a guide folder's encoder, and the map to the latent."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder / "encoder", dtype=dtype)
        latent = load_file(folder / "latent.safetensors")
        weight, bias = latent["to_latent.weight"], latent["to_latent.bias"]
        self.to_latent = nn.Linear(weight.shape[1], weight.shape[0])
        self.to_latent.load_state_dict({"weight": weight, "bias": bias})

    def encode(self, ids: Tensor, seen: Tensor, response: Tensor) -> Tensor:
        """The latents (R, Z) float32 of R responses; ids, seen, response: (R, T), see `padded`."""
        states = self.encoder(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state
        share = response.float() / response.sum(1, keepdim=True)  # (R, T)
        return self.to_latent((share[:, None] @ states.float())[:, 0])


class Guide(Encoder):
    """Both GPT-2s of a guide folder and what lies between them; the decoder's head is tied."""

    def __init__(self, folder: Path, way_out: float) -> None:
        super().__init__(folder, torch.float32)
        self.way_out = way_out  # what both are multiplied by
        self.decoder = AutoModel.from_pretrained(folder / "decoder", dtype=torch.float32)
        latent = load_file(folder / "latent.safetensors")
        self.null, self.mask = (nn.Parameter(latent[name]) for name in ("null", "mask"))
        # (D, Z) each: what scales the decoder's states, and what shifts them
        self.to_scale, self.to_output = (
            nn.Parameter(latent[f"{name}.weight"]) for name in ("to_scale", "to_output")
        )

    def loss(
        self,
        rows: list[Row],
        kept: Tensor,
        what: dict[str, float],
        means: Tensor,
        contrasted: float,
    ) -> Tensor:
        """What these rows add to the loss () of a global batch, in training.

        kept (R,) bool: the responses that are read with their latent. means (R,): one over the
        batch's number of response tokens of that side. contrasted: tokens of its kept responses.
        """
        ids, seen, response = both_responses(rows, kept.device)
        latents = self.encode(ids, seen, response)  # (R, Z)
        share = torch.rand(len(ids), 1, device=ids.device) * what["token_dropout"]
        hidden = response & (torch.rand(ids.shape, device=ids.device) < share)
        embedded = self.decoder.get_input_embeddings()(ids)
        embedded = torch.where(hidden[..., None], self.mask, embedded)
        states = self.decoder(
            inputs_embeds=embedded, attention_mask=seen, use_cache=False
        ).last_hidden_state
        # The head reads where the next token is one of a response.
        of_row, place = response[:, 1:].nonzero(as_tuple=True)  # (M,)
        states, targets = states[of_row, place], ids[of_row, place + 1]

        def logps(z: Tensor) -> Tensor:  # (R,), summed over a response's tokens
            scale = 1 + self.way_out * (z @ self.to_scale.T)[of_row]
            shift = self.way_out * (z @ self.to_output.T)[of_row]
            logits = (states * scale + shift) @ self.decoder.get_input_embeddings().weight.T
            each = -F.cross_entropy(logits, targets, reduction="none")
            return torch.zeros(len(ids), device=ids.device).index_add(0, of_row, each)

        own = logps(torch.where(kept[:, None], latents, self.null))
        sibling = logps(latents.unflatten(0, (-1, 2)).flip(1).flatten(0, 1))
        contrast = what["contrast"] / contrasted * (F.softplus(sibling - own) * kept).sum()
        return contrast - (own * means).sum()


def guide_training(job: Job) -> Result:
    """Times optimizer steps over the job's batches, in micro-batches of `rows` rows.

    A step lasts from the end of the one before to its own.
    """
    device, what = torch.device(job["device"]), job["loss"]
    # ours has no dropout either
    guide = Guide(Path(job["guide"]), job["way_out"]).to(device).eval()
    optimizer = optimizer_of(guide, "adamw", job["learning_rate"])
    ends: list[float] = []
    losses: list[float] = []
    for batch in job["batches"]:
        kept = torch.rand(2 * len(batch), device=device) >= what["latent_dropout"]
        tokens = [sum(len(row[side]) for row in batch) for side in ("real", "generated")]
        means = (1 / torch.tensor(tokens, device=device)).repeat(len(batch))
        lengths = [len(row[side]) for row in batch for side in ("real", "generated")]
        contrasted = max(1.0, float(kept.float() @ torch.tensor(lengths, device=device).float()))
        total = 0.0
        for start in range(0, len(batch), job["rows"]):
            these = slice(2 * start, 2 * (start + job["rows"]))
            rows = batch[start : start + job["rows"]]
            loss = guide.loss(rows, kept[these], what, means[these], contrasted)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(guide.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        settle(device)
        ends.append(perf_counter())
        losses.append(total)
    return {"seconds": [b - a for a, b in pairwise(ends)], "losses": losses}


@torch.no_grad()
def guide_distance(job: Job) -> Result:
    """Times ||E(x, y) - E(x, y')|| of all rows, in the job's batches; the first time warms up."""
    device = torch.device(job["device"])
    guide = Encoder(Path(job["guide"]), getattr(torch, job["dtype"])).to(device).eval()
    seconds: list[float] = []
    distances = [0.0] * len(job["pairs"])
    for _ in range(job["repeat"] + 1):
        with timed(seconds, device):
            for batch in job["row_batches"]:
                z = guide.encode(*both_responses([job["pairs"][i] for i in batch], device))
                found = (z[0::2] - z[1::2]).norm(dim=1).tolist()
                for i, distance in zip(batch, found, strict=True):
                    distances[i] = distance
    return {"seconds": seconds[1:], "distances": distances}


def both_responses(rows: list[Row], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`padded` of [x; y] of both responses of every row: real, generated, real, ..."""
    return padded([(r["prompt"], r[side]) for r in rows for side in ("real", "generated")], device)


if __name__ == "__main__":
    main({"guide_training": guide_training, "guide_distance": guide_distance})
