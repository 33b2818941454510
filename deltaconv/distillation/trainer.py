"""The distillation itself: a generator of records over the stages init, layers and joint."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..block import DeltaConvBlock
from ..geometry import BlockPlan
from ..memory import is_out_of_memory
from .checkpoint import State, load_state, save_state, state_files
from .data import Batch, Dataset, draw
from .initialization import initialize, refit
from .losses import LayerLosses, joint_losses
from .record import Record, memory_in_use
from .replay import replay_of
from .settings import (
    DistillationError,
    DistillationSettings,
    StageSettings,
    new_blocks,
    read_plan,
)
from .student import Optimizer, Student, take_weights
from .teacher import Teacher


def distill(
    teacher: Teacher,
    recipe: Mapping[str, object],
    dataset: Dataset | Callable[[], Dataset],
    settings: DistillationSettings,
    *,
    gate: str = "scaled",
    start: Mapping[str, DeltaConvBlock] | None = None,
    folder: str | os.PathLike | None = None,
    resume: bool = True,
    progress: Callable[[float], None] = lambda share: None,
) -> Iterator[Record]:
    """Distil `teacher` into ΔConvBlocks, yielding a record per step.

    `recipe` maps site → (kernel, scales), or a kernel alone. A `dataset` that is a function is
    called once, when the first record is asked for. `start`, where given, holds blocks that are
    gone on from in place of an initialization, of all sites or some. `folder` takes the states; one
    that holds some is gone on with, or refused where `resume` is False. `progress` hears the share
    done of the initialization, and may raise to stop it. Closing the generator, as an interrupt
    does, saves first. Raises DistillationError at the call, before any data is drawn or anything is
    changed, where the settings, the recipe or the folder's state do not fit.
    """
    run = _Run(teacher, recipe, dataset, settings, gate, start, folder, resume, progress)
    return run.records()


def _plain(plan: BlockPlan) -> list:
    """What a state says of a site; states of before there were biases say the same."""
    plain = [plan.kernel, list(plan.scales)]
    return [*plain, list(plan.biased)] if plan.biased else plain


class _Run:
    def __init__(self, teacher, recipe, dataset, settings, gate, start, folder, resume, progress):
        self.teacher, self.dataset, self.settings = teacher, dataset, settings
        self.progress = progress
        self.plans = read_plan(recipe, teacher.dims)
        self.given = {site: block for site, block in (start or {}).items() if site in self.plans}
        for site, block in self.given.items():
            # A recipe says nothing of biases: a block that has some keeps them.
            self.plans[site] = replace(self.plans[site], biased=block.biased)
        if settings.joint.steps and teacher.why_not_differentiable:
            raise DistillationError(f"The joint stage cannot run: {teacher.why_not_differentiable}")
        self.folder = Path(folder) if folder is not None else None
        self.identity = {
            "base": teacher.fingerprint,
            "recipe": {
                "gate": gate,
                **{site: _plain(plan) for site, plan in self.plans.items()},
            },
        }
        if self.folder and not resume and state_files(self.folder):
            raise DistillationError(
                f"Expected a folder without states, got {self.folder} with a distillation in it. "
                "Allow resuming to go on with it, or choose another folder."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            blocks = new_blocks(self.plans, teacher.dims, gate)
        for site, block in self.given.items():
            take_weights(site, blocks[site], block)
        self.student = Student(blocks, settings, teacher.device)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.stage, self.step, self.position, self.number = "layers", 0, 0, 0
        # Parts of a batch; an out-of-memory doubles them once.
        self.more_parts = 1
        self.rng = self.generator.get_state()
        self.optimizer = self._new_optimizer()
        self.saved_number: int | None = None
        self.initialized = self.yielded = False
        # False while weights, optimizer and counters belong to different steps.
        self.whole = True
        self.notes: list[str] = []
        # The loss of every training step so far, across resumed runs.
        self.history: list[float] = []
        if self.folder and (state := load_state(self.folder, self.identity, self._shapes())):
            self._take_up(state)

    def records(self) -> Iterator[Record]:
        try:
            if callable(self.dataset):
                self.dataset = self.dataset()
            if not self.initialized:
                yield from self._init()
            for name in ("layers", "joint"):
                if self.stage == name:
                    yield from self._train(getattr(self.settings, name))
            if not self.yielded:
                # Resumed at its end: there is still a student to hand over.
                self.notes.append("complete already")
                now = time.monotonic()
                yield self._record(self.stage, self.step, self.step, {}, 0.0, now, 0)
        finally:
            # Reached by an error, an interrupt and a closed generator alike.
            self.teacher.checkpointing(False)
            self._save()

    def _init(self) -> Iterator[Record]:
        started = time.monotonic()
        errors: Mapping[str, float] = {}
        rest = self.student.blocks.keys() - self.given.keys()
        if self.settings.init == "informed" and rest:
            errors = self._within_memory(
                self.settings.layers,
                lambda: self._on_cpu(
                    lambda blocks: initialize(
                        {site: block for site, block in blocks.items() if site in rest},
                        self._replay(),
                        self.teacher.projections,
                        torch.Generator().manual_seed(self.settings.seed),
                        self.progress,
                    )
                ),
            )
        self.initialized = True
        images = self.settings.init_images if errors else 0
        yield self._record("init", 1, 1, errors, 0.0, started, images)
        self._save()

    def _train(self, stage: StageSettings) -> Iterator[Record]:
        joint = self.stage == "joint"
        self.teacher.checkpointing(joint and self.settings.checkpointing)
        while self.step < stage.steps:
            started = time.monotonic()
            batch = self._draw(stage)
            losses = self._within_memory(
                stage, lambda batch=batch: self._losses(stage, batch, joint)
            )
            total = sum(losses.values()) if joint else sum(losses.values()) / len(losses)
            lr = self.optimizer.lr(self.step)
            if note := self._update(total):
                self.notes.append(note)
            self.step += 1
            self.number += 1
            self.position += 1
            self.rng = self.generator.get_state()
            self.history.append(total)
            self.whole = True
            saved = self._save() if self.number % self.settings.save_every == 0 else ""
            yield self._record(
                self.stage, self.step, stage.steps, losses, lr, started, stage.batch, total, saved
            )
        self._end_stage(stage)

    def _end_stage(self, stage: StageSettings) -> None:
        if self.stage != "layers":
            return
        if stage.refit and stage.steps:
            self.student.adopt_average()
            self._within_memory(
                stage, lambda: self._on_cpu(lambda blocks: refit(blocks, self._replay()))
            )
        # With no stage to follow, a resumed run may still be given more steps of this one.
        if self.settings.joint.steps:
            self.student.adopt_average()
            self.stage, self.step = "joint", 0
            self.student.restart_average()
            self.optimizer = self._new_optimizer()

    def _draw(self, stage: StageSettings) -> Batch:
        return draw(
            self.dataset,
            self.teacher,
            self.generator,
            seed=self.settings.seed,
            batch=stage.batch,
            position=self.position,
            unconditional=self.settings.unconditional,
            trajectory_share=self.settings.trajectory_share if self.dataset.trajectories else 0.0,
        )

    def _update(self, total: float) -> str:
        self.whole = False
        try:
            return self.optimizer.update(self.step, total)
        except DistillationError:
            # The guard stops before it changes anything; who goes on, does so with a new count.
            self.whole = True
            self.optimizer.bad = 0
            raise

    def _parts(self, stage: StageSettings) -> int:
        return min(stage.accumulate * self.more_parts, stage.batch)

    def _within_memory(self, stage: StageSettings, compute: Callable[[], dict]) -> dict:
        """What `compute` gives, called again with parts of half the size where memory ran out."""
        try:
            return compute()
        except RuntimeError as error:
            before = self._parts(stage)
            if not is_out_of_memory(error) or self.more_parts > 1 or before >= stage.batch:
                raise
            self.more_parts = 2
            images = -(-stage.batch // self._parts(stage))
            self.notes.append(f"out of memory: {images} images at a time from here on")
        # Outside the handler, which keeps the failed step's tensors alive.
        if self.teacher.device.type == "cuda":
            torch.cuda.empty_cache()
        return compute()

    def _losses(self, stage: StageSettings, batch: Batch, joint: bool) -> dict[str, float]:
        """Gradients of the whole batch, part by part; loss by name, mean over its images."""
        self.optimizer.zero()
        parts, backward = batch.parts(self._parts(stage)), self.optimizer.backward
        if not joint:
            layers = LayerLosses(self.student, len(batch), backward)
            for part in parts:
                layers.add(self.teacher, part)
            return {name: float(loss) for name, loss in layers.finish().items()}
        totals: dict[str, torch.Tensor] = {}
        for part in parts:
            share = len(part) / len(batch)
            losses = joint_losses(self.teacher, self.student, part, share, backward, self.settings)
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0.0) + loss.double() * share
        return {name: float(total) for name, total in totals.items()}

    def _replay(self) -> Callable:
        layers = self.settings.layers
        return replay_of(self.teacher, self.dataset, self.settings, lambda: self._parts(layers))

    def _on_cpu(self, change: Callable) -> dict[str, float]:
        """Apply `change` to the blocks on the CPU, and begin the average at what it made."""
        for block in self.student.blocks.values():
            block.cpu()
        try:
            return change(self.student.blocks)
        finally:
            for block in self.student.blocks.values():
                block.to(self.teacher.device)
            self.student.restart_average()
            self.optimizer = self._new_optimizer()

    def _new_optimizer(self) -> Optimizer:
        stage = getattr(self.settings, self.stage)
        # The joint stage's gradients come through the base.
        scaled = self.stage == "joint" and self.teacher.dtype == torch.float16
        return Optimizer(self.student, stage, self.settings, scaled)

    def _record(self, stage, step, steps, losses, lr, started, images, total=None, saved=""):
        seconds = time.monotonic() - started
        if total is None:
            total = sum(losses.values()) / max(len(losses), 1)
        notes, self.notes = "; ".join(self.notes), []
        self.yielded = True
        return Record(
            stage=stage,
            step=step,
            steps=steps,
            loss=total,
            losses=dict(losses),
            lr=lr,
            images_per_second=images / max(seconds, 1e-9),
            memory=memory_in_use(self.teacher.device),
            seconds=seconds,
            student=self.student,
            history=self.history,
            message=notes,
            saved=str(saved),
        )

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self.student.parameters.items()}

    def _save(self) -> Path | str:
        """Save what the last whole step left; nothing where that is saved already."""
        if self.folder is None or not self.initialized or self.saved_number == self.number:
            return ""
        if not self.whole:
            # Stopped within an update: the state before is the last good one.
            return ""
        history = torch.tensor(self.history, dtype=torch.float64)
        tensors = {"rng": self.rng, "history": history}
        groups = (
            ("weights", self.student.parameters),
            ("ema", self.student.ema),
            ("optimiser", self.optimizer.tensors()),
        )
        for group, members in groups:
            tensors |= {f"{group}.{name}": tensor for name, tensor in members.items()}
        progress = {
            "stage": self.stage,
            "step": self.step,
            "position": self.position,
            "number": self.number,
            "averaged": self.student.averaged,
            "parts": self.more_parts,
            "bad": self.optimizer.bad,
            "rate": self.optimizer.rate,
            "scaler": self.optimizer.scaler.state_dict(),
            "settings": self.settings.to_mapping(),
        }
        path = save_state(self.folder, self.number, State(tensors, progress), self.identity)
        self.saved_number = self.number
        return path

    def _take_up(self, state: State) -> None:
        self.initialized = True
        progress = state.progress
        self.stage, self.step = progress["stage"], progress["step"]
        self.position, self.number = progress["position"], progress["number"]
        self.more_parts = max(1, progress["parts"])
        self.student.load(state.group("weights"))
        self.student.ema = {
            name: tensor.to(self.teacher.device) for name, tensor in state.group("ema").items()
        }
        self.student.averaged = progress["averaged"]
        self.optimizer = self._new_optimizer()
        if not self.optimizer.load(state.group("optimiser")):
            self.notes.append("optimiser begun anew: the state holds another kind's moments")
        self.optimizer.bad, self.optimizer.rate = progress["bad"], progress["rate"]
        if progress["scaler"] and self.optimizer.scaler.is_enabled():
            self.optimizer.scaler.load_state_dict(progress["scaler"])
        self.rng = state.tensors["rng"]
        self.history = state.tensors["history"].tolist()
        self.generator.set_state(self.rng)
        self.saved_number = self.number
        self.notes.append(f"resumed after {self.number} steps")
        if not self.settings.matches(progress.get("settings")):
            self.notes.append("with other settings than it was begun with")
