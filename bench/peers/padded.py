"""A classic preference step on transformers: one right-padded batch, log-softmax of all logits.

The reference's log-probs are at hand. Settings: bfloat16 (weights and optimizer states, no
autocast: its best), mixed (float32 weights under bfloat16 autocast), float32.
"""

import time

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from worker import Job, Result, main, optimizer_of, padded, settle


def dpo(job: Job) -> Result:
    """One step a batch; the first warms up."""
    device = torch.device(job["device"])
    mixed = job["precision"] == "mixed"
    model = make_model(
        job, torch.bfloat16 if job["precision"] == "bfloat16" else torch.float32
    ).train()
    optimizer = optimizer_of(model, job["optimizer"], job["learning_rate"])
    seconds, losses = [], []
    for batch in job["batches"]:
        settle(device)
        began = time.perf_counter()
        sides = [(pair["prompt"], pair[side]) for side in ("real", "generated") for pair in batch]
        ids, seen, answer = padded(sides, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits
        token_logps = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        real, generated = (token_logps * answer[:, 1:]).sum(1).chunk(2)
        loss = -F.logsigmoid(job["beta"] * (real - generated)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        del logits, token_logps, loss
        settle(device)
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[1:], "losses": losses}


def make_model(job: Job, dtype: torch.dtype) -> PreTrainedModel:
    """The job's model folder, or random weights in the shape of its config."""
    if job["folder"]:
        return AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype).to(job["device"])
    config = AutoConfig.for_model(**job["config"])
    with torch.device(job["device"]):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


if __name__ == "__main__":
    main({"dpo": dpo})
