"""What both of TRL's iterations share: their options, and the held-out likelihood."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]


def options() -> argparse.ArgumentParser:
    """The options of an iteration."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--policy", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--global-batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--beta", type=float, default=0.1)
    return parser


def read_rows(path: str) -> list[Row]:
    """The rows of a JSON Lines file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def user(row: Row) -> Row:
    """The turn that asks."""
    return {"role": "user", "content": row["prompt"]}


def assistant(text: str) -> Row:
    """The turn that answers."""
    return {"role": "assistant", "content": text}


@torch.no_grad()
def nll(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], batch: int = 8
) -> float:
    """Nats a token of the rows' responses, in bfloat16; the longest rows first."""
    model.eval()
    texts = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(
            [user(row)], add_generation_prompt=True, tokenize=False
        )
        whole = tokenizer.apply_chat_template(
            [user(row), assistant(row["response"])], tokenize=False
        )
        # the template ends a turn with a line break, which is no part of the response
        ids = tokenizer(whole.rstrip("\n"), add_special_tokens=False).input_ids
        texts.append((ids, len(tokenizer(prompt, add_special_tokens=False).input_ids)))
    texts.sort(key=lambda text: -len(text[0]))
    total, count = 0.0, 0
    for start in range(0, len(texts), batch):
        chosen = texts[start : start + batch]
        longest = len(chosen[0][0])
        ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
        seen, response = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, (tokens, prompt_length) in enumerate(chosen):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            seen[i, : len(tokens)] = 1
            response[i, prompt_length : len(tokens)] = True
        with torch.autocast("cpu", torch.bfloat16):
            states = model.model(input_ids=ids, attention_mask=seen).last_hidden_state[:, :-1]
            logits = model.lm_head(states[response[:, 1:]])
        total += F.cross_entropy(
            logits.float(), ids[:, 1:][response[:, 1:]], reduction="sum"
        ).item()
        count += int(response.sum())
    return total / count
