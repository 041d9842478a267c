"""vLLM's generation on a CPU: its continuous batching with prefix caching, its model compiled.

The engine and its worker run in this process, so that its memory is all of theirs. A prompt's rows
all go on to the full number of new tokens. The first batch warms up.
"""

import os
import statistics
import time
from importlib.metadata import version

CACHE_GIB = 2  # of keys and values: more than 128 rows of these lengths take in float32
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

from vllm import LLM, SamplingParams  # noqa: E402  it reads the environment when it is imported
from worker import Job, Result, main  # noqa: E402


def generation(job: Job) -> Result:
    """All rows of a batch at once."""
    longest = max(len(prompt) for prompts in job["batches"] for prompt in prompts)
    engine = LLM(
        model=job["folder"],
        dtype=job["dtype"],
        skip_tokenizer_init=True,
        max_model_len=longest + job["new_tokens"],
        max_num_seqs=max(map(len, job["batches"])),
        enable_prefix_caching=True,
        disable_log_stats=False,
        seed=0,
    )
    sampling = SamplingParams(
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        ignore_eos=True,
        max_tokens=job["new_tokens"],
        detokenize=False,
    )
    seconds, first = [], []
    for prompts in job["batches"]:
        began = time.perf_counter()
        out = engine.generate(
            [{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False
        )
        seconds.append(time.perf_counter() - began)
        first.append(statistics.mean(each.metrics.first_token_latency for each in out))
        made = {len(each.outputs[0].token_ids) for each in out}
        assert made == {job["new_tokens"]} and len(out) == len(prompts), made
    settings = (
        f"{version('vllm-cpu')}; compiled, continuous batching, prefix caching, a cache of "
        f"{CACHE_GIB} GiB, engine and worker in one process"
    )
    return {"seconds": seconds[1:], "first": statistics.median(first[1:]), "settings": settings}


if __name__ == "__main__":
    main({"generation": generation})
