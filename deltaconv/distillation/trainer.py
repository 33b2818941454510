"""The distillation itself: a generator of records over the stages init, layers and joint."""

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TypeVar

import torch

from ..block import DeltaConvBlock
from ..geometry import BlockPlan
from ..weights.model import DeltaConvWeights
from .checkpoint import Checkpoints
from .data import Batch, Dataset, draw
from .engine import Engine
from .initialization import initialize, refit
from .memory_policy import MemoryPolicy
from .passes import Kept, KeptPasses, KeptTeacher, chosen, record, record_joint
from .plan import Pace, Plan, with_steps
from .record import Record, memory_in_use, weights_of
from .replay import replay_of
from .settings import (
    DistillationError,
    DistillationSettings,
    StageName,
    StageSettings,
    new_blocks,
    read_plan,
)
from .student import Student, take_weights
from .teacher import Teacher
from .token_plans import check_tokens
from .training import Training

_T = TypeVar("_T")
# Apart from the training's own, for kept passes: the noise of a pass follows from its number.
_SEEDS: dict[StageName, int] = {"layers": 0xAC7, "joint": 0x901}

Change = Callable[[Mapping[str, DeltaConvBlock]], dict[str, float]]
# Initialized blocks → the sites that keep theirs, and the share of sampling from which they act.
Choose = Callable[[Mapping[str, DeltaConvBlock]], tuple[Collection[str], float]]


def distill(
    teacher: Teacher,
    recipe: Mapping[str, object],
    dataset: Dataset | Callable[[], Dataset],
    settings: DistillationSettings,
    *,
    gate: str = "scaled",
    start: Mapping[str, DeltaConvBlock] | None = None,
    choose: Choose | None = None,
    plan: Plan | None = None,
    folder: str | os.PathLike | None = None,
    resume: bool = True,
    progress: Callable[[float], None] = lambda share: None,
    engine: Engine | None = None,
) -> Iterator[Record]:
    """Distill `teacher` into ΔConvBlocks, yielding a record per step.

    `recipe` maps site → BlockPlan, (kernel, scales), these and heads, or a kernel alone. A
    `dataset` that is a function is called once, at the first record. `start` holds blocks to go on
    from in place of an initialization, for all sites or some. `choose` decides once, after the
    initialization, which blocks are trained further, and for which part of sampling; none: all of
    them, from `settings.start` on. `plan` then gives the settings with the steps to train, from the
    pace that is measured here; a run that is resumed within its steps keeps them, and one that is
    done asks for more. Without it the steps are those of `settings`. `folder` takes the states; one
    that holds a state is resumed, or refused where `resume` is False. `progress` hears the share
    done of the initialization, and may raise to stop it. Closing the generator, as an interrupt
    does, saves first. `engine` computes the steps; none: this process alone. With many processes an
    error saves nothing, since the others are not where it was. Raises DistillationError at the
    call, before any data is drawn or anything is changed, where the settings, the recipe or the
    folder's state do not fit, and at the first record where another run is writing to the folder.
    """
    plans = read_plan(recipe, teacher.dims)
    given = {site: block for site, block in (start or {}).items() if site in plans}
    for site, block in given.items():
        # A block to go on from keeps its biases and heads, which a recipe need not name.
        heads = plans[site].heads or block.heads
        plans[site] = replace(plans[site], biased=block.biased, heads=heads)
    if settings.joint.steps and teacher.why_not_differentiable:
        raise DistillationError(f"The joint stage cannot run: {teacher.why_not_differentiable}")
    untrained = plans.keys() - given.keys()
    if settings.init == "informed":
        check_tokens(teacher, {site: plans[site] for site in untrained})
    identity = {
        "base": teacher.fingerprint,
        "recipe": {"gate": gate, **{site: _plain(plan) for site, plan in plans.items()}},
    }
    engine = engine or Engine()
    checkpoints = engine.checkpoints(Path(folder) if folder is not None else None, identity)
    if not resume:
        checkpoints.refuse_states()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        blocks = new_blocks(plans, teacher.dims, gate)
    for site, block in given.items():
        take_weights(site, blocks[site], block)
    student = Student(blocks, settings, teacher.device)
    training = Training(student, settings, half_base=teacher.dtype == torch.float16)
    return _Run(
        teacher, dataset, training, checkpoints, untrained, choose, plan, progress, engine
    ).records()


def _plain(plan: BlockPlan) -> list:
    """What a state says of a site; states from before there were biases, or heads, say the same."""
    plain = [plan.kernel, list(plan.scales)]
    if plan.heads:
        return [*plain, list(plan.biased), plan.heads]
    return [*plain, list(plan.biased)] if plan.biased else plain


class _Run:
    """One call of `distill`; `untrained` are the sites that the initialization is for."""

    def __init__(
        self,
        teacher: Teacher,
        dataset: Dataset | Callable[[], Dataset],
        training: Training,
        checkpoints: Checkpoints,
        untrained: set[str],
        choose: Choose | None,
        plan: Plan | None,
        progress: Callable[[float], None],
        engine: Engine,
    ):
        self.teacher, self.dataset, self.engine = teacher, dataset, engine
        self.training, self.checkpoints = training, checkpoints
        self.untrained, self.progress = untrained, progress
        self.choose, self.plan = choose, plan
        # Said with the next record.
        self.notes: list[str] = []
        self.memory = MemoryPolicy(teacher.device, self.notes.append)
        # Of the stage, where a pass of the teacher serves several updates.
        self.passes: KeptPasses | None = None
        self.initialized = self.yielded = False
        if state := checkpoints.load(training.shapes):
            if plan and state.progress.number:
                training.settings = _planned_before(training.settings, state.progress.settings)
            self.notes += training.take_up(state)
            self.memory.factor = max(1, state.progress.parts)
            self.initialized = True

    @property
    def settings(self) -> DistillationSettings:
        return self.training.settings

    def records(self) -> Iterator[Record]:
        # One of many processes keeps other runs out for all of them.
        with self.checkpoints.alone() if self.engine.main else nullcontext():
            yield from self._records()

    def _records(self) -> Iterator[Record]:
        training = self.training
        # Whether all processes are after the same whole step: one alone always is.
        together = self.engine.alone
        try:
            data = self.dataset() if callable(self.dataset) else self.dataset
            if not self.initialized:
                yield self._initialize(data)
                self._save()
            if self.choose and training.replaced is None and not training.number:
                chosen = self._choose(self.choose)
                # As many steps as the state of the initialization has.
                self.checkpoints.saved = None
                self._save()
                yield chosen
            if self.plan and self.done:
                yield self._plan(data, self.plan)
            if training.stage == "layers":
                yield from self._train(data)
                self._end_layers(data)
            if training.stage == "joint":
                self.teacher.checkpointing(self.settings.checkpointing)
                yield from self._train(data)
            if not self.yielded:
                # Resumed at its end: there is still a student to hand over.
                self.notes.append("complete already")
                yield self._record(training.stage, training.step, training.step, time.monotonic())
            together = True
        finally:
            # Reached by an error, an interrupt and a closed generator alike.
            self.teacher.checkpointing(False)
            if together or self.engine.stopping:
                self._save()

    def _initialize(self, data: Dataset) -> Record:
        started = time.monotonic()
        errors: dict[str, float] = {}
        if self.settings.init == "informed" and self.untrained:
            errors = self._solve(
                lambda blocks: initialize(
                    {site: block for site, block in blocks.items() if site in self.untrained},
                    self._replay(data),
                    self.teacher.values,
                    self.teacher.projections,
                    torch.Generator().manual_seed(self.settings.seed),
                    self.progress,
                ),
            )
        self.initialized = True
        images = self.settings.init_images if errors else 0
        return self._record("init", 1, 1, started, losses=errors, images=images)

    def _choose(self, choose: Choose) -> Record:
        started = time.monotonic()
        with torch.no_grad():
            replaced, start = self.engine.shared(lambda: choose(self.training.student.blocks))
        self.training.choose(replaced, start)
        return self._record("choice", 1, 1, started)

    @property
    def done(self) -> bool:
        """Whether all steps of the settings are."""
        training = self.training
        left = training.stage == "layers" and self.settings.joint.steps
        return training.step >= self.settings.stage(training.stage).steps and not left

    def _plan(self, data: Dataset, plan: Plan) -> Record:
        started = time.monotonic()
        measured = self._pace(data)
        pace, planned = self.engine.shared(lambda: (measured, plan(measured, self.settings)))
        self.training.adopt(planned)
        steps = (self.settings.layers.steps, self.settings.joint.steps)
        self.notes.append(f"{steps[0]} layer and {steps[1]} joint steps in all, as {pace}")
        return self._record("plan", 1, 1, started)

    def _pace(self, data: Dataset) -> Pace:
        """Seconds of the second of two steps of each stage, which change nothing."""
        training = self.training
        state, keeps = training.generator.get_state(), training.keeps
        seconds: dict[StageName, float] = {"layers": inf, "joint": inf}

        def timed(stage: StageName) -> float:
            started = time.monotonic()
            self._losses(data, stage, 0)
            return time.monotonic() - started

        try:
            for stage in seconds:
                joint = stage == "joint"
                if joint and self.teacher.why_not_differentiable:
                    continue
                self.teacher.checkpointing(joint and self.settings.checkpointing)
                training.keeps = True
                for _ in range(2):
                    self.passes = self._passes(data, stage)
                    seconds[stage] = timed(stage)
                if self.passes:
                    # The step before had a pass of the teacher in it, which serves several.
                    updates = self.settings.stage(stage).updates
                    seconds[stage] += (updates - 1) * timed(stage)
                    seconds[stage] /= updates
        finally:
            self.passes = None
            self.teacher.checkpointing(False)
            training.optimizer.zero()
            training.generator.set_state(state)
            training.keeps = keeps
        return Pace(**seconds)

    def _train(self, data: Dataset) -> Iterator[Record]:
        training = self.training
        joint, stage = training.stage == "joint", self.settings.stage(training.stage)
        self.passes = self._passes(data, training.stage)
        while training.step < stage.steps:
            started = time.monotonic()
            losses = self._losses(data, training.stage, training.step)
            total = sum(losses.values()) if joint else _mean(losses)
            lr = training.optimizer.lr(training.step)
            if note := training.update(total):
                self.notes.append(note)
            saved = self._save() if training.number % self.settings.save_every == 0 else ""
            yield self._record(
                training.stage,
                training.step,
                stage.steps,
                started,
                losses=losses,
                loss=total,
                lr=lr,
                images=stage.batch,
                saved=saved,
            )
        self.passes = None

    def _end_layers(self, data: Dataset) -> None:
        layers = self.settings.layers
        if layers.refit and layers.steps:
            self.training.student.adopt_average()
            self._solve(lambda blocks: refit(blocks, self._replay(data)))
        # With no stage to follow, a resumed run may still be given more steps of this one.
        if self.settings.joint.steps:
            self.training.begin_joint()

    def _draw(
        self, data: Dataset, stage: StageSettings, generator: torch.Generator, position: int
    ) -> Batch:
        return draw(
            data,
            self.teacher,
            generator,
            seed=self.settings.seed,
            batch=stage.batch,
            position=position,
            unconditional=self.settings.unconditional,
            trajectory_share=self.settings.trajectory_share if data.trajectories else 0.0,
            start=self.training.student.start,
            growth=self.settings.growth,
            rows=self.engine.rows(stage),
        )

    def _losses(self, data: Dataset, stage: StageName, step: int) -> dict[str, float]:
        """The losses of this step's batch, and their gradients."""
        training, settings = self.training, self.settings.stage(stage)
        kept = self._kept(settings.updates, step)
        if kept is None:
            batch = self._draw(data, settings, training.generator, training.position)
        else:
            batch = kept.batch

        def losses() -> dict[str, float]:
            training.optimizer.zero()
            teacher = self.teacher
            if kept is not None and stage == "layers":
                teacher = KeptTeacher(kept, self.teacher.device).as_teacher()
            parts = self.memory.parts(settings)
            return self.engine.losses(teacher, training, batch, parts, stage == "joint")

        return self.engine.within_memory(self.memory, settings, losses)

    def _kept(self, updates: int, step: int) -> Kept | None:
        """The pass that this update of the stage goes over, None where it has its own.

        So it is from the first one on that does not fit.
        """
        settings = self.settings
        if self.passes and (passes := self.passes.up_to(step // updates)):
            return chosen(passes, step, updates, settings.seed)
        if self.passes:
            self.passes, self.training.keeps = None, False
            self.notes.append(
                f"a pass of the base takes more than kept_gib, {settings.kept_gib:g} GiB: every "
                "update has its own; a smaller batch may fit"
            )
        return None

    def _passes(self, data: Dataset, name: StageName) -> KeptPasses | None:
        """Of this stage; None where every update has its own."""
        stage, settings = self.settings.stage(name), self.settings
        most = settings.kept_gib * 2**30
        sites = self.training.student.blocks.keys()
        layers = settings.layers
        # The joint stage goes on with the images behind those of the layers stage.
        first = -(-layers.steps // layers.updates) if name == "joint" else 0

        def run(number: int) -> Kept | None:
            generator = torch.Generator().manual_seed((settings.seed ^ _SEEDS[name]) + number)
            batch = self._draw(data, stage, generator, first + number)

            def keep() -> Kept | None:
                shared = (self.teacher, batch, stage.batch, self.memory.parts(stage), sites, most)
                return record(*shared) if name == "layers" else record_joint(*shared, settings)

            return self.engine.within_memory(self.memory, stage, keep)

        return KeptPasses(run, most) if stage.updates > 1 and self.training.keeps else None

    def _replay(self, data: Dataset):
        layers = self.settings.layers
        start = self.training.student.start
        return replay_of(
            self.teacher, data, self.settings, lambda: self.memory.parts(layers), start
        )

    def _solve(self, change: Change) -> dict[str, float]:
        """Apply `change` to the blocks on the CPU; average and optimizer restart from it."""

        def solve():
            try:
                with self.training.student.on_cpu() as blocks:
                    return change(blocks)
            finally:
                self.training.restart_optimizer()

        return self.memory.run(self.settings.layers, solve)

    def _record(
        self,
        stage: str,
        step: int,
        steps: int,
        started: float,
        *,
        losses: Mapping[str, float] | None = None,
        loss: float | None = None,
        lr: float = 0.0,
        images: int = 0,
        saved: str = "",
    ) -> Record:
        seconds = time.monotonic() - started
        losses = dict(losses or {})
        message = "; ".join(self.notes)
        self.notes.clear()
        self.yielded = True
        return Record(
            stage=stage,
            step=step,
            steps=steps,
            loss=_mean(losses) if loss is None else loss,
            losses=losses,
            lr=lr,
            images_per_second=images / max(seconds, 1e-9),
            memory=memory_in_use(self.teacher.device),
            seconds=seconds,
            student=self.training.student,
            settings=self.settings,
            history=self.training.history,
            message=message,
            saved=saved,
        )

    def _save(self) -> str:
        """Save what the last whole step left; "" where there is none, or it is saved already."""
        # Stopped within an update, the state before is the last good one.
        if not self.initialized or not self.training.whole:
            return ""
        return self.checkpoints.save(self.training.state(self.memory.factor), self._weights)

    def _weights(self) -> DeltaConvWeights:
        """What the averaged weights are now."""
        steps = len(self.training.history)
        return weights_of(self.training.student, self.teacher, self.settings, steps=steps)


def _planned_before(settings: DistillationSettings, saved: object) -> DistillationSettings:
    """The settings with the steps and the initialization that a state was planned with."""
    try:
        former = DistillationSettings.from_mapping(saved)
    except DistillationError:
        return settings
    planned = with_steps(settings, former.layers.steps, former.joint.steps)
    return replace(planned, init_images=former.init_images)


def _mean(losses: Mapping[str, float]) -> float:
    return sum(losses.values()) / max(len(losses), 1)
