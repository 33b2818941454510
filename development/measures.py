"""`python dev.py measures`: which figure ranks students as their pictures do.

Over thirty students of the demo teacher: initialized, packaged and briefly trained ones, with
attention kept in layers and steps, mixed, scaled and disturbed. Each is measured by every candidate
and samples pictures of other prompts from other noise; a rank correlation says which candidate
agrees with their PSNR, and which with their SSIM. Writes JSON after every student, and goes on
where it was stopped.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..cli.host import entered
from . import ROOT
from .comfyui.tree import chosen_tree
from .distill_compare import TWELVE, grown

MEASURED, PICTURED = 4, 8
PATH_STEPS, SHORT_STEPS, PICTURE_STEPS = 10, 6, 12
TRAINED_STEPS = 20


@dataclass(frozen=True)
class Subject:
    """A student: its blocks, made when they are asked for, and the step they act from."""

    name: str
    blocks: Callable[[], Mapping]
    start: float = 0.0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py measures", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "measure-study.json")
    options = parser.parse_args(argv)
    with entered(chosen_tree()):
        study(options.output)
    return 0


def study(output: Path) -> dict:
    """Measure what `output` does not hold yet; prints and returns {"students", "correlations"}."""
    from ..cli.distill_config import Configuration
    from ..cli.distill_inputs import chosen_data, load_teacher
    from ..deltaconv.distillation import default_settings

    settings = default_settings()
    teacher = load_teacher(Configuration(), settings)
    output.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    students = found.setdefault("students", {})
    with teacher:
        data = chosen_data(Configuration(), teacher)
        study = _Study(teacher, data)
        for subject in subjects(teacher, data, settings, output.with_suffix("")):
            if subject.name not in students:
                since = time.monotonic()
                students[subject.name] = study.figures(subject)
                output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                seconds = time.monotonic() - since
                print(
                    f"{subject.name}: {_line(students[subject.name])}, {seconds:.0f} s", flush=True
                )
    found["correlations"] = correlations(students)
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, (psnr, ssim) in found["correlations"].items():
        print(f"{name:36} Spearman {psnr:.3f} with PSNR, {ssim:.3f} with SSIM")
    print(f"{len(students)} students")
    return found


class _Study:
    """The teacher's part of every measurement, computed once."""

    def __init__(self, teacher, data):
        import torch

        from ..deltaconv.distillation import sample
        from ..deltaconv.distillation.measure import guided_path

        self.teacher, self.data = teacher, data
        names = [index for index, name in enumerate(_captions()) if name not in TWELVE]
        stride = len(names) // (MEASURED + PICTURED)
        picked = names[::stride][: MEASURED + PICTURED]
        self.measured = [data.conditions[index] for index in picked[:MEASURED]]
        self.pictured = [data.conditions[index] for index in picked[MEASURED:]]
        noise = torch.randn((len(picked), 3, 64, 64), generator=torch.Generator().manual_seed(2024))
        self.noises = noise[:MEASURED], noise[MEASURED:]
        self.path = guided_path(
            teacher, self.measured, data.unconditional, self.noises[0], steps=PATH_STEPS
        )
        arguments = (teacher, self.measured, data.unconditional, self.noises[0])
        self.short = sample(*arguments, steps=SHORT_STEPS)
        arguments = (teacher, self.pictured, data.unconditional, self.noises[1])
        self.pictures = sample(*arguments, steps=PICTURE_STEPS).clamp(-1, 1)

    def figures(self, subject: Subject) -> dict:
        """Every candidate, and the PSNR of pictures that none of them saw."""
        from ..deltaconv.distillation import in_place_of_attention, sample
        from ..deltaconv.distillation.evaluation import held_out_error
        from ..deltaconv.pictures.metrics import compare

        blocks, start = subject.blocks(), subject.start
        visit = in_place_of_attention(blocks)
        empty = self.data.unconditional
        short = sample(
            self.teacher,
            self.measured,
            empty,
            self.noises[0],
            steps=SHORT_STEPS,
            visit=visit,
            start=start,
        )
        pictures = sample(
            self.teacher,
            self.pictured,
            empty,
            self.noises[1],
            steps=PICTURE_STEPS,
            visit=visit,
            start=start,
        ).clamp(-1, 1)
        shares = self.path.errors(self.teacher, visit)
        steps = zip(self.path.positions, shares, strict=True)
        alike = compare(_picture(self.pictures), _picture(pictures))
        return {
            "psnr": alike.mean_psnr,
            "ssim": alike.mean_ssim,
            "mse": held_out_error(self.teacher, blocks, self.data, batches=2),
            "steps": [share if position >= start else 0.0 for position, share in steps],
            "guided": self._guided(shares),
            "short": float((short - self.short).square().mean() / self.short.square().mean()),
        }

    def _guided(self, shares: list[float]) -> list[float]:
        """Mean squared error of the guided prediction at each step, whatever the start."""
        from ..deltaconv.distillation.teacher import noise_levels

        levels = noise_levels(self.teacher, PATH_STEPS)
        return [
            share * float(point.x.square().mean()) / (levels[at + 1] - levels[at]) ** 2
            for at, (share, point) in enumerate(zip(shares, self.path.points, strict=True))
        ]


def correlations(students: Mapping[str, dict]) -> dict[str, tuple[float, float]]:
    """Candidate → rank correlations of its figure with the loss of PSNR and with that of SSIM."""
    from scipy.stats import spearmanr

    candidates: dict[str, Callable[[dict], float]] = {
        "mse at uniform steps": lambda f: f["mse"],
        "guided mse, mean": lambda f: sum(f["guided"]),
        "error along sampling": lambda f: sum(f["steps"]),
        "error along sampling, as it grows": lambda f: grown(f["steps"]),
        "short sampling": lambda f: f["short"],
    }
    psnr, ssim = ([-figures[of] for figures in students.values()] for of in ("psnr", "ssim"))

    def agreement(figure, lost: list[float]) -> float:
        return float(spearmanr([figure(f) for f in students.values()], lost).statistic)

    return {
        name: (agreement(figure, psnr), agreement(figure, ssim))
        for name, figure in candidates.items()
    }


def _picture(latents):
    """Latents of the demo, pictures [B, 3, H, W] in −1…1 → [B, H, W, 3] in 0…1."""
    return (latents.movedim(1, -1) + 1) / 2


def subjects(teacher, data, settings, folder: Path) -> Iterator[Subject]:
    """The students; those that take training are kept in `folder`."""
    from functools import cache

    import torch

    from ..deltaconv import demo, read_weights, write_weights
    from ..deltaconv.distillation import StageSettings, default_kernels, distill, weights_of

    kernels = default_kernels(teacher.model_sites.levels)

    def load(path):
        return read_weights(path).blocks()

    @cache
    def trained(name: str) -> Mapping:
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            losses, steps, lr = _TRAINED[name]
            start = None if name == "initialized" else trained("initialized")
            run = replace(
                settings,
                layers=StageSettings(0),
                joint=StageSettings(steps, lr=lr, warmup=2),
                losses=losses or {"teacher": 1.0},
                init_images=64,
            )
            for record in distill(teacher, kernels, data, run, start=start):
                student = record.student
            folder.mkdir(parents=True, exist_ok=True)
            write_weights(weights_of(student, teacher, run), path, overwrite=True)
        return load(path)

    @cache
    def packaged() -> Mapping:
        return load(demo.DELTACONV_PATH)

    def first():
        return trained("initialized")

    for name in _TRAINED:
        yield Subject(name, lambda name=name: trained(name))
    yield Subject("packaged", packaged)
    for start in (0.1, 0.2, 0.3, 0.5):
        yield Subject(f"packaged from {start:.0%}", packaged, start)
        yield Subject(f"initialized from {start:.0%}", first, start)
    for index in range(len(kernels)):
        yield Subject(f"initialized, attention in {index}", lambda i=index: _without(first(), i))
    for kept in ((6, 7), (7, 8), (0, 8, 9), (2, 3, 4, 5), (1, 6, 7)):
        yield Subject(f"initialized, attention in {kept}", lambda k=kept: _without(first(), *k))
    for index in (1, 4, 6, 8):
        yield Subject(f"packaged, attention in {index}", lambda i=index: _without(packaged(), i))
    for share in (0.8, 0.9):
        yield Subject(f"initialized, times {share}", lambda s=share: _scaled(first(), s))
    yield Subject("packaged, times 0.9", lambda: _scaled(packaged(), 0.9))
    for spread in (0.03, 0.1):
        yield Subject(
            f"packaged, disturbed by {spread}", lambda s=spread: _disturbed(packaged(), s)
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixed = {name: trained(name) for name in ("teacher", "guided")}
    yield Subject("mixed", lambda: _mixed(mixed["teacher"], mixed["guided"]))


# Name → losses of the joint stage, steps and rate, from the initialized blocks.
_TRAINED: dict[str, tuple[dict, int, float]] = {
    "initialized": ({}, 0, 3e-4),
    "teacher": ({"teacher": 1.0}, TRAINED_STEPS, 3e-4),
    "guided": ({"guided": 1.0}, TRAINED_STEPS, 3e-4),
    "features": ({"normalised_features": 1.0}, TRAINED_STEPS, 3e-4),
    "too fast": ({"teacher": 1.0}, TRAINED_STEPS, 3e-3),
}


def _captions() -> list[str]:
    from ..deltaconv import demo

    return demo.pictures()[1]


def _without(blocks: Mapping, *indices: int) -> dict:
    return {site: block for at, (site, block) in enumerate(blocks.items()) if at not in indices}


def _changed(blocks: Mapping, change) -> dict:
    import torch

    changed = copy.deepcopy(dict(blocks))
    with torch.no_grad():
        for site, block in changed.items():
            for name, parameter in block.named_parameters():
                change(site, name, parameter)
    return changed


def _scaled(blocks: Mapping, share: float) -> dict:
    def change(site, name, parameter):
        if name.startswith(("conv_out", "conv_pool")):
            parameter.mul_(share)

    return _changed(blocks, change)


def _disturbed(blocks: Mapping, spread: float) -> dict:
    import torch

    generator = torch.Generator().manual_seed(7)

    def change(site, name, parameter):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(spread * parameter.std(correction=0) * noise)

    return _changed(blocks, change)


def _mixed(blocks: Mapping, others: Mapping) -> dict:
    def change(site, name, parameter):
        parameter.lerp_(others[site].get_parameter(name), 0.5)

    return _changed(blocks, change)


def _line(figures: dict) -> str:
    along = sum(figures["steps"])
    return (
        f"PSNR {figures['psnr']:.2f}, mse {figures['mse']:.5f}, along sampling {along:.5f}, short "
        f"{figures['short']:.4f}"
    )
