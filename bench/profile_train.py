"""Where the time of a step, of scoring, of a guide's step and of a generation goes, and what the
machine could do.

    python bench/profile_train.py [--precision bfloat16|mixed|float32] [--batch 4] [--new-tokens 16]

`make profile`. Runs the program's own `policy.train`, `response_logps` (the reference pass, and
what evaluation measures likelihoods with), `train_guide` and its generation engine under
torch.profiler. Ranges are put around the modules from outside, by forward hooks; an operation of
the backward belongs to the part of the forward operation whose sequence number it carries. Beside
each part's time stand the operations and bytes that it needs at the least (work.py), and how near
its time is to the time those need at the measured product rate and copy bandwidth of this machine:
its share of the roofline; a guide's operations are not counted. Writes a table, a figure, and for
each a trace for Perfetto (ui.perfetto.dev; not committed).
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import common
import torch
from ours import PRECISION, SEED, STAGE, in_train_order, make_model
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile, record_function
from work import (
    LENGTHS,
    SHAPES,
    Config,
    Cost,
    Shape,
    generation_costs,
    make_pairs,
    scoring_costs,
    step_costs,
    tokens_of,
)

from ldalign.data.pairs import Pair
from ldalign.generation.decoders import new_decoder
from ldalign.generation.engine import Engine, Request
from ldalign.generation.sampling import Sampling
from ldalign.models.guide import GuideConfig, GuideLoss
from ldalign.models.guide_folder import pretrained_guide
from ldalign.models.mistral import Mistral
from ldalign.models.toy import write_toy_model
from ldalign.system import distributed
from ldalign.system.exits import run
from ldalign.training import policy
from ldalign.training.guide import GuideTrainSettings, train_guide
from ldalign.training.scoring import response_logps

RANGE = "part:"
# inner ranges win over outer ones
MODULES = {"Block": "elementwise", "Attention": "attention", "MLP": "MLP"}
OPERATIONS = {  # parts told by the names of ldalign's own operations, and of torch's ranges
    "rms_norm": "elementwise",
    "rope": "elementwise",
    "swiglu": "elementwise",
    "attention": "attention",
    "pair_loss": "head",
    "linear_logprob": "head",
    "sft_loss": "head",
    "dpo": "head",
    "decode_mlp": "MLP",
    "packed_linear": "head",
    "sample": "sampler",
    "all_finite": "sampler",
}
PREFIXES = {
    "Optimizer.": "optimizer",
    "FSDP::": "communication",
    "c10d::": "communication",
    "gloo:": "communication",
}
PARTS = (
    "attention",
    "MLP",
    "head",
    "elementwise",
    "optimizer",
    "sampler",
    "communication",
    "other",
    "idle",
)
BACKWARD = "autograd::engine::evaluate_function"
WHOLE = "whole"
WARM_STEPS = 2


def main(argv: list[str]) -> None:
    parser = common.options("profile_train", __doc__)
    parser.add_argument("--precision", choices=["bfloat16", "mixed", "float32"], default="bfloat16")
    parser.add_argument("--optimizer", choices=["adamw", "rmsprop"], default="adamw")
    parser.add_argument("--batch", type=int, default=4, help="pairs of the step")
    parser.add_argument("--new-tokens", type=int, default=16, help="of the generation")
    parser.add_argument("--rows", type=int, default=32, help="of the generation")
    parser.add_argument("--lengths", choices=list(LENGTHS), default="gsm8k")
    parser.add_argument(
        "--shape", choices=list(SHAPES), help="random weights in this shape, no model folder"
    )
    args = parser.parse_args(argv)
    if args.small:
        args.lengths, args.batch, args.new_tokens, args.rows = "short", 2, 3, 2
    device = distributed.start("cuda" if torch.cuda.is_available() else "cpu")
    folder, config = (
        (None, SHAPES[args.shape]) if args.shape and not args.small else common.model_of(args)
    )
    job = {"folder": folder, "config": config}
    args.results.mkdir(parents=True, exist_ok=True)
    sections = [profile_step(job, args, device), profile_reference(job, args, device)]
    if args.small or folder is not None:
        sections.append(profile_guide(job, args, device))
    sections.append(profile_generation(job, args, device))
    result = common.result(
        "profile",
        args,
        device=str(device),
        shape=args.shape,
        precision=args.precision,
        optimizer=args.optimizer,
        sections=sections,
    )
    name = f"profile-{device.type}" + (f"-{args.shape}" if args.shape else "")
    figure = args.results / f"{name}.svg"
    drawn = draw(result, figure)
    common.save(result, render(result, figure.name if drawn else None), args.results, name)
    distributed.stop()


def profile_step(
    job: dict[str, Any], args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """The step after WARM_STEPS others, from the start of its forward to that of the next."""
    precision = PRECISION[args.precision]
    config: Config = job["config"]
    pairs = pairs_of_steps(args, config)
    model = make_model(job, precision.weights, device)
    put_ranges(model)
    clock = Clock(WARM_STEPS, device)
    read: list[int] = []  # tokens of each step

    def begins(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        read.append(inputs[0].numel())
        clock.tick()

    model.register_forward_pre_hook(begins)
    settings = policy.TrainSettings(
        epochs=1,
        global_batch=args.batch,
        micro_tokens=10**9,
        learning_rate=1e-6,
        optimizer=args.optimizer,
        schedule="constant",
        warmup_ratio=0.0,
        **precision.settings,
    )
    policy.train(
        model,
        in_train_order(pairs),
        settings,
        compute_dtype=precision.compute,
        device=device,
        seed=SEED,
        stage=STAGE,
        step0_is_reference=False,
    )
    profiled = pairs[-args.batch :]
    assert set(read[WARM_STEPS:]) == {tokens_of(profiled)}, read
    shape, width = Shape.of(config), precision.weights.itemsize
    # of the weights' size: norm, clipping, update
    accesses = {"adamw": 10, "rmsprop": 8}[args.optimizer]
    costs = step_costs(shape, profiled, precision.compute.itemsize, accesses * width)
    if precision.weights != precision.compute:  # a rank alone casts: weights there, gradients back
        costs["communication"] = Cost(0, 2 * (width + precision.compute.itemsize) * shape.weights)
    what = (
        f"one step of {args.batch} pairs ({tokens_of(profiled)} tokens), {args.precision}, "
        f"{args.optimizer}"
    )
    dtype = str(precision.compute).removeprefix("torch.")
    rates = common.measure_machine(shape, tokens_of(profiled), dtype, device, args.small)
    return summarise("training", what, clock, costs, rates, args.results, device)


def pairs_of_steps(args: argparse.Namespace, config: Config) -> list[dict[str, list[int]]]:
    """The pairs of all steps, in order: some to warm up, and then the same ones each time."""
    pairs = make_pairs(LENGTHS[args.lengths], args.batch * (WARM_STEPS + 1), config["vocab_size"])
    return pairs + 3 * pairs[-args.batch :]


def answering_model(
    job: dict[str, Any], args: argparse.Namespace, device: torch.device
) -> tuple[Config, torch.dtype, Mistral]:
    """The job's config, the dtype that is computed in, and the model in it, ranges around it."""
    compute = PRECISION[args.precision].compute
    model = make_model(job, compute, device).eval()
    put_ranges(model)
    return job["config"], compute, model


def profile_reference(
    job: dict[str, Any], args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Log-probs of both responses of each pair, after one pass unprofiled."""
    config, compute, model = answering_model(job, args, device)
    drawn = make_pairs(LENGTHS[args.lengths], 4 * args.batch, config["vocab_size"])
    pairs = [Pair(str(i), **pair) for i, pair in enumerate(drawn)]
    clock = Clock(1, device)
    for _ in range(4):
        clock.tick()
        response_logps(model, pairs, 10**9, device)
    clock.tick()
    shape, dtype = Shape.of(config), str(compute).removeprefix("torch.")
    costs = scoring_costs(shape, drawn, compute.itemsize)
    rates = common.measure_machine(shape, tokens_of(drawn), dtype, device, args.small)
    what = f"{len(pairs)} pairs ({tokens_of(drawn)} tokens), {dtype}"
    return summarise("reference", what, clock, costs, rates, args.results, device)


def profile_guide(
    job: dict[str, Any], args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """The step after WARM_STEPS others of a guide whose two towers start as the policy."""
    config: Config = job["config"]
    drawn = pairs_of_steps(args, config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = job["folder"] or write_toy_model(Path(scratch) / "policy")
        guide = pretrained_guide(
            GuideConfig(max_tokens=None), SEED, folder, False, torch.float32, device
        )
        for tower in (guide.encoder, guide.decoder):
            put_ranges(tower)
        clock = Clock(WARM_STEPS, device)
        hook = register_optimizer_step_post_hook(lambda *_: clock.tick())
        settings = GuideTrainSettings(
            epochs=1,
            global_batch=args.batch,
            learning_rate=1e-5,
            micro_tokens=10**9,
            loss=GuideLoss(),
            weight_decay=0.0,
            warmup_ratio=0.0,
        )
        compute = PRECISION[args.precision].compute
        train_guide(
            guide,
            in_train_order(drawn),
            settings,
            compute_dtype=compute,
            device=device,
            seed=SEED,
            stage=STAGE,
            metrics_path=Path(scratch) / "metrics.jsonl",
        )
        hook.remove()
    tokens = tokens_of(drawn[-args.batch :])
    dtype = str(compute).removeprefix("torch.")
    rates = common.measure_machine(Shape.of(config), tokens, dtype, device, args.small)
    what = (
        f"one step of {args.batch} pairs ({tokens} tokens), two trained towers, float32 "
        f"weights, {dtype} compute"
    )
    return summarise("guide", what, clock, {}, rates, args.results, device)


def profile_generation(
    job: dict[str, Any], args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Prefill and decoding of one batch, after one unprofiled."""
    config, compute, model = answering_model(job, args, device)
    prompts = [
        pair["prompt"]
        for pair in make_pairs(LENGTHS[args.lengths], args.rows, config["vocab_size"])
    ]
    requests = [Request(str(i), prompt, i) for i, prompt in enumerate(prompts)]
    decoder, longest = new_decoder(model), max(map(len, prompts)) + args.new_tokens
    clock = Clock(1, device)
    for _ in range(4):  # one to warm up, one profiled, two for the unprofiled time
        clock.tick()
        engine = Engine(
            decoder, Sampling(args.new_tokens), [], SEED, longest=longest, rows=len(prompts)
        )
        assert sum(1 for _ in engine.run(requests)) == len(prompts)
    clock.tick()
    shape = Shape.of(config)
    costs = generation_costs(shape, [len(p) for p in prompts], args.new_tokens, compute.itemsize)
    dtype = str(compute).removeprefix("torch.")
    rates = common.measure_machine(shape, sum(map(len, prompts)), dtype, device, args.small)
    what = (
        f"{len(prompts)} rows, {sum(map(len, prompts))} prompt tokens, {args.new_tokens} new "
        f"tokens a row, {dtype}"
    )
    return summarise("generation", what, clock, costs, rates, args.results, device)


class Clock:
    """Ticks once a repetition: times the unprofiled ones, and profiles number `after`."""

    def __init__(self, after: int, device: torch.device) -> None:
        activities = [ProfilerActivity.CPU] + (
            [ProfilerActivity.CUDA] if device.type == "cuda" else []
        )
        self.profiler = profile(activities=activities)
        self.whole = record_function(WHOLE)
        self.after, self.device, self.ticks = after, device, 0
        self.began = 0.0
        self.seconds: list[float] = []  # of the repetitions after the profiled one
        self.profiled_seconds = 0.0

    def tick(self) -> None:
        """A repetition ends and the next begins."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - self.began
        if self.ticks == self.after + 1:
            self.profiled_seconds = taken
            self.whole.__exit__(None, None, None)
            self.profiler.stop()
        elif self.ticks > self.after + 1:
            self.seconds.append(taken)
        if self.ticks == self.after:
            self.profiler.start()
            self.whole.__enter__()
        self.ticks += 1
        self.began = time.perf_counter()


# ------------------------------------------------------------------------------------------- ranges


def put_ranges(model: Mistral) -> None:
    """Puts a range around every module of MODULES, and around the head handed to the forward."""
    for module in model.modules():
        part = MODULES.get(type(module).__name__)
        if part is not None:
            _around(module, part)

    def wrap_head(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > 2 and args[2] is not None:
            args = (*args[:2], ranged("head", args[2]), *args[3:])
        return args, kwargs

    model.register_forward_pre_hook(wrap_head, with_kwargs=True)


def _around(module: nn.Module, part: str) -> None:
    open_ranges: list[Any] = []

    def enter(*_: object) -> None:
        open_ranges.append(record_function(RANGE + part))
        open_ranges[-1].__enter__()

    def leave(*_: object) -> None:
        open_ranges.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def ranged(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function inside a range."""

    def inside(*args: Any, **kwargs: Any) -> Any:
        with record_function(RANGE + part):
            return function(*args, **kwargs)

    return inside


# -------------------------------------------------------------------------------------- attribution


def times_by_part(events: Sequence[Any], cuda: bool) -> dict[str, float]:
    """Returns the seconds of the profiled repetition by part.

    events: torch.profiler's FunctionEvents. `idle` is what no operation covers (on a CPU: Python's
    own time). On a GPU a part's time is that of the kernels it launched.
    """
    (whole,) = (e for e in events if e.name == WHOLE)
    inside = [e for e in events if _within(e, whole)]
    forward = forward_parts(inside)
    seconds: dict[str, float] = defaultdict(float)
    for event in inside:
        own = sum(k.duration for k in event.kernels) if cuda else event.self_cpu_time_total
        if cuda or (event.thread == whole.thread and not event.name.startswith(RANGE)):
            seconds[part_of(event, forward)] += own / 1e6
    total = (whole.time_range.end - whole.time_range.start) / 1e6
    seconds["idle"] = max(0.0, total - sum(seconds.values()))
    return dict(seconds)


def _within(event: Any, whole: Any) -> bool:
    on_cpu = event.device_type == whole.device_type
    start, end = whole.time_range.start, whole.time_range.end
    return (
        on_cpu
        and event is not whole
        and start <= event.time_range.start
        and event.time_range.end <= end
    )


def forward_parts(events: Iterable[Any]) -> dict[int, str]:
    """Returns the part of each sequence number, from the forward operation that made its node.

    That is the last one that carries the number.
    """
    found = {}
    for event in sorted(events, key=lambda e: e.time_range.start):
        if event.sequence_nr >= 0 and not any(e.name.startswith(BACKWARD) for e in _line(event)):
            found[event.sequence_nr] = part_of(event, {})
    return found


def part_of(event: Any, forward: dict[int, str]) -> str:
    """The part of the event, by the innermost thing around it that says one."""
    for around in _line(event):
        if around.name.startswith(RANGE):
            return around.name.removeprefix(RANGE)  # type: ignore[no-any-return]
        if "ldalign" in around.name:
            for word, part in OPERATIONS.items():
                if word in around.name:
                    return part
        for prefix, part in PREFIXES.items():
            if around.name.startswith(prefix):
                return part
        if around.sequence_nr in forward and _in_backward(around):
            return forward[around.sequence_nr]
    return "other"


def _in_backward(event: Any) -> bool:
    return any(e.name.startswith(BACKWARD) for e in _line(event))


def _line(event: Any) -> Iterable[Any]:
    """The event and those around it, from the inside out."""
    while event is not None:
        yield event
        event = event.cpu_parent


def summarise(
    name: str,
    what: str,
    clock: Clock,
    costs: dict[str, Cost],
    rates: dict[str, float],
    folder: Path,
    device: torch.device,
) -> dict[str, Any]:
    """A section of the result; writes its trace."""
    seconds = times_by_part(clock.profiler.events() or [], device.type == "cuda")
    clock.profiler.export_chrome_trace(str(folder / f"trace-{name}-{device.type}.json.gz"))
    parts = []
    for part in PARTS:
        if part not in seconds and part not in costs:
            continue
        cost, taken = costs.get(part, Cost(0, 0)), seconds.get(part, 0.0)
        least = max(cost.flops / rates["flops"], cost.bytes / rates["bytes"])
        bound = "products" if cost.flops / rates["flops"] == least else "memory"
        parts.append(
            {
                "part": part,
                "seconds": taken,
                "flops": cost.flops,
                "bytes": cost.bytes,
                "least_seconds": least,
                "bound": bound if least else None,
            }
        )
    return {
        "name": name,
        "what": what,
        "parts": parts,
        "seconds": clock.profiled_seconds,
        "unprofiled_seconds": statistics.median(clock.seconds),
        "rates": rates,
    }


# -------------------------------------------------------------------------------------------- pages


def render(result: dict[str, Any], figure: str | None) -> list[str]:
    """The Markdown page."""
    lines = [f"## profile, {result['device']}", ""]
    if figure:
        lines += [f"![Time by part, and the time it needs at the least]({figure})", ""]
    for section in result["sections"]:
        rates = section["rates"]
        lines += [
            f"**{section['name']}**: {section['what']}; {section['seconds']:.2f} s under the "
            f"profiler, {section['unprofiled_seconds']:.2f} without. The machine then: "
            f"{rates['flops'] / 1e9:.0f} GFLOP/s in bare products of these shapes, "
            f"{rates['bytes'] / 2**30:.1f} GiB/s in a copy.",
            "",
            *common.table(
                "part",
                "time",
                "seconds",
                "GFLOP",
                "GiB",
                "needs at least, s",
                "share of the roofline",
                "bound by",
            ),
        ]
        total = sum(part["seconds"] for part in section["parts"])
        for p in section["parts"]:
            needed = [
                f"{p['flops'] / 1e9:.1f}",
                f"{p['bytes'] / 2**30:.2f}",
                f"{p['least_seconds']:.3f}",
            ]
            share = (
                (f"{100 * p['least_seconds'] / p['seconds']:.0f} %")
                if p["bound"] and p["seconds"]
                else ""
            )
            cells = [f"{100 * p['seconds'] / total:.1f} %", f"{p['seconds']:.3f}"]
            cells += [*needed, share, p["bound"]] if p["bound"] else ["", "", "", "", ""]
            lines.append(common.row(p["part"], *cells))
        lines.append("")
    return [
        *lines,
        "Elementwise: norms, rotary embedding, SwiGLU, residual sums. Other: embedding, packing, "
        "metrics. Idle: time that no operation covers, mostly Python's.",
    ]


def draw(result: dict[str, Any], path: Path) -> bool:
    """Draws each part's time as a bar, the least it needs in front.

    Returns False, and says a line, where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        common.say("profile: no figure, matplotlib is not installed (pip install matplotlib)")
        return False
    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ldalign", "font.size": 9})
    figure, axes = pyplot.subplots(1, len(result["sections"]), figsize=(14, 3.2))
    for axis, section in zip(axes, result["sections"], strict=True):
        parts = section["parts"][::-1]
        names = [part["part"] for part in parts]
        axis.barh(names, [part["seconds"] for part in parts], color="#c6d4e4", label="time")
        axis.barh(
            names,
            [part["least_seconds"] for part in parts],
            height=0.4,
            color="#2b5c8a",
            label="at the least",
        )
        axis.set_title(f"{section['name']}: {section['seconds']:.2f} s", fontsize=10)
        axis.set_xlabel("seconds")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True


if __name__ == "__main__":
    run(main)
