"""A tiny random model folder, made on the spot: `policy=toy`, which needs no download.

A whole model folder in the Hugging Face layout, 0.2 million weights: Mistral with grouped-query
attention and a window shorter than the texts, a byte-level BPE tokenizer trained on the embedded
task rows, ChatML's template. It knows nothing; it is there so that runs and tests walk every path
of the program in seconds.
"""

import json
import tempfile
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from ldalign.data import embedded
from ldalign.models.mistral import Mistral, MistralConfig
from ldalign.models.weights import save_model
from ldalign.system.errors import EnvironmentProblem
from ldalign.system.seeds import normals

TOY_MODEL = "toy"
RECIPE = 2  # raise it when the folder changes: it is part of the folder's name in the cache
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 512
CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "sliding_window": 48,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def toy_model(cache: Path) -> Path:
    """Returns the toy's model folder below `cache`, made if it is not there yet.

    Raises EnvironmentProblem if it cannot be written.
    """
    folder = cache / f"{TOY_MODEL}-{RECIPE}"
    if folder.is_dir():  # it gets this name when it is whole
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{TOY_MODEL}-") as temporary:
            made = write_toy_model(Path(temporary) / "model")
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster with the same result
                    raise
    except OSError as error:
        raise EnvironmentProblem(
            f"{folder}: cannot be written ({error.strerror}); set cache=FOLDER"
        ) from error
    return folder


def write_toy_model(folder: Path, seed: int = 0, **config: object) -> Path:
    """Writes the toy into `folder`, weights in bf16; returns the folder.

    `config` overrides keys of its config.json; the weights are a function of `seed`.
    """
    folder.mkdir(parents=True)
    raw = CONFIG | config
    _train_tokenizer().save(str(folder / "tokenizer.json"))
    names = {"eos_token": CONTROL_TOKENS[2], "pad_token": CONTROL_TOKENS[0]}
    # The class that takes tokenizer.json as it is.
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    ids = {key: raw[key] for key in ("eos_token_id", "pad_token_id")}
    files = {"config": raw, "tokenizer_config": kind | names, "generation_config": ids}
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    save_model(random_mistral(MistralConfig.from_json(raw, "toy"), seed), folder, source=folder)
    return folder


def random_mistral(config: MistralConfig, seed: int) -> Mistral:
    """Returns a float32 model with seeded normal weights of deviation 0.02, norms 1."""
    with torch.device("meta"):
        model = Mistral(config)
    state = {}
    for name, p in model.named_parameters():
        if p.ndim == 1:  # the norms
            state[name] = torch.ones(p.shape)
        else:
            state[name] = normals(seed, f"toy/{name}", *p.shape) * 0.02
    model.load_state_dict(state, assign=True)
    return model


def _train_tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = embedded.make_rows(0, "train", 300)
    texts = [message["content"] for row in rows for message in row["messages"]]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
