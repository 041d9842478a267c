"""Two tiny tokenizers made on the spot, templates, and conversations to render."""

import json
import shutil
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from ldalign.data.rows import Row

# Zephyr's template, as its model folder has it
ZEPHYR_TEMPLATE = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""


CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


CORPUS = [
    "The quick brown fox jumps over the lazy dog; it was not amused.",
    "How many clips did Natalia sell altogether in April and May? She sold 48 + 24 = 72 clips.",
    "<|user|> <|assistant|> <|system|> user assistant system\nlines\n\nand tabs\tand the end too",
    "Überraschung: naïve café, 10 °C, 3.14159",
]


def write_tokenizer_folder(
    folder: Path, tokenizer: tokenizers.Tokenizer, template: str, **settings: object
) -> Path:
    """A folder with tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    # the class that takes tokenizer.json as it is
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def sentencepiece_tokenizer(prefix: str = "legacy") -> tokenizers.Tokenizer:
    """Makes a small BPE laid out like Mistral's, with byte fallback.

    ``prefix``: legacy (Prepend), first or always (Metaspace).
    """
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        CORPUS * 3, trainers.BpeTrainer(vocab_size=400, show_progress=False)
    )
    learnt = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if prefix == "legacy":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    special = [
        tokenizers.AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")
    ]
    tokenizer.add_special_tokens(special)
    return tokenizer


def byte_level_tokenizer() -> tokenizers.Tokenizer:
    """A small byte-level BPE with ChatML's control tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


CONVERSATIONS = [
    [("user", "What is 12 + 30?"), ("assistant", "12 + 30 = 42")],
    [
        ("system", "Brief."),
        ("user", "Größe?\n\n ok"),
        ("assistant", "naïve 🙂\n"),
        ("user", "x"),
        ("assistant", "y"),
    ],
    [("user", "tabs\tand\nlines "), ("assistant", "The <|user|> is <b>here</b>\n\n\nend ")],
    [("user", " "), ("assistant", "a")],
]


def messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


def as_row(turns, where=""):
    *history, last = messages(turns)
    return Row("r", tuple(history), last["content"], where=where)


def copy(folder: Path, target: Path, name: str, **changes) -> Path:
    target = target / "copy"
    shutil.copytree(folder, target)
    path = target / name
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**value, **changes}))
    return target
