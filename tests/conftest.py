"""Model folders that several test files use: the real default model, and two tiny tokenizers made
on the spot.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from ldalign.models.fetch import DEFAULT_MODEL, resolve_model
from ldalign.system import distributed
from ldalign.system.errors import EnvironmentProblem

# Without a GPU, Triton's kernels run in its interpreter. That is settled when triton is first
# imported, by whomever.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Side by side with others, a test and what it starts use their share of the cores.
if (WORKERS := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    SHARE = max(1, len(os.sched_getaffinity(0)) // WORKERS)
    os.environ.setdefault("OMP_NUM_THREADS", str(SHARE))
    torch.set_num_threads(SHARE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        action="store_true",
        help="the tests marked long too, which take minutes to an hour",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        long = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)


# Zephyr's template (methods.md, section 2), as its model folder has it
ZEPHYR_TEMPLATE = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog; it was not amused.",
    "How many clips did Natalia sell altogether in April and May? She sold 48 + 24 = 72 clips.",
    "<|user|> <|assistant|> <|system|> user assistant system\nlines\n\nand tabs\tand the end too",
    "Überraschung: naïve café, 10 °C, 3.14159",
]


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct, made once into $LDALIGN_CACHE (else ~/.cache/ldalign)."""
    cache = Path(os.environ.get("LDALIGN_CACHE") or Path.home() / ".cache" / "ldalign")
    try:
        return resolve_model(DEFAULT_MODEL, cache)
    except EnvironmentProblem as error:
        if "cannot download" not in str(error):
            raise
        pytest.skip(f"the default model needs the network once: {error}")


def write_tokenizer_folder(
    folder: Path, tokenizer: tokenizers.Tokenizer, template: str, **settings: object
) -> Path:
    """A folder with tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    # the class that takes tokenizer.json as it is
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def sentencepiece_tokenizer(prefix: str = "legacy") -> tokenizers.Tokenizer:
    """A small BPE laid out like Mistral's: byte fallback; ``prefix``: legacy (Prepend), first or
    always (Metaspace).
    """
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        CORPUS * 3, trainers.BpeTrainer(vocab_size=400, show_progress=False)
    )
    learnt = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if prefix == "legacy":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    special = [
        tokenizers.AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")
    ]
    tokenizer.add_special_tokens(special)
    return tokenizer


def byte_level_tokenizer() -> tokenizers.Tokenizer:
    """A small byte-level BPE with ChatML's control tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def zephyr_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny tokenizer laid out like Mistral's legacy one, with Zephyr's template; the model uses a
    BOS.
    """
    folder = tmp_path_factory.mktemp("zephyr")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return write_tokenizer_folder(
        folder, sentencepiece_tokenizer(), ZEPHYR_TEMPLATE, add_bos_token=True, **names
    )


@pytest.fixture(scope="session")
def chatml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny byte-level tokenizer with a ChatML template, no BOS."""
    folder = tmp_path_factory.mktemp("chatml")
    return write_tokenizer_folder(
        folder, byte_level_tokenizer(), CHATML_TEMPLATE, eos_token="<|im_end|>"
    )


# ---------------------------------------------------------------------------------- a whole toy run

ROOT = Path(__file__).resolve().parent.parent


def run_script(*arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """A training script by path, as a person types it: one thread, one rank or several under
    torchrun.
    """
    return subprocess.run(
        script_command(*arguments, ranks=ranks), capture_output=True, text=True, env=one_thread()
    )


def script_command(*arguments: object, ranks: int = 1) -> list[str]:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*start, *map(str, arguments)]


def one_thread() -> dict[str, str]:
    # PYTHONPATH: `make test` keeps a script's own folder off the import path, and some run files of
    # this folder.
    here = str(Path(__file__).parent)
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONPATH": here,
    }


@pytest.fixture(scope="session")
def toy_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory, toy_cache: Path) -> Path:
    """The run folder of `train/align.py --config configs/toy.yaml`, made once; tests must not
    change it.
    """
    folder = tmp_path_factory.mktemp("runs") / "toy"
    config = ROOT / "configs/toy.yaml"
    done = run_script(
        ROOT / "train/align.py",
        "--config",
        config,
        f"run={folder}",
        f"cache={toy_cache}",
        "--debug",
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def in_process() -> Iterator[None]:
    """For tests that call a script's main(): one thread as in `run_script`, and the process group
    is left behind.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    distributed.stop()


# ----------------------------------------------------------------------------------- runs that fail


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[faults.Driver]:
    """The process that forks a run a trial (faults.py)."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler for the failing file layer")
    started = faults.start_driver(tmp_path_factory.mktemp("driver"))
    yield started
    started.process.communicate()


@pytest.fixture(scope="session")
def undisturbed(
    driver: faults.Driver, tmp_path_factory: pytest.TempPathFactory, toy_cache: Path
) -> Callable[[int], tuple[dict[str, Any], int]]:
    """Of a number of ranks: what an undisturbed small run leaves, and how many write points rank 0
    has in it.
    """

    @functools.cache
    def made(ranks: int) -> tuple[dict[str, Any], int]:
        run = tmp_path_factory.mktemp("undisturbed") / "run"
        trial = driver.run(run, f"cache={toy_cache}", ranks=ranks)
        assert trial.codes == [0] * ranks, trial.said
        return faults.outcome(run), trial.points[0]

    return made
