"""Least squares of few rows: never worse, on what it holds out, than what it begins at."""

from dataclasses import replace

import pytest
import torch
import toy_teacher as toy
from comfyui_deltaconv.deltaconv.distillation import DistillationError, distill
from comfyui_deltaconv.deltaconv.distillation.data import draw
from comfyui_deltaconv.deltaconv.distillation.least_squares import Sums, fit
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@st.composite
def regressions(draw_value):
    """Two halves of features [N, F] and targets [N, T], and the group of each feature."""
    seed = draw_value(st.integers(0, 2**31))
    width, targets = draw_value(st.integers(1, 24)), draw_value(st.integers(1, 5))
    rank = draw_value(st.integers(0, width))
    scales = [10.0 ** draw_value(st.sampled_from([-30, -12, -3, 0, 3, 12, 30])) for _ in range(2)]
    signal = draw_value(st.sampled_from([0.0, 0.5, 1.0]))
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    mixing, solution = normal(rank, width), normal(width, targets)
    halves = []
    for _ in range(2):
        rows = draw_value(st.sampled_from([0, 1, 2, 3, 7, 30]))
        # The halves may differ in mean and power, as images at two noise levels do.
        features = normal(rows, rank) @ mixing + draw_value(st.sampled_from([0, 0, 1, 30]))
        features[:, : draw_value(st.sampled_from([0, 0, 1]))] = 0
        found = signal * features @ solution + (1 - signal) * normal(rows, targets)
        found *= draw_value(st.sampled_from([1, 1, 0, 100]))
        sums = Sums.empty(width, targets)
        sums.add(features * scales[0], found * scales[1])
        halves.append((sums, features.double() * scales[0], found.double() * scales[1]))
    return halves, torch.randint(0, 3, (width,), generator=generator)


@given(regressions())
@settings(deadline=None, max_examples=150)
def test_held_out_error_is_never_above_that_of_zero(regression):
    """With a fixed weak ridge on group 0 and 1 features, 65 of 150 such cases are above 1."""
    halves, groups = regression
    weight, error = fit([sums for sums, _, _ in halves], groups)
    assert weight.isfinite().all()
    assert 0 <= error <= 1 + 1e-9


@given(regressions(), st.integers(0, 2**31))
@settings(deadline=None, max_examples=150)
def test_held_out_error_is_never_above_that_of_the_start(regression, seed):
    halves, groups = regression
    sums = [sums for sums, _, _ in halves]
    start = torch.randn(sums[0].cross.shape, generator=torch.Generator().manual_seed(seed)).double()
    # Of the size that the solution has, so that neither end hides the other.
    sizes = [sum(half[at].square().sum() for half in halves).sqrt() for at in (1, 2)]
    start *= sizes[1] / sizes[0] if sizes[0] else 1
    weight, error = fit(sums, groups, start)
    left = sum((targets - x @ start).square().sum() for _, x, targets in halves)
    power = sum(targets.square().sum() for _, _, targets in halves)
    assert weight.isfinite().all()
    # The sums are of float32 products, and what the start leaves is their difference: it is as
    # exact as they are, not as it is.
    terms = power + sum((x @ start).square().sum() for _, x, _ in halves)
    assert error <= ((left + 1e-6 * terms) / power if power else 0)


def foretold(rows, seed):
    """Squared errors of the weight found, and of the best of all common ridges, from the truth."""
    generator = torch.Generator().manual_seed(seed)
    solution = torch.randn(60, 3, generator=generator) * torch.linspace(1, 0, 60)[:, None] ** 4
    x = torch.randn(2, rows, 60, generator=generator)
    y = x @ solution + 0.3 * torch.randn(2, rows, 3, generator=generator)
    halves = (Sums.empty(60, 3), Sums.empty(60, 3))
    for sums, features, targets in zip(halves, x, y, strict=True):
        sums.add(features, targets)
    weight, _ = fit(halves, torch.ones(60, dtype=torch.long))
    whole, target = (part.flatten(0, 1).double() for part in (x, y))
    system, cross = whole.T @ whole, whole.T @ target
    strengths = torch.logspace(-4, 3, 40)
    ridges = [torch.linalg.solve(system + s * torch.eye(60), cross) for s in strengths]
    off = [(each - solution).square().sum().item() for each in (weight, *ridges)]
    return off[0], min(off[1:])


@pytest.mark.parametrize("rows", [12, 40, 400])
def test_what_can_be_foretold_is(rows):
    """Fewer rows than features, about as many, more; and noise, whose best ridge nobody tells."""
    found, best = (
        sum(parts) for parts in zip(*(foretold(rows, s) for s in range(20)), strict=True)
    )
    # 1.01 to 1.155 by rows, by seeds within 0.06; 1.32 with the strength of half the rows for all.
    assert found < 1.3 * best


class Unrelated(toy.ToyTeacher):
    """Its layers give noise that nothing in their input tells."""

    def _attention(self, layers, n):
        seed = int(n.double().abs().sum() * 1e6) % 2**31
        return torch.randn(n.shape, generator=torch.Generator().manual_seed(seed))


class Silent(toy.ToyTeacher):
    """Its layers give nothing."""

    def _attention(self, layers, n):
        return torch.zeros_like(n)


class Overflowing(toy.ToyTeacher):
    """One of its layers gives an infinite value, as float16 does where it overflows."""

    def _attention(self, layers, n):
        y = super()._attention(layers, n)
        if layers is self.sites["second"]:
            y[0, 0, 0, 0] = float("inf")
        return y


def initialized(teacher, images, batch=4, **changes):
    settings = toy.toy_settings(0, 0, init_images=images, **changes)
    settings = replace(settings, layers=replace(settings.layers, batch=min(batch, images)))
    (record,) = distill(teacher, toy.PLAN, toy.toy_data(), settings)
    return record


def errors_on_new_images(teacher, blocks):
    """Site → each block's error against its layer, over the power of the layer's output."""
    errors, powers = dict.fromkeys(toy.PLAN, 0.0), dict.fromkeys(toy.PLAN, 0.0)

    def visit(site, x, attend):
        y = attend()
        errors[site] += (blocks[site](x) - y).square().sum().item()
        powers[site] += y.square().sum().item()
        return y

    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for position in range(8):
            options = {"seed": 99, "batch": 8, "position": position, "unconditional": 0.1}
            batch = draw(toy.toy_data(), teacher, generator, **options)
            teacher.predict(batch.x, batch.sigma, batch.conditions, visit)
    return {site: errors[site] / powers[site] for site in toy.PLAN}


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("images", [2, 3, 16])
def test_layers_that_no_block_approximates_are_left_alone(images, batch):
    teacher = Unrelated()
    record = initialized(teacher, images, batch)
    assert max(record.losses.values()) <= 1 + 1e-9
    blocks = record.student.averaged_blocks()
    new = errors_on_new_images(teacher, blocks)
    # 1.0000 to 1.002 over the seeds and threads tried.
    assert max(new.values()) < 1.1
    again = initialized(teacher, images, batch)
    for site, block in again.student.averaged_blocks().items():
        found = blocks[site].state_dict()
        assert all(torch.equal(found[name], t) for name, t in block.state_dict().items())


@pytest.mark.parametrize("images", [2, 3, 16])
def test_few_images_help_or_do_no_harm(images):
    teacher = toy.ToyTeacher()
    record = initialized(teacher, images)
    assert max(record.losses.values()) <= 1 + 1e-9
    new = errors_on_new_images(teacher, record.student.averaged_blocks())
    # Of ten seeds 0.8 to 1.6 and 0.04 to 0.19; few images foretell little, and images unlike them
    # may come. Where the ridge was fixed, 11 to 170,000 for 2 and 3 images.
    assert max(new.values()) < (5 if images < 16 else 0.7)


def test_silent_layers_get_silent_blocks():
    record = initialized(Silent(), 4)
    assert not any(record.losses.values())
    x = torch.randn(1, 6, 5, toy.CHANNELS)
    for block in record.student.averaged_blocks().values():
        assert not block(x).any()


def test_activations_that_are_not_finite_are_refused_by_site():
    with pytest.raises(DistillationError, match=r"finite .* at second"):
        initialized(Overflowing(), 4)


def test_refit_on_few_images_keeps_what_training_reached():
    teacher = toy.ToyTeacher()

    def reached(refit, images):
        settings = toy.toy_settings(60, 0, init="random", init_images=images)
        layers = replace(settings.layers, refit=refit, lr=1e-2)
        *_, last = distill(teacher, toy.PLAN, toy.toy_data(), replace(settings, layers=layers))
        return errors_on_new_images(teacher, last.student.averaged_blocks())

    before, after = reached(False, 2), reached(True, 2)
    # 0.98 to 1.08 over six seeds; 3.6 to 20 where nothing was held out against it.
    assert max(after[site] / before[site] for site in toy.PLAN) < 1.4
