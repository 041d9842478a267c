"""transformers' generation: `generate` on a left-padded batch, and its continuous batching.

A prompt's rows all go on to the full number of new tokens. The first batch warms up.
"""

import statistics
import time
from typing import Any

import torch
import transformers
from padded import make_model
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from worker import Job, Result, main, settle


class FirstToken(StoppingCriteria):
    """Stops nothing; notes when the first token was there."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.at = self.at or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def sampling(new_tokens: int, pad: int) -> dict[str, Any]:
    """Plain sampling at temperature 1, whatever the model's generation_config says."""
    return {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_new_tokens": new_tokens,
        "max_new_tokens": new_tokens,
        "pad_token_id": pad,
    }


def generation(job: Job) -> Result:
    """All rows of a batch at once."""
    device = torch.device(job["device"])
    model = make_model(job, getattr(torch, job["dtype"])).eval()
    pad = model.config.pad_token_id or 0
    seconds, first = [], []
    for prompts in job["batches"]:
        settle(device)
        noted = FirstToken()
        began = time.perf_counter()
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
        seen = torch.tensor(
            [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device
        )
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=seen,
                stopping_criteria=StoppingCriteriaList([noted]),
                **sampling(job["new_tokens"], pad),
            )
        settle(device)
        seconds.append(time.perf_counter() - began)
        first.append((noted.at or began) - began)
        assert out.shape[1] == longest + job["new_tokens"]
    settings = f"{transformers.__version__}; one batch, padded on the left"
    return {"seconds": seconds[1:], "first": statistics.median(first[1:]), "settings": settings}


def continuous(job: Job) -> Result:
    """Its own scheduler and paged cache."""
    device = torch.device(job["device"])
    model = make_model(job, getattr(torch, job["dtype"])).eval()
    settings = sampling(job["new_tokens"], model.config.pad_token_id or 0)
    config = GenerationConfig(**settings, eos_token_id=-1)  # never drawn: rows go on to the end
    seconds = []
    for prompts in job["batches"]:
        settle(device)
        began = time.perf_counter()
        with torch.no_grad():  # its own thread works outside of inference mode
            out = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
        settle(device)
        seconds.append(time.perf_counter() - began)
        made = [len(o.generated_tokens) for o in out.values()]
        wrong = {str(o.error) for o in out.values() if o.error}
        assert made == [job["new_tokens"]] * len(prompts), (
            f"continuous batching made {set(made)} tokens; {wrong}"
        )
    settings = f"{transformers.__version__}; its defaults"
    return {"seconds": seconds[1:], "first": None, "settings": settings}


if __name__ == "__main__":
    main({"generation": generation, "continuous": continuous})
