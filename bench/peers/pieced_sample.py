"""A response to every prompt by OpenVINO GenAI: continuous batching, a shared beginning once.

pieced_sample.py POLICY.gguf ROWS.jsonl SAMPLES.jsonl NEW_TOKENS
"""

import json
import sys

import openvino_genai

CACHE_GB = 2  # of keys and values: more than 256 rows of these lengths take

print("stage: sampling", flush=True)
gguf, data, out, new_tokens = sys.argv[1:]
with open(data, encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
scheduler = openvino_genai.SchedulerConfig()
scheduler.cache_size, scheduler.enable_prefix_caching = CACHE_GB, True
scheduler.max_num_batched_tokens, scheduler.max_num_seqs = 2**31 - 1, 256
properties = {"INFERENCE_PRECISION_HINT": "bf16"}
pipeline = openvino_genai.ContinuousBatchingPipeline(gguf, scheduler, "CPU", properties)
tokenizer = pipeline.get_tokenizer()
config = openvino_genai.GenerationConfig()
config.max_new_tokens = int(new_tokens)
config.do_sample, config.temperature, config.top_p, config.top_k = True, 1.0, 1.0, 2**31
config.eos_token_id = tokenizer.get_eos_token_id()
config.stop_token_ids = {config.eos_token_id}
prompts = []
for row in rows:
    turns = [{"role": "user", "content": row["prompt"]}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    prompts.append(tokenizer.encode(text, add_special_tokens=False).input_ids)
made = pipeline.generate(prompts, [config] * len(prompts))
with open(out, "w", encoding="utf-8") as file:
    for each in made:
        ids = each.m_generation_ids[0]
        sample = {"response": tokenizer.decode(ids), "tokens": len(ids)}
        file.write(json.dumps(sample) + "\n")
