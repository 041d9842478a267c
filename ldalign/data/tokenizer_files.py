"""The files of a model folder that make a tokenizer, read as a stranger's.

Special tokens are declared in up to four files, and come to what transformers makes of them:

- tokenizer.json: `added_tokens`, each with its id.
- tokenizer_config.json: `added_tokens_decoder` (with ids), `bos_token` and its like, any other key
  that ends in `_token`, `extra_special_tokens` (a list, or an object of names that templates may
  use), and its older name `additional_special_tokens`.
- special_tokens_map.json and added_tokens.json: older; read where tokenizer_config.json has no
  `added_tokens_decoder`, and then the map's values are the ones that hold.

A token that is declared without an id has that of the vocabulary, or the next one that is free.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from ldalign.data.tokenizer_growth import check_growth
from ldalign.system.errors import InputError, is_failure
from ldalign.system.untrusted import MAX_TOKENIZER_BYTES, read_json, read_text

NAMED_TOKENS = tuple(f"{role}_token" for role in "bos eos unk sep pad cls mask".split())
EXTRA, OLDER_EXTRA = "extra_special_tokens", "additional_special_tokens"
NAMED_EXTRA = "model_specific_special_tokens"
NAMED_TEMPLATES = "additional_chat_templates"  # a folder: NAME.jinja for each template but one
DEFAULT_TEMPLATE = "default"  # the name of that one
# What a template is given beside the special tokens.
RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# The library's own flags of a token that is text.
TEXT_TOKEN = {**dict.fromkeys(FLAGS, False), "normalized": True}


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns tokenizer_config.json, with what the older special_tokens_map.json says.

    Then `extra_special_tokens` is a list, and `model_specific_special_tokens` an object: {name of
    the token in templates: token}, of those that extra_special_tokens names. Which file and which
    key wins is as in transformers. Raises InputError for values of other kinds.
    """
    where = folder / "tokenizer_config.json"
    settings = read_json(where, missing={})
    named: dict[str, Any] = {}
    if OLDER_EXTRA in settings and not settings.get(EXTRA):
        settings[EXTRA] = settings.pop(OLDER_EXTRA)
    if isinstance(settings.get(EXTRA), dict):
        named |= settings.pop(EXTRA)
    if "added_tokens_decoder" not in settings:
        older = read_json(folder / "special_tokens_map.json", missing={})
        if isinstance(older.get(EXTRA), list):
            older[EXTRA] = [*(settings.get(EXTRA) or []), *older[EXTRA]]
        settings |= older
        if isinstance(settings.get(EXTRA), dict):
            named |= settings.pop(EXTRA)
    if OLDER_EXTRA in settings and EXTRA not in settings:
        settings[EXTRA] = settings.pop(OLDER_EXTRA)
    settings[EXTRA] = settings.get(EXTRA) or []
    if not isinstance(settings[EXTRA], list) or not all(
        map(token_text, [*settings[EXTRA], *named.values()])
    ):
        raise InputError(
            f"{where}: extra_special_tokens is neither a list of tokens nor an object of them; "
            "compare with the model's original files"
        )
    settings[NAMED_EXTRA] = named
    return settings


def special_names(settings: dict[str, Any], where: Path) -> dict[str, str]:
    """Returns the special tokens that a template may name, as {name: token}.

    settings: of `read_settings`. Raises InputError naming `where` for one that is called like
    another of a template's variables.
    """
    found = {**_own_tokens(settings), **settings[NAMED_EXTRA]}
    names = {name: text for name, value in found.items() if (text := token_text(value)) is not None}
    for name in RESERVED:
        if name in names:
            raise InputError(
                f"{where}: extra_special_tokens names a token {name!r}, which templates know as "
                "something else; rename it"
            )
    return names


def _own_tokens(settings: dict[str, Any]) -> dict[str, Any]:
    """The keys that are a token each: bos_token and its like first, then those of the model."""
    own = [name for name in settings if name.endswith("_token") and name not in NAMED_TOKENS]
    return {name: settings[name] for name in (*NAMED_TOKENS, *own) if name in settings}


def read_templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Returns the folder's chat templates by name; `default` is the one in use, where there is one.

    They are chat_template.jinja with additional_chat_templates/NAME.jinja, and what
    tokenizer_config.json has beside these: a text, or a list of {"name", "template"}. Raises
    InputError for what is no text.
    """
    where = folder / "tokenizer_config.json"
    given = settings.get("chat_template")
    templates: dict[str, Any] = {}
    if isinstance(given, list):
        entries = [entry for entry in given if isinstance(entry, dict)]
        templates = {str(entry.get("name")): entry.get("template") for entry in entries}
    elif given is not None:
        templates = {DEFAULT_TEMPLATE: given}
    for name, template in templates.items():
        if not isinstance(template, str):
            kind = type(template).__name__
            raise InputError(f"{where}: chat_template {name!r} is {kind}; expected text")
        _check_template_name(name, where)
    files = {DEFAULT_TEMPLATE: folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / NAMED_TEMPLATES).glob("*.jinja"))}
    for name, path in files.items():
        if path.is_file():
            _check_template_name(name, path)
            templates[name] = read_text(path, folder)
    return templates


def _check_template_name(name: str, where: Path) -> None:
    """It becomes a file's name where the template is exported."""
    if not name or "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
        raise InputError(f"{where}: a chat template is named {name!r}, which no file can be called")


def read_tokenizer_json(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns tokenizer.json, completed and checked.

    Truncation and padding are off, and every token that is declared elsewhere is among its added
    tokens. Raises InputError for a file that is not the tokenizers library's, where there is only
    an older kind of file, and for a token without a row in the embedding.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        _refuse_older_kinds(folder)
    description = read_json(path, most=MAX_TOKENIZER_BYTES)
    model = description.get("model")
    if not isinstance(model, dict) or not isinstance(description.get("added_tokens", []), list):
        raise InputError(
            f"{path}: is not a tokenizer of the tokenizers library; save the model with "
            "transformers"
        )
    check_growth(description, path)
    description["truncation"] = description["padding"] = None
    # Read where transformers reads it: never beside a decoder.
    legacy = "added_tokens_decoder" not in settings
    older = read_json(folder / "added_tokens.json", missing={}) if legacy else {}
    try:
        tokens = _all_added_tokens(description, settings, older)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: an added token (here or in tokenizer_config.json) is malformed: {error}"
        ) from error
    _check_rows(tokens, description, folder)
    description["added_tokens"] = tokens
    return description


def _refuse_older_kinds(folder: Path) -> None:
    for name in ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"):
        if (folder / name).is_file():
            raise InputError(
                f"{folder / name}: is a tokenizer of an older kind, and tokenizer.json is missing; "
                f"convert it: transformers' AutoTokenizer.from_pretrained({str(folder)!r})"
                f".save_pretrained({str(folder)!r}) writes tokenizer.json"
            )


def _all_added_tokens(
    description: dict[str, Any], settings: dict[str, Any], older: dict[str, Any]
) -> list[dict[str, Any]]:
    """The added tokens of all files, in the order of their ids; the declared ones are special."""
    added = {
        token["content"]: _added_token(token["content"], token["id"], token)
        for token in description.get("added_tokens") or []
    }
    for number, entry in (settings.get("added_tokens_decoder") or {}).items():
        if entry["content"] not in added:
            added[entry["content"]] = _added_token(entry["content"], int(number), entry)
    for content, number in older.items():
        if content not in added:
            # As transformers has it: an ordinary one, unless it is declared below.
            added[content] = _added_token(content, int(number), {"normalized": True})
    known = _vocabulary(description["model"])
    top = max([-1, *known.values(), *(token["id"] for token in added.values())])
    for text, flags in _declared(settings):
        if text in added:
            added[text]["special"] = True
            continue
        top += text not in known
        added[text] = _added_token(text, known.get(text, top), flags)
    return sorted(added.values(), key=lambda token: token["id"])


def _declared(settings: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(text, flags) of the special tokens that are declared by name or in a list, in that order.

    All of them are special, whatever they are called.
    """
    named = {**_own_tokens(settings), **settings[NAMED_EXTRA]}
    return [
        (text, {**(value if isinstance(value, dict) else {}), "special": True})
        for value in (*named.values(), *settings[EXTRA])
        if (text := token_text(value)) is not None
    ]


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    """The model's own pieces with their ids: an object, or a list of [piece, score]."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        return vocabulary
    return {entry[0]: i for i, entry in enumerate(vocabulary or [])}


def _check_rows(tokens: list[dict[str, Any]], description: dict[str, Any], folder: Path) -> None:
    """Raises InputError for a token, declared or of the vocabulary, that the embedding lacks.

    Without a config.json there is an embedding row for what tokenizer.json has, and no other.
    """
    vocabulary = _vocabulary(description["model"])
    if not vocabulary:
        return  # the library will say what is wrong with it
    rows = read_json(folder / "config.json", missing={}).get("vocab_size")
    if type(rows) is not int:
        ids = [token["id"] for token in description.get("added_tokens") or []]
        rows = 1 + max([*vocabulary.values(), *ids])
    for token in tokens:
        if token["id"] >= rows:
            raise InputError(
                f"{folder}: the declared token {token['content']!r} has no row in the embedding: "
                f"its id would be {token['id']}, vocab_size is {rows}; remove it from "
                "tokenizer_config.json, or give the model that was trained with it"
            )


def _added_token(content: str, token_id: int, flags: dict[str, Any]) -> dict[str, Any]:
    said = {key: bool(flags.get(key, False)) for key in FLAGS}
    return {"id": token_id, "content": content, **said}


def read_backend(description: dict[str, Any], folder: Path) -> tokenizers.Tokenizer:
    """Builds the tokenizer of the tokenizers library from its description.

    Raises InputError where the library refuses it, or an added token gets another id.
    """
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(description))
    except BaseException as error:
        raise library_error(folder, error) from error
    _check_ids(backend, description["added_tokens"], folder)
    return backend


def like(
    backend: tokenizers.Tokenizer, added_tokens: Sequence[dict[str, Any]], folder: Path
) -> tokenizers.Tokenizer:
    """Returns a tokenizer with other added tokens, which shares the rest with `backend`.

    Reading a vocabulary of 49,152 pieces a second time would take 0.2 s. Raises InputError where an
    added token gets another id.
    """
    made = tokenizers.Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (shared := getattr(backend, part)) is not None:
            setattr(made, part, shared)
    add(made, added_tokens)
    _check_ids(made, added_tokens, folder)
    return made


def add(backend: tokenizers.Tokenizer, tokens: Sequence[dict[str, Any]]) -> None:
    """Adds tokens, each with its `content` and all FLAGS, which get the next ids in their order.

    All at once, as what finds them in a text is built anew in every call of the library.
    """
    backend.add_tokens(
        [
            tokenizers.AddedToken(token["content"], **{flag: token[flag] for flag in FLAGS})
            for token in tokens
        ]
    )


def _check_ids(
    backend: tokenizers.Tokenizer, added_tokens: Sequence[dict[str, Any]], folder: Path
) -> None:
    """Raises InputError where an added token gets another id than it should have."""
    for token in added_tokens:
        if backend.token_to_id(token["content"]) != token["id"]:
            raise InputError(
                f"{folder}/tokenizer.json: added token {token['content']!r} cannot have id "
                f"{token['id']}"
            )


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
