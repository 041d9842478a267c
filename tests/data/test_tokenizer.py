"""Chat templates and ids against transformers; control tokens in messages; hostile folders."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from made_tokenizers import (
    CHATML_TEMPLATE,
    CONVERSATIONS,
    ZEPHYR_TEMPLATE,
    as_row,
    byte_level_tokenizer,
    copy,
    messages,
    sentencepiece_tokenizer,
)
from made_tokenizers import write_tokenizer_folder as write_folder

from ldalign.data.tokenizer import Tokenizer, load_tokenizer
from ldalign.data.tokenizer_export import WRITES_BOS, save_tokenizer_files
from ldalign.data.tokenizer_files import like, read_backend, read_settings, read_tokenizer_json
from ldalign.system.errors import InputError

LLAMA2_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + "
    "eos_token }}{% endif %}"
    "{% endfor %}"
)


def transformers_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def check_against_transformers(folder: Path, turns) -> None:
    """Checks that ids are those of apply_chat_template, after the one BOS the model may want."""
    ours, theirs = load_tokenizer(folder), transformers_tokenizer(folder)
    pair = ours.pair_ids(as_row(turns))
    chat = messages(turns)
    prompt = theirs.apply_chat_template(
        chat[:-1], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    whole = theirs.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert ours.render(chat) == theirs.apply_chat_template(chat, tokenize=False)
    if (
        ours.bos_id is not None
        and ours.prompt_ids(chat[:-1])[0] == ours.bos_id
        and prompt[0] != ours.bos_id
    ):
        prompt, whole = [ours.bos_id, *prompt], [ours.bos_id, *whole]
    assert pair.prompt == prompt
    assert pair.prompt + pair.response == whole[: len(prompt) + len(pair.response)]
    assert pair.response[-1] in ours.end_ids
    assert not set(pair.response[:-1]) & set(ours.end_ids)
    # only what comes after the end of the answer is cut away: the template's own line end
    assert theirs.decode(whole[len(prompt) + len(pair.response) :]).strip() == ""


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_ids_equal_transformers_zephyr(zephyr_folder, turns):
    check_against_transformers(zephyr_folder, turns)


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_ids_equal_transformers_smollm2(smollm2_folder, turns):
    check_against_transformers(smollm2_folder, turns)


@pytest.mark.parametrize("prefix", ["first", "always", "never"])
def test_ids_equal_transformers_metaspace(tmp_path, prefix):
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    folder = write_folder(tmp_path, sentencepiece_tokenizer(prefix), ZEPHYR_TEMPLATE, **names)
    for turns in CONVERSATIONS:
        check_against_transformers(folder, turns)


def test_zephyr_text_and_one_bos(zephyr_folder):
    tokenizer = load_tokenizer(zephyr_folder)
    chat = messages(CONVERSATIONS[0])
    assert tokenizer.render(chat[:1], add_generation_prompt=True) == (
        "<|user|>\nWhat is 12 + 30?</s>\n<|assistant|>\n"
    )
    assert tokenizer.render(chat) == (
        "<|user|>\nWhat is 12 + 30?</s>\n<|assistant|>\n12 + 30 = 42</s>\n"
    )
    prompt = tokenizer.prompt_ids(chat[:1])
    assert prompt.count(tokenizer.bos_id) == 1
    # Zephyr's template writes no BOS; its models are trained and served on the rendered text *with*
    # it
    theirs = transformers_tokenizer(zephyr_folder)
    assert prompt == theirs(tokenizer.render(chat[:1], add_generation_prompt=True))["input_ids"]


def test_bos_of_the_template_is_not_doubled(zephyr_folder):
    tokenizer = load_tokenizer(zephyr_folder, template=LLAMA2_TEMPLATE)
    prompt, response = tokenizer.pair_ids(as_row([("user", "Hi"), ("assistant", "Ho")]))
    assert prompt[0] == tokenizer.bos_id
    assert (prompt + response).count(tokenizer.bos_id) == 1
    doubled = load_tokenizer(zephyr_folder, template="{{ bos_token }}" + LLAMA2_TEMPLATE)
    with pytest.raises(InputError, match="two 1 '<s>'"):
        doubled.prompt_ids(messages([("user", "Hi")]))


def test_add_bos_token_false_wins(zephyr_folder, tmp_path):
    folder = copy(zephyr_folder, tmp_path, "tokenizer_config.json", add_bos_token=False)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_id not in tokenizer.prompt_ids(messages([("user", "Hi")]))


def test_a_bos_is_wanted_where_tokenizer_json_adds_one(tmp_path):
    """Where no add_bos_token says it: a post-processor does, a BOS that is only named does not."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    added = write_folder(tmp_path / "a", sentencepiece_tokenizer(), ZEPHYR_TEMPLATE, **names)
    assert load_tokenizer(added).adds_bos
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    named = write_folder(tmp_path / "b", byte_level_tokenizer(), CHATML_TEMPLATE, **names)
    assert load_tokenizer(named).bos_id == 0 and not load_tokenizer(named).adds_bos


def test_rendered_text_has_the_bos_once_and_where_it_is_wanted(zephyr_folder, tmp_path):
    tokenizer = load_tokenizer(zephyr_folder)
    bare = tokenizer.encode_rendered("x</s>", add_bos=False)
    assert tokenizer.bos_id not in bare and bare[-1] in tokenizer.end_ids
    assert tokenizer.encode_rendered("x</s>") == [tokenizer.bos_id, *bare]
    assert tokenizer.encode_rendered("x</s>", add_bos=True) == [tokenizer.bos_id, *bare]
    assert tokenizer.encode_rendered("<s>x</s>").count(tokenizer.bos_id) == 1
    without = load_tokenizer(
        copy(zephyr_folder, tmp_path, "tokenizer_config.json", add_bos_token=False)
    )
    assert without.encode_rendered("x</s>") == bare


def test_smollm2_ids_are_the_published_ones(smollm2_folder):
    tokenizer = load_tokenizer(smollm2_folder)
    system = [
        1,
        9690,
        198,
        2683,
        359,
        253,
        5356,
        5646,
        11173,
        3365,
        3511,
        308,
        34519,
        28,
        7018,
        411,
        407,
        19712,
        8182,
    ]
    assert tokenizer.prompt_ids([{"role": "user", "content": "Hi"}])[: len(system)] == system
    assert (tokenizer.end_ids, tokenizer.bos_id, tokenizer.vocab_size) == ((2,), 1, 49152)


# ---------------------------------------------------------------------------- text is never control


def renamed(folder: Path, target: Path, renames: dict[str, str]) -> Path:
    """Spells the control tokens of tokenizer and template otherwise, to see that all follow."""
    target.mkdir()
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8")
        for old, new in renames.items():
            text = text.replace(old, new)
        (target / path.name).write_text(text, encoding="utf-8")
    return target


@pytest.mark.parametrize(
    "content", ["a </s> b", "</s>", "</s></s> \n</s", "<s>x<unk>", "<</s>/s>", "<|assistant|>\nI"]
)
def test_control_text_in_messages_is_text_sentencepiece(zephyr_folder, tmp_path, content):
    oracle_folder = renamed(
        zephyr_folder, tmp_path / "oracle", {"</s>": "⟪end⟫", "<s>": "⟪bos⟫", "<unk>": "⟪unk⟫"}
    )
    check_control_text(
        load_tokenizer(zephyr_folder), transformers_tokenizer(oracle_folder), content
    )


@pytest.mark.parametrize(
    "content", ["a <|im_end|> b", "<|im_end|>", "<|im_start|>user\nI", "<|im_<|im_end|>end|>"]
)
def test_control_text_in_messages_is_text_byte_level(chatml_folder, tmp_path, content):
    names = {"<|im_end|>": "⟪end⟫", "<|im_start|>": "⟪start⟫", "<|endoftext|>": "⟪text⟫"}
    oracle_folder = renamed(chatml_folder, tmp_path / "oracle", names)
    check_control_text(
        load_tokenizer(chatml_folder), transformers_tokenizer(oracle_folder), content
    )


def check_control_text(tokenizer: Tokenizer, oracle, content: str) -> None:
    turns = [("user", f"u {content}"), ("assistant", f"w {content}")]
    pair = tokenizer.pair_ids(as_row(turns))
    expected = oracle.apply_chat_template(messages(turns), tokenize=True, return_dict=False)
    bos = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    assert pair.prompt + pair.response == (bos + expected)[: len(pair.prompt) + len(pair.response)]
    assert [i for i in pair.response if i in tokenizer.end_ids] == pair.response[-1:]
    assert content in tokenizer.decode(pair.response)
    assert tokenizer.decode(tokenizer.encode(content)) == content


def test_control_text_in_role_is_text(chatml_folder):
    tokenizer = load_tokenizer(chatml_folder)
    ids = tokenizer.prompt_ids([{"role": "user<|im_end|>", "content": "x"}])
    assert ids.count(tokenizer.end_ids[0]) == 1


def test_added_tokens_not_marked_special(tmp_path):
    """Role headers and end tokens are control even if tokenizer.json calls them ordinary; <think>
    stays a token.
    """
    backend = byte_level_tokenizer()
    backend.add_tokens(["<|user|>", "<|assistant|>", "<|end|>", "<|stop|>", "<think>"])
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    folder = write_folder(tmp_path, backend, template)
    ends = [backend.token_to_id(t) for t in ("<|end|>", "<|stop|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    tokenizer = load_tokenizer(folder)
    control = [backend.token_to_id(t) for t in ("<|user|>", "<|end|>", "<|assistant|>", "<|stop|>")]
    text = "<|assistant|><|end|><|stop|><think>"
    pair = tokenizer.pair_ids(as_row([("user", text), ("assistant", text)]))
    ids = pair.prompt + pair.response
    assert [i for i in ids if i in control] == [control[0], control[1], control[2], control[1]]
    assert ids.count(backend.token_to_id("<think>")) == 2
    assert tokenizer.decode(pair.response) == text + "<|end|>"


def check_prompt(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Checks that a row's prompt is what generation starts from; its prompt and response."""
    row = as_row([("user", "Say it."), ("assistant", "It is said.")])
    pair = tokenizer.pair_ids(row)
    assert pair.prompt == tokenizer.prompt_ids(row.history)
    assert tokenizer.decode(pair.response).strip() == "It is said."
    return pair


def test_a_prompt_without_control_tokens(chatml_folder):
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}"
        "<|im_end|>{% endif %} {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = load_tokenizer(chatml_folder, template=template)
    prompt, response = check_prompt(tokenizer)
    assert min(prompt) > 2 and response[-1] == 2  # 0 to 2 are the control tokens
    assert tokenizer.decode(prompt) == "user: Say it. assistant: "


def test_a_control_token_that_the_library_does_not_find(tmp_path):
    """One for words alone, which the template writes right behind a letter."""
    backend = byte_level_tokenizer()
    backend.add_special_tokens([tokenizers.AddedToken("<q>", single_word=True, special=True)])
    template = CHATML_TEMPLATE.replace("message['content'] +", "message['content'] + 'x<q>' +", 1)
    for text in (template, template.replace("x<q>", " <q> ")):
        folder = write_folder(tmp_path / str(len(text)), backend, text, eos_token="<|im_end|>")
        tokenizer = load_tokenizer(folder)
        row = as_row([("user", "Say it."), ("assistant", "It is said.")])
        assert tokenizer.pair_ids(row).prompt == tokenizer.prompt_ids(row.history)


def test_of_two_control_tokens_the_longer_one_is_meant(tmp_path):
    backend = byte_level_tokenizer()
    backend.add_special_tokens(["<|im_start|>assistant", "<|im_end|>\n"])
    folder = write_folder(tmp_path, backend, CHATML_TEMPLATE, eos_token="<|im_end|>")
    generation = {"eos_token_id": backend.token_to_id("<|im_end|>\n")}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = load_tokenizer(folder)
    prompt, response = check_prompt(tokenizer)
    longer = backend.token_to_id("<|im_start|>assistant")
    assert prompt.count(longer) == 1 and response[-1] == generation["eos_token_id"]
    rendered = tokenizer.render(messages([("user", "Say it.")]), add_generation_prompt=True)
    assert prompt == tokenizer.encode_rendered(rendered)


def test_private_use_characters_survive(chatml_folder):
    tokenizer = load_tokenizer(chatml_folder)
    text = "".join(map(chr, range(0xE000, 0xE008))) + "\ue000:0\ue001 <|im_end|> \ue0020\ue003"
    pair = tokenizer.pair_ids(as_row([("user", text), ("assistant", text)]))
    assert tokenizer.decode(pair.response) == text
    assert tokenizer.decode(pair.prompt).count(text) == 1


@pytest.fixture(scope="module")
def chatml(chatml_folder) -> Tokenizer:
    return load_tokenizer(chatml_folder)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
CONTROL_TEXTS = st.sampled_from(
    ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_start|>assistant\n", "<|im_"]
)


@given(st.lists(TEXTS | CONTROL_TEXTS).map("".join))
def test_any_text_comes_back_and_is_never_control(chatml, text):
    ids = chatml.encode(text)
    assert chatml.decode(ids) == text
    assert all(3 <= i < chatml.vocab_size for i in ids)  # 0 to 2 are the control tokens
    answer = f"{text}."
    pair = chatml.pair_ids(as_row([("user", f"{text}?"), ("assistant", f".{answer}")]))
    assert chatml.decode(pair.response) == f".{answer}"
    assert [i for i in pair.prompt + pair.response if i < 3] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    "text", ["", "12 345", "Zeile\r\n\n", "日本語 🙂", "<|im_start|>\n<|im_end|>", " \t x\u00a0"]
)
def test_smollm2_round_trip(smollm2_folder, text):
    tokenizer = load_tokenizer(smollm2_folder)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(17 <= i < tokenizer.vocab_size for i in ids)  # 0 to 16 are control tokens
    assert "12 345" not in text or len(ids) == 6  # every digit is a token of its own


# -------------------------------------------------------------------------- end ids, size, template


@pytest.mark.parametrize("value", [99999, "2", True, [2, None, 99999]])
def test_end_id_outside_the_vocabulary_is_refused(chatml_folder, tmp_path, value):
    folder = copy(chatml_folder, tmp_path, "generation_config.json", eos_token_id=value)
    with pytest.raises(InputError, match=r"generation_config.json: eos_token_id"):
        load_tokenizer(folder)


@pytest.mark.parametrize("empty", [False, True])
def test_a_folder_without_an_end_token_is_refused(tmp_path, empty):
    """And one without any token."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE()) if empty else byte_level_tokenizer()
    folder = write_folder(tmp_path, backend, CHATML_TEMPLATE)
    with pytest.raises(InputError, match="no end token is declared; set eos_token_id in"):
        load_tokenizer(folder)


def test_template_that_ends_no_answer_is_refused(chatml_folder):
    tokenizer = load_tokenizer(chatml_folder, template=CHATML_TEMPLATE.replace("<|im_end|>", ""))
    with pytest.raises(InputError, match="data.jsonl:3: .*without an end token"):
        tokenizer.pair_ids(as_row(CONVERSATIONS[0], where="data.jsonl:3"))


def test_template_order_and_hash(chatml_folder, tmp_path):
    folder = copy(
        chatml_folder, tmp_path, "tokenizer_config.json", chat_template="from the json field"
    )
    assert load_tokenizer(folder).template == CHATML_TEMPLATE
    (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(folder).template == "from the json field"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "chat_template": named})
    )
    assert load_tokenizer(folder).template == "d"
    mine = load_tokenizer(folder, template="mine")
    assert mine.template == "mine"
    # sha256 of "mine"
    assert mine.template_hash == "3fd30542fe3f61b14bd4a4b2dc0b6fb30fa6f63ebce52dd1778aaa8c4dc02cff"


def test_folder_without_template_encodes_but_does_not_render(chatml_folder, tmp_path):
    folder = copy(chatml_folder, tmp_path, "config.json")
    (folder / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    with pytest.raises(InputError, match="no chat template"):
        tokenizer.render(messages([("user", "x")]))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", r"TypeError: .* \(line 1\)$"),
        ("{% for x in range(10**6) %}a{% endfor %}", "OverflowError"),
        ("a\n{% for m in messages %}\n{{ m.x.y }}{% endfor %}", r"UndefinedError: .* \(line 3\)$"),
        ("a\n\n{{ 'a' * 10**9 }}", r"SecurityError: .* \(line 3\)$"),
    ],
)
@pytest.mark.parametrize("called", [None, "template=my.jinja"])
def test_failing_template_is_an_input_error(chatml_folder, template, message, called):
    """It is named by its folder, or its file, with the line that failed."""
    begin = called or f"{chatml_folder}: chat template"
    with pytest.raises(InputError, match=f"^{begin}: .*{message}"):
        load_tokenizer(chatml_folder, template=template, template_called=called).prompt_ids(
            messages([("user", "x")])
        )


@pytest.mark.parametrize("called", [None, "template=my.jinja"])
def test_broken_template_is_an_input_error(chatml_folder, called):
    begin = called or f"{chatml_folder}: chat template"
    with pytest.raises(InputError, match=rf"^{begin}: TemplateSyntaxError: .* \(line 2\)$"):
        load_tokenizer(chatml_folder, template="a\n{% for %}", template_called=called)


def test_template_extras(chatml_folder):
    template = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{% generation %}{{ m "
        "| tojson }}"
    )
    template += "{% endgeneration %}{% endfor %}{{ strftime_now('%Y') | length }}"
    text = load_tokenizer(chatml_folder, template=template).render(
        messages([("user", "<é>"), ("assistant", "x")])
    )
    assert text == '{"role": "user", "content": "<é>"}4'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json: is missing"),
        ("tokenizer.json", "{", "not valid JSON"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer.json", '{"model": {"type": "?"}}', "tokenizer.json: "),
        ("tokenizer.json", '{"model": {}, "added_tokens": [3]}', "malformed"),
        ("tokenizer_config.json", "[]", "expected a JSON object"),
        (
            "tokenizer_config.json",
            '{"eos_token": "</nowhere>"}',
            "the declared token '</nowhere>' has no row in the embedding",
        ),
    ],
)
def test_broken_folder_is_an_input_error(chatml_folder, tmp_path, name, text, message):
    folder = copy(chatml_folder, tmp_path, "config.json")
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(InputError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize("made", ["zephyr_folder", "chatml_folder", "smollm2_folder"])
def test_a_tokenizer_that_shares_its_vocabulary_is_the_same(request, made):
    """As the library reads it from a description with those added tokens, and the other one too."""
    folder = request.getfixturevalue(made)
    description = read_tokenizer_json(folder, read_settings(folder))
    backend = read_backend(description, folder)
    whole, added = backend.to_str(), description["added_tokens"]
    for tokens in (added, [{**token, "special": not token["special"]} for token in added]):
        expected = read_backend({**description, "added_tokens": tokens}, folder)
        made = like(backend, tokens, folder)
        made.add_tokens(["<one-more>"])
        expected.add_tokens(["<one-more>"])
        assert made.to_str() == expected.to_str()
    assert backend.to_str() == whole
    with pytest.raises(InputError, match=r"added token '<other>' cannot have id 3"):
        like(backend, [{**added[0], "content": "<other>", "id": 3}], folder)


def test_thousands_of_control_tokens(tmp_path):
    """As families with reserved ones have them: added one after the other they take a minute."""
    backend = byte_level_tokenizer()
    backend.add_special_tokens([f"<unused{n}>" for n in range(4000)])
    folder = write_folder(tmp_path, backend, CHATML_TEMPLATE, eos_token="<|im_end|>")
    tokenizer, text = load_tokenizer(folder), "a <unused7><unused3999> b"
    reserved = [backend.token_to_id(f"<unused{n}>") for n in (7, 3999)]
    found = tokenizer.encode(text)
    assert not set(reserved) & set(found) and tokenizer.decode(found) == text
    assert [i for i in tokenizer.encode_rendered(text) if i in reserved] == reserved


def test_truncation_and_padding_of_tokenizer_json_are_ignored(chatml_folder, tmp_path):
    backend = byte_level_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    folder = write_folder(tmp_path, backend, CHATML_TEMPLATE, eos_token="<|im_end|>")
    text = "How many clips did Natalia sell?"
    assert load_tokenizer(folder).encode(text) == load_tokenizer(chatml_folder).encode(text)


# ------------------------------------------------------------------------------------------- export


def test_saved_files_keep_ids_template_and_ends(zephyr_folder, tmp_path):
    source = copy(
        zephyr_folder, tmp_path, "generation_config.json", eos_token_id=[2, 5], temperature=0.7
    )
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoTokenizer": "evil.py"}})
    )
    save_tokenizer_files(source, tmp_path / "out")
    before, after = load_tokenizer(source), load_tokenizer(tmp_path / "out")
    row = as_row(CONVERSATIONS[1])
    assert after.pair_ids(row) == before.pair_ids(row)
    assert (after.end_ids, after.bos_id) == (before.end_ids, before.bos_id)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    template = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert settings["chat_template"] == template == WRITES_BOS + ZEPHYR_TEMPLATE
    assert "auto_map" not in settings
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2, 5], "temperature": 0.7}


def test_saved_template_is_the_one_in_use(chatml_folder, tmp_path):
    save_tokenizer_files(chatml_folder, tmp_path / "out", template="mine")
    assert load_tokenizer(tmp_path / "out").template == "mine"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "eos_token_id": 2
    }


def test_the_exported_template_writes_the_bos_of_training(zephyr_folder, tmp_path):
    """Whoever renders it, transformers for one, gets the ids that training used; once is enough."""
    save_tokenizer_files(zephyr_folder, tmp_path / "out")
    save_tokenizer_files(tmp_path / "out", tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").template == load_tokenizer(tmp_path / "out").template
    theirs = transformers_tokenizer(tmp_path / "out")
    for turns in CONVERSATIONS:
        row = as_row(turns)
        ids = theirs.apply_chat_template(
            list(row.history), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert ids == load_tokenizer(zephyr_folder).pair_ids(row).prompt


@pytest.mark.parametrize(
    "template",
    [
        ZEPHYR_TEMPLATE,
        "   " + ZEPHYR_TEMPLATE,  # white space that is stripped where it begins a line
        "\n" + ZEPHYR_TEMPLATE,
        "{%- if true -%} x {%- endif %}" + ZEPHYR_TEMPLATE,
    ],
)
def test_the_bos_in_front_changes_nothing_else(zephyr_folder, tmp_path, template):
    save_tokenizer_files(zephyr_folder, tmp_path / "out", template)
    before, after = load_tokenizer(zephyr_folder, template), load_tokenizer(tmp_path / "out")
    chat = messages(CONVERSATIONS[1])
    assert after.render(chat) == "<s>" + before.render(chat)
    assert after.pair_ids(as_row(CONVERSATIONS[1])) == before.pair_ids(as_row(CONVERSATIONS[1]))


def test_a_template_with_a_bos_or_for_none_is_exported_as_it_is(
    zephyr_folder, chatml_folder, tmp_path
):
    save_tokenizer_files(zephyr_folder, tmp_path / "a", LLAMA2_TEMPLATE)
    save_tokenizer_files(chatml_folder, tmp_path / "b")
    assert load_tokenizer(tmp_path / "a").template == LLAMA2_TEMPLATE
    assert load_tokenizer(tmp_path / "b").template == CHATML_TEMPLATE


def test_all_named_templates_are_exported(chatml_folder, tmp_path):
    """From both places, into both places: the list and the folder."""
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    folder = copy(chatml_folder, tmp_path, "tokenizer_config.json", chat_template=named)
    (folder / "chat_template.jinja").write_text(CHATML_TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("r")
    save_tokenizer_files(folder, tmp_path / "out")
    expected = {"default": CHATML_TEMPLATE, "tool_use": "t", "rag": "r"}
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert {e["name"]: e["template"] for e in settings["chat_template"]} == expected
    assert transformers_tokenizer(tmp_path / "out").chat_template == expected
    written = {p.stem: p.read_text() for p in (tmp_path / "out").rglob("*.jinja")}
    assert written == {"chat_template": CHATML_TEMPLATE, "tool_use": "t", "rag": "r"}


@pytest.mark.parametrize("name", ["../x", "", "a/b"])
def test_a_template_that_no_file_can_be_named_after_is_refused(chatml_folder, tmp_path, name):
    named = [{"name": "default", "template": "d"}, {"name": name, "template": "t"}]
    folder = copy(chatml_folder, tmp_path, "tokenizer_config.json", chat_template=named)
    with pytest.raises(InputError, match="which no file can be called"):
        load_tokenizer(folder)
