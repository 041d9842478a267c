"""A tiny sentence-embedding model with random weights, laid out like all-MiniLM-L6-v2."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = "what is the sum of two and one three four five more it a an answer right wrong".split()
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
LONGEST = 24  # tokens of a text that it reads, [CLS] and [SEP] among them


def word_tokenizer(**template: str) -> Tokenizer:
    """A tokenizer of WORDS that puts [CLS] and [SEP] around a text, or as a template says."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)], **template
    )
    return words


def save_tokenizer(words: Tokenizer, folder: Path) -> None:
    """Writes a tokenizer's files into a model folder."""
    names: dict[str, Any] = {f"{s[1:-1].lower()}_token": s for s in SPECIAL}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)


def write_bert(folder: Path) -> Path:
    """Makes the model folder: BERT without its pooler, and the steps after it; returns it."""
    words = word_tokenizer()
    # As all-MiniLM-L6-v2's tokenizer.json has them: neither may count.
    words.enable_truncation(9)
    words.enable_padding(length=9)
    save_tokenizer(words, folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        initializer_range=0.5,
        max_position_embeddings=40,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    steps = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [{"path": p, "type": f"sentence_transformers.models.{t}"} for p, t in steps]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": LONGEST}))
    (folder / "1_Pooling").mkdir()
    modes = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(modes))
    return folder
