"""Which keys of a config.json are known: an allowlist, a key that is on no list is refused.

A key that asks for another network than the one built here must not be passed over, and nobody
knows all of those: so every key has to be read, or be known to leave the network as it is.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ldalign.system.errors import InputError

# Where a config comes from, how it is stored and run, what a task's head is called; what generation
# is asked for (generation_config.json's business); what is drawn at random in training, which here
# never is. The network is the same for every value of these.
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _flash_attn_2_enabled _name_or_path architectures attn_implementation bos_token_id dtype
    eos_token_id gradient_checkpointing id2label initializer_range is_decoder is_llama_config
    label2id license model_type name_or_path num_labels output_attentions output_hidden_states
    output_scores pad_token_id pretraining_tp problem_type return_dict return_dict_in_generate
    sep_token_id tokenizer_class torch_dtype torchscript transformers.js_config
    transformers_js_config transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache
    chunk_size_feed_forward decoder_start_token_id finetuning_task prefix task_specific_params
    tf_legacy_loss model_max_length max_sequence_length
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences remove_invalid_values repetition_penalty suppress_tokens
    temperature top_k top_p typical_p
    attention_dropout attention_probs_dropout_prob attn_pdrop classifier_dropout embd_pdrop
    hidden_dropout hidden_dropout_prob resid_pdrop
    """.split()
)
# Harmless as long as they say nothing: {key: the values that are as good as none}.
OFF: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "quantization_config": ({},),
    "tie_encoder_decoder": (False,),
    "use_return_dict": (True,),
}
WHY = {"quantization_config": "give the unquantised weights"}


def check_keys(
    raw: Mapping[str, Any],
    where: str,
    read: Iterable[str],
    harmless: Iterable[str] = (),
    off: Mapping[str, tuple[Any, ...]] | None = None,
) -> None:
    """Raises InputError naming `where` and the key for one that may change the network.

    read: the keys that the network is built from. harmless: those beside HARMLESS that leave it as
    it is. off: those that do so with one of these values, beside OFF. A null says nothing.
    """
    known = {*read, *harmless, *HARMLESS}
    switched = {**OFF, **(off or {})}
    for key, value in raw.items():
        if value is None or key in known:
            continue
        allowed = switched.get(key)
        if allowed is None:
            raise InputError(
                f"{where}: key {key!r} is not known here and may change the network; if it does "
                "not, remove it"
            )
        # True is 1, and 1.0 too: a flag may not be a number, nor the other way round.
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            wanted = " or ".join(_json(a) for a in (*allowed, None))
            raise InputError(
                f"{where}: {key} {_json(value)} is not supported; "
                + WHY.get(key, f"it must be {wanted}")
            )


def _json(value: Any) -> str:
    names = {True: "true", False: "false", None: "null"}
    named = value is None or isinstance(value, bool)
    return names[value] if named else repr(value)[:60]
