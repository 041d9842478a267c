"""Text in, pairs of token ids out: rows, the embedded data, tokenizer, chat template, pairs."""
