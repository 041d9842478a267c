"""The tour: what `train/tour.py` prints holds together, and docs/tour.md tells the same walk."""

import ast
import math
import re
from pathlib import Path

import pytest
from runs import ROOT, run_script

SCRIPT, PAGE = ROOT / "train/tour.py", ROOT / "docs/tour.md"
TITLE = re.compile(r"^## (\d+\. .+)$", re.MULTILINE)
LINK = re.compile(r"\[`([\w.]+)`\]\(([^)#]+)\)")
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]\d+)?")


@pytest.fixture(scope="module")
def said(toy_cache: Path) -> str:
    """What the tour prints of the toy model."""
    done = run_script(SCRIPT, "policy=toy", f"cache={toy_cache}")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def steps(text: str) -> dict[str, str]:
    """{"3. The loser": what stands between this title and the next} of a page or an output."""
    _, *parts = TITLE.split(text.partition("\n## Where ")[0])
    return dict(zip(parts[0::2], parts[1::2], strict=True))


def numbers(said: str, step: int, name: str) -> list[float]:
    """The numbers in the first line of that name in a step, and in those that it goes on in."""
    text = next(text for title, text in steps(said).items() if title.startswith(f"{step}. "))
    text = re.sub(r"\n {24}(?=\S)", " ", text)
    line = next(line for line in text.splitlines() if line[2:].startswith(name))
    return [float(number) for number in NUMBER.findall(line[2 + len(name) :])]


def labels(text: str) -> list[str]:
    """The names of the lines that the script shows, their numbers left out."""
    lines = [line for line in text.splitlines() if re.match(r"  \S", line)]
    return [re.sub(r"\d+", "#", line[:24].strip()) for line in lines]


# ----------------------------------------------------------------------------------- the numbers


def test_the_fused_loss_is_that_of_the_equations(said: str) -> None:
    assert numbers(said, 10, "fused - equations")[0] < 1e-5
    assert numbers(said, 10, "gradients apart")[0] < 1e-4
    plain, fused = (numbers(said, step, "loss of the batch")[0] for step in (9, 10))
    assert fused == pytest.approx(plain, abs=2e-6)


def test_the_first_loss_is_ln_2_times_the_weight(said: str) -> None:
    for step in (9, 10):
        assert numbers(said, step, "loss without s")[0] == pytest.approx(math.log(2), abs=1e-5)
    distance, mean, weight = numbers(said, 6, "s = d / mean d")
    assert weight == pytest.approx(distance / mean, abs=2e-4)
    assert numbers(said, 6, "mean of all s") == [1.0]
    loss = numbers(said, 9, "loss of the pair")[0]
    assert loss == pytest.approx(weight * math.log(2), abs=1e-4)
    assert numbers(said, 14, "SPIN's first loss")[0] == pytest.approx(math.log(2), abs=1e-6)


def test_readings_can_be_checked_by_hand(said: str) -> None:
    """Gains are differences of readings, contrasts functions of gains; untrained, no latent adds
    anything to the policy's log-prob.
    """
    own, sibling = numbers(said, 4, "log D(y | x) before")
    assert own == sibling == pytest.approx(numbers(said, 8, "log pi_ref(y | x)")[0], abs=1e-3)
    gains, contrasts = numbers(said, 5, "sibling gain G"), numbers(said, 5, "contrast")
    for side, name in enumerate(("log D(y | x, .)", "log D(y' | x, .)")):
        own, sibling = numbers(said, 5, name)[:2]
        assert own != sibling and gains[side] == pytest.approx(own - sibling, abs=2e-4)
        assert contrasts[side] == pytest.approx(math.log1p(math.exp(-gains[side])), abs=1e-4)
    gain, error = numbers(said, 4, "sibling gain")
    tells = next(line for line in said.splitlines() if line.startswith("  tells apart"))
    assert ("yes" in tells) == (gain >= 2 * error)


def test_distance_and_coefficient_can_be_checked_by_hand(said: str) -> None:
    real, generated = (numbers(said, 5, name) for name in ("E(x, y) ", "E(x, y')"))
    (distance,) = numbers(said, 6, "d = its length")
    assert distance == pytest.approx(math.dist(real, generated), abs=5e-4)
    assert numbers(said, 6, "the same in a run") == pytest.approx([distance], abs=2e-4)
    weight = numbers(said, 6, "s = d / mean d")[2]
    coefficient = numbers(said, 11, "d loss / d log pi(y)")[0]
    assert coefficient == pytest.approx(-0.1 * weight / 2, abs=1e-5)
    up, down = numbers(said, 11, "by autograd")
    assert up == pytest.approx(coefficient, abs=2e-6) and down == pytest.approx(-up, abs=2e-6)


def test_log_probs_agree_however_they_are_computed(said: str) -> None:
    for name in ("log pi_ref(y | x)", "log pi_ref(y' | x)"):
        packed, alone = numbers(said, 8, name)
        assert packed == pytest.approx(alone, abs=1e-3)
    (drawn,) = numbers(said, 3, "log-prob")
    assert numbers(said, 8, "log pi_ref(y' | x)")[0] == pytest.approx(drawn, abs=1e-3)


def test_the_margin_rises_and_the_loss_falls(said: str) -> None:
    before, after = numbers(said, 13, "margin Delta")
    assert before == 0 and after > 1e-3
    for name in ("loss of the pair", "loss of the batch"):
        before, after = numbers(said, 13, name)
        assert after < before


def test_the_same_seed_prints_the_same(said: str, toy_cache: Path) -> None:
    assert run_script(SCRIPT, "policy=toy", f"cache={toy_cache}").stdout == said


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("sed=1", "sed=1: sed: unknown key; did you mean seed?"),
        ("seed=-1", "seed=-1: seed: -1 must be 0 or greater"),
        ("--seed", "--seed: unknown option"),
        ("policy=nowhere", "model 'nowhere': no such folder"),
    ],
)
def test_a_wrong_argument_is_one_line(argument: str, message: str) -> None:
    done = run_script(SCRIPT, argument)
    assert done.returncode == 2
    assert done.stderr.startswith(f"ldalign: error: {message}") and done.stderr.count("\n") == 1
    assert not done.stdout


def test_help() -> None:
    done = run_script(SCRIPT, "--help")
    assert done.returncode == 0
    assert "The method on one pair" in done.stdout and "seed=0" in done.stdout


# -------------------------------------------------------------------------------------- the page


def test_the_page_takes_the_steps_of_the_script(said: str, page: str) -> None:
    """Titles, functions and the names of the lines shown: those of the script, in its order."""
    assert list(steps(page)) == list(steps(said))
    for title, told in steps(page).items():
        printed = steps(said)[title]
        calls = re.findall(r"^(\S+\.py): (\S+)$", printed, re.MULTILINE)
        linked = everything_linked(told)
        missing = set(calls) - linked
        # One link is enough for what an earlier step has linked.
        earlier = everything_linked(page.partition(f"## {title}")[0])
        assert not missing - earlier, f"step {title}: link {missing - earlier}"
        assert labels(told) == labels(printed), f"step {title}: print the block again"


def everything_linked(text: str) -> set[tuple[str, str]]:
    return {(file.removeprefix("../"), name) for name, file in LINK.findall(text)}


def test_links_lead_to_what_they_name(page: str) -> None:
    links = LINK.findall(page)
    assert len(links) > 25
    for name, file in links:
        path = (PAGE.parent / file).resolve()
        assert path.is_file(), file
        if name != file.removeprefix("../"):  # else the link names the file itself
            assert name in defined(path), f"{name} is not defined in {file}"
    for target in re.findall(r"\]\(([^)#:]+)\)", page):
        assert (PAGE.parent / target).exists(), target


def defined(path: Path) -> set[str]:
    """The functions and classes of a file, and the methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            inner = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
            found.update(f"{node.name}.{name}" for name in inner)
    return found


def test_these_tests_can_fail() -> None:
    text = "## 1. A title\nfile.py: f\n  loss 12 of it         -3.5 -> 1e-05; x\n## Where a run\n"
    assert steps(text)["1. A title"].count("\n") == 2
    assert numbers(text, 1, "loss 12 of it") == [-3.5, 1e-05]
    assert labels(text) == ["loss # of it"]
    assert "make_ids" in defined(SCRIPT) and "Batch.pack" not in defined(SCRIPT)
