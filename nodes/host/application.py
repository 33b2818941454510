"""One application of blocks to a model: when they act, which way runs, what was logged."""

import logging
import math
import operator
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from weakref import ReferenceType

import torch
from comfy.hooks import EnumHookType
from comfy.model_patcher import ModelPatcher

from ...deltaconv import DeltaConvBlock
from ...deltaconv.application.fastest import BUDGET, Choice, Choices, Savings, Size
from ...deltaconv.application.report import choices_report
from .inert import inert_parts
from .messages import say
from .node_text import present_node, show_on_node
from .sites import OTHERS, ModelSites, OnMap, Site, SiteCall
from .step_clock import Counted, StepClock, readable
from .two_models import BOTH_PASSES, NO_RANGE, TAKEN, not_these_blocks, runs_in_both_passes

log = logging.getLogger(__name__)

# Times are measured once per process and shared by all applications: to choose by, and to tell what
# attention would take.
_CHOICES, _SAVINGS = Choices(), Savings()
_BLOCKS, _ATTENTION = "blocks", "attention"
# The class of the node that applies, as saved workflows name it.
NODE = "DeltaConvApply"


@dataclass
class Application:
    """State that all patched sites of one application share."""

    model_sites: ModelSites
    replaced: tuple[str, ...]
    # Fractions of sampling between which the blocks act; None: always.
    percent_range: tuple[float, float] | None = None
    # Keep attention where it is the faster of the two on this device.
    where_faster: bool = False
    # Tell the node what a step takes, and would take with attention.
    tells_times: bool = False
    # Site path and shape [B, H, W] → what was chosen for it, in the order first met.
    chosen: dict[tuple[str, tuple[int, int, int]], Choice] = field(default_factory=dict)
    # The node's id and what stands on it, where what is said while sampling follows.
    node: str = ""
    summary: str = ""
    _said: set[str] = field(default_factory=set)
    # Warnings in the order in which they came, and what the node shows below its summary.
    _warnings: list[str] = field(default_factory=list)
    _steps: str = ""
    # And on which node.
    _shown: tuple[str, list[str]] = ("", [])
    _counted: Counted = field(default_factory=Counted)
    _ran: bool = False
    _run: threading.local = field(default_factory=threading.local)

    @property
    def acts(self) -> bool:
        """Whether blocks act in the model call that this thread is in."""
        noted = getattr(self._run, "acts", None)
        return self.percent_range is None if noted is None else noted

    @contextmanager
    def acting(self, acts: bool = True) -> Iterator[None]:
        """Context: blocks act in this thread, whatever the range; or plain attention runs."""
        before = getattr(self._run, "acts", None)
        self._run.acts = acts
        try:
            yield
        finally:
            self._run.acts = before

    def resting(self) -> AbstractContextManager[None]:
        """Context: plain attention runs in this thread, on the same loaded model."""
        return self.acting(False)

    def say_once(self, key: str, message: str) -> None:
        """Log a warning the first time this application meets `key`."""
        if key not in self._said:
            self._said.add(key)
            self._warnings.append(message)
            log.warning(message)

    def say_on_running(self, key: str, message: str) -> None:
        """Show a sentence on the node that is being executed, and log it once."""
        if key not in self._said:
            self._said.add(key)
            log.warning(message)
        show_on_node(message)

    def replacing(self, site: Site, block: ReferenceType[DeltaConvBlock]) -> OnMap:
        """A handler of calls of `site`: its block where blocks act, else plain attention.

        Where another node tiles, merges or exchanges tokens, or brings keys and values of its own,
        the block has no map to work on; one warning says so. The block is held weakly: a forward
        stays on the model object until the next clone is loaded, and ComfyUI would report a memory
        leak if it kept the blocks of a clone that is gone.
        """

        def on_map(call: SiteCall) -> torch.Tensor:
            if self.acts and (convolution := block()):
                if call.is_whole_map(site.dim):
                    return self.compute(site, convolution, call.x, call.size, call.attend)
                self.say_once("map", _no_map(site, call))
            elif not self.acts and getattr(self._run, "acts", None) is None:
                self.say_once("range", f"ΔConv: {NO_RANGE}")
            return call.attend()

        return on_map

    def compute(
        self,
        site: Site,
        block: DeltaConvBlock,
        x: torch.Tensor,
        size: tuple[int, int],
        attend: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """x [B, H·W, C] → [B, H·W, C] by the block, or by attention where that is faster."""

        def convolve():
            return block(x.unflatten(1, size)).flatten(1, 2)

        self._ran = True
        compiling = torch.compiler.is_compiling()
        if not self.where_faster and (compiling or not self.tells_times):
            return convolve()
        # Make symbolic sizes of a compiler concrete: every size has its own choice.
        batch, *size = map(operator.index, (x.shape[0], *size))
        size = tuple(size)
        counts = (site.dim, site.parameters, block.kernel_size, block.heads)
        numbers = tuple(map(operator.index, counts))
        layer = (x.device, x.dtype, batch, numbers, block.scales, block.gate)
        if not self.where_faster:
            result, saved = _SAVINGS.run((layer, size), x.device, convolve, attend)
            self._count(saved)
            return result
        if compiling:
            takes = self.takes_compiled_block(site.path, layer, batch, size)
            return convolve() if takes else attend()
        choice = _CHOICES.choose(layer, size, x.device, convolve, attend)
        self.chosen[site.path, (batch, *size)] = choice
        if not choice.takes_block:
            self._count(0.0)
            return attend()
        self._count(choice.attention - choice.block if choice.measured else math.nan)
        return convolve()

    def _count(self, saved: float) -> None:
        """Note one call of a layer, and the seconds that its block saved; NaN: unknown."""
        self._counted = Counted(self._counted.calls + 1, self._counted.saved + saved)

    @torch.compiler.assume_constant_result
    def takes_compiled_block(self, path: str, layer: Hashable, batch: int, size: Size) -> bool:
        """The choice made before compiling: timing within a trace would time the tracing."""
        choice = _CHOICES.made.get((layer, size))
        if choice is None:
            self.say_once(
                "compile",
                "ΔConv: expected layers to be timed before the model is compiled, got none at "
                f"{path}. Blocks run where that is so; connect a latent of the final size and "
                "batch to Apply ΔConv to have them timed.",
            )
            return True
        self.chosen[path, (batch, *size)] = choice
        return choice.takes_block

    def after_sampling(self, patcher: ModelPatcher) -> None:
        """ON_CLEANUP callback: log once what was chosen for every shape; show what was said."""
        sentences = choices_report(self.chosen)
        if judged := sum(not choice.measured for choice in self.chosen.values()):
            sentences.append(
                f"{judged} of these layers and shapes were not timed, but judged by the times of "
                f"others: the {BUDGET:.0f} s for timing on this device are spent"
            )
        for sentence in sentences:
            if sentence not in self._said:
                self._said.add(sentence)
                log.info("ΔConv: %s", sentence)
        if not_these_blocks(patcher, self.model_sites, self.replaced):
            self.say_once("other model", f"ΔConv: {TAKEN}")
        self._show()

    def _show(self) -> None:
        """Put what was said and measured since on the node."""
        said = [*filter(None, [self._steps]), *self._warnings]
        shown = (node := present_node(self.node, NODE), said)
        if node and shown != self._shown and (said or self._shown[1]):
            self._shown = shown
            show_on_node("\n".join([self.summary, *said]), node)

    def around_model_call(self, executor, x, t, *args, **kwargs):
        """APPLY_MODEL wrapper, which PixArt calls too: note whether this sigma is in the range."""
        with self.acting(self._in_range(executor.class_obj.model_sampling, float(t.max()))):
            return executor(x, t, *args, **kwargs)

    def _in_range(self, sampling, sigma: float) -> bool:
        if self.percent_range is None:
            return True
        start, end = (sampling.percent_to_sigma(percent) for percent in self.percent_range)
        return end <= sigma <= start

    def around_sampling(self, executor, *args, **kwargs):
        """OUTER_SAMPLE wrapper: log what has no effect, with the patches that hooks bring."""
        guider = executor.class_obj
        hooks = guider.model_options.get("registered_hooks")
        own = hooks.get_type(EnumHookType.TransformerOptions) if hooks else []
        options = [guider.model_options.get("transformer_options", {})]
        options += [hook.transformers_dict or {} for hook in own]
        self.say_inert(guider.model_patcher, options)
        if runs_in_both_passes(guider, self.model_sites, self.replaced):
            self.say_once("both passes", f"ΔConv: {BOTH_PASSES}")
        if not self.tells_times:
            return executor(*args, **kwargs)
        self._counted = Counted()
        sampling = guider.model_patcher.get_model_object("model_sampling")
        clock = StepClock(
            lambda sigma: _BLOCKS if self._in_range(sampling, sigma) else _ATTENTION,
            lambda: self._counted,
            # Of the first two, one loads and the other is lengthened by the timing of layers.
            skipped=2,
        )
        result = clock.run(executor, args, kwargs)
        self._steps = self._seconds_of_steps(clock)
        self._show()
        return result

    def _seconds_of_steps(self, clock: StepClock) -> str:
        """What a step takes with blocks and with attention, as far as it was measured."""
        blocks, attention = clock.series[_BLOCKS], clock.series[_ATTENTION]
        if not self._ran or blocks.step is None:
            return ""
        after = readable(blocks.step)
        if attention.step is not None:
            return say("step times", before=readable(attention.step), after=after)
        calls, saved = blocks.counted
        # A compiled model and a replayed graph run without this code.
        if calls < blocks.steps * len(self.replaced) or not math.isfinite(saved):
            return say("step time", seconds=after)
        before = max(0.0, blocks.step + saved / blocks.steps)
        return say("step times by layer", before=readable(before, 2), after=after)

    def before_sampling(self, patcher: ModelPatcher) -> None:
        """ON_PRE_RUN callback: log what has no effect of the nodes after Apply ΔConv."""
        self.model_sites.forget()
        self.say_inert(patcher)

    def say_inert(self, patcher: ModelPatcher, options: Sequence[Mapping] = ()) -> None:
        """Log once per kind what has no effect on replaced layers."""
        for kind, sentence in inert_parts(
            patcher, self.model_sites, self.replaced, options
        ).items():
            self.say_once(kind, f"ΔConv: {sentence}")


def _no_map(site: Site, call: SiteCall) -> str:
    got = call.problem or f"tokens of shape {list(call.x.shape)}"
    # Nothing can be taken off a model that draws no single image.
    advice = "; remove HyperTile, ToMe or the like to use ΔConvBlocks everywhere"
    return (
        f"ΔConv: expected the whole map {list(call.expected(site.dim))} at {site.path}, got {got}. "
        f"Plain attention runs where that is so{advice if call.problem in ('', OTHERS) else ''}."
    )
