"""OpenVINO GenAI's generation, by its continuous batching with a shared prefix computed once.

It reads the policy's GGUF file: float16 weights, computed in the job's dtype, or 8 bits. A prompt's
rows all go on to the full number of new tokens. The first batch warms up.
"""

import time

import numpy as np
import openvino as ov
import openvino_genai
from worker import Job, Result, main

HINTS = {"bfloat16": "bf16", "float32": "f32"}
CACHE_GB = 4  # of keys and values: more than 128 rows of these lengths take


def generation(job: Job) -> Result:
    """All rows of a batch at once."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = CACHE_GB, True
    scheduler.max_num_batched_tokens = 2**31 - 1
    scheduler.max_num_seqs = max(map(len, job["batches"]))
    properties = {
        "INFERENCE_PRECISION_HINT": HINTS[job["dtype"]],
        "INFERENCE_NUM_THREADS": job["threads"],
    }
    pipeline = openvino_genai.ContinuousBatchingPipeline(job["gguf"], scheduler, "CPU", properties)
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = job["new_tokens"]
    config.ignore_eos, config.do_sample, config.temperature = True, True, 1.0
    config.top_p, config.top_k = 1.0, 2**31  # no cut
    seconds = []
    for prompts in job["batches"]:
        ids = [ov.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        began = time.perf_counter()
        out = pipeline.generate(ids, [config] * len(ids))
        seconds.append(time.perf_counter() - began)
        made = {len(each.m_generation_ids[0]) for each in out}
        assert made == {job["new_tokens"]} and len(out) == len(prompts), made
    settings = (
        f"{openvino_genai.__version__}; continuous batching, prefix caching, a cache of "
        f"{CACHE_GB} GB, all tokens of a step in one batch"
    )
    return {"seconds": seconds[1:], "first": None, "settings": settings}


if __name__ == "__main__":
    main({"generation": generation})
