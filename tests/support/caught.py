"""Stages whose work is caught: they run on real rows, and what they call does nothing."""

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import pytest


@dataclass
class Run:
    """A run's folder in which every stage is made anew, and no manifest is read."""

    path: Path
    began: date = date(2026, 1, 1)

    def stage(
        self, name: str, parents: Any, make: Callable[[Path], Any], resume: bool = False
    ) -> Any:
        (self.path / name).mkdir(parents=True, exist_ok=True)
        return make(self.path / name)


class Caught:
    """What was handed to functions, by their names: the arguments, by theirs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.calls = patch, Namespace()

    def __call__(self, where: Any, *names: str, result: Any = None) -> None:
        """Functions or classes of a module do nothing from now on; `result` is what they return, a
        function of their arguments or a value.
        """
        for name in names:
            signature = inspect.signature(getattr(where, name))

            def call(
                *args: Any, _name: str = name, _signature: Any = signature, **kwargs: Any
            ) -> Any:
                bound = _signature.bind(*args, **kwargs)
                bound.apply_defaults()
                given = Namespace(**bound.arguments)
                setattr(self.calls, _name, given)
                return result(given) if isinstance(result, types.FunctionType) else result

            self.patch.setattr(where, name, call)
