"""Chat templates, rendered where they can do no harm. Skip this on a first reading.

All that the rest of the program needs to know: `ChatTemplate(text, today).render(messages)` gives
the text that jinja2 gives with transformers' settings, or raises; a template that asks for too much
raises SecurityError. `ldalign.data.tokenizer` is its only user.

A chat template is a program from the model folder. jinja2's immutable sandbox keeps it away from
Python's insides and from files, but not from `'a' * 10**9` or from loops in loops in loops. Here
every step that can make text or take time spends from a budget: a loop's turn, a call, a filter, `+
* ** % ~`, a slice, a list or dict literal, and what is written. The budget grows with the
conversation and is far above what a template needs; beyond it the template is refused. Why not a
process with limits of the kernel's: it costs a start of Python for every tokenizer and a round trip
for every row, and what works for a sample of the rows may be a bomb for another. So the compiler is
what is changed: `_Metered` puts the meter's filters into the syntax tree, and `_Sandbox` lets only
known methods and filters be called, each measured before and after. Containers are measured as if
written out (`[x, x]` nested 40 times is 2^40 items), at every step, so that no value exists that
takes long to print, compare or hash.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import date
from functools import wraps
from typing import Any, NoReturn, cast

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes as nodes
import jinja2.parser
import jinja2.sandbox
from jinja2.runtime import BlockReference, Context, LoopContext
from jinja2.sandbox import SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_TEMPLATE = 64 * 1024  # characters of a template; the longest in use have some 30,000
MAX_SPENT = 2**20  # characters and steps of one rendering, beside those for the conversation
SPENT_PER_CHARACTER = 64  # of it: a template copies each message some ten times (trim, +, write)
MAX_SECONDS = 5.0  # of this thread's processor time, for one rendering
MAX_NUMBER = 10**6  # as an argument: a width or a count
MAX_BITS = 4096  # of an integer
MAX_WIDTH = 999  # in a format string

TEXT_METHODS = frozenset(
    "capitalize casefold center count endswith expandtabs find format format_map index isalnum "
    "isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle "
    "isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex "
    "rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper "
    "zfill".split()
)
CONTAINER_METHODS = frozenset("copy count get index items keys values".split())
FILTERS = frozenset(
    "abs attr batch capitalize center count d default dictsort e escape first float format groupby "
    "indent int items join last length list lower map max min reject rejectattr replace reverse "
    "round safe select selectattr slice sort string sum title trim truncate unique upper "
    "wordcount".split()
)
JINJAS_OWN = ("_loop_vars", "_block_vars")  # arguments that the compiler adds to calls
# Filters whose arguments are no widths or counts, or are looked at elsewhere.
NO_WIDTHS = frozenset("abs int float round string default d format first last safe".split())
# Filters that take no longer for a longer value.
LOOKS = frozenset("count first last length".split())
# Filters that look at each item of a list and hand on those they were given.
CHOOSERS = frozenset("list reject rejectattr select selectattr".split())


class _Budget:
    """What one rendering may still do."""

    def __init__(self, allowed: int) -> None:
        self.allowed = self.left = allowed
        self.calls = 0
        self.deadline = 0.0

    def spend(self, amount: int) -> None:
        """Takes `amount` off the budget; SecurityError where it or the time is used up."""
        self.left -= amount
        if self.left < 0:
            raise SecurityError(
                f"writes, copies or loops more than it may ({self.allowed} characters and steps)"
            )
        self.calls += 1
        # Seldom, as the clock may cost a call of the system; few renderings get here.
        if self.calls % 1024 == 0:
            now = time.thread_time()
            self.deadline = self.deadline or now + MAX_SECONDS
            if now > self.deadline:
                raise SecurityError(f"takes more than {MAX_SECONDS:g} s")

    def take(self, value: Any) -> Any:
        """`value`, paid for; an iterator pays item by item."""
        if isinstance(value, str):  # nearly always
            self.spend(1 + len(value))
        elif hasattr(value, "__next__"):
            return self.items(value, 1)
        else:
            self.spend(self.size(value)[0])
        return value

    def items(self, values: Any, each: int) -> Iterator[Any]:
        """The values, each paid for with its own size and `each`."""
        for value in values:
            self.spend(each)
            self.take(value)
            yield value

    def turns(self, values: Any, each: int) -> Iterator[Any]:
        """The values, each paid for with `each`, whatever its size: it is there already."""
        for value in values:
            self.spend(each)
            yield value

    def size(self, value: Any) -> tuple[int, int]:
        """The characters and items of `value` written out, about, and its depth.

        Raises SecurityError where that is too much.
        """
        if isinstance(value, str):  # nearly always
            return 1 + len(value), 0
        total, depth = 0, 0
        stack = [(value, 0)]
        while stack:
            item, level = stack.pop()
            total += 1
            depth = max(depth, level)
            if isinstance(item, str):
                total += len(item)
            elif isinstance(item, int):
                if item.bit_length() > MAX_BITS:
                    raise SecurityError(f"makes an integer of more than {MAX_BITS} bits")
            elif isinstance(item, Mapping):
                stack += [(part, level + 1) for pair in item.items() for part in pair]
            elif isinstance(item, Namespace):
                # It can change later, and so what it is in: that is why text is measured again
                # where it is written. One that holds itself goes round until the budget is spent.
                attributes = item._Namespace__attrs
                stack += [(part, level + 1) for pair in attributes.items() for part in pair]
            elif isinstance(item, list | tuple | set | frozenset):
                stack += [(part, level + 1) for part in item]
            if total > self.left:
                raise SecurityError(
                    f"makes a value larger than it may ({self.allowed} characters and items)"
                )
        return total, depth


_BUDGET: ContextVar[_Budget] = ContextVar("_BUDGET")


class ChatTemplate:
    """A compiled chat template.

    today: the day that strftime_now formats, at 0:00: every rendering says the same. Raises
    jinja2's SecurityError for a hostile template, any other exception for a broken one.
    """

    def __init__(self, text: str, today: date) -> None:
        if len(text) > MAX_TEMPLATE:
            raise SecurityError(f"has {len(text)} characters; at most {MAX_TEMPLATE} are read")
        self._template = _sandbox(len(text), today).from_string(text)

    def render(self, messages: list[dict[str, str]], **variables: Any) -> str:
        """Returns the conversation as the template writes it.

        Raises SecurityError where that takes more than it may; else
        whatever the template runs into.
        """
        characters = sum(len(text) for message in messages for text in message.values())
        given = characters + 100 * len(messages)
        token = _BUDGET.set(_Budget(MAX_SPENT + SPENT_PER_CHARACTER * given))
        try:
            return self._template.render(messages=messages, **variables)
        finally:
            _BUDGET.reset(token)


# -------------------------------------------------------------------------------------- the sandbox


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox of transformers, metered.

    A forbidden attribute is an error at once, not an empty text.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    # The template's own characters: what one turn of a recursive loop, or a block, may write.
    text_size = 0

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__} is unsafe")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return _Metered().visit(tree)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _BUDGET.get()
        if operator == "%" and isinstance(left, str):
            budget.spend(_percent_size(budget, left, right))
        elif operator == "*" and (isinstance(left, int) != isinstance(right, int)):
            count, value = (left, right) if isinstance(left, int) else (right, left)
            budget.spend(budget.size(value)[0] * max(1, count) if isinstance(count, int) else 1)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if abs(left) > 1 and right * left.bit_length() > MAX_BITS:
                raise SecurityError(f"makes an integer of more than {MAX_BITS} bits")
        else:
            budget.spend(budget.size(left)[0] + budget.size(right)[0])
        result = super().call_binop(context, operator, left, right)
        budget.size(result)
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @wraps(value)
        def bounded(*args: Any, **kwargs: Any) -> str:
            budget = _BUDGET.get()
            budget.spend(_braces_size(budget, value.__self__, [args, kwargs]))
            return wrapped(*args, **kwargs)

        return bounded

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        budget.spend(1)
        # What jinja passes itself, in a loop or a block: all variables set there, at every call.
        own = {name: kwargs.pop(name) for name in JINJAS_OWN if name in kwargs}
        if isinstance(__obj, LoopContext | BlockReference):
            budget.spend(__self.text_size)
        if isinstance(__obj, LoopContext) and args:
            args = (budget.items(args[0], 1 + __self.text_size), *args[1:])
        args, kwargs = _paid(budget, args, kwargs)
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            if name not in TEXT_METHODS:
                raise SecurityError(f"calls the text method {name!r}, which no template needs")
            args = _text_call(budget, owner, name, args)
        elif isinstance(owner, int | float | bytes) or (
            isinstance(owner, list | tuple | Mapping) and name not in CONTAINER_METHODS
        ):
            raise SecurityError(
                f"calls the method {name!r} of a {type(owner).__name__}, which no template needs"
            )
        return budget.take(super().call(__context, __obj, *args, **kwargs, **own))


def _paid(
    budget: _Budget, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments, measured; numbers among them are widths or counts, and small."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, int | float) and abs(value) > MAX_NUMBER:
            raise SecurityError(f"asks for a width or a count above {MAX_NUMBER}")
    return tuple(budget.take(a) for a in args), {name: budget.take(a) for name, a in kwargs.items()}


def _text_call(budget: _Budget, text: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pays for what a method of `text` will make, which may be far more than it is given.

    Returns the method's arguments.
    """
    if name == "replace":
        budget.spend(_replace_size(text, args))
    elif name == "join" and args:
        parts = list(args[0])
        budget.spend(len(text) * len(parts) + budget.size(parts)[0])
        args = (parts,)
    elif name == "expandtabs":
        width = args[0] if args and isinstance(args[0], int) else 8
        budget.spend(len(text) + text.count("\t") * width)
    elif name in ("center", "ljust", "rjust", "zfill") and args and isinstance(args[0], int):
        budget.spend(args[0])
    else:
        budget.spend(len(text))
    return args


def _replace_size(text: str, args: tuple[Any, ...]) -> int:
    """The most characters that a replacement leaves: an empty text is found everywhere."""
    if len(args) < 2 or not all(isinstance(arg, str) for arg in args[:2]):
        return len(text)
    found = text.count(args[0]) if args[0] else len(text) + 1
    return len(text) + found * len(args[1])


def _percent_size(budget: _Budget, text: str, values: Any) -> int:
    """The most characters of `text % values`."""
    if re.search(r"%[^a-zA-Z%]*(\*|\d{4})", text):
        raise SecurityError(f"formats to a width above {MAX_WIDTH}")
    return len(text) + text.count("%") * (MAX_WIDTH + budget.size(values)[0])


def _braces_size(budget: _Budget, text: str, values: Any) -> int:
    """The most characters of `text.format(values)`."""
    bare = text.replace("{{", "").replace("}}", "")
    if re.search(r"\{[^{}]*(\{|\d{4})", bare):
        raise SecurityError(
            f"formats to a width above {MAX_WIDTH}, or one that is not written in the text"
        )
    return len(text) + bare.count("{") * (MAX_WIDTH + budget.size(values)[0])


# -------------------------------------------------------------------------------------- the filters


def _sandbox(text_size: int, today: date) -> _Sandbox:
    """The environment that a template of `text_size` characters is compiled in."""
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
        loader=jinja2.FunctionLoader(_no_files),
    )
    environment.text_size = text_size
    builtin = {name: function for name, function in environment.filters.items() if name in FILTERS}
    environment.filters = {name: _metered(name, function) for name, function in builtin.items()}
    environment.filters["tojson"] = jinja2.pass_context(
        lambda context, *args, **options: _tojson(*args, **options)
    )
    meters = {name: jinja2.pass_context(function) for name, function in METERS.items()}
    environment.filters |= meters
    del environment.globals["lipsum"]  # random text: a rendering must repeat
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_of(today)
    return environment


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of jinja2's, its arguments and its result paid for.

    It asks for the context, which also keeps the compiler from running it on constants.
    """
    wants = getattr(function, "jinja_pass_arg", None)

    @jinja2.pass_context
    def filtered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        chooses = name in CHOOSERS and isinstance(value, list | tuple)
        (value, *rest), kwargs = _paid_filter(budget, name, (value, *args), kwargs)
        # What the filter wants as its first argument; `environment` is the only other kind.
        kinds = {None: (), "context": (context,), "eval_context": (context.eval_ctx,)}
        first = kinds.get(getattr(wants, "name", None), (context.environment,))
        result = function(*first, value, *rest, **kwargs)
        if chooses:  # paid for by the item: what they hold is not copied
            return result if isinstance(result, list) else budget.turns(result, 1)
        return budget.take(result)

    return filtered


def _paid_filter(
    budget: _Budget, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A filter's arguments, measured, and what it will make of them paid for."""
    value = args[0]
    if name not in NO_WIDTHS:
        _paid(budget, args[1:], kwargs)
    if name in LOOKS and isinstance(value, str | list | tuple | Mapping):
        # Else `messages|length` in a loop over messages would cost the square of their number.
        budget.spend(1)
    elif name in CHOOSERS and isinstance(value, list | tuple):
        # Else a choice of messages in a loop over messages would cost that square, too.
        budget.spend(1 + len(value))
    else:
        args = (budget.take(value), *args[1:])
    options = [*args[1:], *kwargs.values()]
    if name == "join":
        args = (list(args[0]), *args[1:])
        between = budget.size(options)[0]
        budget.spend(between * len(args[0]))
    elif name == "replace":
        budget.spend(_replace_size(str(value), tuple(map(str, options))))
    elif name == "format":
        budget.spend(_percent_size(budget, str(value), options))
    elif name == "indent":
        widths = [option if isinstance(option, int) else len(str(option)) for option in options]
        budget.spend((str(value).count("\n") + 2) * (max([4, *widths]) + 1))
    elif name == "center":
        budget.spend(max([80, *(option for option in options if isinstance(option, int))]))
    elif name == "round":
        _paid(budget, args[1:], kwargs)
    elif name == "sum" and any(isinstance(option, list | tuple) for option in options):
        raise SecurityError("adds up lists, which takes the square of their number")
    return args, kwargs


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes HTML."""
    budget = _BUDGET.get()
    size, depth = budget.size(value)
    between = sum(map(len, map(str, separators))) if isinstance(separators, list | tuple) else 0
    width = indent if isinstance(indent, int) else len(str(indent or ""))
    budget.spend(size * (1 + between + max(0, width) * (depth > 0) * (depth + 1)))
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_of(today: date) -> Callable[[str], str]:
    def strftime_now(pattern: str) -> str:
        if re.search(r"%[^a-zA-Z%]*\d", pattern):  # a width: glibc writes '%1000000000d' out
            raise SecurityError("formats the date to a width")
        return today.strftime(pattern)

    # No functools.partial: a template could read the date out of it, and format that.
    return strftime_now


def _no_files(name: str) -> NoReturn:
    raise SecurityError(f"reads the file {name!r}; a chat template is one file")


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`, which marks answers for transformers.

    Here it only groups.
    """

    tags = {"generation"}  # noqa: RUF012 - the interface of jinja2

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


# ------------------------------------------------------------------------ meters in the syntax tree

METERS: dict[str, Callable[..., Any]] = {
    "meter": lambda context, value: _BUDGET.get().take(value),
    "meter_slice": lambda context, value: _slice(_BUDGET.get(), value),
    "meter_loop": lambda context, values, each: _loop(_BUDGET.get(), values, each),
    "meter_macro": lambda context, written: _BUDGET.get().spend(written),
    "meter_text": lambda context, value: str(_BUDGET.get().take(value)),
    "meter_joined": lambda context, values: "".join(map(str, _BUDGET.get().take(values))),
}


def _slice(budget: _Budget, value: Any) -> Any:
    """A slice, paid for: by the character of a text, by the item of a list."""
    if isinstance(value, list | tuple):
        budget.spend(1 + len(value))
        return value
    return budget.take(value)


def _loop(budget: _Budget, values: Any, each: int) -> Iterator[Any]:
    """What a loop goes through; `each` is what one turn writes."""
    # The items of a list were paid for when it was made; an iterator makes its own.
    there = isinstance(values, list | tuple | Mapping)
    return budget.turns(values, each) if there else budget.items(values, each)


class _Metered(NodeTransformer):
    """Puts the filters above wherever text, containers or loops come about unseen.

    That is without a call, a filter or `+ * ** %`, which the sandbox sees itself.
    """

    def visit_For(self, node: nodes.For) -> nodes.For:
        # Counted before the body's own texts are changed; inner loops pay for theirs once more.
        written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.iter = _filter(cast(nodes.Expr, node.iter), "meter_loop", nodes.Const(1 + written))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [
            n if isinstance(n, nodes.TemplateData) else _filter(n, "meter_text") for n in node.nodes
        ]
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        self._pay_each_call(node)
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        self._pay_each_call(node)
        return node

    def _pay_each_call(self, node: nodes.Macro | nodes.CallBlock) -> None:
        """A call costs what its own body writes, not the whole template."""
        written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        paid = _filter(nodes.Const(1 + written, lineno=node.lineno), "meter_macro")
        node.body.insert(0, nodes.ExprStmt(paid, lineno=node.lineno))

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "meter_joined")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _filter(node, "meter_slice") if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Filter:
        self.generic_visit(node)
        return _filter(node, "meter")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Filter:
        self.generic_visit(node)
        return _filter(node, "meter")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _filter(node, "meter") if node.ctx == "load" else node


def _filter(node: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)
