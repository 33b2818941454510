"""The blocks in training: float32 masters, moving average, optimizer, non-finite guard."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..block import DeltaConvBlock
from .checkpoint import eight_bit
from .settings import DistillationError, DistillationSettings, StageSettings
from .teacher import Visit, in_place_of_attention

# Neither a depthwise kernel nor a bias, of a Linear or of a depthwise convolution.
_LINEAR_WEIGHT = re.compile(r"(?:^|\.)(?:conv_(?:up|out|pool)|tokens\.(?:qkv|out))\.weight$")


class Student:
    """Blocks by site as float32 masters on `device`, with an exponential moving average.

    `start` is the share of sampling from which on they act.
    """

    def __init__(
        self,
        blocks: Mapping[str, DeltaConvBlock],
        settings: DistillationSettings,
        device: torch.device,
    ):
        self.blocks = {site: block.float().to(device).train() for site, block in blocks.items()}
        self.precision = settings.precision
        self.device = device
        self.ema_decay = settings.ema
        self.start = settings.start
        self.averaged = 0
        self.ema: dict[str, torch.Tensor] = {}
        self.restart_average()

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """`<site>.<published tensor name>` → master."""
        return {
            f"{site}.{name}": parameter
            for site, block in self.blocks.items()
            for name, parameter in block.named_parameters()
        }

    def run(self, site: str, x: torch.Tensor) -> torch.Tensor:
        """x [B, H, W, C] of any dtype → [B, H, W, C] in the training precision."""
        dtype = getattr(torch, self.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return self.blocks[site](x.float())

    def keep(self, sites: Collection[str], start: float) -> None:
        """Drop the blocks of all other sites, where attention stays, as it does before `start`."""
        self.start = start
        self.blocks = {site: block for site, block in self.blocks.items() if site in sites}
        self.ema = {name: self.ema[name] for name in self.parameters}

    @property
    def visit(self) -> Visit:
        """The blocks in place of their sites' attention."""
        return in_place_of_attention({site: partial(self.run, site) for site in self.blocks})

    @contextmanager
    def on_cpu(self) -> Iterator[dict[str, DeltaConvBlock]]:
        """The blocks on the CPU, to be set otherwise than by steps; the average restarts there."""
        for block in self.blocks.values():
            block.cpu()
        try:
            yield self.blocks
        finally:
            for block in self.blocks.values():
                block.to(self.device)
            self.restart_average()

    def average(self) -> None:
        """Add the current weights to the moving average, with a lower decay at its beginning."""
        self.averaged += 1
        decay = min(self.ema_decay, (1 + self.averaged) / (10 + self.averaged))
        for name, parameter in self.parameters.items():
            self.ema[name].lerp_(parameter.detach(), 1 - decay)

    def restart_average(self) -> None:
        """Restart the moving average at the current weights."""
        self.averaged = 0
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}

    def adopt_average(self) -> None:
        """Take the moving average, a stage's result, as the weights."""
        self.load(self.ema)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy `tensors`, named as `parameters` are, into the masters."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])

    def averaged_blocks(self) -> dict[str, DeltaConvBlock]:
        """Site → a new block on the CPU with the averaged weights: what is shown and saved."""
        blocks = {}
        for site, block in self.blocks.items():
            state = {name: self.ema[f"{site}.{name}"].cpu() for name in block.state_dict()}
            blocks[site] = DeltaConvBlock.from_state(state, gate=block.gate, scales=block.scales)
        return blocks


class Optimizer:
    """AdamW for one stage, with its schedule, clipping, loss scaling and non-finite guard.

    `scaled` scales the loss, for gradients that pass through float16 outside the blocks.
    """

    def __init__(
        self,
        student: Student,
        stage: StageSettings,
        settings: DistillationSettings,
        scaled: bool = False,
    ):
        self.student, self.stage, self.settings = student, stage, settings
        groups = parameter_groups(student.parameters, stage)
        self.adamw = _adamw(settings)(groups, lr=stage.lr, betas=stage.betas)
        scaled = scaled or settings.precision == "float16"
        self.scaler = torch.amp.GradScaler(student.device.type, enabled=scaled)
        # Non-finite steps in a row, and the guard's factor on the rate.
        self.bad, self.rate = 0, 1.0

    def lr(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        stage = self.stage
        warm = min(1.0, (step + 1) / stage.warmup) if stage.warmup else 1.0
        if stage.schedule == "cosine":
            warm *= 0.5 * (1 + math.cos(math.pi * step / max(stage.steps, 1)))
        return stage.lr * warm * self.rate

    def zero(self) -> None:
        """Forget all gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of `loss`, scaled where the precision needs it."""
        self.scaler.scale(loss).backward()

    def update(self, step: int, loss: float) -> str:
        """One step with the current gradients; returns what the guard did, "" where nothing.

        A non-finite loss or gradient skips the step; `lower_after` of them in a row halve the
        rate, `stop_after` raise DistillationError. Each block is clipped alone, so that one site's
        outlier does not slow the others.
        """
        for group in self.adamw.param_groups:
            group["lr"] = self.lr(step)
        self.scaler.unscale_(self.adamw)
        norms = [
            torch.nn.utils.clip_grad_norm_(block.parameters(), self.stage.clip)
            for block in self.student.blocks.values()
        ]
        finite = all(norm.isfinite() for norm in norms)
        # Loss scaling finds its scale by overflows: they are faults only at a scale of 1.
        searching = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if not math.isfinite(loss) or not (finite or searching):
            self.zero()
            if self.scaler.is_enabled():
                self.scaler.update()
            return self._guard()
        self.scaler.step(self.adamw)
        self.scaler.update()
        if finite:
            self.bad = 0
            self.student.average()
        return ""

    def _guard(self) -> str:
        self.bad += 1
        if self.bad >= self.settings.stop_after:
            raise DistillationError(
                f"The loss was not finite in {self.bad} steps in a row, and halving the learning "
                "rate did not help. Choose a lower one, or train in float32 or bfloat16."
            )
        if self.bad % self.settings.lower_after == 0:
            self.rate /= 2
            return f"loss not finite {self.bad} times in a row: learning rate halved"
        return "loss not finite: step skipped"

    def tensors(self) -> dict[str, torch.Tensor]:
        """AdamW's state, by `<parameter>.<entry>`."""
        return {
            f"{name}.{entry}": torch.as_tensor(value)
            for name, parameter in self.student.parameters.items()
            for entry, value in self.adamw.state.get(parameter, {}).items()
        }

    def load(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Restore what `tensors` returned; False, and nothing restored, from another AdamW."""
        if tensors and eight_bit(tensors) != self.settings.eight_bit:
            return False
        for name, parameter in self.student.parameters.items():
            entries = {
                key.removeprefix(f"{name}."): value
                for key, value in tensors.items()
                if key.startswith(f"{name}.")
            }
            if entries:
                # The count of steps stays on the CPU; bitsandbytes wants it as a number.
                step = entries.pop("step")
                self.adamw.state[parameter] = {
                    "step": int(step) if self.settings.eight_bit else step,
                    **{entry: value.to(parameter.device) for entry, value in entries.items()},
                }
        return True


def parameter_groups(
    parameters: Mapping[str, torch.nn.Parameter], stage: StageSettings
) -> list[dict[str, Any]]:
    """The optimizer's groups: with the stage's weight decay, and without."""
    decayed, kept = [], []
    for name, parameter in parameters.items():
        acts = stage.decayed == "all" or _LINEAR_WEIGHT.search(name)
        (decayed if acts else kept).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": stage.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def take_weights(site: str, block: DeltaConvBlock, given: DeltaConvBlock) -> None:
    """Give `block` the weights of `given`; raises DistillationError unless they are built alike."""
    shapes = [{n: tuple(t.shape) for n, t in b.state_dict().items()} for b in (block, given)]
    if shapes[0] != shapes[1] or (block.scales, block.gate) != (given.scales, given.gate):
        raise DistillationError(
            f"Expected a block to start from at {site} as the recipe has it ({block}), got "
            f"{given}. Change the recipe, or leave it out."
        )
    block.load_state_dict(given.state_dict())


def _adamw(settings: DistillationSettings) -> Callable[..., torch.optim.Optimizer]:
    if not settings.eight_bit:
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise DistillationError(
            "Expected bitsandbytes for eight_bit, got none installed. Install it into ComfyUI's "
            "environment, or leave eight_bit off."
        ) from None
    return AdamW8bit
