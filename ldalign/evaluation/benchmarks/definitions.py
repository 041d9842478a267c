"""The benchmarks: their definitions (tasks/*.yaml), their rows, and harness tasks made of both.

A definition is a YAML file as the harness reads them. Its rows come from the hub's data set that it
names, or from local JSON Lines files. lm-eval is imported when a task is made, not before.
"""

import ast
import difflib
import hashlib
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jinja2
import jinja2.meta
import yaml

from ldalign.system.errors import EnvironmentProblem, InputError, how_to_install

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

DEFINITIONS = Path(__file__).parent / "tasks"
FEWSHOT_SEED = 1234  # the harness's own


def no_harness(error: ImportError) -> EnvironmentProblem:
    """Returns what to raise where lm-eval cannot be imported."""
    return EnvironmentProblem(
        f"benchmarks need lm-eval, which cannot be imported ({error}): "
        f"{how_to_install('eval')}, or, in the repository, run them by `make evaluate`"
    )


def names() -> list[str]:
    """Lists the names of all benchmarks, sorted."""
    return sorted(path.stem for path in DEFINITIONS.glob("*.yaml"))


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: where its rows come from, and how many examples stand in front of each.

    data: a folder of local files; None: the hub. shots: None: as many as the definition says.
    Raises InputError for an unknown name and a missing file.
    """

    name: str
    data: Path | None = None
    shots: int | None = None

    @cached_property
    def definition(self) -> dict[str, Any]:
        """The content of the YAML file, its functions resolved."""
        if self.name not in names():
            close = difflib.get_close_matches(self.name, names(), n=1, cutoff=0.4)
            hint = f"did you mean {close[0]}?" if close else f"expected {', '.join(names())}"
            raise InputError(f"benchmarks.tasks: {self.name}: no such benchmark; {hint}")
        return _read_definition(DEFINITIONS / f"{self.name}.yaml")

    @property
    def version(self) -> float:
        """The definition's version: that of lm-eval's own definition that it agrees with."""
        return float(self.definition["metadata"]["version"])

    @property
    def used_shots(self) -> int:
        """How many examples stand in front of every row."""
        return int(self.definition["num_fewshot"] if self.shots is None else self.shots)

    @property
    def definition_hash(self) -> str:
        """The sha256 of the definition, in hexadecimal; functions count by their names."""
        text = json.dumps(self.definition, sort_keys=True, default=lambda f: f.__qualname__)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def file(self) -> Path | None:
        """The local file of rows to score; None: the hub."""
        return self._local("")

    @cached_property
    def examples_file(self) -> Path | None:
        """The local file of examples; None: the first rows of `file` serve, or the hub's split."""
        return self._local("_train") if self.used_shots else None

    def _local(self, suffix: str) -> Path | None:
        if self.data is None:
            return None
        stems = self.definition["metadata"]["files"]
        if suffix:
            stems = [stem.removesuffix("_test") for stem in stems]
        paths = [self.data / f"{stem}{suffix}.jsonl" for stem in stems]
        found = next((path for path in paths if path.is_file()), None)
        if found is None and not suffix:
            raise InputError(
                f"{paths[0]}: no such file, for benchmark {self.name}; put its rows there "
                f"(docs/benchmarks.md), leave {self.name} out of benchmarks.tasks, or set "
                "benchmarks.data=null for the hub's"
            )
        return found

    @property
    def source(self) -> str:
        """What the rows are, for a manifest: hashes of local files, or the hub's name."""
        if self.file is None:
            name = self.definition.get("dataset_name") or ""
            return f"hub: {self.definition['dataset_path']} {name}".strip()
        files = [self.file, *([self.examples_file] if self.examples_file else [])]
        return " ".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)

    def task(self) -> "ConfigurableTask":
        """Makes the harness's task with its rows.

        Raises InputError for a bad row (FILE:LINE), EnvironmentProblem where lm-eval or the hub
        cannot be had.
        """
        try:
            from lm_eval.api.task import ConfigurableTask
        except ImportError as error:
            raise no_harness(error) from error
        config = dict(self.definition)
        if self.file is not None:
            config |= self._local_splits(self.file)
        config["num_fewshot"] = self.used_shots
        try:
            task = ConfigurableTask(config=config)
        except InputError:
            raise
        except Exception as error:
            if self.file is not None:
                raise
            first = (str(error).splitlines() or [""])[0]
            raise EnvironmentProblem(
                f"benchmark {self.name}: its data set {config['dataset_path']} cannot be had from "
                f"the hub ({type(error).__name__}: {first}); without a network give local files: "
                "benchmarks.data=FOLDER"
            ) from error
        task.set_fewshot_seed(FEWSHOT_SEED)
        return task

    def _local_splits(self, file: Path) -> dict[str, Any]:
        """Returns the part of a task's config that says where rows are."""
        shots = self.used_shots
        process = self.definition.get("process_docs")
        rows = read_rows(file, process)
        if self.examples_file is not None:
            examples, sampler = read_rows(self.examples_file, process), "default"
        else:
            # Never scored; one order for every row, so that they are computed once.
            examples, rows, sampler = rows[:shots], rows[shots:], "first_n"
        if not rows or len(examples) < shots:
            raise InputError(
                f"{self.examples_file or file}: {len(rows) + len(examples)} rows are too few for "
                f"{shots} examples and one row to score; add rows or lower benchmarks.shots"
            )
        for row in [*examples, *rows]:
            check_row(self.definition, row)
        return {
            "custom_dataset": lambda **_: {"rows": rows, "examples": examples},
            "process_docs": None,
            "training_split": None,
            "validation_split": None,
            "test_split": "rows",
            "fewshot_split": "examples" if shots else None,
            "fewshot_config": {"sampler": sampler},
        }


# -------------------------------------------------------------------------------------- definitions


class _Loader(yaml.SafeLoader):
    """YAML with the harness's tag `!function MODULE.NAME`, for functions of ours alone."""


def _function(loader: yaml.SafeLoader, node: yaml.Node) -> Callable[..., Any]:
    text = str(node.value)
    module, _, name = text.rpartition(".")
    if module != "ldalign.evaluation.benchmarks.rows":
        raise InputError(
            f"{node.start_mark}: {text!r} is no function of ldalign.evaluation.benchmarks.rows; "
            "install ldalign again"
        )
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


_Loader.add_constructor("!function", _function)


def _read_definition(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    definition: dict[str, Any] = yaml.load(text, Loader=_Loader)  # noqa: S506
    included = definition.pop("include", None)
    return {**(_read_definition(path.parent / included) if included else {}), **definition}


# --------------------------------------------------------------------------------------- local rows


class LocalRow(dict[str, Any]):
    """A row that knows where it stands."""

    where: str = ""


class Rows(list[LocalRow]):
    """Local rows, as far as the harness's tasks treat a data set of the hub."""

    @property
    def features(self) -> dict[str, Any]:
        """The columns, by name."""
        return dict.fromkeys(self[0]) if self else {}

    def map(self, function: Callable[[dict[str, Any]], dict[str, Any]]) -> Self:
        """Returns the rows with what `function` returns for each put into it.

        Raises InputError naming the row that it fails on.
        """
        out = type(self)()
        for row in self:
            new = LocalRow(row)
            new.where = row.where
            try:
                new.update(function(row))
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise InputError(f"{row.where}: {_reason(error)}") from error
            out.append(new)
        return out

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return type(self)(found) if isinstance(index, slice) else found


def _reason(error: Exception) -> str:
    return f"column {error} is missing" if isinstance(error, KeyError) else str(error)


def read_rows(path: Path, process: Callable[[Any], Any] | None = None) -> Rows:
    """Reads a JSON Lines file, one object a line, and processes the rows.

    Raises InputError (FILE:LINE) for a bad line.
    """
    rows = Rows()
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{path}:{number}: not JSON ({error}); write one object a line"
            ) from None
        if not isinstance(value, dict):
            raise InputError(f"{path}:{number}: {type(value).__name__} instead of an object")
        rows.append(LocalRow(value))
        rows[-1].where = f"{path}:{number}"
    return process(rows) if process else rows


@lru_cache
def _compiled(text: str) -> tuple[jinja2.Template, list[str]]:
    """Compiles a template, and lists the columns that it needs."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    columns = jinja2.meta.find_undeclared_variables(environment.parse(text))
    return environment.from_string(text), sorted(columns)


def check_row(definition: dict[str, Any], row: LocalRow) -> None:
    """Raises InputError where the row does not fill the templates or names no choice."""

    def filled(key: str) -> Any:
        value = definition[key]
        if not isinstance(value, str):
            return value
        template, columns = (None, [value]) if value.isidentifier() else _compiled(value)
        for column in columns:
            if column not in row:
                raise ValueError(f"column {column!r} is missing")
        return template.render(row) if template else row[value]

    try:
        if not filled("doc_to_text"):
            raise ValueError("the question is empty")
        target = filled("doc_to_target")
        if "doc_to_choice" in definition:
            choices = filled("doc_to_choice")
            choices = ast.literal_eval(choices) if isinstance(choices, str) else choices
            texts = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
            if not (texts and choices):
                raise ValueError("the choices are no list of texts")
            if not 0 <= int(target) < len(choices):
                raise ValueError(f"the answer {target} is none of {len(choices)} choices")
    except (jinja2.TemplateError, ValueError, TypeError, KeyError, SyntaxError) as error:
        raise InputError(
            f"{row.where}: not a row of {definition['task']}: {error}; docs/benchmarks.md has the "
            "columns"
        ) from error
