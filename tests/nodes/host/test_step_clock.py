"""What a step took, on the nodes that a user looks at."""

import math

import pytest
import torch
from patched_models import apply, condition, sample

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")

STOCK, BLOCKS = 1.0, 0.25


@pytest.fixture
def shown(monkeypatch, comfy):
    """(node, text) of all that Apply ΔConv, node 3, and the demo model, node 5, show."""
    from comfyui_deltaconv.nodes import apply, demo
    from comfyui_deltaconv.nodes.host import application, demo_model

    texts = []
    for module, node in ((apply, "3"), (demo, "5")):
        monkeypatch.setattr(module, "running_node", lambda node=node: node)
    for module in (apply, application, demo_model):
        monkeypatch.setattr(
            module, "show_on_node", lambda text, node="3": texts.append((node, text))
        )
    return texts


@pytest.fixture
def clock(monkeypatch, comfy):
    """A function of a model and seconds by sigma → the model, on a clock that these drive."""
    from comfyui_deltaconv.nodes.host import step_clock

    now = [0.0]
    monkeypatch.setattr(step_clock, "_now", lambda device: now[0])

    def timed(model, seconds):
        def call(apply_model, arguments):
            now[0] += seconds(float(arguments["timestep"].max()))
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

        clone = model.clone()
        clone.set_model_unet_function_wrapper(call)
        return clone

    return timed


@pytest.fixture
def told(monkeypatch, comfy):
    """A function of the seconds of a layer's attention, where its block takes 0.01."""
    from comfyui_deltaconv.deltaconv.application import fastest
    from comfyui_deltaconv.nodes.host import application

    def told(attention):
        def seconds(device, call):
            call()
            return 0.01 if call.__name__ in ("convolve", "kept") else attention

        monkeypatch.setattr(fastest, "seconds", seconds)
        monkeypatch.setattr(fastest, "BUDGET", math.inf)
        monkeypatch.setattr(application, "_SAVINGS", fastest.Savings())
        monkeypatch.setattr(application, "_CHOICES", fastest.Choices())

    return told


def steps_of(shown):
    """The line about steps on Apply ΔConv, as it stands at the end; "" without one."""
    lines = [text for node, text in shown if node == "3"][-1].splitlines()
    return next((line for line in lines if line.startswith("a step took")), "")


def test_attention_and_blocks_of_one_sampling_are_compared(base, weights, clock, shown):
    sampling = base.get_model_object("model_sampling")
    begin = sampling.percent_to_sigma(0.5)
    model = clock(base, lambda sigma: BLOCKS if sigma <= begin else STOCK)
    sample(apply(model, weights, start_percent=0.5)[0], steps=8)
    assert steps_of(shown) == "a step took 1 s with attention, 0.25 s with blocks"


def test_without_a_step_of_attention_its_layers_tell(base, weights, clock, told, shown):
    told(attention=0.03)
    patched, _ = apply(clock(base, lambda sigma: BLOCKS), weights)
    first = sample(patched, steps=4)
    # Ten layers, each 0.02 s longer with attention.
    expected = (
        "a step took 0.25 s with blocks; with attention it would take about 0.45 s, by the time of "
        "its layers"
    )
    assert steps_of(shown) == expected
    assert torch.equal(sample(patched, steps=4), first)


def test_where_faster_counts_the_layers_with_blocks(base, weights, clock, told, shown):
    told(attention=0.002)
    patched, _ = apply(clock(base, lambda sigma: BLOCKS), weights, when="where faster")
    sample(patched, steps=4)
    assert "with attention it would take about 0.25 s" in steps_of(shown)


def test_a_layer_that_was_not_timed_leaves_only_the_step(
    base, weights, clock, told, shown, monkeypatch
):
    from comfyui_deltaconv.deltaconv.application import fastest

    told(attention=0.03)
    monkeypatch.setattr(fastest, "BUDGET", 1e-9)
    sample(apply(clock(base, lambda sigma: BLOCKS), weights)[0], steps=4)
    assert steps_of(shown) == "a step took 0.25 s"


def test_layers_behind_another_nodes_hand_leave_only_the_step(base, weights, clock, told, shown):
    """As a compiled model or a replayed graph: a part of the calls comes by."""
    told(attention=0.03)
    patched, _ = apply(clock(base, lambda sigma: BLOCKS), weights)
    calls, forwards = [], dict(patched.object_patches)

    def rarely(forward):
        def call(x, *arguments, **named):
            calls.append(x)
            return forward(x, *arguments, **named) if len(calls) < 12 else torch.zeros_like(x)

        return call

    for key, forward in forwards.items():
        patched.add_object_patch(key, rarely(forward))
    sample(patched, steps=4)
    assert steps_of(shown) == "a step took 0.25 s"


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_first_steps_are_not_counted(base, weights, clock, shown, steps):
    times = iter([100.0, 100.0, BLOCKS])
    sample(apply(clock(base, lambda sigma: next(times)), weights)[0], steps=steps)
    assert steps_of(shown).startswith("a step took 0.25 s" if steps == 3 else "")
    assert bool(steps_of(shown)) == (steps == 3)


def test_telling_calls_no_block_twice(base, weights, told, shown):
    told(attention=0.03)
    patched, _ = apply(base, weights)
    (blocks,) = patched.get_additional_models_with_key("deltaconv")
    calls = []
    for block in blocks.model.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    sample(patched, steps=3)
    assert len(calls) == 3 * 10


def test_whoever_else_hears_of_steps_still_does(base, weights):
    import comfy.sample

    heard = []
    latent = torch.zeros(1, 3, 24, 16)
    comfy.sample.sample(
        apply(base, weights)[0],
        comfy.sample.prepare_noise(latent, 1),
        3,
        4.0,
        "euler",
        "normal",
        condition("red apple"),
        condition(""),
        latent,
        callback=lambda step, denoised, x, steps: heard.append((step, steps, denoised.shape)),
        seed=1,
    )
    assert heard == [(step, 3, (1, 3, 24, 16)) for step in range(3)]


def test_the_demo_model_tells_of_its_own_steps_alone(clock, shown):
    from comfyui_deltaconv.nodes.demo import DeltaConvDemoModel

    model, weights = DeltaConvDemoModel.execute().args
    model = clock(model, lambda sigma: STOCK)
    sample(apply(model, weights)[0], steps=3)
    assert not [text for node, text in shown if node == "5"]
    sample(model, steps=3)
    assert shown[-1] == ("5", "a step took 1 s with self-attention")


def test_a_guider_that_names_its_arguments_is_left_alone(comfy):
    from comfyui_deltaconv.nodes.host.step_clock import StepClock

    clock, given = StepClock(lambda sigma: "stock"), {"sigmas": torch.zeros(3), "callback": None}
    assert clock.run(lambda *args, **kwargs: (args, kwargs), ("noise",), given) == (
        ("noise",),
        given,
    )
    assert clock.series["stock"].step is None


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((0.0468, 0.0123), "a step took 0.0468 s with attention, 0.0123 s with blocks"),
        ((1234.5, 128.46), "a step took 1234 s with attention, 128 s with blocks"),
    ],
)
def test_seconds_of_any_size_are_plain_numbers(base, weights, clock, shown, steps, said):
    begin = base.get_model_object("model_sampling").percent_to_sigma(0.5)
    model = clock(base, lambda sigma: steps[sigma <= begin])
    sample(apply(model, weights, start_percent=0.5)[0], steps=8)
    assert steps_of(shown) == said


def test_a_long_step_is_reckoned_in_plain_numbers(base, weights, clock, told, shown):
    told(attention=9.01)
    sample(apply(clock(base, lambda sigma: 30.0), weights)[0], steps=4)
    assert "a step took 30 s with blocks; with attention it would take about 120 s" in (
        steps_of(shown)
    )
