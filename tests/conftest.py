"""Fixtures that several test files use: the default model, two tiny tokenizers, a toy run."""

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
from made_tokenizers import (
    CHATML_TEMPLATE,
    ZEPHYR_TEMPLATE,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    write_tokenizer_folder,
)
from runs import ROOT, run_script

from ldalign.kernels import cpp
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


@pytest.fixture(params=cpp.build_info()["isas"] if cpp.available() else [])
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every instruction set that the C++ operations were built for and this machine has."""
    before = cpp.build_info()["isa"]
    cpp.set_isa(request.param)
    yield
    cpp.set_isa(before)


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


@pytest.fixture(scope="session")
def zephyr_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny tokenizer like Mistral's legacy one, with Zephyr's template; the model uses a BOS."""
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


@pytest.fixture(scope="session")
def toy_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory, toy_cache: Path) -> Path:
    """The run folder of configs/toy.yaml, made once by train/align.py; tests must not change it."""
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
    """Lets a test call a script's main(): one thread as in `run_script`, the process group left."""
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
    """By number of ranks: what an undisturbed small run leaves, and rank 0's write points in it."""

    @functools.cache
    def made(ranks: int) -> tuple[dict[str, Any], int]:
        run = tmp_path_factory.mktemp("undisturbed") / "run"
        trial = driver.run(run, f"cache={toy_cache}", ranks=ranks)
        assert trial.codes == [0] * ranks, trial.said
        return faults.outcome(run), trial.points[0]

    return made
