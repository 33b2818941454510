"""What measuring costs: the demo's step in time, a real-size SD1.5 UNet in memory."""

import statistics
import time

import pytest
import torch
from comfyui_deltaconv.deltaconv.locality.attention import memory_bound
from comfyui_deltaconv.deltaconv.locality.settings import LocalityPlan
from host_models import REAL, host_model, randomize
from safetensors.torch import load_file

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("comfy")]


def watched(model):
    """(probe, clone) that measures every site while `probe.watching`."""
    from comfyui_deltaconv.nodes.host.probe import Probe, probed
    from comfyui_deltaconv.nodes.host.sites import find_sites

    model_sites = find_sites(model)
    probe = Probe(model_sites, LocalityPlan(points=()))
    return probe, probed(model, model_sites, probe)


@torch.inference_mode()
def test_a_measured_step_takes_at_most_three_stock_steps(comfy, data):
    import comfy.model_management
    from comfyui_deltaconv.nodes.host.demo_model import load_demo_model

    probe, clone = watched(load_demo_model())
    comfy.model_management.load_models_gpu([clone])
    golden = load_file(data / "demo_forward.safetensors")
    arguments = (golden["x"], golden["timesteps"])
    seconds = {False: [], True: []}
    for _ in range(4):
        for probe.watching in seconds:
            since = time.process_time()
            clone.model.diffusion_model(
                *arguments, context=golden["context"], transformer_options={}
            )
            seconds[probe.watching].append(time.process_time() - since)
            probe.take()
    # The first of each is warm-up.
    stock, measured = (statistics.median(seconds[kind][1:]) for kind in (False, True))
    assert measured <= 3 * stock


@torch.inference_mode()
def test_sd15_at_512_stays_within_its_memory_bound(comfy):
    import comfy.model_management

    model = randomize(host_model(*REAL["sd1"]), 0.02)
    probe, clone = watched(model)
    assert len(probe.model_sites.sites) == 16
    comfy.model_management.load_models_gpu([clone])
    x, context = torch.randn(1, 4, 64, 64), torch.randn(1, 77, 768)
    extra = []

    class Peak(torch.utils._python_dispatch.TorchDispatchMode):
        """Counts bytes of tensors as they are made and dropped."""

        def __init__(self):
            super().__init__()
            self.live, self.peak = {}, 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            import weakref

            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() not in self.live:
                        self.live[storage.data_ptr()] = storage.nbytes()
                        weakref.finalize(storage, self.live.pop, storage.data_ptr(), None)
            self.peak = max(self.peak, sum(self.live.values()))
            return out

    outputs = []
    for probe.watching in (False, True):
        with Peak() as peak:
            arguments = (x, torch.tensor([500.0]))
            options = {"transformer_options": {}}
            outputs.append(clone.model.diffusion_model(*arguments, context=context, **options))
        extra.append(peak.peak)
    assert torch.equal(*outputs)
    assert len(probe.take()[0]) == 16
    # Stock attention and the measurement do not hold their memory at one time.
    assert extra[1] - extra[0] <= memory_bound(1, 8, 40, 64, 64) < 2**30
