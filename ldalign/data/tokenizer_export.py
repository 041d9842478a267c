"""The tokenizer files of a model folder, written into another one."""

import json
from pathlib import Path
from typing import Any

from ldalign.data.chat_text import ChatText
from ldalign.data.tokenizer import Tokenizer, load_tokenizer
from ldalign.data.tokenizer_files import (
    DEFAULT_TEMPLATE,
    NAMED_TEMPLATES,
    read_settings,
    read_templates,
    special_names,
)
from ldalign.system.errors import InputError
from ldalign.system.untrusted import MAX_TOKENIZER_BYTES, read_bytes, read_json

COPIED_FILES = tuple(
    "tokenizer.json special_tokens_map.json added_tokens.json tokenizer.model vocab.json "
    "merges.txt".split()
)
# The comment takes the line's end with it, so that what follows begins a line, as before.
WRITES_BOS = "{{ bos_token }}{# which the model was trained with #}\n"


def save_tokenizer_files(
    source: str | Path, folder: str | Path, template: str | None = None
) -> None:
    """Copies what turns text into ids and back from model folder `source` into `folder`.

    All chat templates go with it (`template`, if given, as the default one): as
    chat_template.jinja and additional_chat_templates/NAME.jinja *and* in tokenizer_config.json, so
    that readers old and new find them. Where the model wants a BOS and a template leaves it out,
    it is written in front: who renders the template gets the ids that training used.
    generation_config.json names every declared end id, so that all of them stop.
    """
    source, folder = Path(source), Path(folder)
    tokenizer = load_tokenizer(source, template)
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED_FILES:
        if (source / name).is_file():
            (folder / name).write_bytes(read_bytes(source / name, MAX_TOKENIZER_BYTES))
    settings = read_json(source / "tokenizer_config.json", missing={})
    settings.pop("auto_map", None)  # would ask the reader to import code
    settings.pop("chat_template", None)
    templates = exported_templates(tokenizer)
    if templates:
        settings["chat_template"] = _write_templates(templates, folder)
    _write_json(folder / "tokenizer_config.json", settings)
    generation = read_json(source / "generation_config.json", missing={})
    ends = list(tokenizer.end_ids)
    generation["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    _write_json(folder / "generation_config.json", generation)


def exported_templates(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the templates that go with a tokenizer, by name, each with the BOS that it lacks."""
    settings = read_settings(tokenizer.folder)
    templates = read_templates(tokenizer.folder, settings)
    if tokenizer.template:
        templates[DEFAULT_TEMPLATE] = tokenizer.template
    names = special_names(settings, tokenizer.folder / "tokenizer_config.json")
    return {name: _with_bos(text, tokenizer, names) for name, text in templates.items()}


def _with_bos(template: str, tokenizer: Tokenizer, names: dict[str, str]) -> str:
    """The template, which writes the BOS itself where `tokenizer` would have to add it."""
    bos = names.get("bos_token")
    if not tokenizer.adds_bos or bos is None or not template:
        return template
    try:
        chat = ChatText(tokenizer.folder, template, tokenizer.today, names)
        return WRITES_BOS + template if chat.leaves_out(bos) else template
    except InputError:  # one of the named templates may need what is not known here
        return template


def _write_templates(templates: dict[str, str], folder: Path) -> str | list[dict[str, str]]:
    """Writes the templates as files; returns what tokenizer_config.json says of them."""
    for name, text in templates.items():
        path = folder / "chat_template.jinja"
        if name != DEFAULT_TEMPLATE:
            path = folder / NAMED_TEMPLATES / f"{name}.jinja"
            path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode("utf-8"))
    if list(templates) == [DEFAULT_TEMPLATE]:
        return templates[DEFAULT_TEMPLATE]
    return [{"name": name, "template": text} for name, text in templates.items()]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
