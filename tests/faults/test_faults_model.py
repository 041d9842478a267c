"""The matrix's M rows: model folders that are damaged, contradict themselves or are hostile."""

import json
import os
import pickle
import re
import shutil
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import forget_peak, peak
from made_tokenizers import CHATML_TEMPLATE, CONVERSATIONS, as_row, copy, messages
from made_weights import EMBEDDING, GPT2_, HEAD, MISTRAL, Q1, edit, edit_json, refusal, write_folder
from torch import Tensor

from ldalign.data.chat_template import ChatTemplate
from ldalign.data.tokenizer import load_tokenizer
from ldalign.evaluation.reward import check_reward_model
from ldalign.models import guide_folder, stored_tensors, toy, weights
from ldalign.models.stored_tensors import INDEX, SINGLE
from ldalign.models.weights import load_model
from ldalign.run import manifest
from ldalign.run.measures import check_measurements
from ldalign.run.settings import RunConfig
from ldalign.system import untrusted
from ldalign.system.config import load_config
from ldalign.system.errors import InputError


def with_header(header: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("share", [i / 64 for i in range(64)])
def test_M1_truncated_at_64_points(share: float, tmp_path: Path) -> None:
    """A safetensors file is cut at 64 points.

    Expected: one line with the file, the bytes expected and found.
    """
    write_folder(tmp_path, GPT2_)
    whole = (tmp_path / SINGLE).read_bytes()
    kept = int(share * len(whole))
    (tmp_path / SINGLE).write_bytes(whole[:kept])
    message = refusal(tmp_path, SINGLE)
    assert f"{kept} found" in message or f"has {kept};" in message
    header = struct.unpack("<Q", whole[:8])[0]
    assert f"{len(whole)} bytes expected" in message or kept < 8 + header


@pytest.mark.parametrize(
    "content",
    [
        with_header(b"{}", 2**63),
        with_header(b"{}", 100 * 10**6 + 1),
        with_header(b"not json"),
        with_header(b"[1]"),
        with_header(b"[" * 50_000),
        with_header(json.dumps({"a": "tensor"}).encode()),
        with_header(json.dumps({"a": {"dtype": "F32"}}).encode()),
        with_header(
            json.dumps({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}).encode(), data=bytes(12)
        ),  # overlap
        with_header(
            json.dumps({"a": entry([1], [0, 4]), "b": entry([1], [8, 12])}).encode(), data=bytes(12)
        ),  # hole
        # shape against bytes
        with_header(json.dumps({"a": entry([3], [0, 8])}).encode(), data=bytes(8)),
        # overflow
        with_header(json.dumps({"a": entry([2**40, 2**40], [0, 8])}).encode(), data=bytes(8)),
        with_header(json.dumps({"a": entry([-2], [0, 8])}).encode(), data=bytes(8)),
        with_header(json.dumps({"a": entry([2], [8, 0])}).encode(), data=bytes(8)),
        with_header(json.dumps({"a": entry([2], [0, 8], "F99")}).encode(), data=bytes(8)),
        with_header(
            b'{"a":%b,"a":%b}' % ((json.dumps(entry([2], [0, 8])).encode(),) * 2), data=bytes(8)
        ),  # duplicate
        # a byte too many
        with_header(json.dumps({"a": entry([2], [0, 8])}).encode(), data=bytes(9)),
        b"",
        b"\x80\x04pickle!",
    ],
)
def test_M2_broken_header(content: bytes, tmp_path: Path) -> None:
    """A header of length 2^63, not JSON, with a key twice, overlap, hole, overflow, and more.

    Expected: one line with the file.
    """
    write_folder(tmp_path)
    (tmp_path / SINGLE).write_bytes(content)
    refusal(tmp_path, SINGLE)


@pytest.mark.parametrize("length", [2**63, 100 * 10**6 + 1, 50 * 10**6])
def test_M2_huge_header_is_not_read(length: int, tmp_path: Path) -> None:
    """A header of 2^63 bytes, of over 100 MB, of 50 MB in a file that is long enough.

    Expected: one line, under 1 s and 20 MB.
    """
    write_folder(tmp_path)
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(120 * 10**6)  # no bytes on the disk
    tracemalloc.start()
    start = time.process_time()
    refusal(tmp_path, f"its header should take {length} bytes")
    assert time.process_time() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_M3_tensors_missing_and_extra(tmp_path: Path) -> None:
    """Two tensors are missing, seven are extra.

    Expected: one line with the first five names and the counts.
    """
    write_folder(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[Q1], tensors[EMBEDDING]
        for i in range(7):
            tensors[f"model.layers.{i + 2}.mlp.up_proj.weight"] = torch.ones(1)

    edit(tmp_path, change)
    message = refusal(
        tmp_path, f"2 missing ({EMBEDDING}, {Q1})", "7 extra (model.layers.2.mlp.up_proj.weight, "
    )
    assert "... 2 more" in message, "five names, then the count"


@pytest.mark.parametrize(
    "tensor", [torch.ones(15, 16), torch.ones(16, 16, 1), torch.tensor(1.0), torch.ones(0, 16)]
)
def test_M3_tensor_of_wrong_shape(tensor: Tensor, tmp_path: Path) -> None:
    """A tensor has another shape than config.json says.

    Expected: one line with its name, shape and file, and the right shape.
    """
    write_folder(tmp_path)
    edit(tmp_path, lambda t: t.update({Q1: tensor}))
    refusal(tmp_path, f"{Q1} F32 {list(tensor.shape)} in {SINGLE}", "should be a float [16, 16]")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_M3_tensor_of_wrong_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """A tensor is of integers, booleans or 8-bit floats.

    Expected: one line with its name.
    """
    write_folder(tmp_path)
    edit(tmp_path, lambda t: t.update({Q1: torch.ones(16, 16).to(dtype)}))
    refusal(tmp_path, f"1 of wrong shape or dtype ({Q1} ")


def test_M3_shard_missing(tmp_path: Path) -> None:
    """A shard that the index names is not there.

    Expected: one line with its path.
    """
    write_folder(tmp_path, shard_bytes=2000)
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    refusal(tmp_path, f"{lost}: shard not found")


def test_M3_tensor_in_two_shards(tmp_path: Path) -> None:
    """Two shards hold one tensor.

    Expected: one line with the tensor and both files.
    """
    write_folder(tmp_path, shard_bytes=2000)
    first, second = sorted(p.name for p in tmp_path.glob("model-*.safetensors"))[:2]
    edit(tmp_path, lambda t: t.update({EMBEDDING: torch.ones(40, 16)}), second)
    refusal(tmp_path, f"{tmp_path / second}: tensor {EMBEDDING} is in {first} too")


OPENED: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str):
        OPENED.append(os.path.realpath(arguments[0]))


@pytest.fixture(scope="module")
def watched() -> None:
    """Gives OPENED the real path of every file that Python opens from here on.

    An audit hook cannot be removed.
    """
    sys.addaudithook(watch)


@pytest.mark.parametrize(
    "kind", ["parent", "absolute", "link", "single link", "linked index", "folder link"]
)
def test_M4_nothing_outside_the_folder_is_opened(
    kind: str, tmp_path: Path, watched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index names ../x or an absolute path; a shard, the index or a folder is a link out.

    Expected: one line; an audit hook sees no file outside opened.
    """
    folder, outside = tmp_path / "model", tmp_path / "outside"
    write_folder(folder, shard_bytes=10**9 if kind == "single link" else 2000)
    outside.mkdir()
    if kind == "single link":
        (folder / SINGLE).rename(outside / SINGLE)
        (folder / SINGLE).symlink_to(outside / SINGLE)
    elif kind == "linked index":
        (folder / INDEX).rename(outside / INDEX)
        (folder / INDEX).symlink_to(outside / INDEX)
    else:
        name = sorted(p.name for p in folder.glob("model-*.safetensors"))[0]
        (folder / name).rename(outside / name)
        wrong = {
            "parent": f"../outside/{name}",
            "absolute": str(outside / name),
            "folder link": f"sub/{name}",
        }.get(kind)
        if kind == "link":
            (folder / name).symlink_to(outside / name)
        elif kind == "folder link":
            (folder / "sub").symlink_to(outside)
        if wrong:
            weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
            edit_json(
                folder / INDEX,
                weight_map={k: wrong if v == name else v for k, v in weight_map.items()},
            )
    library = stored_tensors.safe_open  # opens files behind the hook's back
    monkeypatch.setattr(
        stored_tensors,
        "safe_open",
        lambda path, **k: watch("open", (str(path),)) or library(path, **k),
    )
    OPENED.clear()
    refusal(
        folder,
        "not a plain safetensors file name"
        if kind in ("parent", "absolute", "folder link")
        else "is a link out",
    )
    assert os.path.realpath(folder / "config.json") in OPENED, "the watch itself works"
    assert not [path for path in OPENED if path.startswith(os.path.realpath(outside))]


def test_M4_a_shard_name_that_no_file_can_have(tmp_path: Path) -> None:
    """The index names a shard by 300 characters.

    Expected: one line; the file system is not asked.
    """
    write_folder(tmp_path, shard_bytes=2000)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    edit_json(tmp_path / INDEX, weight_map=dict.fromkeys(weight_map, "x" * 288 + ".safetensors"))
    refusal(tmp_path, INDEX, "not a plain safetensors file name")


def test_M5_only_pickles(tmp_path: Path) -> None:
    """The folder has only pytorch_model.bin, which would run code.

    Expected: one line; it is not read.
    """
    write_folder(tmp_path)
    (tmp_path / SINGLE).unlink()
    refusal(tmp_path, "no weights", SINGLE)

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    refusal(tmp_path, "only pickles (pytorch_model.bin)")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "raw", [MISTRAL | {"tie_word_embeddings": True}, GPT2_], ids=["mistral", "gpt2"]
)
def test_M6_tied_head_that_differs(raw: dict[str, Any], tmp_path: Path) -> None:
    """config.json ties the head, the file holds another one (or a copy, which is fine).

    Expected: one line with both tensors.
    """
    write_folder(tmp_path, raw)
    embedding = EMBEDDING if raw is not GPT2_ else "transformer.wte.weight"
    edit(tmp_path, lambda t: t.update({HEAD: t[embedding].clone()}))
    load_model(tmp_path, torch.float32)
    edit(tmp_path, lambda t: t[HEAD][-1, -1].add_(1e-6))
    refusal(
        tmp_path,
        f"{tmp_path / SINGLE}: tensor {HEAD} differs from {embedding}",
        "tie_word_embeddings",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("read_bytes", [16 * 2**20, 100])
def test_M7_one_value_that_is_no_number(
    value: float, read_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One NaN or infinity in one weight.

    Expected: one line with the tensor.
    """
    monkeypatch.setattr(stored_tensors, "READ_BYTES", read_bytes)
    write_folder(tmp_path)
    edit(tmp_path, lambda t: t[Q1].view(-1)[200].fill_(value))
    refusal(tmp_path, f"{tmp_path / SINGLE}: tensor {Q1} holds NaN or Inf")


def test_M8_tokenizer_larger_than_the_embedding(chatml_folder, tmp_path):
    """Token ids go beyond the embedding.

    Expected: one line with both sizes.
    """
    folder = copy(chatml_folder, tmp_path, "config.json", vocab_size=400)
    with pytest.raises(InputError, match="vocab_size 400"):
        load_tokenizer(folder)


def test_M8_no_end_token(chatml_folder, tmp_path):
    """No end token is declared anywhere.

    Expected: one line that says where to declare it.
    """
    folder = copy(chatml_folder, tmp_path, "tokenizer_config.json", eos_token=None)
    with pytest.raises(InputError, match="no end token is declared"):
        load_tokenizer(folder)


def test_M8_several_end_ids(chatml_folder, tmp_path):
    """Several end ids are declared, in three files.

    Expected: generation stops at each.
    """
    folder = copy(chatml_folder, tmp_path, "generation_config.json", eos_token_id=[0, 7])
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 7, "vocab_size": 5000}))
    assert load_tokenizer(folder).end_ids == (0, 7, 2)


def test_M11_no_generation_prompt(chatml_folder):
    """The template has no generation prompt.

    Expected: one line at the start.
    """
    template = CHATML_TEMPLATE.split("{% if add_generation_prompt")[0]
    with pytest.raises(InputError, match="no generation prompt"):
        load_tokenizer(chatml_folder, template=template).pair_ids(as_row(CONVERSATIONS[0]))


def test_M11_prompt_is_no_prefix(chatml_folder):
    """The prompt is not how prompt + answer begins: the assistant's header changes.

    Expected: one line with the row and the place from which they differ.
    """
    template = CHATML_TEMPLATE.replace("assistant\n' }}", "assistant:\n' }}")
    tokenizer = load_tokenizer(chatml_folder, template=template)
    with pytest.raises(
        InputError,
        match=r"data.jsonl:3: .* character \d+ and what follows is ':\\n' in the prompt, "
        r"'\\n12 \+ 30",
    ):
        tokenizer.pair_ids(as_row(CONVERSATIONS[0], where="data.jsonl:3"))


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "chat_template.jinja", "vocab.json"]
)
def test_M4_a_small_file_that_is_a_link_out(name: str, tmp_path: Path, watched: None) -> None:
    """config.json, a tokenizer file or the template is a link to a file outside the folder.

    Expected: one line; the file outside is not opened.
    """
    folder, outside = toy.write_toy_model(tmp_path / "model"), tmp_path / "outside"
    outside.mkdir()
    (outside / name).write_bytes(
        (folder / name).read_bytes() if (folder / name).exists() else b"{}"
    )
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside / name)
    OPENED.clear()
    with pytest.raises(InputError, match=f"{name}: is a link out of the model folder"):
        weights.check_model(folder)
        load_tokenizer(folder)
    assert not [path for path in OPENED if path.startswith(os.path.realpath(outside))]


@pytest.mark.parametrize(
    "name", ["latent.safetensors", "tokenizer.json", "guide.json", "merges.txt", "encoder"]
)
def test_M4_a_link_out_of_a_guide(name: str, toy_run: Path, tmp_path: Path, watched: None) -> None:
    """A file, or a tower's folder, of a trained guide is a link out of it.

    Expected: one line, before anything is loaded and when the guide is; nothing outside is opened.
    """
    folder, outside = tmp_path / "guide", tmp_path / "outside"
    shutil.copytree(toy_run / "guide", folder)
    outside.mkdir()
    if (folder / name).exists():
        (folder / name).rename(outside / name)
    else:
        (outside / name).write_text("{}")
    (folder / name).symlink_to(outside / name)
    for read in (guide_folder.check_trained_guide, guide_folder.load_guide):
        OPENED.clear()
        with pytest.raises(InputError, match=f"{name}: is a link out of the model folder"):
            read(folder)
        assert not [path for path in OPENED if path.startswith(os.path.realpath(outside))]


@pytest.mark.parametrize(
    ("folder", "target", "inside"),
    [
        ("models--a--b/snapshots/c0", "models--a--b/blobs/12", True),
        ("models--a--b/snapshots/c0", "models--a--b/blobs/12/34", False),
        ("models--a--b/snapshots/c0", "models--a--b/refs/main", False),
        ("models--a--b/snapshots/c0", "models--a--b/snapshots/c1/config.json", False),
        ("models--a--b/snapshots/c0", "models--x--y/blobs/12", False),
        ("models--a--b/snapshots/c0/deeper", "models--a--b/blobs/12", False),
        ("backup/snapshots/c0", "backup/blobs/12", False),
        ("snapshots/c0", "secret", False),
    ],
)
def test_M4_only_a_hubs_blobs_may_be_linked_to(
    folder: str, target: str, inside: bool, tmp_path: Path
) -> None:
    """A file in a folder named `snapshots` links to what lies beside it.

    Expected: followed to a blob of the same model, in the layout of a hub's
    cache, and nowhere else.
    """
    for path in (tmp_path / folder, (tmp_path / target).parent):
        path.mkdir(parents=True, exist_ok=True)
    (tmp_path / target).write_text('{"a": 1}')
    link = tmp_path / folder / "config.json"
    link.symlink_to(os.path.relpath(tmp_path / target, link.parent))
    assert untrusted.is_inside(link, link.parent) is inside
    if inside:
        assert untrusted.read_json(link) == {"a": 1}
        (tmp_path / target).unlink()
        (tmp_path / target).symlink_to(tmp_path / "elsewhere")  # a blob that is a link itself
    with pytest.raises(InputError, match="is a link out of the model folder"):
        untrusted.read_json(link)


def test_M4_a_device_is_no_model_file(tmp_path: Path) -> None:
    """tokenizer.json is a pipe, which would hold the reader for ever.

    Expected: one line.
    """
    folder = toy.write_toy_model(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer.json: is no ordinary file"):
        load_tokenizer(folder)


def test_M5_auto_map(tmp_path: Path) -> None:
    """config.json asks to import code from the folder (auto_map), which is there.

    Expected: one line; nothing is imported.
    """
    write_folder(tmp_path)
    (tmp_path / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit_json(tmp_path / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    refusal(tmp_path, "auto_map asks to run code")
    assert not (tmp_path / "ran").exists()


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def only_pickles(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def index_out(folder: Path) -> None:
    (folder / SINGLE).rename(folder.parent / "x.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))


def link_out(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder.parent / "tokenizer.json")
    (folder / "tokenizer.json").symlink_to(folder.parent / "tokenizer.json")


def settings(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "tokenizer_config.json", **changes)


Spoil = Callable[[Path], Any]
BROKEN: dict[str, tuple[Spoil, str]] = {
    "only pickles": (only_pickles, "only pickles (pytorch_model.bin), which can run code"),
    "auto_map": (
        lambda f: rewrite(f / "config.json", auto_map={"AutoModel": "x.Evil"}),
        "auto_map asks to run code",
    ),
    "index out": (
        index_out,
        "shard '../x.safetensors' is not a plain safetensors file name inside the folder",
    ),
    "link out": (link_out, "tokenizer.json: is a link out of the model folder"),
    "cut": (lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-9]), "bytes expected"),
    "header": (
        lambda f: (f / SINGLE).write_bytes(with_header(b"{}", 2**63)),
        "not a whole safetensors file",
    ),
}
OF_OURS: dict[str, tuple[Spoil, str]] = BROKEN | {
    "template": (
        lambda f: (f / "chat_template.jinja").write_text("{{ ''.__class__ }}"),
        "chat template: SecurityError",
    ),
}
OF_TRANSFORMERS: dict[str, tuple[Spoil, str]] = BROKEN | {
    "only pickles": (only_pickles, "has no weights in safetensors"),
    "code": (
        settings(auto_map={"AutoTokenizer": "x.Evil"}),
        "tokenizer_config.json: auto_map asks to run code",
    ),
    "vocabulary out": (
        settings(vocab_file="/etc/passwd"),
        "vocab_file '/etc/passwd' is no plain file name",
    ),
    "tokenizers out": (
        settings(fast_tokenizer_files=["../x"]),
        "fast_tokenizer_files '../x' is no plain file name",
    ),
    "adapter": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "adapter_config.json: is an adapter",
    ),
}


@pytest.mark.parametrize("fault", OF_TRANSFORMERS)
def test_M5_reward_models_folder(tmp_path: Path, fault: str) -> None:
    """A reward model's folder with only pickles, code to run, paths out of it, an adapter, or
    broken headers.

    Expected: one line with the file, before anything is computed and before
    transformers sees the folder.
    """
    folder = toy.write_toy_model(tmp_path / "model")
    check_reward_model(folder)
    spoil, message = OF_TRANSFORMERS[fault]
    spoil(folder)
    config = load_config(RunConfig, overrides=[f"reward={folder}"])
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        check_measurements(config, ["start/reward"])
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("fault", OF_OURS)
def test_M5_judges_folder(tmp_path: Path, fault: str) -> None:
    """A judge's folder with only pickles, code to run, paths out of it, broken headers, or a
    template that reaches out.

    Expected: one line with the file, before anything is computed.
    """
    folder = toy.write_toy_model(tmp_path / "model")
    config = load_config(RunConfig, overrides=["method=rlaif", f"judge={folder}"])
    check_measurements(config, ["iteration_0/judged"])
    spoil, message = OF_OURS[fault]
    spoil(folder)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        check_measurements(config, ["iteration_0/judged"])
    assert str(folder) in str(caught.value)


class Evil:
    """A pickle of this leaves a file behind when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return (Path.touch, (self.path,))


def test_M5_planted_pickles_are_never_read(tmp_path: Path, toy_run: Path) -> None:
    """Pickles lie in a model folder, a guide folder and a run folder, under
    every name that others read.

    Expected: everything loads as if they were not there; none is executed.
    """
    model = toy.write_toy_model(tmp_path / "model")
    trained = shutil.copytree(toy_run / "guide", tmp_path / "guide")
    run = shutil.copytree(toy_run / "sft", tmp_path / "run/sft")
    folders = [model, trained, trained / "encoder", trained / "decoder", run, run / "policy"]
    names = (
        "pytorch_model.bin",
        "optimizer.pt",
        "rng_state.pth",
        "training_args.bin",
        "x.pkl",
        "model.ckpt",
    )
    evil = pickle.dumps(Evil(tmp_path / "ran"))
    for folder in folders:
        for name in names:
            (folder / name).write_bytes(evil)
    load_model(model)
    load_tokenizer(model)
    guide_folder.load_guide(trained)
    manifest.check_stage(run / "policy")
    weights.save_model(load_model(run / "policy"), tmp_path / "saved", run / "policy")
    assert not (tmp_path / "ran").exists()
    pickle.loads(evil)  # noqa: S301 - it would have been seen
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 25}, "of wrong shape or dtype (model.layers.0.mlp"),
        ({"num_hidden_layers": 3}, "missing (model.layers.2."),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; at most"),
        ({"hidden_size": 2**30, "intermediate_size": 2**30, "head_dim": 2**30}, "config.json"),
        ({"vocab_size": 41}, EMBEDDING),
    ],
)
def test_M6_config_contradicts_the_weights(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """config.json has another width, depth or vocabulary than the weights, or an absurd one.

    Expected: one line with the first tensor that does not fit, or the key.
    """
    write_folder(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    refusal(tmp_path, message)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append('x') }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'x' as y %}",
        "{% extends 'x' %}",
        "{{ 'x'.encode() }}",
        "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
    ],
)
def test_M9_template_reaches_out(template: str, chatml_folder: Path) -> None:
    """The template reaches for `__class__`, changes its messages, or names another file.

    Expected: one line, SecurityError.
    """
    with pytest.raises(InputError, match="chat template: SecurityError"):
        load_tokenizer(chatml_folder, template=template).prompt_ids(messages([("user", "x")]))


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**9 }}",
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% for a in range(100000) %}{% for b in range(100000) if b < 0 %}{% endfor %}{% endfor %}",
        "{{ '%1000000000d'|format(1) }}",
        "{{ '%*d'|format(10**9, 1) }}",
        "{{ '{:{}}'.format(1, 10**9) }}",
        "{{ '{:{0[0]}}'.format([10**9]) }}",
        "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% "
        "endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% "
        "endfor %}",
        "{% set ns = namespace(x=[]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% "
        "endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% "
        "endfor %}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ 'a'|center(10**9) }}",
        "{{ ('a' * 1000).replace('', 'b' * 100000) }}",
        "{{ ('a' * 1000)|replace('a', 'b' * 100000) }}",
        "{{ range(99999)|join('b' * 1000) }}",
        "{{ messages|tojson(indent=10**7) }}",
        "{{ range(99999)|map('string')|map('center', 100000)|list|length }}",
        "{% set x %}{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}{% endset %}",
        "{{ strftime_now('%1000000000d') }}",
        "{{ x }}" * 20_000,
    ],
    ids=lambda template: template[:60],
)
def test_M10_template_bomb(template: str, chatml_folder: Path) -> None:
    """The template would write gigabytes, or loop for hours.

    Expected: one line within 5 s of processor time and 150 MB.
    """
    before, start = forget_peak(), time.thread_time()
    with pytest.raises(InputError, match="chat template: (SecurityError|RecursionError)"):
        load_tokenizer(chatml_folder, template=template).prompt_ids(messages([("user", "x")]))
    assert time.thread_time() - start < 5
    assert peak() - before < 150 * 2**20


def test_M10_the_budget_grows_with_the_conversation() -> None:
    """A conversation of a megabyte goes through a template that copies each message several times.

    Expected: it is rendered, as jinja2 alone renders it.
    """
    chat = messages([("user", "word " * 200_000), ("assistant", "x")])
    template = (
        "{% for m in messages %}{{ m.content.split('</a>')[-1]|trim ~ '!' + m.role }}{% endfor "
        "%}{{ loop }}"
    )
    text = ChatTemplate(template, date.today()).render(chat)
    assert text == ("word " * 200_000).strip() + "!userx!assistant"


METERED = """{% set ns = namespace(last=messages|length - 1) %}{% for m in messages[::-1] %}{{
    loop.index }}
{{ loop.length }}{{- loop.revindex }}{{ loop.previtem.role if loop.previtem is defined else '-' }}
{{ loop.cycle('a', 'b') }}
{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ ns.last }}
{% macro f(x, y=2) %}[{{ x }}{{ y }}{{ varargs }}{{ caller() if caller }}]{% endmacro %}{{ f(1)
    }}{{ f('a', 3, 4) }}
{% call f(5) %}inner{% endcall %}{{ messages|map(attribute='role')|join(', ')|upper }}{{
    (messages|last).content[:2] }}
{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ '%05.1f %s'|format(2.25, 'x') }}
{{ '{0:>5}|{a}'.format('q', a=1) }}{% for a in [1, [2, [3]]] recursive %}{% if a is iterable
    %}<{{ loop(a) }}>
{% else %}{{ a }}{% endif %}{% else %}none{% endfor %}{% for x in range(3) if x != 1 %}{{ x }}{%
    endfor %}
{% for k, v in {'a': 1}.items() %}{{ k ~ v }}{% endfor %}{% for x in nothing %}{% else %}empty{%
    endfor %}
{% set x %}{{ 1 }}{{ none }}{{ true }}{{ nothing }}{% endset %}{{ x|indent(2) }}{{ [3, 1, 2]|sort
    }}{{ (1, 'a') }}
{{ 7 // 2 }}{{ 2 ** 3 }}{{ 7 % 4 }}{{ [1] + [2] }}{{ 'ab' * 2 }}{{
    messages|groupby('role')|length }}"""


def test_M10_the_meters_change_nothing_else() -> None:
    """A template that uses most of jinja2 is rendered with and without the meters.

    Expected: the same text.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    chat = messages([("system", "s"), ("user", "Größe"), ("assistant", "a"), ("user", "q")])
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(METERED)
    assert ChatTemplate(METERED, date.today()).render(chat) == plain.render(messages=chat)


# Templates as models in use have them, in what they do: of Mistral v0.3, of Llama 3.1, of Qwen3.
IN_USE = {
    "tools of the last "
    "user": """{%- if messages[0]['role'] == 'system' %}{%- set first = messages[0]['content'] %}
{%- set turns = messages[1:] %}{%- else %}{%- set turns = messages %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set asked = turns | selectattr('role', 'equalto', 'user') | list %}{%- set ns =
    namespace(place=0) %}
{%- for turn in turns %}
    {%- if not (turn.role in ['tool', 'results'] or (turn.tool_calls is defined and
    turn.tool_calls is not none)) %}
        {%- if (turn['role'] == 'user') != (ns.place % 2 == 0) %}
            {{- raise_exception('users and assistants take turns') }}
        {%- endif %}{%- set ns.place = ns.place + 1 %}{%- endif %}{%- endfor %}
{{- bos_token }}
{%- for turn in turns %}
    {%- if turn['role'] == 'user' %}
        {%- if tools is not none and turn == asked[-1] %}{{- '[TOOLS] [' }}
            {%- for tool in tools %}{{- tool.function | tojson }}{%- if not loop.last %}{{- ', '
    }}{%- endif %}
            {%- endfor %}{{- '][/TOOLS]' }}{%- endif %}
        {%- if loop.last and first is defined %}{{- '[INST] ' + first + '\n\n' + turn['content']
    + '[/INST]' }}
        {%- else %}{{- '[INST] ' + turn['content'] + '[/INST]' }}{%- endif %}
    {%- elif turn['role'] == 'assistant' %}{{- ' ' + turn['content']|trim + eos_token }}
    {%- else %}{{- raise_exception('no such role: ' + turn['role']) }}{%- endif %}{%- endfor %}""",
    "date and headers": """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not tools_first is defined %}{%- set tools_first = true %}{%- endif %}
{%- if not date is defined %}{%- if strftime_now is defined %}{%- set date =
    strftime_now('%d %b %Y') %}
{%- else %}{%- set date = '1 Jan 2024' %}{%- endif %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|head|>system<|body|>\n\n' }}{%- if builtin is defined or tools is not none %}{{-
    'with tools\n' }}{%- endif %}
{%- if builtin is defined %}{{- builtin | reject('equalto', 'code') | list | join(', ') }}{%-
    endif %}
{{- 'Today: ' + date + '\n\n' }}{{- system }}{{- '<|end|>' }}
{%- if tools_first and not tools is none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\n\n' }}{%- endfor %}{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|head|>' + message['role'] + '<|body|>\n\n' + message['content'] | trim + '<|end|>' }}
    {%- elif message.content is mapping or message.content is iterable %}{{- message.content |
    tojson }}
    {%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|body|>\n\n' }}{%- endif %}""",
    "thoughts": """{%- if tools %}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content +
    '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == 'user' and message.content is string
        and not (message.content.startswith('<found>') and message.content.endswith('</found>')) %}
        {%- set ns.searching = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == 'assistant' %}{%- set thought = '' %}
        {%- if message.reasoning_content is string %}{%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought =
    content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + thought.strip('\n') +
    '\n</think>\n\n' }}
            {{- content.lstrip('\n') }}
        {%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}
        {%- if message.tool_calls %}{%- for call in message.tool_calls %}{{- call.arguments |
    tojson }}{%- endfor %}
        {%- endif %}{{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or (messages[loop.index0 - 1].role != 'tool') %}{{- '<|im_start|>user'
    }}{%- endif %}
        {{- '\n<found>\n' + content + '\n</found>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{-
    '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}""",
}
SHORT = {
    "tools of the last user": "<s>[INST] q[/INST] a</s>[INST] s\n\nr[/INST]",
    "date and headers": "<s><|head|>system<|body|>\n\nToday: "
    "DATE\n\ns<|end|><|head|>user<|body|>\n\nq<|end|>"
    "<|head|>assistant<|body|>\n\n<think>\nhm\n</think>\n\na<|end|><|head|>user<|body|>\n\nr<|end|>"
    "<|head|>assistant<|body|>\n\n",
    "thoughts": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
    "<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.mark.parametrize("name", IN_USE)
def test_M10_templates_in_use_stay_within_the_limits(name: str, zephyr_folder: Path) -> None:
    """Templates that do what Mistral's, Llama's and Qwen's do; conversations of 4
    turns, and of 400 long ones.

    Expected: rendered as jinja2 alone renders them; one BOS where the template writes it.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    answer = "a" if name == "tools of the last user" else "<think>\nhm\n</think>\n\na"
    turns = [("system", "s"), ("user", "q"), ("assistant", answer), ("user", "r")]
    tokenizer = load_tokenizer(zephyr_folder, template=IN_USE[name])
    today = time.strftime("%d %b %Y")
    assert tokenizer.render(messages(turns), True).replace(today, "DATE") == SHORT[name]
    assert tokenizer.prompt_ids(messages(turns)).count(tokenizer.bos_id) == 1

    long = messages(
        [("system", "s"), *[("user", "word " * 400), ("assistant", answer * 100)] * 200]
    )
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    plain.globals |= {"strftime_now": time.strftime, "raise_exception": str}
    expected = plain.from_string(IN_USE[name]).render(
        messages=long, tools=None, bos_token="<s>", eos_token="</s>"
    )
    assert tokenizer.render(long) == expected
