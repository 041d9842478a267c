"""What public chat templates do, feature by feature: our text against transformers' environment.

Each case is a small template written for one feature. The oracle is transformers' own compiled
template; a case in which it fails must be refused here too, by name.
"""

import itertools
import json
from datetime import date
from typing import Any

import jinja2
import pytest
from made_tokenizers import messages

from ldalign.data.chat_template import ChatTemplate
from ldalign.system.errors import InputError

CHATS = {
    "one turn": [("user", "Hi there")],
    "system": [("system", " Be brief. "), ("user", "2 + 2?"), ("assistant", "4"), ("user", "é\n?")],
    "reasoning": [
        ("user", "a"),
        ("assistant", "<think>\nhm, b\n</think>\n\nbee"),
        ("user", "c"),
        ("assistant", "<think>\nwell\n</think>\n\ncee "),
    ],
}
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "tool_token": "<|tool|>"}

# How families of models write a turn: {name: (before all, a turn's head, its foot, the prompt)}.
STYLES = {
    "chatml": ("", "<|im_start|>{r}\n", "<|im_end|>\n", "<|im_start|>assistant\n"),
    "llama 3": (
        "{{ bos_token }}",
        "<|start_header_id|>{r}<|end_header_id|>\n\n",
        "<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "zephyr": ("", "<|{r}|>\n", "{{ eos_token }}\n", "<|assistant|>\n"),
    "phi": ("", "<|{r}|>\n", "<|end|>\n", "<|assistant|>\n"),
    "gemma": (
        "{{ bos_token }}",
        "<start_of_turn>{r}\n",
        "<end_of_turn>\n",
        "<start_of_turn>model\n",
    ),
    "granite": (
        "",
        "<|start_of_role|>{r}<|end_of_role|>",
        "<|end_of_text|>\n",
        "<|start_of_role|>assistant<|end_of_role|>",
    ),
    "command": (
        "{{ bos_token }}",
        "<|START_OF_TURN_TOKEN|>{r}",
        "<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|>",
    ),
    "alpaca": ("", "### {r}:\n", "\n\n", "### Response:\n"),
    "vicuna": ("", "{r}: ", "{{ eos_token }}", "ASSISTANT:"),
    "plain": ("", "{r}\n", "\n", ""),
}
# How a turn's text is written.
CONTENTS = {
    "as it is": "{{ m['content'] }}",
    "trimmed": "{{ m.content | trim }}",
    "concatenated": "{{ '' + m['content'] + '' }}",
    "tilde": "{{ m.content ~ '' }}",
    "generation tag": "{% generation %}{{ m.content }}{% endgeneration %}",
}


def styled(style: str, content: str) -> str:
    first, head, foot, prompt = STYLES[style]
    turn = head.replace("{r}", "{{ m['role'] }}") + CONTENTS[content] + foot
    return (
        f"{first}{{% for m in messages %}}{turn}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


LOOP = "{% for m in messages %}"
FEATURES = {
    # namespaces
    "namespace counter": "{% set n = namespace(i=0) %}" + LOOP + "{% set n.i = n.i + 1 %}{{ n.i }}"
    "{{ m.content }}{% endfor %}{{ n.i }}",
    "namespace in a loop": LOOP + "{% set n = namespace(seen=false) %}{% if m.get('role') == 'user'"
    " %}{% set n.seen = true %}{% endif %}{{ m.role }}{{ n.seen }}{% endfor %}",
    "namespace of text": "{% set n = namespace(t='') %}" + LOOP + "{% set n.t = n.t ~ m.role ~ ','"
    " %}{% endfor %}{{ n.t }}",
    "namespace of a list": "{% set n = namespace(l=[]) %}" + LOOP + "{% set n.l = n.l + [m.role] %}"
    "{% endfor %}{{ n.l | join('|') }}",
    "namespace to a macro": "{% macro f(n) %}{% set n.k = n.k + 1 %}{{ n.k }}{% endmacro %}"
    "{% set n = namespace(k=0) %}" + LOOP + "{{ f(n) }}{% endfor %}",
    "namespace in a namespace": "{% set a = namespace(b=namespace(c=1)) %}{% set a.d = a.b %}"
    "{{ a.b.c }}{{ a.d.c }}",
    "namespace in a dict": "{% set n = namespace(c=1) %}{% set d = {'n': n} %}{{ d.n.c }}",
    "namespace in a list": "{% set l = [namespace(c=1), namespace(c=2)] %}{% for n in l %}{{ n.c }}"
    "{% endfor %}",
    "namespace from a dict": "{% set n = namespace({'a': 1}, b=2) %}{{ n.a }}{{ n.b }}",
    "last user index": "{% set n = namespace(at=0) %}{% for m in messages[::-1] %}{% if n.at == 0"
    " and m.role == 'user' %}{% set n.at = messages | length - loop.index0 - 1 %}{% endif %}"
    "{% endfor %}{{ n.at }}",
    "calls in a loop": LOOP
    + "{% set a = m.content %}"
    + "{% set k = m.get('role') %}" * 60
    + "{{ k }}{% endfor %}",
    # loops
    "first and last": LOOP + "{{ loop.first }}{{ loop.last }}{{ loop.index }}{{ loop.index0 }}"
    "{{ loop.revindex }}{{ loop.length }}{% endfor %}",
    "previous and next": LOOP + "{% if loop.previtem is defined %}{{ loop.previtem.role }}>"
    "{% endif %}{{ m.role }}{% if not loop.last %}>{{ loop.nextitem.role }}{% endif %}{% endfor %}",
    "cycle and changed": LOOP + "{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{% endfor %}",
    "loop filter": "{% for m in messages if m.role != 'system' %}{{ m.role }}{% endfor %}",
    "loop else": "{% for m in messages if m.role == 'tool' %}x{% else %}no tools{% endfor %}",
    "break": LOOP + "{% if m.role == 'assistant' %}{% break %}{% endif %}{{ m.content }}"
    "{% endfor %}",
    "continue": LOOP + "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
    "{% endfor %}",
    "unpacking": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
    "range": "{% for i in range(messages | length) %}{{ i }}{{ messages[i].role }}{% endfor %}",
    "slice": "{% for m in messages[1:] %}{{ m.role }}{% endfor %}{{ messages[:-1] | length }}",
    "reversed": "{% for m in messages | reverse %}{{ m.role }}{% endfor %}",
    "recursive": "{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}<{{ loop(x) }}>"
    "{% else %}{{ x }}{{ loop.depth }}{% endif %}{% endfor %}",
    "loop in a loop": LOOP + "{% for k in messages %}{% if k.role == m.role %}{{ loop.index }}"
    "{% endif %}{% endfor %};{% endfor %}",
    "batches": "{% for pair in messages | batch(2, 'none') %}{{ pair | length }}{% endfor %}",
    "alternation": LOOP + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}",
    # macros
    "macro": "{% macro turn(m) %}[{{ m.role }}] {{ m.content }}{% endmacro %}"
    + LOOP
    + "{{ turn(m) }}{% endfor %}",
    "macro defaults": "{% macro f(a, b='x', c=none) %}{{ a }}{{ b }}{{ c }}{% endmacro %}"
    "{{ f(1) }}{{ f(1, 2) }}{{ f(1, c=3) }}",
    "macro with arguments left": "{% macro f() %}{{ varargs | length }}{{ kwargs | length }}"
    "{% endmacro %}{{ f(1, 2, a=3) }}",
    "macro of macros": "{% macro a(x) %}<{{ x }}>{% endmacro %}{% macro b(x) %}{{ a(x) }}"
    "{{ a(x | upper) }}{% endmacro %}{{ b('q') }}",
    "recursive macro": "{% macro show(v, d) %}{% if v is mapping %}{{ '{' }}{% for k in v %}{{ k }}"
    ":{{ show(v[k], d + 1) }},{% endfor %}{{ '}' }}{% elif v is sequence and v is not string %}["
    "{% for x in v %}{{ show(x, d + 1) }}{% endfor %}]{% else %}{{ v }}@{{ d }}{% endif %}"
    "{% endmacro %}{{ show({'a': {'b': [1, 2]}, 'c': 'x'}, 0) }}",
    "many macro calls": "{# " + "long " * 4000 + "#}{% macro f(x) %}{{ x }},{% endmacro %}"
    "{% for i in range(300) %}{{ f(i) }}{% endfor %}",
    "macro in a namespace": "{% macro f(x) %}{{ x }}{% endmacro %}{% set n = namespace(f=f) %}"
    "{{ n.f(1) }}",
    "call block": "{% macro box(w) %}[{{ w }}{{ caller() }}]{% endmacro %}{% call box('a') %}in"
    "{% endcall %}",
    "call block with arguments": "{% macro each(l) %}{% for x in l %}{{ caller(x) }}{% endfor %}"
    "{% endmacro %}{% call(x) each([1, 2]) %}<{{ x }}>{% endcall %}",
    "macro trimmed": "{% macro f() %}  x  {% endmacro %}{{ f() | trim }}{{ f().strip() }}",
    # tools
    "no tools": "{% if tools is not none and tools %}{{ tools | tojson }}{% else %}none{% endif %}",
    "tools defined": "{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}",
    "own tools": "{% if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}"
    "{{ tools is none }}",
    "documents": "{% if documents %}{{ documents | length }}{% else %}-{% endif %}",
    "tool calls": LOOP + "{% if m.tool_calls is defined and m.tool_calls %}{{ m.tool_calls }}"
    "{% elif 'tool_calls' in m %}empty{% else %}{{ m.role }}{% endif %}{% endfor %}",
    "tool tokens": "{{ tool_token }}" + LOOP + "{{ m.role }}{% endfor %}",
    "json": "{{ messages | tojson }}",
    "json, indented": "{{ messages[0] | tojson(indent=4) }}{{ {'b': 1, 'a': 'é<'} | tojson }}",
    "json, sorted": "{{ {'b': 1, 'a': [1.5, none, true]} | tojson(sort_keys=true) }}",
    "json, separators": "{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':')) }}",
    "json, ascii": "{{ 'é' | tojson(ensure_ascii=true) }}",
    "schema": "{% set p = {'type': 'object', 'properties': {'city': {'type': 'string'}}} %}"
    "{% for name, q in p.properties.items() %}{{ name }}: {{ q.type }}{% if not loop.last %}, "
    "{% endif %}{% endfor %}",
    # generation tags, dates
    "generation tags": LOOP + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "date": "{{ strftime_now('%d %b %Y') }}",
    "date, if there is one": "{% if strftime_now is defined %}{{ strftime_now('%Y-%m-%d') }}"
    "{% else %}26 Jul 2024{% endif %}",
    "date of its own": "{% if date_string is not defined %}{% set date_string = '26 Jul 2024' %}"
    "{% endif %}{{ date_string }}",
    # the system turn
    "system in the last user turn": "{% if messages[0].role == 'system' %}{% set s = "
    "messages[0].content %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}"
    "{% endif %}{% for m in rest %}{% if loop.last and s is defined %}{{ s }}\n\n{% endif %}"
    "{{ m.content }}{% endfor %}",
    "system in the first user turn": "{% if messages[0]['role'] == 'system' %}{% set s = "
    "'<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if loop.index0 == 0 %}{{ s + m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "system by default": "{% if messages[0].role != 'system' %}You are a model.{% endif %}"
    + LOOP
    + "{{ m.content }}{% endfor %}",
    "system refused": "{% if messages[0].role == 'system' %}{{ raise_exception('System role not "
    "supported') }}{% endif %}" + LOOP + "{{ m.content }}{% endfor %}",
    "system moved": "{% set s = messages | selectattr('role', 'equalto', 'system') | list %}"
    "{% if s %}{{ s[0].content }}{% endif %}{% for m in messages | rejectattr('role', 'equalto', "
    "'system') %}{{ m.content }}{% endfor %}",
    # reasoning
    "reasoning cut": LOOP + "{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}",
    "reasoning kept in the last": LOOP + "{% set c = m.content %}{% if '</think>' in c and not "
    "loop.last %}{% set c = c.split('</think>') | last %}{% endif %}{{ c }}{% endfor %}",
    "reasoning parted": LOOP + "{% if '</think>' in m.content %}{% set t = m.content.split("
    "'</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}({{ t }}){% endif %}"
    "{% endfor %}",
    "thinking off": "{% if add_generation_prompt %}{% if enable_thinking is defined and "
    "enable_thinking is false %}<think></think>{% endif %}>{% endif %}",
    "prefill": "{% if add_generation_prompt %}<think>\n{% endif %}",
    # white space
    "minus signs": "  {%- for m in messages -%}  {{- m.role -}}  {%- endfor -%}  ",
    "trimmed blocks": "{% if true %}\n  a\n{% endif %}\nb",
    "stripped blocks": "   {% if true %}\n\tx\n   {% endif %}\n",
    "plus signs": "   {%+ if true %}\n  a\n   {%+ endif +%}\nb",
    "comments": "{# a comment #}\nx {#- and another -#} y",
    "raw": "{% raw %}{{ not rendered }}{% endraw %}{{ 'é' }}",
    "newline at the end": "x\n",
    # values
    "set block": "{% set x %}a{{ 1 }}b{% endset %}{{ x }}{{ x | length }}",
    "ternary": LOOP + "{{ 'U' if m.role == 'user' else 'O' }}{% endfor %}",
    "ternary without else": "{{ 'x' if false }}|",
    "default": "{{ nothing | default('d') }}{{ '' | default('e', true) }}{{ missing or 'm' }}",
    "undefined": "{{ nothing }}{% if nothing %}x{% endif %}{{ nothing is defined }}",
    "undefined attribute": "{{ messages[0].name }}{{ messages[0]['name'] is defined }}",
    "undefined below undefined": "{{ nothing.at.all }}",
    "dict methods": "{{ messages[0].get('name', 'anon') }}{{ messages[0].keys() | list }}",
    "tests": LOOP + "{{ m is mapping }}{{ m.content is string }}{{ m.content is iterable }}"
    "{{ m.content is none }}{{ loop.index is odd }}{{ 4 is divisibleby(2) }}{% endfor %}",
    "more tests": "{{ 1 is number }}{{ 1.5 is float }}{{ true is boolean }}{{ [] is sequence }}"
    "{{ 2 is in([1, 2]) }}{{ 3 is gt(2) }}{{ 'a' is sameas('a') }}{{ 'A' is upper }}",
    "arithmetic": "{{ 7 // 2 }}{{ 7 % 3 }}{{ 2 ** 5 }}{{ 1 / 4 }}{{ -3 | abs }}{{ 2.567 | round(1) "
    "}}",
    "comparisons": "{{ 1 < 2 <= 2 }}{{ 'a' in 'abc' }}{{ 1 not in [2] }}{{ not true and false }}",
    "literals": "{{ [1, 'a', none, true] }}{{ {'a': (1, 2)} }}{{ 1e3 }}",
    "string methods": LOOP + "{{ m.content.strip().upper().lower().title() }}"
    "{{ m.content.startswith('Hi') }}{{ m.content.find('h') }}{{ m.content.replace('a', 'b') }}"
    "{% endfor %}",
    "more string methods": "{{ 'a,b'.split(',')[1] }}{{ ' x '.rstrip() }}{{ 'ab'.index('b') }}"
    "{{ '-'.join(['a', 'b']) }}{{ 'x'.center(5, '*') }}{{ 'a\\nb'.splitlines() }}"
    "{{ 'aXb'.partition('X') }}",
    "formats": "{{ '%s-%02d' % ('a', 7) }}{{ '{}{:>4}'.format('a', 'b') }}{{ '%5.1f' | format(2.34)"
    " }}",
    "text filters": "{{ 'ab c' | upper | replace('B', 'x') | capitalize }}{{ 'a b c' | wordcount }}"
    "{{ 'long text here' | truncate(8) }}{{ 'x' | indent(2, true) }}{{ 'ab' | first }}",
    "list filters": "{{ [3, 1, 2] | sort | join(',') }}{{ [1, 2] | sum }}{{ [1, 1] | unique | list "
    "}}{{ [1, 2, 3] | last }}{{ [3, 1] | min }}{{ [3, 1] | max }}{{ 'ab' | list }}",
    "maps": "{{ messages | map(attribute='role') | join(' ') }}{{ ['a'] | map('upper') | list }}",
    "selects": "{{ [0, 1, 2] | select | list }}{{ [1, 2] | reject('odd') | list }}"
    "{{ messages | selectattr('role', 'in', ['user', 'tool']) | list | length }}",
    "groups": "{% for role, ms in messages | groupby('role') %}{{ role }}{{ ms | length }}"
    "{% endfor %}",
    "dict filters": "{{ {'b': 1, 'a': 2} | dictsort }}{% for k, v in {'x': 1} | items %}{{ k }}{{ v"
    " }}{% endfor %}",
    "conversions": "{{ '3' | int + 1 }}{{ 3 | string + 'x' }}{{ '2.5' | float }}{{ 'a' | list }}",
    "escapes": "{{ '<b>' | e }}{{ '<b>' | safe }}",
    "slices of text": LOOP + "{{ m.content[:3] }}{{ m.content[-2:] }}{{ m.content[::-1] }}"
    "{% endfor %}",
    "list sum": "{% set l = messages + [{'role': 'user', 'content': 'more'}] %}{{ l | length }}",
    "with": "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}",
    "filter block": "{% filter upper %}x{{ messages[0].role }}{% endfilter %}",
    "joiner and cycler": "{% set j = joiner(', ') %}" + LOOP + "{{ j() }}{{ m.role }}{% endfor %}",
    "dict": "{% set d = dict(a=1, b=2) %}{{ d.a }}{{ d | length }}",
    "content in parts": LOOP + "{% if m.content is string %}{{ m.content }}{% else %}{% for p in "
    "m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}",
    "eos between": LOOP + "{{ m.content }}{% if not loop.last %}{{ eos_token }}{% endif %}"
    "{% endfor %}",
    "index of a text": "{{ messages[-1]['content'] }}{{ messages[0].content[0] }}",
    "role map": "{% set roles = {'assistant': 'model'} %}"
    + LOOP
    + "{{ roles.get(m.role, m.role) }}"
    "{% endfor %}",
    # what fails
    "raises": "{{ raise_exception('Only user and assistant roles are supported!') }}",
    "adds text and none": "{{ 'a' + none }}",
    "adds text and number": "{{ messages[0].content + 1 }}",
    "index out of range": "{{ messages[99].content }}",
    "calls what is not there": "{{ messages[0].content.nothing() }}",
}
CASES = {f"{s}, {c}": styled(s, c) for s, c in itertools.product(STYLES, CONTENTS)} | FEATURES


def oracle(template: str, chat: list[dict[str, str]], ask: bool) -> str:
    """What transformers renders, whatever it raises."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template(
        [chat], chat_template=template, add_generation_prompt=ask, **NAMES
    )
    return str(texts[0])


def ours(template: str, chat: list[dict[str, str]], ask: bool) -> str:
    compiled = ChatTemplate(template, date.today())
    return compiled.render(chat, tools=None, documents=None, add_generation_prompt=ask, **NAMES)


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 100 and len(FEATURES) >= 90


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chat", CHATS)
def test_text_is_that_of_transformers(name: str, chat: str) -> None:
    for ask in (True, False):
        try:
            expected = oracle(CASES[name], messages(CHATS[chat]), ask)
        except Exception as error:  # whatever a template runs into
            with pytest.raises(type(error)) as caught:
                ours(CASES[name], messages(CHATS[chat]), ask)
            assert str(caught.value) == str(error)
        else:
            assert ours(CASES[name], messages(CHATS[chat]), ask) == expected


@pytest.mark.parametrize("name", FEATURES)
def test_a_long_conversation_is_within_the_budget(name: str) -> None:
    """200 turns of 2,000 characters: what is only looked at is not paid for each time."""
    turns = [("user", "word " * 400), ("assistant", "<think>\nx\n</think>\n\n" + "say " * 500)]
    chat = messages(turns * 100)
    try:
        expected = oracle(FEATURES[name], chat, True)
    except Exception:  # one of the failing ones, see above
        return
    assert ours(FEATURES[name], chat, True) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% set n = namespace() %}{% set n.n = n %}{{ n }}",
        "{% set n = namespace() %}{% set n.n = [n, n] %}{{ n.n | string }}",
        "{% set n = namespace(x=[]) %}{% set m = namespace(x=[n, n]) %}{% set n.x = [m, m] %}"
        "{{ m.x }}",
        "{% set n = namespace(x='a' * 10000) %}{% set l = [n] * 9999 %}{{ l }}",
        "{% set n = namespace(x='a') %}{% set l = [n] * 9999 %}{% set n.x = 'a' * 99999 %}{{ l }}",
        "{% macro m(n) %}" + "x" * 1000 + "{{ m(n + 1) if n < 900 }}{% endmacro %}"
        "{% for i in range(99) %}{{ m(0) }}{% endfor %}",
        "{% macro m() %}" + "x" * 1000 + "{% endmacro %}{% for i in range(9999) %}{% set y = m() %}"
        "{% endfor %}",
        "{% macro b() %}{{ caller() }}{% endmacro %}{% for i in range(9999) %}{% set y %}"
        "{% call b() %}" + "x" * 1000 + "{% endcall %}{% endset %}{% endfor %}",
        "{% set l = range(99999) | list %}{% for a in l %}{% for b in l %}{% endfor %}{% endfor %}",
        "{% set l = range(99999) | list %}{% for a in l %}{% set x = l[1:] %}{% endfor %}",
        "{% set l = range(99999) | list %}{% for a in l %}{% set x = l | select | list %}"
        "{% endfor %}",
    ],
    ids=lambda template: template[:60],
)
def test_what_is_free_cannot_be_made_a_bomb(template: str) -> None:
    """Namespaces in values, loops, slices and choices are cheap, and still end."""
    with pytest.raises((jinja2.sandbox.SecurityError, RecursionError)):
        ours(template, messages([("user", "x")]), True)


def test_an_error_of_the_template_is_named_as_it_says_it(chatml_folder: Any) -> None:
    from ldalign.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(chatml_folder, template=FEATURES["raises"])
    with pytest.raises(InputError, match=r"chat template: Only user and assistant roles are supp"):
        tokenizer.render(messages([("user", "x")]))


def test_names_of_tokens_come_from_the_folder() -> None:
    assert json.loads(ours("{{ [bos_token, tool_token] | tojson }}", messages([]), True)) == [
        "<s>",
        "<|tool|>",
    ]
