"""Recipes: what the presets decide, what their text says, what is refused."""

import pytest
import torch
from comfyui_deltaconv.deltaconv.families import FAMILIES
from comfyui_deltaconv.deltaconv.geometry import BlockPlan
from comfyui_deltaconv.deltaconv.locality.attention import measure_attention
from comfyui_deltaconv.deltaconv.locality.recipe import (
    Recipe,
    RecipeError,
    budget_recipe,
    cost_curve,
    measured_recipe,
    parse_recipe,
    published_recipe,
    recipe_computation,
)
from comfyui_deltaconv.deltaconv.locality.report import (
    LocalityReport,
    Sensitivity,
    SiteLocality,
    measure_site,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DOWN = "input_blocks.1.1.transformer_blocks.0.attn1"
MIDDLE = "middle_block.1.transformer_blocks.0.attn1"
UP = "output_blocks.5.1.transformer_blocks.0.attn1"


def near(size, reach):
    """q, k of attention that falls off within `reach` cells on a size × size map."""
    index = torch.arange(size * size)
    cells = torch.stack([index // size, index % size], dim=-1).double()
    weight = torch.exp(-(torch.cdist(cells, cells) ** 2) / (2 * reach**2)).clamp_min(1e-30)
    return weight.log().float()[None, None], torch.eye(size * size)[None, None]


def anywhere(size):
    """q, k of attention on one key that has nothing to do with where the query is."""
    keys = torch.randperm(size * size, generator=torch.Generator().manual_seed(0))
    return 30 * torch.eye(size * size)[keys][None, None], torch.eye(size * size)[None, None]


def even(size):
    return torch.zeros(1, 1, size * size, 4), torch.zeros(1, 1, size * size, 4)


def report(errors=(None, None, None), family=""):
    sites = {}
    for (path, (q, k)), error in zip(
        {DOWN: near(16, 1.5), MIDDLE: even(8), UP: anywhere(16)}.items(), errors, strict=True
    ):
        size = round(q.shape[2] ** 0.5)
        measurement = measure_site([measure_attention(q, k, size, size, scale=1.0)], 1.0)
        sites[path] = SiteLocality(path, 0, 32, size, size, [measurement])
        if error is not None:
            sites[path].sensitivity = Sensitivity(9, [error])
    return LocalityReport(family, (16, 16), [1.0], [0.5], sites)


def test_kinds_are_told_apart():
    assert [site.kind for site in report().sites.values()] == ["local", "even", "content"]


def test_measured_follows_the_field_and_judges_by_sensitivity_what_is_neither():
    blocks = measured_recipe(report()).blocks
    assert blocks[DOWN] and blocks[DOWN].kernel in (3, 5)
    assert blocks[MIDDLE] == BlockPlan(3)
    assert blocks[UP] is None
    cheap = measured_recipe(report((0.1, 0.1, 0.001)))
    assert cheap.blocks[UP] and "looks by picture" in cheap.notes[UP]
    dear = measured_recipe(report((0.1, 0.1, 0.5)))
    assert not dear.blocks[UP] and "above 1%" in dear.notes[UP]


def test_budget_takes_the_least_sensitive_first():
    measured = report((0.02, 0.3, 0.01))
    curve = cost_curve(measured)
    assert [point.replaced[-1:] for point in curve] == [(), (UP,), (DOWN,), (MIDDLE,)]
    assert [point.error for point in curve] == pytest.approx([0, 0.01, 0.03, 0.33])
    recipe = budget_recipe(measured, curve[2].computation)
    assert set(recipe.replaced) == {UP, DOWN}
    assert recipe_computation(measured, recipe) == pytest.approx(curve[2].computation)
    assert not budget_recipe(measured, 1.0).replaced
    with pytest.raises(ValueError, match=r"every layer replaced it is 0\.\d+ of stock's"):
        budget_recipe(measured, 0.0)
    with pytest.raises(ValueError, match="Measure again with sensitivity"):
        budget_recipe(report(), 0.5)


def test_published_has_the_authors_kernels_and_no_others():
    sites = report().sites
    recipe = published_recipe(LocalityReport("sd1", (64, 64), [1.0], [0.5], sites))
    for path, block in recipe.blocks.items():
        assert block.kernel == FAMILIES["sd1"].published_kernel(path)
    with pytest.raises(ValueError, match="Expected a family the authors ship kernels for"):
        published_recipe(report())


blocks = (
    st.builds(
        BlockPlan,
        st.sampled_from(range(3, 18, 2)),
        st.lists(
            st.sampled_from([1.0, 0.5, 1 / 3, 0.25, 0.2525, 0.123456789]), min_size=1, unique=True
        ).map(tuple),
        heads=st.sampled_from([0, 1, 8, 20]),
    )
    | st.none()
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(blocks, min_size=3, max_size=3), st.floats(0, 1, exclude_max=True))
def test_text_is_read_back(chosen, start):
    plans = dict(zip((DOWN, MIDDLE, UP), chosen, strict=True))
    recipe = Recipe(plans, "about", {UP: "why"}, start)
    again = parse_recipe(recipe.to_text(), (DOWN, MIDDLE, UP))
    assert again.to_text() == recipe.to_text()
    assert again.start == start
    for path, block in again.blocks.items():
        expected = recipe.blocks[path]
        assert (block is None) == (expected is None)
        if expected:
            assert block.kernel == expected.kernel
            assert block.scales == expected.scales
            assert block.heads == expected.heads


def test_sites_that_the_text_leaves_out_are_kept():
    recipe = parse_recipe(f"{UP}: replace kernel=9", (DOWN, MIDDLE, UP))
    assert recipe.blocks == {DOWN: None, MIDDLE: None, UP: BlockPlan(9)}


def test_heads_of_pooled_tokens_stand_behind():
    recipe = parse_recipe(f"{UP}: replace kernel=5 heads=8\n{MIDDLE}: replace kernel=5 heads=0")
    assert recipe.blocks == {UP: BlockPlan(5, heads=8), MIDDLE: BlockPlan(5)}
    assert f"{UP}: replace kernel=5 scales=1,1/2 heads=8\n" in recipe.to_text()
    assert recipe.to_text().count("heads") == 1


def test_the_start_is_a_line_of_its_own():
    recipe = parse_recipe(f"{UP}: replace kernel=9\nstart: 0.3  # from here on", (DOWN, MIDDLE, UP))
    assert recipe.start == 0.3 and set(recipe.blocks) == {DOWN, MIDDLE, UP}
    assert recipe.to_text().startswith("start: 0.3\n")
    always = parse_recipe(f"{UP}: replace kernel=9")
    assert always.start == 0 and "start" not in always.to_text()
    with pytest.raises(RecipeError, match="at least one line `site: …`"):
        parse_recipe("start: 0.3")
    with pytest.raises(RecipeError, match="Blocks would never act"):
        Recipe({UP: None}, start=1.0)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (f"{UP}: keep\nstart: 1", 2, "expected a start of at least 0 and below 1"),
        ("start: -0.1", 1, "expected a start of at least 0 and below 1"),
        ("start: nan", 1, "expected a start of at least 0 and below 1"),
        ("start: 30%", 1, "expected a start of at least 0 and below 1"),
        ("start:", 1, "expected a start of at least 0 and below 1"),
        ("start: keep", 1, "expected a start of at least 0 and below 1"),
        ("start: replace kernel=9", 1, "expected a start of at least 0 and below 1"),
        (f"start: 0.1\n{UP}: keep\nstart: 0.2", 3, "once, first in line 1"),
        (f"{UP} replace", 1, "expected `site: keep`"),
        (f"# one\n\n{UP}: swap", 3, "expected keep, or replace"),
        (f"{UP}: keep kernel=3", 1, "expected keep, or replace"),
        (f"{UP}:", 1, "expected keep, or replace"),
        (f"{UP}: replace", 1, "expected replace with kernel="),
        (f"{UP}: replace kernel=8", 1, "expected an odd kernel from 3 to 17, got '8'"),
        (f"{UP}: replace kernel=19", 1, "expected an odd kernel"),
        (f"{UP}: replace kernel=١٣", 1, "expected an odd kernel"),
        (f"{UP}: replace kernel=9 kernel=9", 1, "once each"),
        (f"{UP}: replace kernel=9 gate=x", 1, "once each"),
        (f"{UP}: replace kernel=9 scales=1, 1/2", 1, "without spaces inside"),
        (f"{UP}: replace kernel=9 scales=0", 1, "scales such as 1,1/2"),
        (f"{UP}: replace kernel=9 scales=1/0", 1, "scales such as 1,1/2"),
        (f"{UP}: replace kernel=9 scales=3/2", 1, "scales such as 1,1/2"),
        (f"{UP}: replace kernel=9 scales=1,1", 1, "expected scales that differ"),
        (f"{UP}: replace kernel=9 heads=-1", 1, "a number of heads, 0 for no pooled tokens"),
        (f"{UP}: replace kernel=9 heads=", 1, "a number of heads"),
        (f"{UP}: replace kernel=9 heads=8 heads=8", 1, "once each"),
        (f"{UP}: keep\n{UP}: keep", 2, "each site once, first in line 1"),
        ("blocks.0.attn: keep", 1, "expected one of the 3 sites of this model"),
    ],
)
def test_refuses_with_line_and_reason(text, line, reason):
    with pytest.raises(RecipeError) as refused:
        parse_recipe(text, (DOWN, MIDDLE, UP))
    assert str(refused.value).startswith(f"Line {line}: ") and reason in str(refused.value)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text())
def test_any_text_is_read_or_refused(text):
    try:
        assert parse_recipe(text).blocks
    except RecipeError as error:
        assert "xpected" in str(error)
