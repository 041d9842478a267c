"""The files of a model folder that make a tokenizer, read as a stranger's."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from ldalign.system.errors import InputError, is_failure
from ldalign.system.untrusted import MAX_TOKENIZER_BYTES, read_json, read_text

NAMED_TOKENS = tuple(f"{role}_token" for role in "bos eos unk sep pad cls mask".split())


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns tokenizer_config.json, completed by the older special_tokens_map.json."""
    settings = read_json(folder / "tokenizer_config.json", missing={})
    for name, value in read_json(folder / "special_tokens_map.json", missing={}).items():
        if settings.get(name) is None:
            settings[name] = value
    return settings


def read_template(folder: Path, settings: dict[str, Any]) -> str:
    """Returns the text of the folder's chat template; "" if there is none.

    It is in chat_template.jinja, else in tokenizer_config.json. Raises InputError if it is no text.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path)
    template = settings.get("chat_template")
    # Several templates by name: [{"name": "default", "template": ...}, ...].
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = {e.get("name"): e.get("template") for e in entries}.get("default")
    if template is not None and not isinstance(template, str):
        raise InputError(
            f"{folder}/tokenizer_config.json: chat_template is {type(template).__name__}; expected "
            "text"
        )
    return template or ""


def read_tokenizer_json(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns tokenizer.json, completed and checked.

    Truncation and padding are off, and every token that is declared elsewhere is among its added
    tokens. Raises InputError for a file that is not the tokenizers library's.
    """
    path = folder / "tokenizer.json"
    description = read_json(path, most=MAX_TOKENIZER_BYTES)
    model = description.get("model")
    if not isinstance(model, dict) or not isinstance(description.get("added_tokens", []), list):
        raise InputError(
            f"{path}: is not a tokenizer of the tokenizers library; save the model with "
            "transformers"
        )
    description["truncation"] = description["padding"] = None
    try:
        description["added_tokens"] = _all_added_tokens(description, settings)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: an added token (here or in tokenizer_config.json) is malformed: {error}"
        ) from error
    return description


def _all_added_tokens(
    description: dict[str, Any], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """The added tokens of both files, in the order of their ids; the named ones are special."""
    added = {
        token["content"]: _added_token(token["content"], token["id"], token)
        for token in description.get("added_tokens") or []
    }
    for number, entry in (settings.get("added_tokens_decoder") or {}).items():
        if entry["content"] not in added:
            added[entry["content"]] = _added_token(entry["content"], int(number), entry)
    vocabulary = description["model"].get("vocab")
    known = vocabulary if isinstance(vocabulary, dict) else {}
    for name in NAMED_TOKENS:  # transformers makes each of these a special token
        text = token_text(settings.get(name))
        if text is None:
            continue
        if text in added:
            added[text]["special"] = True
        elif text in known:
            added[text] = _added_token(text, known[text], {"special": True})
    return sorted(added.values(), key=lambda token: token["id"])


def _added_token(content: str, token_id: int, flags: dict[str, Any]) -> dict[str, Any]:
    keys = ("single_word", "lstrip", "rstrip", "normalized", "special")
    said = {key: bool(flags.get(key, False)) for key in keys}
    return {"id": token_id, "content": content, **said}


def read_backend(description: dict[str, Any], folder: Path) -> tokenizers.Tokenizer:
    """Builds the tokenizer of the tokenizers library from its description.

    Raises InputError where the library refuses it, or an added token gets another id.
    """
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(description))
    except BaseException as error:
        raise library_error(folder, error) from error
    for token in description["added_tokens"]:
        if backend.token_to_id(token["content"]) != token["id"]:
            raise InputError(
                f"{folder}/tokenizer.json: added token {token['content']!r} cannot have id "
                f"{token['id']}"
            )
    return backend


def library_error(folder: Path, error: BaseException) -> BaseException:
    """Returns what to raise for an error of the tokenizers library.

    The library has bare Exceptions, and BaseExceptions where Rust panics: they become InputErrors.
    Anything that is no failure, such as an interrupt, is returned as it is.
    """
    if not is_failure(error):
        return error
    return InputError(f"{folder}/tokenizer.json: {error}; download the model again")


def token_text(value: Any) -> str | None:
    """Returns the text of a token as config files write it: text, or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None
