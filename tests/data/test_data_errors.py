"""The errors of the data package: each comes out of another process as it was."""

import importlib
import pickle
import pkgutil

import pytest

import ldalign.data
from ldalign.data.chat_text import TemplateRefusal, UnsafeTemplate
from ldalign.data.records import BadRow
from ldalign.system.errors import EnvironmentProblem, InputError, LdalignError, NumericsError
from ldalign.system.workers import spread

EXAMPLES: dict[type[BaseException], BaseException] = {
    BadRow: BadRow("broken JSON", 17),
    TemplateRefusal: TemplateRefusal("folder: ", "chat template: no system turn"),
    UnsafeTemplate: UnsafeTemplate("chat template: SecurityError: too long"),
    LdalignError: LdalignError("a bug"),
    InputError: InputError("rows.jsonl:4: what"),
    EnvironmentProblem: EnvironmentProblem("disk full"),
    NumericsError: NumericsError("nan"),
}


def classes() -> list[type[BaseException]]:
    """Every class of errors in the package, and those that it raises of others."""
    found = {}
    for module in pkgutil.iter_modules(ldalign.data.__path__, "ldalign.data."):
        for value in vars(importlib.import_module(module.name)).values():
            ours = isinstance(value, type) and value.__module__.startswith("ldalign.")
            if ours and issubclass(value, BaseException):
                found[value] = None
    return list(found)


def test_the_examples_are_all() -> None:
    assert set(classes()) <= set(EXAMPLES) and {BadRow, TemplateRefusal} <= set(classes())


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
def test_an_error_is_the_same_in_another_process(kind: type[BaseException]) -> None:
    error = EXAMPLES[kind]
    again = pickle.loads(pickle.dumps(error))  # noqa: S301  # of our own making
    assert type(again) is kind and str(again) == str(error) and vars(again) == vars(error)
    assert str(error) and "(" not in str(error)


def test_a_worker_raises_what_it_met() -> None:
    with pytest.raises(TemplateRefusal, match="^folder: chat template: no system turn$"):
        list(spread(_refuse, [1, 2], processes=2))


def _refuse(task: int) -> None:
    raise TemplateRefusal("folder: ", "chat template: no system turn")
