"""The context of a toy run, opened in the process of the test."""

import json
from pathlib import Path

from runs import ROOT

from ldalign.run import context
from ldalign.run.folder import RunFolder
from ldalign.run.settings import RunConfig
from ldalign.system.config import load_config, to_yaml


def config_of(cache: Path, *overrides: str) -> RunConfig:
    return load_config(
        RunConfig, ROOT / "configs/toy.yaml", [f"cache={cache}", f"run={cache / 'run'}", *overrides]
    )


def open_toy(cache: Path, *overrides: str, write: bool = True) -> context.Context:
    config = config_of(cache, *overrides)
    run = RunFolder(Path(config.run), to_yaml(config))
    if write:
        run.path.mkdir(parents=True, exist_ok=True)
        (run.path / "lock").touch()  # as opening it would
    return context.open_context(run, config, write=write)


def rows_file(path: Path, count: int, **more: str) -> Path:
    lines = [
        json.dumps({"prompt": f"Say {i}.", "response": f"{i}", **more}) + "\n" for i in range(count)
    ]
    path.write_text("".join(lines))
    return path
