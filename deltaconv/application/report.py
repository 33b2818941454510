"""Text report of ΔConv weights applied to a model: layers, parameters, computation, warnings."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ...kernels.backend import LARGEST_KERNEL
from ..families import family_title, native_latent
from ..flops import attention_flops, block_flops
from ..markdown import bullets, escaped
from ..messages import Say, english
from ..weights.model import DeltaConvWeights
from .fastest import Choice

_UNDECIDED = (
    "attention stays where it is faster: each layer is timed at the first step, and the log says "
    "what was chosen; connect a latent to know it here"
)


@dataclass(frozen=True)
class ApplicationFacts:
    """Inputs of the report.

    `map_size` gives rows and columns of tokens at a site for a latent's height and width;
    `latent_size` is None where the size that the model will run at is unknown.
    """

    weights: DeltaConvWeights
    family: str
    dims: Mapping[str, int]
    attention_parameters: Mapping[str, int]
    selected: tuple[str, ...]
    replaced: tuple[str, ...]
    gate: str
    percent_range: tuple[float, float] | None
    latent_size: tuple[int, int] | None
    map_size: Callable[[str, int, int], tuple[int, int]]
    earlier: bool
    inert: tuple[str, ...]
    where_faster: bool = False
    chosen: Mapping[tuple[str, tuple[int, int, int]], Choice] = field(default_factory=dict)


def application_report(facts: ApplicationFacts) -> str:
    """Facts → a list in Markdown, warnings last."""
    lines = [
        _count(facts),
        _parameters(facts),
        _computation(facts),
        _kernels(facts),
        _origin(facts),
    ]
    if sentence := _wide_kernels(facts):
        lines.append(sentence)
    if facts.percent_range:
        start, end = facts.percent_range
        lines.append(
            f"acting from {start:.1%} to {end:.1%} of sampling; plain attention runs outside"
        )
        if start and start == facts.weights.start:
            lines.append(
                f"the weights act from {100 * start:.3g}% of sampling on, as chosen when they were "
                "made"
            )
    if facts.where_faster:
        lines.extend(choices_report(facts.chosen) or [_UNDECIDED])
    if facts.earlier:
        lines.append("the model carried ΔConvBlocks already; these take their place")
    lines.extend(facts.inert)
    return bullets(lines)


def application_summary(facts: ApplicationFacts, say: Say = english) -> str:
    """What the node itself shows: what was replaced, what that saves, what has no effect."""
    before, after, (height, width) = _operations(facts)
    said = [
        say("applied", replaced=len(facts.replaced), total=len(facts.dims)),
        say(
            "applied computation",
            before=_short(before),
            after=_short(after),
            width=width,
            height=height,
        ),
    ]
    return "\n".join([*said, *facts.inert])


@dataclass(frozen=True)
class Inert:
    """Counts of other nodes' changes that have no effect on replaced layers.

    `weights` counts patches by what made them, `modules` exchanged parts of layers; `attention`
    and `covered` count layers whose attention, or the layer itself, another node takes over, and
    `trained` those in which a node trains something.
    """

    weights: Mapping[str, int]
    modules: int
    attention: int
    covered: int
    trained: int
    replaced: int


def inert_sentences(inert: Inert) -> dict[str, str]:
    """Kind of change → one sentence, for nonzero counts."""
    inside = dict(inert.weights)
    if inert.modules:
        inside["object patches of another node"] = inert.modules
    sentences = {
        kind: f"{count} {kind} on replaced self-attention layers have no effect where blocks run; "
        "what lies on other layers works"
        for kind, count in inside.items()
    }
    layers = f"of the {inert.replaced} replaced self-attention layers"
    if inert.attention:
        sentences["attention"] = (
            f"in {inert.attention} {layers} another node replaces the attention (an attn1 replace "
            "patch, as of StyleAligned): no block runs there; take that node off to use them"
        )
    if inert.covered:
        sentences["covered"] = (
            f"in {inert.covered} {layers} another node put a module or forward of its own over the "
            "block: it runs only where that calls it; connect Apply ΔConv after that node"
        )
    if inert.trained:
        sentences["trained"] = (
            f"in {inert.trained} {layers} what a training node (as Train LoRA) adds stays "
            "untrained where blocks run; connect that node before Apply ΔConv to train it there"
        )
    return sentences


def choices_report(chosen: Mapping[tuple[str, tuple[int, int, int]], Choice]) -> list[str]:
    """One sentence per batch size: in which layers attention stayed because it is faster.

    `chosen` maps site path and shape [B, H, W] to the choice made there.
    """
    by_batch: dict[int, list[tuple[str, tuple[int, int, int], Choice]]] = {}
    for (site, shape), choice in chosen.items():
        by_batch.setdefault(shape[0], []).append((site, shape, choice))
    sentences = []
    for batch, entries in by_batch.items():
        kept = [entry for entry in entries if not entry[2].takes_block]
        sentence = (
            f"blocks run in {len(entries) - len(kept)} of {len(entries)} layers and shapes at "
            f"batch {batch}, attention stays where it is faster"
        )
        details = [
            f"{site} at {height} × {width} ({_times(choice)})"
            for site, (_, height, width), choice in kept
        ]
        sentences.append(f"{sentence}: {', '.join(details)}" if details else sentence)
    return sentences


def _times(choice: Choice) -> str:
    if not choice.measured:
        return "not timed"
    if math.isinf(choice.block):
        return "the block ran out of memory"
    return f"{_ms(choice.attention)} against {_ms(choice.block)}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"


def _count(facts: ApplicationFacts) -> str:
    total, kept = len(facts.dims), len(facts.dims) - len(facts.replaced)
    line = f"{len(facts.replaced)} of {total} self-attention layers replaced"
    if not kept:
        return line
    without = len(facts.selected) - len(facts.replaced)
    reasons = []
    if total - len(facts.selected):
        reasons.append(f"{total - len(facts.selected)} not chosen by sites")
    if without:
        reasons.append(f"{without} without a block in the weights")
    return f"{line}; {', '.join(reasons)}"


def _parameters(facts: ApplicationFacts) -> str:
    before = sum(facts.attention_parameters[site] for site in facts.replaced)
    blocks = [facts.weights.sites[site] for site in facts.replaced]
    after = sum(geometry.parameters for geometry in blocks)
    return f"parameters {_short(before)} → {_short(after)}"


def _operations(facts: ApplicationFacts) -> tuple[int, int, tuple[int, int]]:
    """FLOP of a step's replaced layers before and after, and the latent's height and width."""
    height, width = facts.latent_size or (native_latent(facts.family),) * 2
    before = after = 0
    for site in facts.replaced:
        rows, columns = facts.map_size(site, height, width)
        before += attention_flops(facts.dims[site], rows, columns)
        weights = facts.weights
        after += block_flops(weights.sites[site], weights.scales[site], rows, columns)
    return before, after, (height, width)


def _computation(facts: ApplicationFacts) -> str:
    before, after, (height, width) = _operations(facts)
    ratio = f", {before / after:.1f} times less" if before > after else ""
    return (
        f"computation per step {_short(before)}FLOP → {_short(after)}FLOP{ratio}, for one picture "
        f"of {width} × {height} latent cells"
    )


def _kernels(facts: ApplicationFacts) -> str:
    counts = Counter(facts.weights.sites[site].kernel_size for site in facts.replaced)
    kernels = ", ".join(f"{kernel} × {kernel} in {counts[kernel]}" for kernel in sorted(counts))
    tokens = sum(facts.weights.sites[site].heads > 0 for site in facts.replaced)
    kernels += f", pooled tokens in {tokens}" if tokens else ""
    other = "" if facts.gate == facts.weights.gate else f" (the weights say {facts.weights.gate})"
    return f"kernels {kernels}; gate {facts.gate}{other}"


def _wide_kernels(facts: ApplicationFacts) -> str:
    sizes = [facts.weights.sites[site].kernel_size for site in facts.replaced]
    wide = sum(size > LARGEST_KERNEL for size in sizes)
    if not wide:
        return ""
    return (
        f"{wide} of {len(sizes)} blocks have kernels wider than {LARGEST_KERNEL}, the largest of "
        "the Triton kernels: torch's operators run there, slower"
    )


def _origin(facts: ApplicationFacts) -> str:
    weights = facts.weights
    base = escaped(weights.base_model) or "a model they do not name"
    families = (
        " or ".join(escaped(family_title(each)) for each in weights.families) or "no known family"
    )
    source = f", from {escaped(weights.source)}" if weights.source else ""
    return f"weights made for {base} ({families}){source}"


def _short(count: float) -> str:
    """12 345 678 → "12.3 M"; a space stands before the unit."""
    units = ["", "k", "M", "G", "T", "P"]
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.3g} {units[0]}"
