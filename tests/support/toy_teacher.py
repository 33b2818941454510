"""A small network with real self-attention, as a teacher for tests; run as a script it distills
until it is killed: `python toy_teacher.py FOLDER STEPS`."""

import sys

import torch
import torch.nn.functional as F
from comfyui_deltaconv.deltaconv.distillation import (
    Dataset,
    DistillationSettings,
    StageSettings,
    distill,
)
from comfyui_deltaconv.deltaconv.locality.attention import ValueMap
from einops import rearrange

CHANNELS, SIZE = 16, 12
PLAN = {"first": (5, (1.0, 0.5)), "second": (3, (1.0,))}


class ToyTeacher(torch.nn.Module):
    """x [B, 3, H, W] → ε̂: a projection, two residual self-attentions with a bias to near keys."""

    family, base_model = "toy", "a toy"
    why_not_differentiable = ""
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.enter = torch.nn.Linear(3, CHANNELS)
            self.sites = torch.nn.ModuleDict(
                {
                    site: torch.nn.ModuleDict(
                        {
                            name: torch.nn.Linear(CHANNELS, CHANNELS, bias=False)
                            for name in ("query", "key", "value", "out")
                        }
                    )
                    for site in PLAN
                }
            )
            self.leave = torch.nn.Linear(CHANNELS, 3)
        self.requires_grad_(False)
        self.dims = dict.fromkeys(PLAN, CHANNELS)
        self.fingerprint = f"toy-{seed}"
        # Tests set these to meet a guard.
        self.most_images, self.calls, self.poison = 10**9, 0, set()

    def sigmas(self, position):
        return (0.05 + 3 * (1 - position)).float()

    def noised(self, latents, noise, sigma):
        return latents + sigma[:, None, None, None] * noise

    def checkpointing(self, active):
        pass

    def values(self, site):
        return ValueMap(self.sites[site]["value"].weight.detach(), 2)

    def token_heads(self, site):
        return 2

    def projections(self, site):
        return torch.cat([self.sites[site][name].weight for name in ("query", "key", "value")])

    def predict(self, x, sigma, conditions, visit=None, features=None):
        self.calls += 1
        if len(x) > self.most_images:
            raise torch.OutOfMemoryError("out of memory, as the test asked")
        scale = (1 + sigma.square()).rsqrt()[:, None, None, None]
        h = self.enter((x * scale).movedim(1, -1)) + torch.stack(list(conditions))[:, None, None]
        for site in PLAN:
            n = F.layer_norm(h, (CHANNELS,))

            def attend(look=None, site=site, n=n):
                if look is not None:
                    look(*self._heads(self.sites[site], n)[:2], None)
                return self._attention(self.sites[site], n)

            h = h + (attend() if visit is None else visit(site, n, attend))
            if features is not None:
                features[site] = h
        eps = self.leave(F.silu(h)).movedim(-1, 1) + x * scale
        return eps * float("nan") if self.calls in self.poison else eps

    def _heads(self, layers, n):
        return [
            rearrange(layers[name](n), "b h w (heads e) -> b heads (h w) e", heads=2)
            for name in ("query", "key", "value")
        ]

    def _attention(self, layers, n):
        height, width = n.shape[1:3]
        query, key, value = self._heads(layers, n)
        rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        at = rearrange([rows, cols], "yx h w -> (h w) yx").float()
        near = -torch.cdist(at, at) / 2
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=near)
        y = rearrange(y, "b heads (h w) e -> b h w (heads e)", h=height)
        return layers["out"](y)


def toy_data(count: int = 24) -> Dataset:
    """Smooth random pictures, with random conditions."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    latents = F.interpolate(coarse, (SIZE, SIZE), mode="bilinear")
    conditions = torch.randn(count, CHANNELS, generator=generator)
    return Dataset(list(latents), list(conditions), torch.zeros(CHANNELS))


def toy_settings(
    layers: int = 6, joint: int = 5, updates: int = 1, **changes
) -> DistillationSettings:
    """Short stages that save every second step."""
    stage = {"warmup": 2, "batch": 4, "updates": updates}
    defaults = {
        "layers": StageSettings(layers, **stage),
        "joint": StageSettings(joint, lr=1e-3, **stage),
        "losses": {"noise": 0.5, "teacher": 1.0, "features": 0.001},
        "init_images": 8,
        "save_every": 2,
    }
    return DistillationSettings(**{**defaults, **changes})


if __name__ == "__main__":
    torch.set_num_threads(1)
    steps = int(sys.argv[2])
    for _ in distill(ToyTeacher(), PLAN, toy_data(), toy_settings(steps, 0), folder=sys.argv[1]):
        pass
