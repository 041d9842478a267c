"""Model folders: what is written loads again; what is damaged or hostile is one InputError."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from made_weights import (
    EMBEDDING,
    GPT2_,
    HEAD,
    MISTRAL,
    Q1,
    edit,
    edit_json,
    random_model,
    refusal,
    write_folder,
)
from runs import one_thread
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldalign.models import stored_tensors, weights
from ldalign.models.stored_tensors import INDEX, SINGLE, read_config
from ldalign.models.weights import (
    build,
    count_parameters,
    load_model,
    save_model,
    stored_state,
    write_weights,
)
from ldalign.system.errors import InputError, NumericsError

# ----------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize(
    "raw", [MISTRAL, MISTRAL | {"tie_word_embeddings": True}, GPT2_], ids=["untied", "tied", "gpt2"]
)
@pytest.mark.parametrize("shard_bytes", [10**9, 2000], ids=["single", "sharded"])
@pytest.mark.parametrize("read_bytes", [16 * 2**20, 100], ids=["whole", "in pieces"])
def test_saved_equals_loaded(
    raw: dict[str, Any],
    shard_bytes: int,
    read_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stored_tensors, "READ_BYTES", read_bytes)
    model = write_folder(tmp_path, raw, shard_bytes)
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    if shard_bytes == 2000:
        assert len(files) > 2 and all(weights.SHARD.fullmatch(f) for f in files)
        index = json.loads((tmp_path / INDEX).read_text())
        held = {name: f for f in files for name in load_file(tmp_path / f)}
        assert index["weight_map"] == held
        assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    else:
        assert files == [SINGLE] and not (tmp_path / INDEX).exists()
    stored = {name: t for f in files for name, t in load_file(tmp_path / f).items()}
    assert (HEAD in stored) == (raw is MISTRAL), "a tied head is stored once, as the embedding"
    if raw is GPT2_:
        assert stored["transformer.h.0.attn.c_attn.weight"].shape == (8, 24), (
            "GPT-2's files hold (in, out)"
        )
    loaded = load_model(tmp_path, torch.float32)
    assert not loaded.training
    ours = dict(loaded.named_parameters())
    assert ours.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert torch.equal(ours[name], p), name
        assert ours[name].is_contiguous(), name


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    model = write_folder(tmp_path, GPT2_, dtype=stored)
    loaded = dict(load_model(tmp_path, wanted).named_parameters())
    for name, p in model.named_parameters():
        assert loaded[name].dtype == wanted
        assert torch.equal(loaded[name], p.to(stored).to(wanted)), name


def test_the_files_may_vanish_after_loading(tmp_path: Path) -> None:
    """The weights are copies: a folder may be written over while its model is in use."""
    model = write_folder(tmp_path)
    loaded = load_model(tmp_path, torch.float32)
    with (tmp_path / SINGLE).open("r+b") as file:
        file.truncate(0)
    for name, p in model.named_parameters():
        assert torch.equal(dict(loaded.named_parameters())[name], p), name


def test_new_weights_replace_the_old_ones(tmp_path: Path) -> None:
    """Sharded over single, single over sharded, few shards over many: never a file of both."""
    for shard_bytes in (1000, 10**9, 1000, 3000):
        write_folder(tmp_path)  # single
        model = random_model(MISTRAL, seed=shard_bytes)
        write_weights(stored_state(model, model.state_dict()), tmp_path, torch.float32, shard_bytes)
        assert torch.equal(load_model(tmp_path, torch.float32).output_weight, model.output_weight)
        files = {path.name for path in tmp_path.iterdir()} - {"config.json"}
        index = json.loads((tmp_path / INDEX).read_text()) if INDEX in files else None
        assert files == ({INDEX, *index["weight_map"].values()} if index else {SINGLE})


def test_save_model_defaults(chatml_folder: Path, tmp_path: Path) -> None:
    """bf16, the source's config with that dtype under its present key, the tokenizer beside it."""
    source = tmp_path / "source"
    model = write_folder(
        source, MISTRAL | {"vocab_size": 500, "torch_dtype": "float32", "license": "me"}
    )
    for path in chatml_folder.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    save_model(model, tmp_path / "made", source)
    raw = read_config(tmp_path / "made")
    assert (raw["dtype"], raw["license"]) == ("bfloat16", "me")
    assert "torch_dtype" not in raw
    assert all(t.dtype == torch.bfloat16 for t in load_file(tmp_path / "made" / SINGLE).values())
    assert (tmp_path / "made" / "tokenizer.json").read_bytes() == (
        chatml_folder / "tokenizer.json"
    ).read_bytes()
    loaded = dict(load_model(tmp_path / "made").named_parameters())
    assert all(torch.equal(loaded[name], p.bfloat16()) for name, p in model.named_parameters())
    full = {name: 2 * p for name, p in model.state_dict().items()}
    save_model(model, tmp_path / "made", source, torch.float32, state=full)
    assert torch.equal(
        load_model(tmp_path / "made", torch.float32).output_weight, 2 * model.output_weight
    )


def test_saving_under_another_networks_config_is_refused(tmp_path: Path) -> None:
    model = random_model(MISTRAL)
    write_folder(
        tmp_path / "source",
        MISTRAL | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2},
    )
    with pytest.raises(InputError, match="another network"):
        save_model(model, tmp_path / "made", tmp_path / "source")
    assert not (tmp_path / "made").exists()


def test_saving_nan_is_refused(tmp_path: Path) -> None:
    model = random_model(MISTRAL)
    with torch.no_grad():
        stored_state(model, model.state_dict())[Q1][3, 5] = float("nan")
    with pytest.raises(NumericsError, match=f"tensor {Q1} holds NaN"):
        write_weights(stored_state(model, model.state_dict()), tmp_path, torch.float32)
    with torch.no_grad():
        stored_state(model, model.state_dict())[Q1][3, 5] = 1e6
    with pytest.raises(NumericsError, match="as float16"):
        write_weights(stored_state(model, model.state_dict()), tmp_path, torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_build_allocates_nothing() -> None:
    model = build(MISTRAL | {"vocab_size": 10**6, "hidden_size": 10**5 - 10**5 % 8}, "config.json")
    assert all(p.is_meta for p in model.parameters())
    assert (
        count_parameters(build(MISTRAL, ""))
        == 2 * 40 * 16 + 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16 + 2 * 16) + 16
    )
    assert (
        count_parameters(build(MISTRAL | {"tie_word_embeddings": True}, ""))
        == count_parameters(build(MISTRAL, "")) - 640
    )


# The high-water mark counts mapped file pages too, and cannot be reset: a process of its own, its
# own growth.
MEASURE = """
import sys, torch
from ldalign.models.weights import load_model
def resident(key):
    lines = [line.split() for line in open("/proc/self/status") if line.startswith(key + ":")]
    return int(lines[0][1]) * 1024
# What torch itself loads at its first operations is not the model's.
for dtype in (torch.float32, torch.bfloat16):
    torch.isfinite(torch.ones(100_000).to(dtype).clone().to(torch.float32)).all()
before = resident("RssAnon")
model = load_model(sys.argv[1], getattr(torch, sys.argv[2]))
size = sum(p.numel() * p.element_size() for p in model.parameters())
print((resident("VmHWM") - resident("RssFile") - before) / size)
assert "torch._dynamo" not in sys.modules, "importing dynamo takes seconds"
"""


def write_large(folder: Path, width: int, stored: str) -> int:
    """Writes a model folder of some 75 million weights; returns its bytes.

    A third of them are in one tensor, and the tied head is stored twice.
    """
    raw = MISTRAL | {
        "vocab_size": 24_000,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "tie_word_embeddings": True,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    row = torch.randn(4 * width, generator=torch.Generator().manual_seed(0)).to(
        getattr(torch, stored)
    )
    state = {}
    model = build(raw, "")
    for name, p in stored_state(model, model.state_dict()).items():
        state[name] = (
            row[: p.shape[-1]].expand(p.shape).clone(memory_format=torch.contiguous_format)
        )
    size = sum(t.nbytes for t in state.values())
    state[HEAD] = state[EMBEDDING].clone()
    save_file(state, folder / SINGLE)
    (folder / "config.json").write_text(json.dumps(raw))
    return size


def least_peak(script: str, *arguments: object) -> list[float]:
    """Returns what `script` printed in the run of the smallest first number, the peak.

    There are three runs, or fewer if one stays below 1.1.
    """
    found: list[list[float]] = []
    while len(found) < 3 and (not found or found[-1][0] > 1.1):
        command = [sys.executable, "-c", script, *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=one_thread()
        )
        assert done.returncode == 0, done.stderr
        found.append([float(x) for x in done.stdout.split()])
    return min(found)


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the high-water mark from /proc"
)
@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")],
)
def test_loading_peaks_at_the_models_size(stored: str, wanted: str, tmp_path: Path) -> None:
    """At most 1.1 x the model's size, 300 MB here."""
    size = write_large(tmp_path, 1440 if wanted == "bfloat16" else 1024, stored)
    size = size // getattr(torch, stored).itemsize * getattr(torch, wanted).itemsize
    assert 250e6 < size < 400e6
    assert 0.9 < least_peak(MEASURE, tmp_path, wanted)[0] <= 1.1


# One process as a rank of many: torch's fake process group, whose collectives do nothing.
SHARE = """
import sys, torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from ldalign.system import distributed
from ldalign.models.weights import load_model
folder, rank, ranks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def number(path, key):
    return next(int(line.split()[1]) for line in open(path) if line.startswith(key + ":"))
def peak():
    return number("/proc/self/status", "VmHWM") - number("/proc/self/status", "RssFile")
dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
def cut(model):
    global before, read
    distributed.shard(model, model.blocks, torch.float32, torch.device("cpu"))
    torch.isfinite(torch.ones(100_000).sum())
    before, read = number("/proc/self/status", "RssAnon"), number("/proc/self/io", "rchar")
model = load_model(folder, torch.float32, cut=cut)
share = sum(p.to_local().nbytes for p in model.parameters())
print((peak() - before) * 1024 / share, number("/proc/self/io", "rchar") - read, share)
"""


@pytest.mark.skipif(
    not Path("/proc/self/io").exists(), reason="reads the high-water mark and bytes read from /proc"
)
def test_a_rank_reads_and_holds_its_share(tmp_path: Path) -> None:
    """One of four ranks reads a quarter of the bytes, and holds at most 1.1 x the quarter."""
    size = write_large(tmp_path, 1024, "float32")
    peak, read, share = least_peak(SHARE, tmp_path, 2, 4)
    assert share == pytest.approx(size / 4, rel=0.01) and read == pytest.approx(share, rel=0.01)
    assert 0.9 < peak <= 1.1


@pytest.mark.parametrize("raw", [MISTRAL, MISTRAL | {"tie_word_embeddings": True}, GPT2_])
@pytest.mark.parametrize("ranks", [2, 3, 7])
@pytest.mark.parametrize("read_bytes", [16 * 2**20, 100], ids=["whole", "in pieces"])
def test_all_ranks_shares_are_the_model(
    raw: dict[str, Any],
    ranks: int,
    read_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Uneven rows, parameters in parts or transposed: the ranks read what was written."""
    monkeypatch.setattr(stored_tensors, "READ_BYTES", read_bytes)
    model = write_folder(tmp_path, raw, shard_bytes=2000)
    shares: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    found: list[Tensor] = []
    # Only a DTensor takes a share as its value: here, look at the shares on their way.
    monkeypatch.setattr(weights, "_with_share", lambda p, local: (found.append(local), p)[1])
    for rank in range(ranks):
        monkeypatch.setattr(
            weights.distributed, "local_rows", lambda p, rank=rank: chunk(len(p), rank, ranks)
        )
        found.clear()
        loaded = load_model(tmp_path, torch.float32)
        for (name, _), local in zip(loaded.named_parameters(), found, strict=True):
            shares[name].append(local)
    for name, p in model.named_parameters():
        assert torch.equal(torch.cat(shares[name]), p), name


def chunk(rows: int, rank: int, ranks: int) -> tuple[int, int]:
    """FSDP's rows of a rank, which are torch.chunk's."""
    sizes = [len(part) for part in torch.arange(rows).chunk(ranks)] + [0] * ranks
    return sum(sizes[:rank]), sum(sizes[: rank + 1])


# -------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2' is not supported"),
        ({"model_type": None}, "model_type None"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}, "auto_map"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"intermediate_size": None}, "'intermediate_size' is missing"),
    ],
)
def test_config_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_folder(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    refusal(tmp_path, str(tmp_path / "config.json"), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"model_type": "gpt2", "model_type": "mistral"}', "'model_type' is given twice"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_config_files(content: bytes, message: str, tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    refusal(tmp_path, "config.json", message)


def test_folder_without_config(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "config.json").unlink()
    refusal(tmp_path, "config.json: not found")


# ------------------------------------------------------------------------------------------ tensors


def test_biases_are_extra_tensors(tmp_path: Path) -> None:
    write_folder(tmp_path)
    edit(tmp_path, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}))
    refusal(tmp_path, "1 extra (model.layers.0.self_attn.q_proj.bias)")


def test_gpt2_tensor_stored_the_wrong_way_round(tmp_path: Path) -> None:
    write_folder(tmp_path, GPT2_)
    name = "transformer.h.0.mlp.c_fc.weight"
    edit(tmp_path, lambda t: t.update({name: t[name].T.contiguous()}))
    refusal(tmp_path, f"{name} F32 [32, 8]", "should be a float [8, 32]")


def test_large_finite_values_are_no_infinity(tmp_path: Path) -> None:
    """Their sum overflows; they do not. In float16 they would."""
    write_folder(tmp_path)
    edit(tmp_path, lambda t: t[Q1].fill_(3e38))
    model = load_model(tmp_path, torch.float32)
    assert stored_state(model, model.state_dict())[Q1][0, 0] == torch.tensor(3e38)
    with pytest.raises(InputError, match=f"{Q1} holds NaN or Inf as float16"):
        load_model(tmp_path, torch.float16)


def test_gpt2_weight_under_both_its_names(tmp_path: Path) -> None:
    write_folder(tmp_path, GPT2_)
    edit(tmp_path, lambda t: t.update({"wte.weight": t["transformer.wte.weight"] + 1}))
    refusal(tmp_path, "tensor wte.weight is the same weight as transformer.wte.weight")


# -------------------------------------------------------------------------------------------- files


def test_index_that_disagrees_with_the_shards(tmp_path: Path) -> None:
    write_folder(tmp_path, shard_bytes=2000)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    other = next(f for f in weight_map.values() if f != weight_map[Q1])
    edit_json(tmp_path / INDEX, weight_map=weight_map | {Q1: other})
    refusal(tmp_path, f"{INDEX}: disagrees with the shards about {Q1};")
    edit_json(
        tmp_path / INDEX, weight_map={name: f for name, f in weight_map.items() if name != Q1}
    )
    refusal(tmp_path, f"disagrees with the shards about {Q1};")


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}, {"a": None}])
def test_index_without_a_map(weight_map: Any, tmp_path: Path) -> None:
    write_folder(tmp_path, shard_bytes=2000)
    edit_json(tmp_path / INDEX, weight_map=weight_map)
    refusal(tmp_path, f"{INDEX}: no weight_map")


def test_single_file_and_index_together(tmp_path: Path) -> None:
    """One of them is stale, and loaders differ in which they take."""
    write_folder(tmp_path, shard_bytes=2000)
    save_file({"a": torch.ones(1)}, tmp_path / SINGLE)
    refusal(tmp_path, f"holds both {SINGLE} and {INDEX}")


def test_a_hub_cache_keeps_its_links(tmp_path: Path) -> None:
    """models--org--name/snapshots/HASH/file -> ../../blobs/HASH is how such caches are laid out;
    further out is not.
    """
    snapshot, blobs = (
        tmp_path / "models--a--b" / "snapshots" / "c0ffee",
        tmp_path / "models--a--b" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    model = write_folder(snapshot)
    (snapshot / SINGLE).rename(blobs / "1234")
    (snapshot / SINGLE).symlink_to("../../blobs/1234")
    assert torch.equal(load_model(snapshot, torch.float32).output_weight, model.output_weight)
    (blobs / "1234").rename(tmp_path / "1234")
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(tmp_path / "1234")
    refusal(snapshot, "is a link out of the model folder")
