"""Calls of the diffusion model recorded as CUDA graphs and replayed.

At everyday sizes the host takes longer to launch a model's kernels than the GPU to run them. A
recorded call is launched as a whole. A graph holds addresses, sizes and every decision that was
made while it was recorded, so a call is replayed only where none of these can have changed;
otherwise it runs as usual, and the reason is logged.
"""

import functools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import ref

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import (
    CallbacksMP,
    WrapperExecutor,
    WrappersMP,
    get_all_wrappers,
)
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from .patch import CLONE_EVENTS
from .patch import KEY as BLOCKS_KEY

log = logging.getLogger(__name__)

KEY = "deltaconv_replay"
_FORWARD = "diffusion_model.forward"
# Graphs of one sampling run: shapes, times with and without blocks. Each keeps its activations.
MOST_GRAPHS = 4
TOO_MANY = f"more than {MOST_GRAPHS} kinds of calls in one sampling"
# Nothing would free the graphs of such a call.
OUTSIDE = "called outside of a sampling run"
_PATCHES = ("patches", "patches_replace", "optimized_attention_override")

Replay = Callable[[], object]


def cuda_graph(call: Callable[[], object]) -> tuple[Replay, object]:
    """Records a call of the current stream → what replays it, and its output's tensors.

    Raises RuntimeError where the call does what no graph can hold, such as waiting for the GPU.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = call()
    return graph.replay, output


class Kind(NamedTuple):
    """What a recorded call depends on: equal kinds may share a graph."""

    structure: object
    # Of tensors shape, strides, dtype and device; anything else as it is.
    leaves: tuple
    # Whether the blocks of each Apply ΔConv act.
    acting: tuple[bool, ...]
    addresses: tuple[int, ...]


@dataclass
class Recorded:
    """A call met before; `replay` is None until it is recorded, or if it could not be."""

    kind: Kind
    inputs: list[torch.Tensor] = field(default_factory=list)
    replay: Replay | None = None
    output: object = None
    problem: str = ""


class _Run(threading.local):
    """What one thread knows during one sampling run."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget everything, in this thread."""
        self.calls: list[Recorded] = []
        self.parameters: list[Mapping[str, torch.Tensor | None]] | None = None
        self.problem = OUTSIDE
        self.replayed = self.all = 0
        self.usual: Counter[str] = Counter()


class Replays:
    """The recorded calls of a MODEL, kept from the start to the end of one sampling run.

    `record` makes a replay of a call; by default a CUDA graph.
    """

    def __init__(self, record: Callable = cuda_graph, device_type: str = "cuda"):
        self._record, self._device_type = record, device_type
        self._run = _Run()
        self._said: set[str] = set()

    def before_sampling(self, patcher: ModelPatcher) -> None:
        """ON_PRE_RUN callback: forget what was recorded; note what forbids recording."""
        self._run.reset()
        self._run.problem = self._problem(patcher)

    def after_sampling(self, _: ModelPatcher) -> None:
        """ON_CLEANUP callback: free the graphs and log what was replayed, and why not all."""
        run = self._run
        if run.all:
            sentence = f"{run.replayed} of {run.all} model calls were replayed"
            if run.usual:
                reasons = "; ".join(f"{count}: {reason}" for reason, count in run.usual.items())
                sentence += f"; the others ran as usual ({reasons})"
            if sentence not in self._said:
                self._said.add(sentence)
                log.info("ΔConv: %s.", sentence)
        run.reset()

    def why_not(self) -> str:
        """Why no call of this sampling was replayed so far; "" if one was."""
        run = self._run
        if run.replayed:
            return ""
        return "; ".join(run.usual) or "the wrapper was never called"

    def around_call(self, executor, *arguments, **named):
        """DIFFUSION_MODEL wrapper: replay the call if it can be, else make it."""
        run = self._run
        if torch.compiler.is_compiling():
            return executor(*arguments, **named)
        run.all += 1
        options = _transformer_options((*arguments, *named.values()))
        problem = run.problem or _call_problem(executor, options)
        if not problem and run.parameters is None:
            run.problem = problem = _model_problem(executor.class_obj)
            run.parameters = list(_parameters(executor.class_obj))
        if problem:
            run.usual[problem] += 1
            return executor(*arguments, **named)
        return self._replayed(executor, options, arguments, named)

    def _replayed(self, executor, options, arguments: tuple, named: dict):
        """The call's output, from a replay if one was or can be recorded."""
        run = self._run
        # The options are no input: what they say is read while recording, and in `Kind`.
        call = (tuple(None if a is options else a for a in arguments), dict(named))
        for name, value in named.items():
            if value is options:
                call[1][name] = None
        leaves, structure = tree_flatten(call)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        device = tensors[0].device
        kind = Kind(structure, tuple(map(_described, leaves)), _acting(options), ())
        addresses, problem = self._addresses(device)
        if problem or any(tensor.device != device for tensor in tensors):
            run.usual[problem or "inputs on several devices"] += 1
            return executor(*arguments, **named)
        kind = kind._replace(addresses=addresses)
        recorded = next((each for each in run.calls if each.kind == kind), None)
        if recorded is None:
            if len(run.calls) >= MOST_GRAPHS:
                run.usual[TOO_MANY] += 1
                return executor(*arguments, **named)
            # The first call compiles kernels and fills caches, which no graph can hold.
            run.calls.append(Recorded(kind))
            run.usual["the first of its kind"] += 1
            return executor(*arguments, **named)
        if not recorded.problem and recorded.replay is None:
            self._record_call(recorded, executor, options, leaves, structure, arguments, named)
        if recorded.problem:
            run.usual[recorded.problem] += 1
            return executor(*arguments, **named)
        for kept, given in zip(recorded.inputs, tensors, strict=True):
            kept.copy_(given)
        recorded.replay()
        run.replayed += 1
        # The next replay writes to the same tensors.
        return tree_map_only(torch.Tensor, torch.clone, recorded.output)

    def _record_call(
        self, recorded: Recorded, executor, options, leaves, structure, arguments, named
    ) -> None:
        """Record the call on inputs of its own; notes the problem where that fails."""
        own = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        placed, by_name = tree_unflatten(own, structure)
        placed = tuple(
            options if a is options else p for p, a in zip(placed, arguments, strict=True)
        )
        by_name = {n: options if named[n] is options else v for n, v in by_name.items()}
        try:
            recorded.replay, recorded.output = self._record(lambda: executor(*placed, **by_name))
        except (RuntimeError, torch.OutOfMemoryError) as error:
            recorded.problem = f"it could not be recorded, {str(error).strip().splitlines()[0]}"
            return
        recorded.inputs = [leaf for leaf in own if isinstance(leaf, torch.Tensor)]

    def _addresses(self, device: torch.device) -> tuple[tuple[int, ...], str]:
        """Where every weight is; and the problem if one is elsewhere than `device`."""
        found = []
        for parameters in self._run.parameters or ():
            for parameter in parameters.values():
                if parameter is not None:
                    if parameter.device != device:
                        return (), (
                            "a part of the weights is not on the GPU; --highvram or a smaller "
                            "model keeps them there"
                        )
                    found.append(parameter.data_ptr())
        return tuple(found), ""

    def _problem(self, patcher: ModelPatcher) -> str:
        """Why no call of this sampling can be recorded; "" if nothing is known against it."""
        device = torch.device(patcher.load_device)
        if device.type != self._device_type:
            return f"the model runs on {device.type}, where there are no CUDA graphs"
        if torch.version.hip is not None and self._device_type == "cuda":
            return "on AMD this was never tried"
        if patcher.is_dynamic():
            return (
                "weights in dynamic VRAM can move between calls; start ComfyUI with "
                "--disable-dynamic-vram or --highvram"
            )
        return ""


def attach_replays(model: ModelPatcher, replays: Replays) -> ModelPatcher:
    """A clone of `model` whose calls are replayed, in place of any earlier replays."""
    clone = model.clone()
    for event, callback in (
        (CallbacksMP.ON_PRE_RUN, replays.before_sampling),
        (CallbacksMP.ON_CLEANUP, replays.after_sampling),
    ):
        clone.remove_callbacks_with_key(event, KEY)
        clone.add_callback_with_key(event, KEY, callback)
    clone.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, KEY)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, replays.around_call)
    for event in CLONE_EVENTS:
        clone.remove_callbacks_with_key(event, KEY)
        clone.add_callback_with_key(event, KEY, lambda _, again: _call_wrappers(again))
    _call_wrappers(clone)
    return clone


def _call_wrappers(patcher: ModelPatcher) -> None:
    """Give models that call no DIFFUSION_MODEL wrappers a forward that does, as an object patch."""
    model = patcher.model.diffusion_model
    earlier = patcher.object_patches.get(_FORWARD)
    if "DIFFUSION_MODEL" in type(model).forward.__code__.co_names:
        return
    if earlier is not None and getattr(earlier, "deltaconv_replay", lambda: model)() is model:
        # It is this model's own already, or another node's, which the run will name.
        return
    # Weakly: the patch lies on the model itself.
    own = ref(model)

    def forward(*arguments, **named):
        module = own()
        wrappers = get_all_wrappers(
            WrappersMP.DIFFUSION_MODEL, named.get("transformer_options", {})
        )
        call = functools.partial(type(module).forward, module)
        return WrapperExecutor.new_class_executor(call, module, wrappers).execute(
            *arguments, **named
        )

    forward.deltaconv_replay = own
    patcher.add_object_patch(_FORWARD, forward)


def _transformer_options(values: Iterable) -> dict:
    """The options among a call's arguments: they name the wrapper that asks."""
    return next(v for v in values if isinstance(v, dict) and KEY in _own(v, "diffusion_model"))


def _own(options: dict, kind: str) -> Mapping:
    return options.get("wrappers", {}).get(kind, {})


def _call_problem(executor, options: dict) -> str:
    """What of other nodes acts within this call; they may decide anew in every one."""
    for name in _PATCHES:
        if options.get(name):
            return f"another node's {name} act within the model"
    ours = _own(options, WrappersMP.DIFFUSION_MODEL).get(BLOCKS_KEY, ())
    if any(wrapper not in ours for wrapper in executor.wrappers[executor.idx + 1 :]):
        return "another node wraps the model's call"
    if torch.is_grad_enabled():
        return "gradients are recorded"
    return ""


def _model_problem(diffusion_model: torch.nn.Module) -> str:
    """What stands in the model itself that may decide anew in every call."""
    for name, module in diffusion_model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has a hook"
        forward = module.__dict__.get("forward")
        if getattr(forward, "__func__", None) is type(module).forward:
            # ComfyUI restores a method to the instance; it is the module's own all the same.
            if forward.__self__ is module:
                continue
        if forward is not None and not (
            hasattr(forward, "deltaconv") or hasattr(forward, "deltaconv_replay")
        ):
            return f"another node replaced the forward of {name or 'the model'}"
        binding = getattr(forward, "deltaconv", None)
        if binding is not None and binding.chained:
            return f"another node replaced the forward beneath ΔConv's at {name}"
    return ""


def _parameters(diffusion_model: torch.nn.Module) -> Iterator[Mapping]:
    """The dictionaries of all parameters and buffers, those of attached blocks too."""
    seen = set()
    for module in diffusion_model.modules():
        binding = getattr(module.__dict__.get("forward"), "deltaconv", None)
        blocks = binding.blocks() if binding is not None else None
        for each in (module, *(blocks.modules() if blocks is not None else ())):
            for tensors in (each._parameters, each._buffers):
                if tensors and id(tensors) not in seen:
                    seen.add(id(tensors))
                    yield tensors


def _acting(options: dict) -> tuple[bool, ...]:
    """Whether the blocks act now, for every application that decides by sigma."""
    wrappers = _own(options, WrappersMP.APPLY_MODEL).get(BLOCKS_KEY, ())
    return tuple(wrapper.__self__.acts for wrapper in wrappers)


def _described(leaf: object) -> object:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device
    return type(leaf), leaf
