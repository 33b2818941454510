"""A loaded MODEL as the teacher of a distillation; only a clone of it is patched."""

import inspect
import math
from collections.abc import Callable
from functools import partial

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import merge_nested_dicts
from einops import rearrange
from torch.utils.checkpoint import checkpoint

from ...deltaconv.distillation.teacher import Look
from ...deltaconv.locality.attention import ValueMap
from .encoded import EncodedConditions
from .fingerprint import fingerprint
from .object_patches import restore_in_reverse
from .patch import KEY, detach, original_forward
from .sites import Heads, ModelSites, Site, SiteCall, differentiable_attention, find_sites


class ComfyTeacher:
    """`Teacher` over a clone of `model` without ΔConvBlocks; LoRAs on it stay in effect.

    Used as a context manager, outside inference mode: entering loads the clone, leaving unloads
    it. With `differentiable`, gradients must pass through its weights; where the loaded ones
    cannot carry them, the base is loaded again for the clone alone.
    """

    def __init__(self, model: ModelPatcher, *, differentiable: bool = False, name: str = ""):
        self.model_sites: ModelSites = find_sites(model)
        # Latents [B, C, T, H, W] of such models are taken and returned as images, T = 1.
        self._has_frames = model.model.latent_format.latent_dimensions == 3
        self.dims = self.model_sites.dims
        self.family = self.model_sites.family
        self.base_model = name
        self.fingerprint = fingerprint(model)
        self.why_not_differentiable = ""
        clone = detach(model)
        self.model_sites.prepare(clone, KEY)
        if differentiable:
            clone = self._differentiable(clone)
        restore_in_reverse(clone)
        self.patcher = clone
        self.device = torch.device(clone.load_device)
        self._visit = self._features = None
        self._look: Look | None = None
        self._visited = self._recompute = False
        self._encoded = EncodedConditions(clone, self.device)
        self._trained: list[torch.nn.Parameter] = []
        self._was_training = False
        # By which the sites learn their map; those of other nodes rest.
        self._wrappers = {
            event: {KEY: by_key[KEY]} for event, by_key in clone.wrappers.items() if KEY in by_key
        }
        for site in self.model_sites.sites.values():
            self._open(site)
        recomputes = differentiable and not self.why_not_differentiable
        for path in self.model_sites.recomputable(clone.model.diffusion_model):
            key = f"diffusion_model.{path}.forward"
            original, _ = original_forward(clone, key)
            forward = self.model_sites.without_mutation(original)
            if recomputes or forward is not original:
                clone.add_object_patch(key, self._recomputing(forward) if recomputes else forward)

    def __enter__(self) -> "ComfyTeacher":
        comfy.model_management.load_models_gpu([self.patcher])
        self._was_training = comfy.model_management.in_training
        comfy.model_management.in_training = True
        # Only the blocks train: parameters of the base must not collect gradients.
        self._trained = [
            p for p in self.patcher.model.parameters() if p.requires_grad and not p.is_inference()
        ]
        for parameter in self._trained:
            parameter.requires_grad_(False)
        return self

    def __exit__(self, *_) -> None:
        comfy.model_management.in_training = self._was_training
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self._trained = []
        self._encoded.clear()
        # Unload all of it: the next node loads what it needs.
        comfy.model_management.free_memory(
            self.patcher.model_size(),
            self.device,
            keep_loaded=[
                loaded
                for loaded in comfy.model_management.current_loaded_models
                if loaded.model is not None and not loaded.model.is_clone(self.patcher)
            ],
        )
        self.patcher.unpatch_model()
        comfy.model_management.soft_empty_cache()

    def sigmas(self, position: torch.Tensor) -> torch.Tensor:
        """position [B] in (0, 1), 0 the noisiest step → sigma [B]."""
        sampling = self.patcher.get_model_object("model_sampling")
        return torch.tensor([float(sampling.percent_to_sigma(p)) for p in position.tolist()])

    def noised(self, latents, noise, sigma):
        """latents, noise [B, C, H, W], sigma [B] → the model's input at that sigma."""
        sampling = self.patcher.get_model_object("model_sampling")
        return sampling.noise_scaling(sigma[:, None, None, None], noise, latents)

    def latents_in(self, samples: torch.Tensor) -> torch.Tensor:
        """A LATENT's samples → latents [B, C, H, W] as the model works on them.

        Raises ValueError for another number of channels, and for videos.
        """
        channels, shape = self.patcher.model.latent_format.latent_channels, list(samples.shape)
        image = len(shape) == 4 or (self._has_frames and len(shape) == 5 and shape[2] == 1)
        if not image or shape[1] != channels:
            wanted = f"[B, {channels}, H, W]" + f" or [B, {channels}, 1, H, W]" * self._has_frames
            raise ValueError(
                f"Expected latents {wanted} for this model, got {shape}. Encode the images with "
                "this model's own VAE, one by one where it makes videos."
            )
        if self._has_frames and len(shape) == 4:
            samples = samples[:, :, None]
        return self._images(self.patcher.model.process_latent_in(samples))

    def latents_out(self, latents: torch.Tensor) -> torch.Tensor:
        """What `latents_in` made back into a LATENT's samples, with a frame where it has them."""
        return self.patcher.model.process_latent_out(self.with_frame(latents))

    def with_frame(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → [B, C, 1, H, W] for a model whose latents have frames, else as it is."""
        return latents[:, :, None] if self._has_frames else latents

    def _images(self, latents: torch.Tensor) -> torch.Tensor:
        return latents[:, :, 0] if self._has_frames else latents

    def predict(self, x, sigma, conditions, visit=None, features=None):
        """x [B, C, H, W], sigma [B], one CONDITIONING entry per image → ε̂ in float32."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        options = self.patcher.model_options.get("transformer_options", {}).copy()
        options["cond_or_uncond"] = [0]
        options["wrappers"] = merge_nested_dicts(options.get("wrappers", {}), self._wrappers)
        if torch.is_grad_enabled() or self.device.type == "cpu":
            # Fast attentions such as Sage have no backward, and ComfyUI's default on a CPU takes
            # at least twice as long to save memory. Another node's choice stays.
            options.setdefault("optimized_attention_override", differentiable_attention)
        self._visit, self._visited = visit, False
        results, found, order = [], [], []
        try:
            for rows, arguments in self._encoded.batches(conditions, self.with_frame(x)):
                self._features = {} if features is not None else None
                whole = len(rows) == len(x)
                part = (x, sigma) if whole else (x[rows], sigma[rows])
                arguments["transformer_options"] = {**options, "sigmas": part[1]}
                noisy = self.with_frame(part[0])
                denoised = self.patcher.model.apply_model(noisy, part[1], **arguments)
                results.append(self._images(denoised))
                found.append(self._features)
                order += rows
        finally:
            # Keep them for recomputation in the backward pass; predict sets new ones each time.
            if not (self._recompute and torch.is_grad_enabled()):
                self._visit = self._features = None
        if visit is not None and not self._visited:
            raise ValueError(
                "Expected the model's self-attention to be seen, got none: it was unloaded while "
                "it was used. Free memory, or load less beside it, and queue again."
            )
        if features is not None:
            features.update({site: _in_order([f[site] for f in found], order) for site in found[0]})
        denoised = _in_order(results, order)
        return (x - denoised.float()) / sigma[:, None, None, None]

    def checkpointing(self, active: bool) -> None:
        """Recompute the base's activations in the backward pass instead of keeping them."""
        self._recompute = active
        if not active:
            self._visit = self._features = None

    @property
    def dtype(self) -> torch.dtype:
        """dtype that the layers compute in, whatever their weights are stored in."""
        return self.patcher.get_model_object("manual_cast_dtype") or self.patcher.model.get_dtype()

    @torch.no_grad()
    def values(self, site: str) -> ValueMap | None:
        """The site's value map, including LoRA, casting and storage."""
        return self.model_sites.values(self._module(site), partial(self._matrix, self.dims[site]))

    def token_heads(self, site: str) -> int:
        """Heads of a layer whose scores are of linear maps of C channels alone; else 0."""
        found = self.model_sites.projections(self._module(site))
        return found.heads if found else 0

    @torch.no_grad()
    def projections(self, site: str) -> torch.Tensor:
        """The maps [3C, C] to queries, keys and values, including LoRA, casting and storage."""
        found = self.model_sites.projections(self._module(site))
        if found is None:
            raise ValueError(f"Expected a layer with linear queries and keys, got {site}.")
        return torch.cat([self._matrix(self.dims[site], layer) for layer in found[:3]])

    def _module(self, site: str) -> torch.nn.Module:
        return comfy.utils.get_attr(self.patcher.model, f"diffusion_model.{site}")

    def _matrix(self, dim: int, layer: Callable) -> torch.Tensor:
        """The matrix [out, dim] of a layer as it acts, without what it adds."""
        basis = torch.cat([torch.eye(dim), torch.zeros(1, dim)]).to(self.device, self.dtype)[None]
        # Subtract what zero maps to: the bias.
        rows = layer(basis)[0]
        return (rows[:dim] - rows[dim]).float().T.contiguous()

    def _differentiable(self, clone: ModelPatcher) -> ModelPatcher:
        parameters = clone.model.diffusion_model.parameters()
        if not clone.is_dynamic() and not any(p.is_inference() for p in parameters):
            return clone
        if "force_deepcopy" not in inspect.signature(clone.clone).parameters:
            self.why_not_differentiable = (
                "this ComfyUI keeps loaded weights in inference mode and cannot load them again "
                "for training. Set the joint steps to 0, or update ComfyUI to 0.30.0 or newer."
            )
            return clone
        if clone.cached_patcher_init is None:
            self.why_not_differentiable = (
                "the node that loaded this MODEL does not say how to load it again for training. "
                "Set the joint steps to 0, or load the model with a stock loader."
            )
            return clone
        return clone.clone(force_deepcopy=True)

    def _patch(self, key: str, make) -> None:
        original, _ = original_forward(self.patcher, key)
        self.patcher.add_object_patch(key, make(original))

    def _open(self, site: Site) -> None:
        """Object patches that show the site's map to `visit`, and its residual to `features`."""

        def on_map(call: SiteCall) -> torch.Tensor:
            return self._on_map(site, call)

        module = comfy.utils.get_attr(self.patcher.model, f"diffusion_model.{site.path}")

        def opened(original):
            original = self.model_sites.differentiable(module, original)
            seen = self.model_sites.inspecting(site, module, original, self._inspect)

            def attention(x, *arguments, **named):
                return (seen if self._look else original)(x, *arguments, **named)

            return self.model_sites.wrap(site, attention, on_map)

        self._patch(site.forward_key, opened)
        after = self.model_sites.after_residual(site)
        if any(name == after for name, _ in self.patcher.model.diffusion_model.named_modules()):
            key = f"diffusion_model.{after}.forward"
            self._patch(key, lambda original: self._feature(site, original))

    def _on_map(self, site: Site, call: SiteCall) -> torch.Tensor:
        if self._visit is None:
            return call.attend()
        x, size = call.x, call.size
        if x.shape[1] != math.prod(size):
            got = call.problem or f"{x.shape[1]} tokens"
            raise ValueError(
                f"Expected the whole map {list(size)} at {site.path}, got {got}. Remove HyperTile, "
                "ToMe, reference images or the like for the distillation."
            )
        self._visited = True
        map_ = partial(rearrange, pattern="b (h w) c -> b h w c", h=size[0], w=size[1])

        def attend(look: Look | None = None) -> torch.Tensor:
            self._look = look
            try:
                return map_(call.attend())
            finally:
                self._look = None

        y = self._visit(site.path, map_(x), attend)
        return rearrange(y, "b h w c -> b (h w) c")

    def _inspect(self, heads: Heads) -> None:
        if self._look is not None and not heads.problem:
            self._look(heads.q, heads.k, heads.scale)

    def _feature(self, site, original):
        def forward(x, *args, **kwargs):
            if self._features is not None:
                # The same tensor, also where a block has put something else in its place.
                self._features.setdefault(site.path, torch.positive(x))
            return original(x, *args, **kwargs)

        return forward

    def _recomputing(self, original):
        def forward(*args, **kwargs):
            if self._recompute and torch.is_grad_enabled():
                return checkpoint(original, *args, use_reentrant=False, **kwargs)
            return original(*args, **kwargs)

        return forward


def _in_order(parts: list[torch.Tensor], order: list[int]) -> torch.Tensor:
    """Rows of `parts` [b, …], which are rows `order` of the whole → the whole [B, …]."""
    if len(parts) == 1:
        return parts[0]
    joined = torch.cat(parts)
    return joined[torch.tensor(order, device=joined.device).argsort()]
