"""What every kind of host model says of its self-attention: where it is, how it is called.

A kind is one subclass of `ModelSites` in a file of this folder and one row in `KINDS`; its models
are rows in `deltaconv/families.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from comfy.model_patcher import ModelPatcher

from ....deltaconv.families import families_of
from ....deltaconv.locality.attention import ValueMap

Size = tuple[int, int]

# What attention sees beside its own tokens, where another node brings it.
OTHERS = "keys, values or a mask of another node"
GIVEN = "another node gave it a mask, or keys of its own"
# Channels of CLIP-G's pooled output, which SDXL reads.
_POOLED = 1280


@dataclass(frozen=True)
class Site:
    """One self-attention module: its path inside the diffusion model, channels, level, weights.

    `level` is how often the map was halved; `parameters` counts the attention's own weights.
    """

    path: str
    dim: int
    level: int
    parameters: int

    @property
    def forward_key(self) -> str:
        """Name of the object patch that replaces this site's forward."""
        return f"diffusion_model.{self.path}.forward"

    @property
    def weight_prefix(self) -> str:
        """What the names of the attention's own weights start with."""
        return f"diffusion_model.{self.path}."


@dataclass
class SiteCall:
    """One call of a site: tokens x [B, N, C], the map that they should be, and the way on.

    `attend` calls what stood there before, with the arguments as they came, → [B, N, C]. `problem`
    says what attention sees beside one map, "" where it sees that alone.
    """

    x: torch.Tensor
    batch: int
    size: Size
    attend: Callable[[], torch.Tensor]
    problem: str = ""

    def expected(self, dim: int) -> tuple[int, int, int]:
        """Shape [B, rows · columns, C] of a whole map."""
        return self.batch, self.size[0] * self.size[1], dim

    def is_whole_map(self, dim: int) -> bool:
        """Whether a block can compute it: all tokens of the map, attending to each other."""
        return not self.problem and self.x.shape == self.expected(dim)


class Heads(NamedTuple):
    """Where attention is computed: q, k, v [B, heads, N, d] as they act, the map, the scale.

    `problem` says why there are none to see; the rest is None then.
    """

    q: torch.Tensor | None
    k: torch.Tensor | None
    v: torch.Tensor | None
    size: Size
    scale: float | None = None
    problem: str = ""


class Projections(NamedTuple):
    """The Linears, without biases, to queries, keys and values, and the number of heads."""

    query: torch.nn.Module
    key: torch.nn.Module
    value: torch.nn.Module
    heads: int


OnMap = Callable[[SiteCall], torch.Tensor]
# May return the attention's result [B, N, heads · d], or None to have it computed as it is.
Inspect = Callable[[Heads], torch.Tensor | None]


@dataclass(frozen=True)
class ModelSites(ABC):
    """The self-attention sites of one model in network order, and all that its kind knows of them.

    `latent_step`: latents are that many cells times a whole number high and wide.
    """

    family: str
    sites: Mapping[str, Site]
    latent_step: int = 1

    @classmethod
    @abstractmethod
    def of(cls, model: ModelPatcher) -> "ModelSites | None":
        """The sites of `model`; None where it is of another kind."""

    @property
    def dims(self) -> dict[str, int]:
        """Site path → channels C."""
        return {path: site.dim for path, site in self.sites.items()}

    @property
    def levels(self) -> dict[str, int]:
        """Site path → resolution level."""
        return {path: site.level for path, site in self.sites.items()}

    @abstractmethod
    def map_size(self, path: str, height: int, width: int) -> Size:
        """Rows and columns of tokens at a site, for a latent of that height and width."""

    @abstractmethod
    def wrap(self, site: Site, original: Callable, on_map: OnMap) -> Callable:
        """A forward in the module's own signature that gives `on_map` every call of the site."""

    @abstractmethod
    def inspecting(
        self, site: Site, module: torch.nn.Module, original: Callable, inspect: Inspect
    ) -> Callable:
        """A forward that lets `inspect` see, or exchange, what attention is computed from."""

    @abstractmethod
    def example_call(
        self,
        diffusion_model: torch.nn.Module,
        site: Site,
        x: torch.Tensor,
        latent_size: Size,
        options: Mapping,
    ) -> dict[str, object]:
        """The arguments, by name, that a call of the site alone needs beside x [B, N, C].

        `options` are the transformer options that the model would be called with.
        """

    @abstractmethod
    def values(
        self, module: torch.nn.Module, affine: Callable[[Callable], torch.Tensor]
    ) -> ValueMap | None:
        """The value map of a site's module; None where its keys are not the map's own tokens.

        `affine` gives the matrix [out, in] of a layer as it acts, without what it adds.
        """

    def projections(self, module: torch.nn.Module) -> Projections | None:
        """Whence a site's module has its queries, keys and values; None where not from x alone."""
        return None

    @abstractmethod
    def after_residual(self, site: Site) -> str:
        """Path of the first module that reads the hidden state after the site's residual add."""

    @abstractmethod
    def recomputable(self, diffusion_model: torch.nn.Module) -> list[str]:
        """Paths of modules whose input is small to keep, and all within them large."""

    def differentiable(self, module: torch.nn.Module, original: Callable) -> Callable:
        """A site's forward through which gradients pass, where `original` has none for them."""
        return original

    def without_mutation(self, original: Callable) -> Callable:
        """A block's forward that leaves its input as it is, for features and gradients."""
        return original

    @abstractmethod
    def text_shape(self, diffusion_model: torch.nn.Module) -> Size:
        """Tokens and channels of the encoded prompt that the model is made for."""

    def prompt(self, diffusion_model: torch.nn.Module) -> list:
        """A CONDITIONING entry of random numbers, with all that a call of the model needs."""
        shape = self.text_shape(diffusion_model)
        return [torch.randn(1, *shape), {"pooled_output": torch.randn(1, _POOLED)}]

    def is_taken(self, path: str, transformer_options: Mapping) -> bool:
        """Whether another node's entry in the options keeps the site from being called."""
        return False

    def prepare(self, patcher: ModelPatcher, key: str) -> None:  # noqa: B027 (most need none)
        """Add the wrappers, under `key`, by which `wrap` and `inspecting` learn the map's size."""

    def forget(self) -> None:  # noqa: B027 (most keep nothing)
        """Forget what the wrappers of an earlier sampling noted."""


def intercepting(options: Mapping, size: Size, problem: str, inspect: Inspect) -> dict[str, object]:
    """Transformer options under which the attention of one module is seen by `inspect`.

    An override of another node stays in effect beneath.
    """
    earlier = options.get("optimized_attention_override")

    def override(function, q, k, v, heads, *args, **kwargs):
        def compute():
            if earlier is not None:
                return earlier(function, q, k, v, heads, *args, **kwargs)
            return function(q, k, v, heads, *args, **kwargs)

        mask = args[0] if args else kwargs.get("mask")
        if problem or q.shape != k.shape or mask is not None:
            why = problem or GIVEN
            found = Heads(None, None, None, size, problem=why)
        else:
            split = (q, k, v)
            if not kwargs.get("skip_reshape"):
                split = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in split)
            found = Heads(*split, size, kwargs.get("scale"))
        result = inspect(found)
        return compute() if result is None else result

    return {**options, "optimized_attention_override": override}


def exact_family(model: ModelPatcher, dims: Mapping[str, int]) -> str:
    """The family whose sites are exactly these; a model of our own names itself."""
    named = getattr(type(model.model.model_config), "deltaconv_family", "")
    exact = [family.name for family in families_of(dims) if len(family.dims) == len(dims)]
    return named or next(iter(exact), "")


def parameter_count(module: torch.nn.Module) -> int:
    """Numbers in the weights of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def differentiable_attention(function, *args, **kwargs):
    """An `optimized_attention_override` by torch's own attention, which has a backward pass."""
    from comfy.ldm.modules.attention import attention_pytorch

    return attention_pytorch(*args, **kwargs)
