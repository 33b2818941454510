"""The choice of layers and steps: what is measured, what is chosen, what is refused."""

import math
from itertools import combinations, pairwise

import pytest
import torch
from comfyui_deltaconv.deltaconv.block import DeltaConvBlock
from comfyui_deltaconv.deltaconv.distillation import in_place_of_attention, sample
from comfyui_deltaconv.deltaconv.distillation.choice import (
    SHARES,
    ChoicePoint,
    SiteCost,
    TradeOff,
    choose,
    error_bounds,
    pareto,
    share_saved,
)
from comfyui_deltaconv.deltaconv.distillation.choice_plot import choice_curve
from comfyui_deltaconv.deltaconv.distillation.choice_search import falling_ratios, trade_off
from comfyui_deltaconv.deltaconv.distillation.measure import guided_path
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toy_teacher import CHANNELS, PLAN, SIZE, ToyTeacher

STEPS = 5


def toy_path(teacher, cfg=2.0, steps=STEPS):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, SIZE, SIZE, generator=generator)
    conditions = list(torch.randn(2, CHANNELS, generator=generator))
    return guided_path(teacher, conditions, torch.zeros(CHANNELS), noise, steps=steps, cfg=cfg)


def toy_blocks(scale=0.3):
    torch.manual_seed(1)
    blocks = {site: DeltaConvBlock(CHANNELS, *plan).eval() for site, plan in PLAN.items()}
    for block in blocks.values():
        torch.nn.init.normal_(block.conv_out.weight, std=scale)
    return blocks


COSTS = {"first": SiteCost(3.0, 1.0), "second": SiteCost(2.0, 1.0)}


@pytest.fixture
def teacher():
    return ToyTeacher()


@pytest.fixture
def measured(teacher):
    return trade_off(toy_path(teacher), teacher, toy_blocks(), COSTS)


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_every_error_is_that_of_a_sampling_to_the_end(teacher, cfg):
    path, blocks = toy_path(teacher, cfg), toy_blocks()
    measured = trade_off(path, teacher, blocks, COSTS)
    for point, latents in measured.latents.items():
        visit = in_place_of_attention({site: blocks[site] for site in point.replaced})
        again = path.sampled(teacher, visit, round(point.start * STEPS))
        assert torch.equal(latents, again)
        error = (again - path.latents).square().mean() / path.latents.square().mean()
        assert point.error == pytest.approx(float(error))
        assert point.saved == pytest.approx(share_saved(COSTS, point.replaced, point.start))
        assert point.decibels == pytest.approx(-10 * math.log10(point.error))


def test_sampling_with_attention_ends_where_the_path_does(teacher):
    path = toy_path(teacher)
    for step in range(STEPS):
        latents = path.sampled(teacher, in_place_of_attention({}), step)
        torch.testing.assert_close(latents, path.latents, atol=1e-5, rtol=1e-5)
    assert max(path.errors(teacher, in_place_of_attention({}))) < 1e-9


def test_all_layers_are_sampled_from_every_start_and_fastest_is_all_of_them(measured):
    everything = tuple(PLAN)
    starts = [point.start for point in measured.points if point.replaced == everything]
    assert starts == [step / STEPS for step in range(STEPS)]
    fastest = choose(measured, "fastest")
    assert (fastest.replaced, fastest.start, fastest.saved) == (everything, 0.0, 1.0)


@pytest.mark.parametrize("wanted", [*SHARES, 0.05, 0.5, 0.99, 1.0])
def test_what_is_chosen_saves_enough_at_the_least_error(measured, wanted):
    point = choose(measured, wanted)
    share = SHARES.get(wanted, wanted) if wanted != "fastest" else 1.0
    assert point.saved >= share - 1e-9
    enough = [other for other in measured.points if other.saved >= share - 1e-9]
    bounds = error_bounds(measured.points)
    assert bounds[point] == min(bounds[other] for other in enough)


def test_a_quick_search_samples_something_from_each_start_that_saves_enough(teacher):
    quick = trade_off(toy_path(teacher), teacher, toy_blocks(), COSTS, wanted=0.6, quick=True)
    enough = {point.start for point in quick.points if point.saved >= 0.6 - 1e-9}
    # All layers from a start save so much of the time.
    assert enough == {step / STEPS for step in range(STEPS) if 1 - step / STEPS >= 0.6}
    assert choose(quick, "balanced").saved >= 0.6 - 1e-9


def test_attention_stays_where_the_block_is_bad_and_saves_little(teacher):
    """A block that is the attention itself next to a bad one: the bad one goes."""
    path, blocks = toy_path(teacher), toy_blocks(1.0)
    layers = teacher.sites["first"]
    blocks["first"] = lambda x: teacher._attention(layers, x)
    measured = trade_off(path, teacher, blocks, COSTS)
    point = choose(measured, "balanced")
    assert point.replaced == ("first",) and point.start == 0 and point.decibels > 60
    assert measured.alone["second"] > 10


def test_layers_whose_block_is_not_faster_keep_attention(teacher):
    costs = {"first": SiteCost(1.0, 1.0), "second": SiteCost(2.0, 1.0)}
    measured = trade_off(toy_path(teacher), teacher, toy_blocks(), costs)
    assert {point.replaced for point in measured.points} == {("second",)}
    assert choose(measured, "fastest").saved == 1 and not measured.alone


def test_weights_that_act_late_are_tried_from_there_on(teacher):
    measured = trade_off(toy_path(teacher), teacher, toy_blocks(), COSTS, earliest=0.5)
    assert min(point.start for point in measured.points) == 0.6
    assert choose(measured, "fastest").saved == pytest.approx(0.4)
    with pytest.raises(ValueError, match=r"save 60% of the time, got at most 40%\. Ask for less"):
        choose(measured, "balanced")
    with pytest.raises(ValueError, match="begins at 90% of sampling or later"):
        trade_off(toy_path(teacher), teacher, toy_blocks(), COSTS, earliest=0.9)


def test_a_share_below_the_presets_is_searched_for(teacher, measured):
    wide = trade_off(toy_path(teacher), teacher, toy_blocks(), COSTS, wanted=0.05)
    assert min(p.saved for p in measured.points) >= 0.2 - 1e-9
    assert choose(wide, 0.05).error <= choose(measured, "faithful").error


def test_progress_rises_to_its_end(teacher):
    heard = []
    trade_off(
        toy_path(teacher), teacher, toy_blocks(), COSTS, progress=lambda *told: heard.append(told)
    )
    done, most = zip(*heard, strict=True)
    assert list(done) == sorted(done) and done[-1] == most[-1] and len(set(most)) == 1


@pytest.mark.parametrize(
    ("costs", "sentence"),
    [
        ({}, "the finite cost of each of 2 blocks"),
        ({**COSTS, "first": SiteCost(math.inf, 1)}, "the finite cost of each of 2 blocks"),
        ({**COSTS, "first": SiteCost(1e9, 1, timed=False)}, "got seconds and FLOPs"),
        (dict.fromkeys(PLAN, SiteCost(1.0, 2.0)), "faster than attention, got none in 2 layers"),
    ],
)
def test_costs_that_decide_nothing_are_refused(teacher, costs, sentence):
    with pytest.raises(ValueError, match=sentence):
        trade_off(toy_path(teacher), teacher, toy_blocks(), costs)


def test_blocks_that_start_late_are_sampled_as_along_the_path(teacher):
    path, visit = toy_path(teacher), in_place_of_attention(toy_blocks())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, SIZE, SIZE, generator=generator)
    arguments = (teacher, path.conditions, path.unconditional, noise)
    for step in range(STEPS):
        latents = sample(*arguments, steps=STEPS, cfg=2.0, visit=visit, start=step / STEPS)
        torch.testing.assert_close(latents, path.sampled(teacher, visit, step))


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(5, 100), min_size=1, max_size=4, unique=True), st.integers(0, 3))
def test_labels_of_the_curve_lie_apart_and_within_it(shares, chosen):
    points = [ChoicePoint(("a",), 0.0, share / 100, share**2 / 1e5) for share in shares]
    named = dict(zip(["balanced", "fastest", "faithful", "own share"], points, strict=False))
    measured = TradeOff({point: torch.zeros(1) for point in points}, {}, {}, [], 0)
    figure = choice_curve(measured, named, list(named)[chosen % len(named)])
    figure.canvas.draw()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(points)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    whole = axes.get_window_extent()
    assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 for box in boxes)
    assert all(box.y1 <= whole.y1 for box in boxes)
    # Above the curve, which they never cover.
    top = max(point.decibels for point in points)
    assert min(box.y0 for box in boxes) > axes.transData.transform((0, top))[1]


@pytest.mark.parametrize("wanted", ["best", 0, -0.1, 1.1, float("nan")])
def test_what_is_no_share_is_refused(measured, wanted):
    with pytest.raises(ValueError, match=r"Expected (one of balanced|a share of the time)"):
        choose(measured, wanted)


class ManyLayers:
    """A path on which every layer adds an error of its own at every step."""

    def __init__(self, errors, steps):
        self.each, self.steps, self.calls = errors, steps, 0
        self.points, self.latents = [None] * steps, torch.ones(1, 1, 4, 4)

    @property
    def positions(self):
        return [step / self.steps for step in range(self.steps)]

    def errors(self, teacher, visit):
        self.calls += 1
        return [sum(self.each[site] for site in self._replaced(visit))] * self.steps

    def sampled(self, teacher, visit, step=0):
        error = sum(self.each[site] for site in self._replaced(visit)) * (self.steps - step)
        return self.latents + error**0.5

    def _replaced(self, visit):
        x = torch.zeros(1, 1, 1, 1)
        return [s for s in self.each if visit(s, x, lambda: x + 1).item() == 0]


# Savings of nothing but rounding would leave open what all of it is.
SAVED = st.floats(-1, 5).map(lambda value: round(value, 3))
LAYERS = st.lists(st.tuples(st.floats(0, 1), SAVED), min_size=1, max_size=40)


@settings(deadline=None, max_examples=40)
@given(LAYERS, st.integers(1, 30), st.floats(0.05, 1))
def test_the_number_of_measurements_is_bounded(layers, steps, wanted):
    costs = {f"l{i}": SiteCost(5 + saved, 5.0) for i, (_, saved) in enumerate(layers)}
    path = ManyLayers({f"l{i}": error for i, (error, _) in enumerate(layers)}, steps)
    blocks = dict.fromkeys(costs, lambda x: x)
    faster = tuple(site for site in costs if costs[site].saved > 0)
    if not faster:
        with pytest.raises(ValueError, match="faster than attention"):
            trade_off(path, None, blocks, costs, wanted=wanted)
        return
    measured = trade_off(path, None, blocks, costs, wanted=wanted)
    assert measured.measurements == path.calls <= 3 * len(faster) + 12
    assert len(measured.points) <= 30
    assert choose(measured, "fastest").replaced == faster
    assert choose(measured, wanted).saved >= wanted - 1e-9
    # Errors that add up over layers and steps grow by nothing, and are estimated as they are.
    if sum(path.each[site] for site in faster) > 1e-3:
        assert measured.growth == pytest.approx([1.0] * len(measured.growth), rel=1e-3)


@settings(deadline=None, max_examples=40)
@given(LAYERS, st.integers(1, 30), st.floats(0.05, 0.9))
def test_a_quick_search_measures_less_and_saves_as_much(layers, steps, wanted):
    costs = {f"l{i}": SiteCost(5 + saved, 5.0) for i, (_, saved) in enumerate(layers)}
    path = ManyLayers({f"l{i}": error for i, (error, _) in enumerate(layers)}, steps)
    faster = tuple(site for site in costs if costs[site].saved > 0)
    assume(faster)
    blocks = dict.fromkeys(costs, lambda x: x)
    measured = trade_off(path, None, blocks, costs, wanted=wanted, quick=True)
    assert measured.measurements == path.calls <= 2 * len(faster) + 2
    # All layers from every other start, and the best from each.
    assert len(measured.points) <= 5 + 10
    assert choose(measured, "fastest").replaced == faster
    assert choose(measured, wanted).saved >= wanted - 1e-9


def test_a_quick_search_measures_no_layer_that_saves_next_to_nothing(teacher):
    costs = {"first": SiteCost(100.0, 1.0), "second": SiteCost(2.0, 1.0)}
    path, blocks = toy_path(teacher), toy_blocks()
    measured = trade_off(path, teacher, blocks, costs, wanted=0.6, quick=True)
    assert measured.measurements == 2 and not measured.alone


POINTS = st.lists(
    st.builds(
        ChoicePoint,
        st.just(("a",)),
        st.sampled_from([0.0, 0.1, 0.5]),
        st.floats(0, 1),
        st.floats(0, 10),
    ),
    min_size=1,
)


@given(POINTS)
def test_the_front_has_no_dominated_point_and_dominates_all_others(points):
    front = pareto(points)
    assert list(front) == sorted(front, key=lambda point: point.saved)
    for a in front:
        assert not any(b.saved >= a.saved and b.error < a.error for b in points)
        assert not any(b.saved > a.saved and b.error <= a.error for b in points)
    for a in points:
        assert any(b.saved >= a.saved and b.error <= a.error for b in front)


@given(POINTS, st.floats(0.01, 1))
def test_any_share_is_chosen_at_the_least_error_or_refused(points, share):
    measured = TradeOff({point: torch.zeros(1) for point in points}, {}, {}, [], 0)
    enough = [point for point in points if point.saved >= share - 1e-9]
    if not enough:
        with pytest.raises(ValueError, match="Ask for less"):
            choose(measured, share)
        return
    point = choose(measured, share)
    assert point.saved >= share - 1e-9
    bounds = error_bounds(points)
    assert bounds[point] == min(bounds[other] for other in enough)
    assert all(bounds[other] <= other.error for other in points)


def test_more_blocks_are_not_chosen_by_a_lucky_picture():
    """Fewer layers from the same step on save enough: a few pictures that say otherwise are few."""
    few, all_of_them = ("a", "b"), ("a", "b", "c", "d")
    points = [
        ChoicePoint(all_of_them, 0.25, 0.75, 0.010),
        ChoicePoint(few, 0.25, 0.66, 0.012),
        ChoicePoint(few, 0.0, 0.88, 0.100),
    ]
    measured = TradeOff({point: torch.zeros(1) for point in points}, {}, {}, [], 0)
    assert choose(measured, "balanced") == points[1]
    assert choose(measured, 0.7) == points[0]
    assert choose(measured, "fastest") == points[2]


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(0.01, 10)), min_size=1))
def test_ratios_never_rise_and_add_up(pairs):
    tops, bottoms = zip(*pairs, strict=True)
    ratios = falling_ratios(tops, bottoms)
    assert len(ratios) == len(pairs) and min(ratios) >= 0
    assert all(a >= b - 1e-9 for a, b in pairwise(ratios))
    if all(a / b >= c / d for (a, b), (c, d) in pairwise(pairs)):
        expected = [max(0.0, a / b) for a, b in pairs]
        assert ratios == pytest.approx(expected)


@given(st.permutations(list(PLAN)), st.floats(0, 1, exclude_max=True), st.floats(0, 1))
def test_shares_fall_with_the_start_and_rise_with_layers(order, start, later):
    assert share_saved(COSTS, PLAN, 0.0) == pytest.approx(1)
    shares = [share_saved(COSTS, order[:count], start) for count in range(len(order) + 1)]
    assert shares == sorted(shares) and shares[0] == 0
    after = start + (1 - start) * later
    assert share_saved(COSTS, order, after) <= share_saved(COSTS, order, start) + 1e-12
