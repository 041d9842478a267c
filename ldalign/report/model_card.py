"""README.md of every policy: a model card in the form that the Hugging Face hub reads.

It is written beside a stage's files and is none of them: no manifest lists it, so it may be written
anew whenever more is known, first when the policy is there, again when it is measured. Nothing
reads it back but a later run that starts from the policy, for the base's name and licence.

What a user has named (folders, files, models) stands in YAML as a quoted text and in Markdown as
code, so that no name can break either; of local paths the last part alone is shown, as a card may
be published.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ldalign.data.hub import HUB_DATA
from ldalign.models.fetch import DEFAULT_MODEL, HUB_NAME, hub_folder
from ldalign.models.toy import TOY_MODEL
from ldalign.report import words
from ldalign.report.analysis import Numbers
from ldalign.report.notation import HELD_OUT, leading
from ldalign.report.result import BASELINE, method_name, paired, read_answers
from ldalign.report.table import read_config, read_summaries
from ldalign.run.context import SELECTED
from ldalign.run.folder import ENVIRONMENT, STARTED, shown_name
from ldalign.run.selection import read_selected
from ldalign.run.settings import RunConfig
from ldalign.run.stages.policy import POLICY_STAGE, SFT
from ldalign.system.distributed import on_rank0
from ldalign.system.errors import InputError
from ldalign.system.files import write_text
from ldalign.system.hub import SOURCE_FILE
from ldalign.system.untrusted import read_json, read_text

CARD = "README.md"
# A card without this line is a person's, and stays.
MARK = "<!-- Written by ldalign, which writes it anew: take this line out to keep your changes. -->"
MADE = "## How it was made"
FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
# How a licence's own text begins, and the hub's name for it.
LICENSE_TEXTS = {"Apache License": "apache-2.0", "MIT License": "mit"}
UNKNOWN_LICENSE = "other"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Of the settings that a report shows (`words.settings`): those that no card shows, and those that
# fine-tuning reads too, beside its own.
HIDDEN = ("policy", "data", "guide.folder", "judge.model", "iterations")
ALL_READ = ("rows", "max_length", "training.schedule", "validation.metric", "seed", "dtype")
SFT_KEYS = ("epochs", "rows", "learning_rate", "global_batch")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """The model that a run starts from."""

    name: str  # as it is shown
    hub: str | None  # the hub's name, of it or of the model that it was made from
    license: str | None  # the hub's name of the licence; None: not known


def try_cards(run: Path) -> None:
    """Writes the cards of a run's policies, on rank 0; all ranks may call it. Never raises for a
    card that cannot be made: the run goes on all the same.
    """

    def write() -> None:
        try:
            write_cards(run)
        except Exception as error:  # a card is no part of what a run is trusted for
            log.warning("%s: no model card: %s: %s", run, type(error).__name__, error)
            log.debug("model card", exc_info=True)

    on_rank0(write)


def write_cards(run: Path) -> list[Path]:
    """Writes README.md into every policy's folder of a run; returns those that have changed.

    A card that a person has changed and unmarked stays as it is. Raises OSError and
    EnvironmentProblem where one cannot be written.
    """
    config, summaries = read_config(run), read_summaries(run)
    base, changed = find_base(config), []
    for name in summaries:
        folder, path = run / name, run / name / CARD
        if name.rpartition("/")[2] != POLICY_STAGE.name or not any(folder.glob("*.safetensors")):
            continue
        old = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
        if old is not None and MARK not in old:
            continue
        # By what it was made stays true when another version measures it.
        made = (old or "").partition(f"{MADE}\n")[2].lstrip("\n") or _made(run)
        text = card(run, name.partition("/")[0], config, summaries, base, made)
        if text != old:
            write_text(path, text)
            changed.append(path)
    return changed


# --------------------------------------------------------------------------------------------- base


def find_base(config: Mapping[str, Any]) -> Base:
    """Returns what is known of the model that a run's config starts from, without a download.

    Its licence is that of its README.md, of what the hub said when it was fetched, or of its
    LICENSE file; the embedded model's is known.
    """
    name = str(config.get("policy") or RunConfig.policy)
    cache = RunConfig(cache=config.get("cache")).cache_folder
    path = Path(name).expanduser()
    if path.exists():
        chosen = read_selected(path) if (path / SELECTED).is_file() else {}
        return _of_folder(path / chosen.get("folder", ""), _last_part(path))
    if name == DEFAULT_MODEL:
        return Base(SMOLLM2, SMOLLM2, "apache-2.0")
    if HUB_NAME.fullmatch(name):
        found = _of_folder(hub_folder(name, cache), name)
        return Base(name, name.partition("@")[0], found.license)
    return Base("a tiny random model" if name == TOY_MODEL else _last_part(path), None, None)


def _of_folder(folder: Path, shown: str) -> Base:
    """What the files of a model folder say of it."""
    source = _quietly_json(folder / SOURCE_FILE)
    if DEFAULT_MODEL.partition("-")[0] in str(source.get("source", "")):
        return Base(SMOLLM2, SMOLLM2, "apache-2.0")
    card = _front_matter(folder / CARD)
    given = card.get("base_model")
    given = given[0] if isinstance(given, list) and given else given
    hub: Any = str(source["name"]).partition("@")[0] if "name" in source else given
    license = card.get("license", source.get("license")) or _license_text(folder)
    return Base(
        shown,
        hub if isinstance(hub, str) and HUB_NAME.fullmatch(hub) else None,
        license if isinstance(license, str) and LICENSE_ID.fullmatch(license) else None,
    )


def _quietly_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, missing={})
    except InputError:
        return {}


def _quietly(path: Path) -> str:
    try:
        return read_text(path)
    except (InputError, OSError):
        return ""


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML at the beginning of a model card, a stranger's perhaps; {} where it has none."""
    found = FRONT_MATTER.match(_quietly(path))
    try:
        value = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _license_text(folder: Path) -> str | None:
    for name in LICENSE_FILES:
        begin = _quietly(folder / name).strip()[:80]
        known = [license for words, license in LICENSE_TEXTS.items() if words in begin]
        if known:
            return known[0]
    return None


# --------------------------------------------------------------------------------------------- card


def card(
    run: Path,
    policy: str,
    config: Mapping[str, Any],
    summaries: Mapping[str, Numbers],
    base: Base,
    made: str,
) -> str:
    """Returns the card of one policy of a run: sft, iteration_0, ..., continual_sft.

    made: by which version, and when.
    """
    parts = [
        f"---\n{yaml.safe_dump(_about(policy, config, base), sort_keys=False, allow_unicode=True)}"
        f"---\n\n{MARK}\n",
        f"# {code(base.name)} after {_title(policy, config)}\n",
        _origin(policy, config, base),
        "## Data\n",
        _data(run, config),
        "## Method\n",
        _method(policy, config),
        _table(("setting", "value"), _settings(policy, config, summaries)),
        "## Results\n",
        _results(run, policy, config, summaries),
        "## How to load it\n",
        LOADING,
        "## Limits\n",
        LIMITS,
        f"{MADE}\n",
        made,
    ]
    return "\n".join(parts)


ACCURACY = (
    "Accuracy is the share of answers that a program found right, greedy: the likeliest token each "
    "time, sampled: at temperature 1. "
)
LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
messages = [{"role": "user", "content": "Hello!"}]
text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=100)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```

With ldalign: `ldalign chat policy=FOLDER`. For llama.cpp and Ollama: `ldalign export gguf FOLDER`.
"""
LIMITS = """\
- The policy is no safer and knows no more than its base: it was trained towards the answers of the
  data, with their mistakes and their views, and nothing was done against harmful answers.
- The results are of one run, on the prompts that it held out. What they say of other prompts,
  languages and tasks is not known.
- The licence of the data may forbid what that of the base allows; look at both.
"""


def _about(policy: str, config: Mapping[str, Any], base: Base) -> dict[str, Any]:
    """The fields that the hub reads."""
    given = config.get("data") or []
    sets = [_dataset(str(one)) for one in ([given] if isinstance(given, str) else given)]
    method = "sft" if policy in SFT else str(config.get("method", "ld_align"))
    fields: dict[str, Any] = {
        "license": base.license or UNKNOWN_LICENSE,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ldalign", *([method.replace("_", "-")] if method != "ldalign" else [])],
    }
    if base.hub:
        fields = {"base_model": base.hub, "base_model_relation": "finetune"} | fields
    named = [one for one in dict.fromkeys(sets) if one]
    return fields | ({"datasets": named} if named else {})


def _dataset(name: str) -> str | None:
    """The hub's name of a data set, None for a file or an embedded one."""
    found = HUB_DATA.fullmatch(name)
    return None if found is None or Path(name).expanduser().exists() else found["repo"]


def _title(policy: str, config: Mapping[str, Any]) -> str:
    if policy in SFT:
        return "supervised fine-tuning"
    return f"{method_name(config)}, {shown_name(policy)}"


def _origin(policy: str, config: Mapping[str, Any], base: Base) -> str:
    """Base and licence, a sentence each."""
    of = f", which comes of {code(base.hub)}" if base.hub and base.hub != base.name else ""
    known = (
        f"Its licence is {code(base.license)}."
        if base.license and base.license != UNKNOWN_LICENSE
        else "The base's licence is not known here (`other`): look it up before you pass this on."
    )
    return f"The base is {code(base.name)}{of}. {known}\n"


def _data(run: Path, config: Mapping[str, Any]) -> str:
    """The files that were read, with their rows and hashes where the run has them."""
    given = config.get("data") or []
    names = [given] if isinstance(given, str) else list(given)
    said = ", ".join(code(str(n) if _dataset(str(n)) else _last_part(Path(str(n)))) for n in names)
    parts = [f"Trained on {said}.\n"]
    files = [
        (code(_last_part(Path(str(one.get("path", "?"))))), code(str(one["sha256"])[:16]))
        for one in _files(run)
    ]
    if files:
        parts.append(_table(("file", "sha256 begins"), files))
    return "\n".join(parts)


def _files(run: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads((run / "data/sources.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    entries = found if isinstance(found, list) else []
    trained = (one for one in entries if isinstance(one, dict) and one.get("key") == "data")
    return [one for one in trained if one.get("sha256")]


def _method(policy: str, config: Mapping[str, Any]) -> str:
    if policy == "sft":
        return "Supervised fine-tuning: the base was trained to predict the data's responses.\n"
    if policy == BASELINE:
        return (
            "More supervised fine-tuning on the data's responses, from where the run's method "
            "began: its baseline.\n"
        )
    return f"{words.method_text(config)}\n\nThis is {shown_name(policy)}, where 0 is the first.\n"


def _settings(
    policy: str, config: Mapping[str, Any], summaries: Mapping[str, Numbers]
) -> list[tuple[str, ...]]:
    """The settings that matter to this policy; what names a folder is above, or is nobody else's,
    and how many iterations follow says nothing of this one.
    """
    found = words.settings(config, {"data": summaries.get("data", {})})
    if policy in SFT:
        group = config.get(policy) or {}
        own = [(f"{policy}.{key}", group[key]) for key in SFT_KEYS if group.get(key) is not None]
        found = [*((key, value) for key, value in found if key in ALL_READ), *own]
    shown = ((key, value) for key, value in found if key not in HIDDEN)
    return [(code(key), code(str(value))) for key, value in shown]


def _results(
    run: Path, policy: str, config: Mapping[str, Any], summaries: Mapping[str, Numbers]
) -> str:
    """A table of what was measured, beside the policy that it started from and the baseline."""
    first = "sft" if f"sft/{POLICY_STAGE.name}" in summaries else "start"
    measured = {
        name: summaries[f"{name}/evaluation"]
        for name in dict.fromkeys((first, BASELINE, policy))
        if f"{name}/evaluation" in summaries
    }
    tasks = sorted(
        name.rpartition("/")[2] for name in summaries if name.startswith(f"{policy}/benchmarks/")
    )
    rows = [] if policy not in measured else _held_out(run, policy, measured)
    for task in tasks:
        own = summaries[f"{policy}/benchmarks/{task}"]
        if (key := leading(own)) is not None:
            cells = (summaries.get(f"{name}/benchmarks/{task}", {}) for name in measured)
            scores = [_cell(numbers, key, 100.0, "{:.1f}") for numbers in cells]
            rows.append((f"{task} {key}, %", *scores))
    if not rows:
        return "Not measured yet.\n"
    titles = ["" if policy == name else shown_name(name) for name in measured]
    head = [title or "this policy" for title in titles]
    scored = any(key in numbers for numbers in measured.values() for key, _ in HELD_OUT)
    note = (
        f"On held-out prompts; +- is one standard error over prompts. {ACCURACY * scored}NLL is of "
        "the data's own responses, nats a token, lower is better. Differences are paired by "
        "prompt.\n"
    )
    chosen = read_selected(run)
    if chosen.get("policy") == policy:
        note += f"\nThe run's result is this policy: {chosen['why']}.\n"
    return "\n".join([_table(("", *head), rows), *_moved(run, policy, measured), note])


def _held_out(run: Path, policy: str, measured: Mapping[str, Numbers]) -> list[tuple[str, ...]]:
    figures = [(key, f"{name}, %", 100.0, "{:.1f}") for key, name in HELD_OUT]
    figures += [("nll/real", "NLL of the data's responses", 1.0, "{:.4f}")]
    return [
        (name, *(_cell(numbers, key, factor, form) for numbers in measured.values()))
        for key, name, factor, form in figures
        if key in measured[policy]
    ]


def _moved(run: Path, policy: str, measured: Mapping[str, Numbers]) -> list[str]:
    """The differences to the other policies of the table, a line each."""
    lines, answers = [], read_answers(run, [*measured])
    for base in measured:
        found = paired(answers, base, policy, "gap")
        parts = [
            f"{name} {_cell(found, f'gap/{key}', factor, form)}"
            for key, name, factor, form in (
                ("greedy", "greedy accuracy, points:", 100.0, "{:+.1f}"),
                ("sampled", "sampled accuracy, points:", 100.0, "{:+.1f}"),
                ("nll", "NLL:", 1.0, "{:+.4f}"),
            )
            if f"gap/{key}" in found
        ]
        if parts:
            lines.append(f"- this policy less {shown_name(base)}: {'; '.join(parts)}")
    return ["\n".join(lines) + "\n"] if lines else []


def _cell(numbers: Mapping[str, Any], key: str, factor: float, form: str) -> str:
    if key not in numbers:
        return "-"
    error = numbers.get(f"{key}_se")
    plain = form.replace("+", "")
    spread = "" if error is None else f" +- {plain.format(factor * error)}"
    return f"{form.format(factor * numbers[key])}{spread}"


def _made(run: Path) -> str:
    machine, began = _quietly_json(run / ENVIRONMENT), _quietly_json(run / STARTED)
    version = f"ldalign {machine.get('ldalign')}"
    if commit := machine.get("git_commit"):
        version += f", commit {code(str(commit))}"
    return f"{version}, in a run begun on {began.get('date', 'a day that is not known')}.\n"


# ----------------------------------------------------------------------------------------- Markdown


def code(text: str) -> str:
    """Returns a text as Markdown's code, in one line, whatever it holds."""
    text = " ".join(text.split()) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{room}{text}{room}{fence}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    # A bar ends a cell, also in code: there alone a backslash before it is not shown.
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def _last_part(path: Path) -> str:
    return path.name or path.absolute().name or str(path)
