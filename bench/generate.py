"""Batched sampling with a KV cache: `generate.generate_ids` against transformers' `generate` on a left-padded batch.

No row may stop before its full length, so both make the same number of tokens from the same prompts. Run by run.py.
"""

import time

import torch
from peer import Job, Timings, main, settle

from ldalign.generate import Sampling, generate_ids
from ldalign.weights import load_model


def batches(job: Job) -> list[list[list[int]]]:
    """The prompts of each repetition, the one to warm up first."""
    prompts = [pair["prompt"] for pair in job["pairs"]]
    return [prompts[i : i + job["batch"]] for i in range(0, len(prompts), job["batch"])]


def ldalign(job: Job, dtype: torch.dtype, device: torch.device) -> Timings:
    """Without end tokens, rows go on to the end."""
    model = load_model(job["folder"], dtype, device)
    seconds, work = [], []
    for n, prompts in enumerate(batches(job)):
        began = time.perf_counter()
        keys = [f"{n}/{i}" for i in range(len(prompts))]
        made = generate_ids(model, prompts, keys, [], Sampling(job["new_tokens"]), seed=0, batch_rows=len(prompts))
        settle(device)
        if n:
            seconds.append(time.perf_counter() - began)
            work.append(float(sum(len(r.ids) for r in made)))
    return seconds, work


def transformers(job: Job, dtype: torch.dtype, device: torch.device) -> Timings:
    """min_new_tokens keeps rows going."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype).to(device).eval()
    pad = model.config.pad_token_id or 0
    seconds, work = [], []
    for n, prompts in enumerate(batches(job)):
        began = time.perf_counter()
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
        seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=seen, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                min_new_tokens=job["new_tokens"], max_new_tokens=job["new_tokens"], pad_token_id=pad,
            )  # fmt: skip
        settle(device)
        if n:
            seconds.append(time.perf_counter() - began)
            work.append(float((out.shape[1] - longest) * len(prompts)))
    return seconds, work


if __name__ == "__main__":
    main({"ldalign": ldalign, "transformers": transformers})
