"""Object patches of other nodes on modules above, at and below a replaced layer, in any order."""

import copy
import functools
import itertools
import logging
import random
from types import MethodType

import patched_models as models
import pytest
import torch

pixart_weights = models.pixart_weights

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")


class Around(torch.nn.Module):
    """A module of another node that calls the one it stands for."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, *arguments, **named):
        return 0.5 * self.inner(x, *arguments, **named)


class Pass(torch.nn.Module):
    """A module of another node without any layer inside."""

    def forward(self, x, *_, **__):
        return x


class Narrow(torch.nn.Module):
    """An attention of another node that knows only what the model calls it with."""

    def forward(self, x, context=None, value=None, transformer_options=None, HW=None):
        return 0.5 * x


def own_forward(module):
    """What stands for the class's forward on this one module, or None."""
    own = vars(module).get("forward")
    # ComfyUI itself leaves the bound method where an object patch was.
    if isinstance(own, MethodType) and own.__self__ is module:
        return None if own.__func__ is type(module).forward else own
    return own


class Host:
    """One kind of model, with the patches that other nodes could lay around one of its layers."""

    def __init__(self, base, weights, sample, site, part):
        self.base, self.weights = base, weights
        self.sample = functools.partial(sample, steps=1)
        self.site, self.key = site, f"diffusion_model.{site}"
        self.above, self.part = self.key.rpartition(".")[0], f"{self.key}.{part}"
        self.stock = {name: base.get_model_object(name) for name in self.keys[:3]}
        self.copies = {name: self.changed(module) for name, module in self.stock.items()}
        self.around = Around(self.stock[self.key])
        self.before = self.forwards()
        self.alone = self.sample(base)

    @property
    def keys(self):
        return self.key, self.above, self.part, f"{self.key}.forward", f"{self.part}.forward"

    @staticmethod
    def changed(module):
        other = copy.deepcopy(module)
        for parameter in other.parameters():
            parameter.mul_(0.9)
        return other

    def forwards(self):
        """Every module of the model and of the other nodes, with what stands for its forward."""
        roots = [self.base.model, *self.copies.values(), self.around]
        return [
            (name, module, own_forward(module))
            for root in roots
            for name, module in root.named_modules(remove_duplicate=False)
        ]

    def patched(self, model, kind, **inputs):
        """A clone with one more patch, as the node of that kind would make it."""
        if kind == "ours":
            return models.apply(model, self.weights, **inputs)[0]
        clone = model.clone()
        if kind == "forward":
            clone.add_object_patch(f"{self.key}.forward", self.scaled(clone, self.key))
        elif kind == "part's forward":
            clone.add_object_patch(f"{self.part}.forward", self.scaled(clone, self.part))
        else:
            key = {"copy": self.key, "around": self.key, "above": self.above, "part": self.part}
            module = self.around if kind == "around" else self.copies[key[kind]]
            clone.add_object_patch(key[kind], module)
        return clone

    @staticmethod
    def scaled(model, key):
        original = model.get_model_object(f"{key}.forward")
        return lambda x, *arguments, **named: 0.8 * original(x, *arguments, **named)

    def assert_restored(self):
        import comfy.model_management

        assert torch.equal(self.sample(self.base), self.alone)
        comfy.model_management.unload_all_models()
        assert self.forwards() == self.before


@pytest.fixture(params=["unet", "pixart"])
def host(request):
    if request.param == "unet":
        base, weights = map(request.getfixturevalue, ("base", "weights"))
        site = "middle_block.1.transformer_blocks.0.attn1"
        return Host(base, weights, functools.partial(models.sample, size=(8, 8)), site, "to_q")
    base, weights = map(request.getfixturevalue, ("pixart", "pixart_weights"))
    return Host(base, weights, models.sample_pixart, "blocks.1.attn", "qkv")


KINDS = ("copy", "around", "above", "forward", "part", "part's forward")


@pytest.mark.parametrize("kind", KINDS)
def test_either_order_restores_exactly(host, kind):
    import comfy.model_management

    for order in (("ours", kind), (kind, "ours")):
        model = host.base
        for one in order:
            model = host.patched(model, one)
        result = host.sample(model)
        assert not torch.equal(result, host.alone)
        assert torch.equal(host.sample(host.base), host.alone)
        assert torch.equal(host.sample(model), result)
        comfy.model_management.unload_all_models()
        assert host.forwards() == host.before
        assert torch.equal(host.sample(model), result)
        del model
        host.assert_restored()


def test_any_order_of_many_restores_exactly(host):
    """Loaded, unloaded and alternated at random, with a clone that dies while it is loaded."""
    import comfy.model_management

    # A part of `around` is nowhere: ComfyUI itself cannot load that.
    orders = list(itertools.permutations(("ours", *(k for k in KINDS if k != "around"))))
    rng = random.Random(0)
    for order in rng.sample(orders, 12):
        chain = [host.base]
        for kind in order:
            chain.append(host.patched(chain[-1], kind))
        # Without ours on it, ComfyUI alone restores.
        carrying = chain[1 + order.index("ours") :]
        for model in rng.choices([*carrying, host.base], k=3):
            comfy.model_management.load_models_gpu([model, *model.get_nested_additional_models()])
            if rng.random() < 0.3:
                comfy.model_management.unload_all_models()
                assert host.forwards() == host.before, order
        del chain, carrying, model
        comfy.model_management.load_models_gpu([host.base])
        assert host.forwards() == host.before, order
    host.assert_restored()


def test_a_module_exchanged_before_is_chained(host):
    swapped = host.patched(host.base, "copy")
    beneath = host.sample(swapped, steps=4)
    resting = host.patched(swapped, "ours", start_percent=0.4, end_percent=0.6)
    assert torch.equal(host.sample(resting, steps=4), beneath)
    acting = host.patched(swapped, "ours")
    assert torch.equal(host.sample(acting), host.sample(host.patched(host.base, "ours")))
    host.assert_restored()


def test_a_module_exchanged_after_wins_and_is_said_once(host, caplog):
    swapped = host.sample(host.patched(host.base, "copy"))
    applied = host.patched(host.base, "ours", sites=host.site)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(host.sample(host.patched(applied, "copy")), swapped)
        host.sample(host.patched(applied, "copy"))
    said = [r.getMessage() for r in caplog.records if "of its own over the" in r.getMessage()]
    assert len(said) == 1
    assert "in 1 of the 1 replaced self-attention layers" in said[0]
    around = host.sample(host.patched(applied, "around"))
    assert not torch.equal(around, host.sample(host.patched(host.base, "around")))
    host.assert_restored()


def test_applying_again_reaches_the_exchanged_module(host):
    once = host.patched(host.patched(host.base, "ours"), "copy")
    twice, report = models.apply(once, host.weights)
    assert "of its own over the" not in report
    assert torch.equal(host.sample(twice), host.sample(host.patched(host.base, "ours")))
    host.assert_restored()


def test_a_forward_beneath_an_exchanged_module_keeps_its_place(host):
    from comfyui_deltaconv.nodes.host.patch import detach

    model = host.patched(host.patched(host.base, "forward"), "copy")
    before = list(model.object_patches.items())
    patched, report = models.apply(model, host.weights)
    assert "in 1 of the" in report and "of its own over the" in report
    host.sample(patched)
    assert list(detach(patched).object_patches.items()) == before
    host.assert_restored()


def test_a_failing_load_leaves_nothing(host):
    from comfy.patcher_extension import CallbacksMP

    def fail(*_):
        raise RuntimeError("the other node's")

    for order in (("ours", "copy"), ("copy", "ours"), ("ours", "above"), ("above", "ours")):
        import comfy.model_management

        comfy.model_management.unload_all_models()
        model = host.base
        for kind in order:
            model = host.patched(model, kind)
        model.add_callback(CallbacksMP.ON_LOAD, fail)
        with pytest.raises(RuntimeError, match="the other node's"):
            host.sample(model)
        assert host.forwards() == host.before
    host.assert_restored()


def test_a_loaded_clone_with_exchanged_modules_hides_no_layer(host):
    student = host.sample(host.patched(host.base, "ours"))
    swapped = host.base.clone()
    swapped.add_object_patch(host.above, Pass())
    without = host.sample(swapped)
    # As it is right after sampling: the model object still carries the other node's module.
    assert torch.equal(host.sample(host.patched(host.base, "ours")), student)
    assert torch.equal(host.sample(swapped), without)
    host.assert_restored()


def test_a_module_without_the_layer_is_refused(host):
    swapped = host.base.clone()
    swapped.add_object_patch(host.above, Pass())
    with pytest.raises(ValueError, match=rf"layer at {host.site}, got none: another node"):
        host.patched(swapped, "ours")
    assert list(swapped.object_patches) == [host.above]
    host.sample(host.patched(swapped, "ours", sites=f"all, -{host.site}"))
    host.assert_restored()


def test_a_module_that_knows_fewer_arguments_is_called_as_by_the_model(host):
    swapped = host.base.clone()
    swapped.add_object_patch(host.key, Narrow())
    resting = host.patched(swapped, "ours", start_percent=0.4, end_percent=0.6)
    assert torch.equal(host.sample(resting, steps=4), host.sample(swapped, steps=4))
    host.assert_restored()


def test_a_compiled_model_is_chained(pixart, pixart_weights, caplog):
    """Nodes put `torch.compile(diffusion_model)` there, which hands on the model's own modules."""
    student = models.sample_pixart(models.apply(pixart, pixart_weights)[0], steps=1)
    alone = models.sample_pixart(pixart, steps=1)
    for ours_first in (True, False):
        model = models.apply(pixart, pixart_weights)[0] if ours_first else pixart.clone()
        whole = model.get_model_object("diffusion_model")
        model.add_object_patch("diffusion_model", torch.compile(whole, backend="eager"))
        if not ours_first:
            model = models.apply(model, pixart_weights)[0]
        # What it compiles to is not the question here.
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(models.sample_pixart(model, steps=1), student)
        assert torch.equal(models.sample_pixart(pixart, steps=1), alone)
    assert "of its own over the" not in caplog.text


@pytest.mark.parametrize("kind", ["copy", "above"])
def test_a_teacher_over_exchanged_modules_restores_exactly(host, kind):
    from comfyui_deltaconv.nodes.host.teacher import ComfyTeacher

    swapped = host.patched(host.base, kind)
    with torch.inference_mode(False), ComfyTeacher(swapped):
        pass
    host.assert_restored()
