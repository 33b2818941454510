"""Distilling blocks with pooled tokens: how they begin, are trained, kept and refused."""

from contextlib import closing
from itertools import islice

import pytest
import torch
import toy_teacher as toy
from comfyui_deltaconv.deltaconv import DeltaConvBlock, read_weights, write_weights
from comfyui_deltaconv.deltaconv.distillation import (
    DistillationError,
    StageSettings,
    distill,
    plans_with_tokens,
    weights_of,
)
from comfyui_deltaconv.deltaconv.distillation.initialization import _output_features, refit
from comfyui_deltaconv.deltaconv.distillation.student import parameter_groups
from comfyui_deltaconv.deltaconv.geometry import BlockPlan
from torch._subclasses.fake_tensor import FakeTensorMode

TOKENS = {site: (kernel, scales, 2) for site, (kernel, scales) in toy.PLAN.items()}


def run(recipe, settings=None, teacher=None, **options):
    settings = settings or toy.toy_settings()
    return list(distill(teacher or toy.ToyTeacher(), recipe, toy.toy_data(), settings, **options))


def test_the_layers_own_projections_begin_them():
    (record, *_) = run(TOKENS, toy.toy_settings(0, 0, init="informed"))
    teacher = toy.ToyTeacher()
    for site, block in record.student.blocks.items():
        assert torch.equal(block.tokens.qkv.weight, teacher.projections(site))
        assert torch.equal(block.tokens.scale.weight, torch.full((2,), (16 / 2) ** -0.5))
        assert block.tokens.out.weight.abs().sum() > 0


def test_least_squares_with_tokens_are_nearer_to_the_layers():
    settings = toy.toy_settings(0, 0, init="informed", init_images=64)
    (without,), (tokens,) = (run(recipe, settings)[:1] for recipe in (toy.PLAN, TOKENS))
    for site in toy.PLAN:
        assert tokens.losses[site] < 0.9 * without.losses[site]


def test_a_refit_solves_the_tokens_output_too():
    (record,) = run(TOKENS, toy.toy_settings(0, 0, init="informed"))[:1]
    blocks = record.student.averaged_blocks()
    for block in blocks.values():
        block.tokens.out.weight.data.mul_(-1)
    teacher, data = toy.ToyTeacher(), toy.toy_data()
    arguments = (torch.stack(list(data.latents)), torch.full((24,), 0.5), list(data.conditions))

    def replay(visit, turn, first_batch_only=False):
        teacher.predict(*arguments, visit)

    errors, expected = {}, {}

    def compare(site, x, attend):
        y = attend()
        errors[site] = ((blocks[site](x) - y).square().sum() / y.square().sum()).item()
        return y

    with torch.no_grad():
        replay(compare, 0)
        before = dict(errors)
        expected = refit(blocks, replay)
        replay(compare, 0)
    for site in toy.PLAN:
        assert errors[site] < 0.2 * before[site] and expected[site] < 0.2 * before[site]


@pytest.mark.parametrize("stop", [1, 3, 9])
def test_resume_is_bit_exact(tmp_path, stop):
    def figures(records):
        return [
            (r.stage, r.step, r.loss, dict(r.losses))
            for r in records
            if "complete already" not in r.message
        ]

    straight = run(TOKENS)
    arguments = (toy.ToyTeacher(), TOKENS, toy.toy_data(), toy.toy_settings())
    with closing(distill(*arguments, folder=tmp_path)) as records:
        before = list(islice(records, stop))
    after = run(TOKENS, folder=tmp_path)
    assert figures(before + after) == figures(straight)
    a, b = straight[-1].student.ema, (after or before)[-1].student.ema
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_states_with_and_without_tokens_are_not_mixed_up(tmp_path):
    run(TOKENS, folder=tmp_path)
    with pytest.raises(DistillationError, match="state of this recipe"):
        run(toy.PLAN, folder=tmp_path)


def test_training_lowers_the_error_and_the_file_has_the_tokens(tmp_path):
    settings = toy.toy_settings(100, 0, init="random")
    records = run(TOKENS, settings)
    losses = [r.loss for r in records if r.stage == "layers"]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    written = write_weights(
        weights_of(records[-1].student, toy.ToyTeacher(), settings), tmp_path / "a.safetensors"
    )
    assert {g.heads for g in read_weights(written).sites.values()} == {2}


def test_weight_decay_of_linears_leaves_the_scale_alone():
    block = DeltaConvBlock(8, 3, heads=2)
    named = {f"site.{name}": parameter for name, parameter in block.named_parameters()}
    decayed, kept = parameter_groups(named, StageSettings(decayed="linear", weight_decay=0.1))
    names = {
        name: any(parameter is each for each in decayed["params"])
        for name, parameter in named.items()
    }
    assert names["site.tokens.qkv.weight"] and names["site.tokens.out.weight"]
    assert not names["site.tokens.scale.weight"] and len(kept["params"]) == 6


def test_blocks_to_go_on_from_keep_their_tokens():
    first = run(TOKENS)[-1].student.averaged_blocks()
    again = run(toy.PLAN, start=first)[-1].student.blocks
    assert {block.heads for block in again.values()} == {2}
    without = run(toy.PLAN)[-1].student.averaged_blocks()
    with pytest.raises(DistillationError, match="as the recipe has it"):
        run(TOKENS, start=without)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ((5, (1.0,), 3), "heads must divide dim"),
        ((5, (1.0,), -2), "first: heads"),
        ((5, (1.0,), 1.5), "first: heads"),
        ((5, (1.0,), 2, 2), r"expected \[kernel, \[scales\]\] or \[kernel, \[scales\], heads\]"),
        (BlockPlan(5, heads=5), "heads must divide dim"),
    ],
)
def test_heads_that_cannot_be_are_refused(entry, sentence):
    with pytest.raises(DistillationError, match=sentence):
        run({"first": entry})


@pytest.fixture
def untouched(tmp_path):
    """Arguments of a run that must be refused at the call: no data drawn, no state written."""
    drawn = []

    def data():
        drawn.append(1)
        return toy.toy_data()

    yield {"dataset": data, "folder": tmp_path, "settings": toy.toy_settings(init="informed")}
    assert not drawn and not list(tmp_path.iterdir())


def test_other_heads_than_the_layers_are_refused_at_the_call(untouched):
    with pytest.raises(DistillationError, match="the 2 heads of the layer at first, got 4"):
        distill(toy.ToyTeacher(), {**TOKENS, "first": (5, (1.0,), 4)}, **untouched)


def test_layers_that_tokens_cannot_begin_are_refused_at_the_call(untouched):
    teacher = toy.ToyTeacher()
    teacher.token_heads = lambda site: 2 if site == "first" else 0
    for refused in (
        lambda: plans_with_tokens(teacher),
        lambda: distill(teacher, TOKENS, **untouched),
    ):
        with pytest.raises(DistillationError, match=r"pooled tokens, .* at second"):
            refused()
    # Without tokens there, nothing is asked of the layer.
    distill(teacher, {**TOKENS, "second": toy.PLAN["second"]}, **untouched)


def test_at_random_any_number_of_heads_will_do():
    records = run({**TOKENS, "first": (5, (1.0,), 4)}, toy.toy_settings(init="random"))
    assert records[-1].student.blocks["first"].heads == 4


def test_plans_have_the_layers_own_heads_and_small_kernels():
    plans = plans_with_tokens(toy.ToyTeacher())
    assert plans == dict.fromkeys(toy.PLAN, BlockPlan(5, (1.0,), heads=2))


def test_features_are_computed_where_the_activations_are():
    """The blocks are on the CPU while they are solved for, the teacher may be on a GPU."""
    with FakeTensorMode():
        block = DeltaConvBlock(16, 3, heads=2)
        features = _output_features(block, torch.empty(2, 9, 8, 16, device="cuda"))
        assert features.device.type == "cuda" and features.shape == (2, 9, 8, 8 + 16 + 16 + 1)
        with pytest.raises(RuntimeError, match="cpu"):
            block.tokens(torch.empty(2, 9, 8, 16, device="cuda"))
