"""The public calls stay as they are: names, arguments and results, letter by letter."""

import subprocess
import sys
from pathlib import Path

import torch

import ldalign
from ldalign.data.rows import Row
from ldalign.models.toy import write_toy_model


def test_import_alone_loads_nothing() -> None:
    code = (
        "import ldalign, sys; print([m for m in sys.modules if m == 'torch' or "
        "m.startswith('ldalign.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_models_tokenizer_and_generation(tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path / "toy")
    model = ldalign.load_model(folder, dtype=torch.bfloat16, device="cpu")
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    logits = model(ids)
    assert logits.shape == (2, 3, 512) and logits.dtype == torch.bfloat16

    copy = tmp_path / "copy"
    ldalign.save_model(model, copy, source=folder)
    assert torch.equal(ldalign.load_model(copy)(ids), logits)

    tok = ldalign.load_tokenizer(copy)
    assert tok.decode(tok.encode("What is 2 + 2?")) == "What is 2 + 2?"
    question = [{"role": "user", "content": "What is 2 + 2?"}]
    assert tok.render(question).endswith("2?<|im_end|>\n")
    prompt, response = tok.pair_ids(Row("1", tuple(question), "4"))
    assert tok.decode(prompt, skip_special_tokens=False).endswith("<|im_start|>assistant\n")
    assert response == [*tok.encode("4"), tok.end_ids[0]]

    options = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": 3}
    texts = ldalign.generate(model, tok, [question, question], **options)
    assert len(texts) == 2 and texts[0] != texts[1]  # a stream of its own for each
    assert ldalign.generate(model, tok, [question, question], **options) == texts
    greedy = ldalign.generate(model, tok, [question, question], max_new_tokens=8, temperature=0.0)
    assert greedy[0] == greedy[1]


def test_guide(toy_run: Path) -> None:
    guide = ldalign.load_guide(toy_run / "guide")
    d = guide.distance(["Count.", "Sort."], ["1 2 3", "a b"], ["1 2 3", "b a"])
    assert d.shape == (2,) and d.dtype == torch.float32
    assert d[0] == 0 and d[1] > 0


def test_ops() -> None:
    hidden, weight = torch.eye(3, 4), torch.eye(5, 4)  # logits: row i has 1 at i, else 0
    logp = ldalign.ops.linear_logprob(hidden, weight, torch.tensor([0, 1, 4]))
    e = torch.e
    hit, miss = torch.tensor(e / (e + 4)).log(), torch.tensor(1 / (e + 4)).log()
    torch.testing.assert_close(logp, torch.stack([hit, hit, miss]).float())
    column = torch.tensor
    loss, metrics = ldalign.ops.weighted_dpo_loss(
        column([-1.0]), column([-3.0]), column([-2.0]), column([-2.0]), column([0.5]), 0.1
    )
    torch.testing.assert_close(loss, 0.5 * -torch.sigmoid(column(0.2)).log())
    torch.testing.assert_close(metrics["rewards/margins"], column([0.2]))


def test_generate_stays_the_function() -> None:
    """The module of the same name is imported by half of the program; the public
    name must not turn into it.
    """
    import ldalign.run.stages.responses

    assert callable(ldalign.generate) and set(ldalign.__all__) <= set(dir(ldalign))
