"""Faults within training, on a tiny model: damaged checkpoints, NaN, no memory, other ranks.

Named by the rows of the fault matrix (docs/reliability.md).
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import faults_ranks
import pytest
import tiny
import torch
from faults import TIMES, Driver
from faults_ranks import STEPS, pairs, trained
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toy_context import open_toy

from ldalign.data.pairs import with_losers
from ldalign.models import guide, guide_folder, weights
from ldalign.models.gpt2 import GPT2Config
from ldalign.models.toy import write_toy_model
from ldalign.models.weights import load_model
from ldalign.run.folder import RunFolder
from ldalign.run.manifest import hash_model_folder
from ldalign.run.stages import policy as policy_module
from ldalign.run.stages import reference as reference_module
from ldalign.run.stages.policy import policy_stage
from ldalign.run.stages.reference import reference_stage
from ldalign.system import distributed
from ldalign.system.errors import EnvironmentProblem, InputError, NumericsError
from ldalign.system.memory import OutOfMemory
from ldalign.system.metrics import MetricsLog
from ldalign.training import guide as guide_training
from ldalign.training import policy as policy_training
from ldalign.training import scoring
from ldalign.training.batches import global_batches
from ldalign.training.scoring import response_logps

CPU = torch.device("cpu")


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def one_rank(in_process: None) -> Iterator[None]:
    distributed.start("cpu")
    yield


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Trains into a folder until just after the metrics of a step were written, and no further."""

    def until(folder: Path, step: int, **settings: Any) -> None:
        write = MetricsLog.write

        def writing(log: MetricsLog, record: dict[str, Any], text: str) -> None:
            write(log, record, text)
            if record["global_step"] == step:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(MetricsLog, "write", writing)
            with pytest.raises(Killed):
                trained(folder, **settings)

    return until


def timeless(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def assert_same(
    folder: Path, got: tuple[dict[str, Tensor], Any], whole: Path, expected: Any
) -> None:
    """Weights, summary and metrics to the bit."""
    assert all(torch.equal(got[0][name], p) for name, p in expected[0].items())
    assert got[1] == expected[1] and timeless(folder) == timeless(whole)


def newest(folder: Path) -> Path:
    return sorted(folder.glob("checkpoint/step_*"))[-1]


# ------------------------------------------------------------------------------------------ T1, T18


@pytest.mark.parametrize(
    "settings", [{}, {"optimizer": "rmsprop"}, {"state_dtype": torch.bfloat16}], ids=str
)
def test_T1_killed_after_any_step(
    tmp_path: Path, killed: Callable[..., None], settings: dict[str, Any]
) -> None:
    """A training stage killed after each of its steps; both optimizers, averages in bfloat16 too.

    Expected: weights, metrics and summary bit-identical to the undisturbed
    run's; two checkpoints kept.
    """
    expected = trained(tmp_path / "whole", **settings)
    for step in range(1, STEPS + 1) if not settings else (5,):
        folder = tmp_path / f"killed_{step}"
        killed(folder, step, **settings)
        assert len(list(folder.glob("checkpoint/step_*"))) == min(2, step - 1)
        assert_same(folder, trained(folder, **settings), tmp_path / "whole", expected)


def test_T18_resumed_at_the_end_of_an_epoch(tmp_path: Path, killed: Callable[..., None]) -> None:
    """11 pairs in batches of 4: epochs end in a batch of 3. Killed right after an epoch's last
    step, and before it.

    Expected: every row once an epoch; bit-identical.
    """
    steps = global_batches(11, 4, 3, 0, "policy")
    batches = [(epoch, list(indices)) for epoch, indices in steps]
    assert [len(batch) for _, batch in batches] == [4, 4, 3] * 3
    for epoch in range(3):
        assert sorted(i for number, batch in batches if number == epoch for i in batch) == list(
            range(11)
        )
    expected = trained(tmp_path / "whole")
    for step in (3, 4, 6):
        folder = tmp_path / f"killed_{step}"
        killed(folder, step)
        assert_same(folder, trained(folder), tmp_path / "whole", expected)


# ----------------------------------------------------------------------------------------------- T5


def test_T5_other_ranks_and_micro_batches(driver: Driver, tmp_path: Path) -> None:
    """Stopped after step 3 on 1 rank, gone on with on 2 until step 6, then on 4; another
    micro-batch each time.

    Expected: exit 143 twice; fp32 losses within 1e-6 of one rank's, mean drift
    within 1e-7; the same rows.
    """
    expected, _ = trained(tmp_path / "whole")
    for ranks, stop, micro, code in ((1, 3, 45, 143), (2, 6, 20, 143), (4, 0, 10_000, 0)):
        arguments = ("resume", str(tmp_path / "run"), str(stop), str(micro))
        trial = driver.call("faults_ranks", tmp_path / "run", *arguments, ranks=ranks)
        assert trial.codes == [code] * ranks, trial.said
    one, many = timeless(tmp_path / "whole"), timeless(tmp_path / "run")
    assert [r["global_step"] for r in many] == list(range(1, STEPS + 1))
    assert [r["len/chosen"] for r in many] == [r["len/chosen"] for r in one]
    gaps = [a["loss"] - b["loss"] for a, b in zip(one, many, strict=True)]
    assert max(map(abs, gaps)) < 1e-6 and abs(sum(gaps) / len(gaps)) < 1e-7
    state = load_file(tmp_path / "run/model.safetensors")
    assert all((state[name] - p).abs().max() < 1e-4 for name, p in expected.items())


# ----------------------------------------------------------------------------------------------- T4


def test_T4_one_rank_raises(driver: Driver, tmp_path: Path) -> None:
    """An error of rank 1's, of 2: in the forward of a step, and in work that each
    rank does before all meet.

    Expected: both end at once, one line that names rank 1; resumed: bit-identical.
    """
    for folder in ("whole", "run"):
        if folder == "run":
            trial = driver.call(
                "faults_ranks", tmp_path / "run", "raise", str(tmp_path / "run"), ranks=2
            )
            assert trial.codes == [3, 1], trial.said
            (line,) = re.findall("^ldalign: error: .*", trial.said, flags=re.MULTILINE)
            assert line.startswith("ldalign: error: rank 1: unexpected KeyError: 'planted'")
            assert list((tmp_path / "run/checkpoint").glob("step_*"))
        arguments = ("resume", str(tmp_path / folder), "0", "45")
        trial = driver.call("faults_ranks", tmp_path / folder, *arguments, ranks=2)
        assert trial.codes == [0, 0], trial.said
    whole, run = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run"))
    assert whole == run and timeless(tmp_path / "whole") == timeless(tmp_path / "run")

    trial = driver.call("faults_ranks", tmp_path / "run", "alone", str(tmp_path / "run"), ranks=2)
    assert trial.codes == [1, 1] and trial.said.count("ldalign: error:") == 1, trial.said
    assert "ldalign: error: rank 1: unexpected KeyError: 'planted'" in trial.said


# ----------------------------------------------------------------------------------------------- T7


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit flip": (lambda path: flip(path / "rank_00000.safetensors"), "damaged"),
    "cut": (lambda path: cut(path / "rank_00000.safetensors"), "bytes, but manifest.json says"),
    "empty": (
        lambda path: (path / "rank_00000.safetensors").write_bytes(b""),
        ": 0 bytes, but manifest.json says",
    ),
    "no shard": (lambda path: (path / "rank_00000.safetensors").unlink(), "missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "missing"),
    "empty manifest": (
        lambda path: (path / "manifest.json").write_bytes(b""),
        "not a readable manifest",
    ),
    "manifest flip": (lambda path: flip(path / "manifest.json"), "not a readable manifest"),
    "manifest cut": (lambda path: cut(path / "manifest.json"), "not a readable manifest"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_T7_damaged_newest_checkpoint(
    tmp_path: Path, killed: Callable[..., None], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The newest checkpoint has a flipped bit, is cut, empty, or misses a file; then every one has.

    Expected: the one before is used, with the reason said, bit-identical; where all are damaged, an
    error that names them, and no fresh start.
    """
    harm, reason = DAMAGES[damage]
    expected = trained(tmp_path / "whole")
    folder = tmp_path / "run"
    killed(folder, 6)
    harm(newest(folder))
    shutil.copytree(folder, tmp_path / "all")
    assert_same(folder, trained(folder), tmp_path / "whole", expected)
    (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert reason in warning and "step_00000005" in warning and "going on from" in warning

    harm(sorted((tmp_path / "all/checkpoint").glob("step_*"))[0])
    before = (tmp_path / "all/metrics.jsonl").read_bytes()
    with pytest.raises(
        InputError, match="no checkpoint can be used: .*step_00000005.*step_00000004"
    ):
        trained(tmp_path / "all")
    assert (tmp_path / "all/metrics.jsonl").read_bytes() == before


def test_T7_lines_of_another_run(tmp_path: Path, killed: Callable[..., None]) -> None:
    """metrics.jsonl was changed by hand since the checkpoints were made.

    Expected: an error that names the file.
    """
    killed(tmp_path, 6)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"loss": 0', '"loss": 1', 1))
    with pytest.raises(InputError, match="metrics.jsonl: its first"):
        trained(tmp_path)


# ------------------------------------------------------------------------------------------- T8, T9


def test_T8_nan_loss(tmp_path: Path) -> None:
    """One row's loss becomes NaN at step 3.

    Expected: NumericsError (exit 4) before the update, all row ids of the step in a file, the
    checkpoint finite.
    """
    chosen = pairs()
    rows = [int(i) for i in list(global_batches(11, 4, 3, 0, "policy"))[2][1]]
    chosen[rows[1]] = replace(chosen[rows[1]], ref_real=math.nan)
    with pytest.raises(
        NumericsError, match="policy: step 3: loss nan.*all 3 in .*non_finite_step.json"
    ):
        trained(tmp_path, chosen)
    found = json.loads((tmp_path / "non_finite_step.json").read_text())
    assert found["rows"] == [f"row-{i}" for i in rows] and found["step"] == 3
    assert newest(tmp_path).name == "step_00000002"
    tensors = load_file(newest(tmp_path) / "rank_00000.safetensors")
    assert len(tensors) == 3 * len(load_named()) and all(
        bool(t.isfinite().all()) for t in tensors.values()
    )


def load_named() -> list[str]:
    import tiny

    return [name for name, _ in tiny.mistral().named_parameters()]


def test_T9_infinite_gradient_on_one_rank(driver: Driver, tmp_path: Path) -> None:
    """A finite loss whose gradient is infinite, on the last of two ranks, at step 2 or later.

    Expected: exit 4 on both ranks before the update, row ids in a file, the checkpoint finite.
    """
    trial = driver.call("faults_ranks", tmp_path / "run", "explode", str(tmp_path / "run"), ranks=2)
    assert trial.codes == [4, 4], trial.said
    assert (
        len(
            re.findall(
                r"ldalign: error: rank \d: policy: "
                r"step",
                trial.said,
            )
        )
        == 1
        and "gradient norm" in trial.said
    )
    found = json.loads((tmp_path / "run/non_finite_step.json").read_text())
    assert math.isfinite(float(found["loss"])) and not math.isfinite(float(found["grad_norm"]))
    assert len(found["rows"]) >= 3
    shards = sorted(newest(tmp_path / "run").glob("*.safetensors"))
    assert len(shards) == 2
    assert all(bool(t.isfinite().all()) for shard in shards for t in load_file(shard).values())


def test_T8_weights_that_are_not_finite_are_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update makes a weight infinite.

    Expected: NumericsError naming the weight, before the good checkpoint goes.
    """
    step = policy_training.make_optimizer

    def making(*arguments: Any, **keywords: Any) -> Any:
        optimizer = step(*arguments, **keywords)
        plain = optimizer.step

        def stepping(factor: Any) -> None:
            plain(factor)
            if optimizer.steps == 3:
                optimizer.param_groups[0]["params"][0].data.view(-1)[5] = math.inf

        optimizer.step = stepping  # type: ignore[method-assign]
        return optimizer

    monkeypatch.setattr(policy_training, "make_optimizer", making)
    with pytest.raises(
        NumericsError, match="weight/.* holds NaN or Inf; the checkpoint was not written"
    ):
        trained(tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("checkpoint/step_????????"))] == [
        "step_00000001",
        "step_00000002",
    ]


# ---------------------------------------------------------------------------------------------- T10


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"
        ),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_T10_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """No memory in step 3, as a GPU, a CPU and Python say it.

    Expected: exit 3; stage, step, the shapes and the settings to lower are named;
    the checkpoint is there.
    """
    plain, calls = policy_training.accumulate_gradients, [0]

    def failing(*arguments: Any) -> float:
        calls[0] += 1
        if calls[0] == 3:
            raise error
        return plain(*arguments)

    monkeypatch.setattr(policy_training, "accumulate_gradients", failing)
    with pytest.raises(
        EnvironmentProblem,
        match=r"^step 3: .* at most 45 tokens .*row-\d.*: out "
        r"of memory; lower "
        r"training.micro_tokens.*training.checkpointing=full",
    ):
        trained(tmp_path)
    assert newest(tmp_path).name == "step_00000002"


def test_T10_other_errors_stay_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A RuntimeError that has nothing to do with memory.

    Expected: it is not called one of memory.
    """

    def failing(*arguments: Any) -> float:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(policy_training, "accumulate_gradients", failing)
    with pytest.raises(RuntimeError, match="^shapes differ$"):
        trained(tmp_path)


def test_T10_in_the_guides_optimizer_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for the averages of the guide's optimizer.

    Expected: exit 3; the step, the shapes and the settings to lower are named.
    """
    make = guide_training.make_optimizer

    def making(*arguments: Any, **keywords: Any) -> Any:
        optimizer = make(*arguments, **keywords)
        optimizer.step = failing  # type: ignore[method-assign]
        return optimizer

    monkeypatch.setattr(guide_training, "make_optimizer", making)
    small = tiny_guide()
    pairs = [small.pair(str(i), "Say.", f"It is {i}.", "No.") for i in range(6)]
    settings = guide_training.GuideTrainSettings(1, 2, 1e-3, micro_tokens=500)
    message = (
        r"^step 1: a micro-batch of at most 500 tokens \(the longest row .*: out of memory; lower "
        r".*guide.max_tokens"
    )
    with pytest.raises(OutOfMemory, match=message):
        guide_training.train_guide(
            small, pairs, settings, compute_dtype=torch.float32, device=CPU, seed=0
        )


def failing(*arguments: Any, **keywords: Any) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def tiny_guide() -> guide.Guide:
    return guide_folder.new_guide(
        guide.GuideConfig(latent_width=4), 0, ["It is 5."], GPT2Config(300, 1024, 16, 1, 2)
    )


STAGE = "iteration_0/reference"


def score(folder: Path) -> Any:
    return response_logps(load_model(folder, torch.float32), tiny.pairs(5), 1000, CPU)


@pytest.mark.parametrize(
    ("where", "name", "work", "message"),
    [
        (
            weights,
            "_empty_share",
            score,
            r"model: 0.\d million weights, 0.00 GiB as float32, on "
            r"cpu: out of memory; ",
        ),
        (
            scoring,
            "token_logprobs",
            score,
            r"a micro-batch of \d+ tokens \(the longest row, row-\d, has \d+\): out of memory; "
            r"lower "
            r"training.micro",
        ),
        (
            guide.Guide,
            "states",
            lambda folder: tiny_guide().distance(["a"], ["b"], ["c"]),
            r"latents of 1 pairs of \d+ tokens: out of memory; lower training.micro_tokens",
        ),
        (scoring, "deal", score, "out of memory; lower training.micro_tokens, sampling.batch_rows"),
    ],
    ids=["loading", "scoring", "distances", "elsewhere"],
)
def test_T10_in_a_stage_that_does_not_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, work: Any, message: str
) -> None:
    """No memory to load a model, to score, to encode, or for anything else in a stage.

    Expected: exit 3; the stage, the shapes and the settings to lower are named.
    """
    folder = write_toy_model(tmp_path / "model")
    ctx: Any = SimpleNamespace(run=RunFolder(tmp_path / "run", ""))
    monkeypatch.setattr(where, name, failing)
    with pytest.raises(OutOfMemory, match=rf"^{STAGE}: .*{message}") as caught:
        ctx.run.stage(STAGE, {}, lambda partial: work(folder))
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- T13


def test_T13_nan_distance_on_one_of_two_ranks(driver: Driver, tmp_path: Path) -> None:
    """One distance of ten is NaN; the second rank computes it.

    Expected: exit 4 on both ranks; one line with the row's id.
    """
    trial = driver.call("faults_ranks", tmp_path / "run", "nan", str(tmp_path / "run"), ranks=2)
    assert trial.codes == [4, 4], trial.said
    assert (
        trial.said.count("ldalign: error: ") == 1
        and ("row-7: the latent distance is nan") in trial.said
    )


# ----------------------------------------------------------------------------------------- T15, T16


def test_T15_dropout_in_config_json(tmp_path: Path) -> None:
    """config.json asks for dropout of 0.1.

    Expected: off in policy and reference: the loss of step 0 is ln 2, and what is
    computed twice is equal.
    """
    folder = write_toy_model(
        tmp_path / "model", attention_dropout=0.1, hidden_dropout=0.1, resid_pdrop=0.1
    )
    model = load_model(folder, torch.float32)
    plain = [replace(p, ref_real=0.0, ref_generated=0.0) for p in pairs()]
    first, second = (response_logps(model.train(), plain, 10_000, CPU) for _ in range(2))
    assert torch.equal(first, second)
    chosen = [
        replace(p, ref_real=a, ref_generated=b)
        for p, (a, b) in zip(plain, first.tolist(), strict=True)
    ]
    policy_training.train(
        model,
        chosen,
        faults_ranks.SETTINGS,
        compute_dtype=torch.float32,
        device=CPU,
        seed=0,
        stage="policy",
        metrics_path=tmp_path / "metrics.jsonl",
    )
    assert timeless(tmp_path)[0]["loss/unweighted"] == pytest.approx(math.log(2), abs=1e-5)


def align_one_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str
) -> tuple[nn.Module, nn.Module]:
    """Runs reference and policy stage for one step on four pairs of the toy run; their models."""
    loaded: list[nn.Module] = []
    for stage in (policy_module, reference_module):
        monkeypatch.setattr(
            stage, "load_model", lambda *a, **k: loaded.append(load_model(*a, **k)) or loaded[-1]
        )
    ctx = open_toy(
        folder,
        "max_rows=4",
        "global_batch=4",
        "training.steps=1",
        "heldout_fraction=0",
        "sft.rows=4",
        "sft.global_batch=4",
        *overrides,
    )
    before = hash_model_folder(ctx.start)
    with ctx.run:
        losers = [[*pair.real[:-1], 5, pair.real[-1]] for pair in ctx.train.pairs]
        against = with_losers(ctx.train.pairs, losers, 1000)
        policy_stage(ctx, 0, ctx.start, reference_stage(ctx, 0, ctx.start, against, {}), {})
    assert hash_model_folder(ctx.start) == before
    reference, policy = loaded
    return reference, policy


def assert_frozen(reference: nn.Module, policy: nn.Module) -> None:
    assert all(
        not p.requires_grad and p.grad is None and p.grad_fn is None for p in reference.parameters()
    )
    assert all(p.requires_grad for p in policy.parameters())
    both = zip(reference.parameters(), policy.parameters(), strict=True)
    # the policy has moved, the reference has not
    assert any(not torch.equal(a.float(), b.float()) for a, b in both)
    storages = [
        {p.untyped_storage().data_ptr() for p in model.parameters()}
        for model in (reference, policy)
    ]
    assert not storages[0] & storages[1]


def test_T16_the_reference_has_no_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole step of an alignment: reference pass, loss, backward, update. Then again, the
    reference left trainable.

    Expected: no parameter of the reference's can have a gradient or has one, none shares storage
    with the policy's, the folder's hash is the same; the second time the check fails.
    """
    reference, policy = align_one_step(tmp_path / "one", monkeypatch)
    assert_frozen(reference, policy)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "requires_grad_", lambda module, _=True: module)
        trainable, policy = align_one_step(tmp_path / "two", monkeypatch)
    with pytest.raises(AssertionError):
        assert_frozen(trainable, policy)


def test_T16_the_reference_is_as_coarse_as_the_weights_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """training.master_dtype=bfloat16 and dtype=float32, from a policy whose file has float32.

    Expected: the reference has the weights that training begins with, and step 0 finds it so.
    """
    folder = write_toy_model(tmp_path / "policy")
    stored = {
        name: p.float() * (1 + 2**-10)
        for name, p in load_file(folder / "model.safetensors").items()
    }
    save_file(stored, folder / "model.safetensors")
    keys = (f"policy={folder}", "dtype=float32")
    coarse = "training.master_dtype=bfloat16"
    reference, _ = align_one_step(tmp_path / "one", monkeypatch, *keys, coarse)
    for name, p in reference.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, p.bfloat16().float()), name
    exact, _ = align_one_step(tmp_path / "two", monkeypatch, *keys)
    assert any(not torch.equal(p, p.bfloat16().float()) for p in exact.parameters())


def test_T16_reference_stays_as_it_is(toy_run: Path) -> None:
    """The reference's folder is hashed before an iteration (its manifest) and after the run.

    Expected: equal hashes.
    """
    for t, start in enumerate(("sft/policy", "iteration_0/policy")):
        for stage in ("reference", "policy"):
            manifest = json.loads((toy_run / f"iteration_{t}/{stage}/manifest.json").read_text())
            assert manifest["parents"]["policy"] == hash_model_folder(toy_run / start)
