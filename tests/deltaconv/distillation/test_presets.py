"""The authors' presets: gradients against their formulas, weight decay by group, states of both."""

import json
from contextlib import closing
from dataclasses import replace
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
import toy_teacher as toy
from comfyui_deltaconv.deltaconv.distillation import (
    PRESETS,
    DistillationError,
    DistillationSettings,
    StageSettings,
    code_settings,
    default_settings,
    distill,
    paper_settings,
)
from comfyui_deltaconv.deltaconv.distillation.checkpoint import (
    State,
    load_state,
    save_state,
    state_files,
)
from comfyui_deltaconv.deltaconv.distillation.data import draw
from comfyui_deltaconv.deltaconv.distillation.losses import joint_losses
from comfyui_deltaconv.deltaconv.distillation.settings import new_blocks, read_plan
from comfyui_deltaconv.deltaconv.distillation.student import Optimizer, Student, parameter_groups

PLAN, ToyTeacher, toy_data, toy_settings = toy.PLAN, toy.ToyTeacher, toy.toy_data, toy.toy_settings
CPU = torch.device("cpu")


def student_of(settings, teacher):
    torch.manual_seed(3)
    return Student(new_blocks(read_plan(PLAN, teacher.dims), teacher.dims, "scaled"), settings, CPU)


def batch_of(teacher):
    options = {"seed": 0, "batch": 4, "position": 0, "unconditional": 0.15}
    return draw(toy_data(), teacher, torch.Generator().manual_seed(0), **options)


def gradients(student, loss):
    parameters = student.parameters
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def preset_gradients(settings):
    """Student, teacher, batch, and the gradients that the joint stage gives its parameters."""
    teacher = ToyTeacher()
    student, batch = student_of(settings, teacher), batch_of(teacher)
    losses = joint_losses(teacher, student, batch, 1.0, lambda loss: loss.backward(), settings)
    found = {name: p.grad for name, p in student.parameters.items()}
    return teacher, student, batch, found, losses


def by_formula(teacher, student, batch, overwritten):
    """The authors' loss as it stands: three terms, with the student's prediction or without it."""
    inputs, goal, own = (batch.x, batch.sigma, batch.conditions), {}, {}
    expected = teacher.predict(*inputs, None, goal).detach()
    predicted = teacher.predict(*inputs, student.visit, own)
    if overwritten:
        # As their wrapper for SD1.5 leaves it.
        predicted = expected
    features = sum(F.mse_loss(own[site], goal[site].detach()) for site in PLAN)
    output = F.mse_loss(predicted, batch.noise) + F.mse_loss(predicted, expected)
    return output + 0.001 * features


def assert_same(found, wanted):
    for name, gradient in wanted.items():
        size = gradient.norm()
        assert size > 0 and (found[name] - gradient).norm() <= 1e-5 * size, name


def test_the_code_for_sd15_has_the_gradient_of_the_features_alone():
    teacher, student, batch, found, losses = preset_gradients(code_settings("SD1.5"))
    assert set(losses) == {"features"}
    overwritten = by_formula(teacher, student, batch, overwritten=True)
    assert_same(found, gradients(student, overwritten))
    # What was left out of the loss is a constant, and not small.
    assert overwritten - losses["features"] > 0.1
    straight = gradients(student, by_formula(teacher, student, batch, overwritten=False))
    assert any((found[name] - g).norm() > 0.1 * g.norm() for name, g in straight.items())


@pytest.mark.parametrize("name", ["paper", "published", "code-sdxl", "code-pixart"])
def test_the_others_have_the_gradient_of_all_three(name):
    settings = replace(PRESETS[name](), eight_bit=False)
    teacher, student, batch, found, losses = preset_gradients(settings)
    assert set(losses) == {"noise", "teacher", "features"}
    assert_same(found, gradients(student, by_formula(teacher, student, batch, overwritten=False)))


def test_presets_say_what_each_trains_with():
    assert PRESETS["published"]() == paper_settings() and PRESETS["default"]() == default_settings()
    assert PRESETS["tokens"]() == default_settings(growth=10.0) != default_settings()
    assert PRESETS["tokens"](growth=2.0, seed=3) == default_settings(growth=2.0, seed=3)
    assert paper_settings().joint.weight_decay == 0.03 and paper_settings().joint.decayed == "all"
    codes = {model: code_settings(model) for model in ("SD1.5", "SDXL", "PixArt")}
    for settings in codes.values():
        stage = settings.joint
        assert (stage.weight_decay, stage.decayed, settings.min_snr) == (0.01, "linear", 0)
        assert (stage.lr, stage.betas, stage.warmup) == (3e-4, (0.9, 0.99), 500)
        assert settings.layers.steps == 0 and settings.init == "random"
    assert [settings.eight_bit for settings in codes.values()] == [False, True, False]
    assert code_settings("SDXL", eight_bit=False, seed=4).eight_bit is False
    with pytest.raises(DistillationError, match=r"SD1\.5"):
        code_settings("SD3")


def with_decay(decayed, **changes):
    stage = {"weight_decay": 0.5, "decayed": decayed, "warmup": 0}
    settings = toy_settings(4, 4, init="random", **changes)
    layers, joint = (replace(s, **stage) for s in (settings.layers, settings.joint))
    return replace(settings, layers=layers, joint=joint)


@pytest.mark.parametrize("decayed", ["all", "linear"])
def test_a_step_without_gradient_decays_what_it_should(decayed):
    settings = with_decay(decayed)
    student = student_of(settings, ToyTeacher())
    before = {name: p.detach().clone() for name, p in student.parameters.items()}
    for parameter in student.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    stage = settings.joint
    assert Optimizer(student, stage, settings).update(0, 0.0) == ""
    shrunk = set()
    for name, parameter in student.parameters.items():
        kept = torch.equal(parameter.detach(), before[name])
        expected = before[name] * (1 - stage.lr * stage.weight_decay)
        assert kept or torch.allclose(parameter.detach(), expected, rtol=1e-6, atol=0)
        shrunk |= set() if kept else {name}
    linear = {
        f"{site}.{layer}.weight" for site in PLAN for layer in ("conv_up", "conv_out", "conv_pool")
    }
    assert shrunk == (linear if decayed == "linear" else set(before))


def test_a_depthwise_bias_is_a_bias():
    names = ("conv_up.weight", "conv_up.bias", "conv_out.weight", "conv_pool.bias")
    names += tuple(f"gates.{s}.conv_spatial.{kind}" for s in (0, 1) for kind in ("weight", "bias"))
    # One site's name alone may hold a Linear's.
    parameters = {
        f"{site}.{name}": torch.nn.Parameter(torch.ones(1))
        for site in ("a.attn1", "conv_up.weight.1")
        for name in names
    }
    decayed, kept = parameter_groups(parameters, StageSettings(weight_decay=0.1, decayed="linear"))
    linear = [p for n, p in parameters.items() if n.endswith(("conv_up.weight", "conv_out.weight"))]
    assert [id(p) for p in decayed["params"]] == [id(p) for p in linear]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert len(kept["params"]) == len(parameters) - len(linear)
    (all_of_them,) = parameter_groups(parameters, StageSettings(weight_decay=0.1))
    assert len(all_of_them["params"]) == len(parameters) and all_of_them["weight_decay"] == 0.1


def run(settings, **options):
    return list(distill(ToyTeacher(), PLAN, toy_data(), settings, **options))


def losses(records):
    return [(r.stage, r.step, r.loss) for r in records]


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("stop", [3, 7])
def test_a_run_with_groups_resumes_bit_for_bit(tmp_path, stop, eight_bit, monkeypatch):
    if eight_bit:
        # Large enough for bitsandbytes to quantize the moments.
        monkeypatch.setattr(toy, "CHANNELS", 128)
    settings = with_decay("linear", eight_bit=eight_bit)
    straight = run(settings)
    assert losses(straight) != losses(run(with_decay("all", eight_bit=eight_bit)))
    with closing(distill(ToyTeacher(), PLAN, toy_data(), settings, folder=tmp_path)) as records:
        before = list(islice(records, stop))
    after = run(settings, folder=tmp_path)
    assert losses(before) + losses(after) == losses(straight)


def test_a_state_from_before_there_were_groups_resumes(tmp_path):
    settings = toy_settings(4, 4, init="random")
    straight = run(settings)
    with closing(distill(ToyTeacher(), PLAN, toy_data(), settings, folder=tmp_path)) as records:
        before = list(islice(records, 7))
    shapes = {name: tuple(p.shape) for name, p in before[-1].student.parameters.items()}
    identity = {"base": "toy-0", "recipe": {"gate": "scaled"}}
    identity["recipe"] |= {site: [kernel, list(scales)] for site, (kernel, scales) in PLAN.items()}
    state = load_state(tmp_path, identity, shapes)
    plain = json.loads(json.dumps(state.progress.settings))
    for stage in ("layers", "joint"):
        assert plain[stage].pop("decayed") == "all"
    old = State(state.tensors, replace(state.progress, settings=plain))
    for path in state_files(tmp_path):
        path.unlink()
    save_state(tmp_path, old, identity)
    after = run(settings, folder=tmp_path)
    assert losses(before) + losses(after) == losses(straight)
    assert "resumed" in after[0].message and "other settings" not in after[0].message
    changed = replace(settings, joint=replace(settings.joint, decayed="linear"))
    save_state(tmp_path, old, identity)
    for path in state_files(tmp_path)[:-1]:
        path.unlink()
    assert "other settings" in run(changed, folder=tmp_path)[0].message


def test_a_choice_of_tensors_that_there_is_not_is_refused():
    with pytest.raises(DistillationError, match=r"joint\.decayed"):
        DistillationSettings.from_mapping({"joint": {"decayed": "biases"}})
