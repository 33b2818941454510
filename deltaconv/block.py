"""The ΔConvBlock: a pyramid of gated depthwise convolutions and a pooled constant."""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import cast

import torch
from torch import nn
from torch.nn.functional import linear

from ..kernels import GATES, Biases, Projections, SiteProjection, gated_pyramid
from .geometry import check_geometry, complete_state, default_scales, read_geometry
from .tokens import PooledAttention, spread, token_means


class DepthwiseKernel(nn.Module):
    """A depthwise kernel [k, k, h] in the published layout, with an optional bias [h]."""

    def __init__(
        self, kernel_size: int, channels: int, bias: bool = False, *, dtype=None, device=None
    ):
        super().__init__()
        shape = (kernel_size, kernel_size, channels)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        bound = 1 / kernel_size
        nn.init.uniform_(self.weight, -bound, bound)
        zeros = torch.zeros(channels, dtype=dtype, device=device) if bias else None
        self.bias = None if zeros is None else nn.Parameter(zeros)

    def extra_repr(self) -> str:
        return "×".join(map(str, self.weight.shape)) + ("" if self.bias is None else ", bias")


def _like(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`tensor.to`, which takes longer to find that there is nothing to do."""
    if tensor.dtype == dtype and tensor.device == device:
        return tensor
    return tensor.to(device, dtype)


class Gate(nn.Module):
    """One scale of the pyramid; its own module only for the published tensor names."""

    def __init__(
        self, kernel_size: int, channels: int, bias: bool = False, *, dtype=None, device=None
    ):
        super().__init__()
        self.conv_spatial = DepthwiseKernel(kernel_size, channels, bias, dtype=dtype, device=device)


class Lent:
    """A context that yields what it was given; a generator costs more than the rest of the call."""

    __slots__ = ("weights",)

    def __init__(self, weights: tuple[torch.Tensor, ...] | None):
        self.weights = weights

    def __enter__(self) -> tuple[torch.Tensor, ...] | None:
        return self.weights

    def __exit__(self, *_) -> None:
        pass


def lend_plain(linears: Sequence[nn.Module], like: torch.Tensor) -> Lent:
    """Context: weight, bias, weight, bias … of plain torch Linears, or None: call the modules.

    A host whose Linears cast or move their weights supplies its own `lend` beside them, which
    yields the tensors in `like`'s dtype, on its device.
    """
    tensors = []
    for each in linears:
        # Read the dictionaries: Module's own lookup takes ten times as long.
        bias = each._parameters.get("bias")
        plain = type(each) is nn.Linear and bias is not None
        if not plain or each._forward_hooks or each._forward_pre_hooks:
            return Lent(None)
        tensors += (each._parameters["weight"], bias)
    return Lent(tuple(tensors))


class DeltaConvBlock(nn.Module):
    """x [B, H, W, C] → [B, H, W, C], in place of a whole self-attention layer.

    `dim` is C, a multiple of 4; `kernel_size` is odd; `scales` are fractions of H × W; `gate` is
    "scaled" (SD1.5, SDXL) or "sigmoid" (PixArt). `biased` are the scales, by index, whose depthwise
    convolution has a bias, as the authors' first release has it. `heads` above 0 add an attention
    over the map's pooled tokens (tokens.py), our own extension. `operations` supplies `Linear`:
    torch.nn, or the host's that casts its weights, and optionally `lend`, which passes them to one
    fused op; see `lend_plain`. Raises ValueError for impossible geometry.

    y = conv_out(pyramid(conv_up(x))) + conv_pool(mean of x over H, W), and tokens(x) where it has
    heads; source: arXiv 2504.21292.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        scales: Sequence[float] = (1.0, 0.5),
        gate: str = "scaled",
        *,
        biased: Sequence[int] = (),
        heads: int = 0,
        operations: ModuleType | type = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        problems = check_geometry(dim, kernel_size, heads)
        if not scales or not all(0 < scale <= 1 for scale in scales):
            problems.append(f"scales must be one or more fractions in (0, 1], got {scales=}")
        if gate not in GATES:
            problems.append(f"gate must be one of {GATES}, got {gate=}")
        if not all(level in range(len(scales)) for level in biased):
            problems.append(f"biased must be indices of {scales=}, got {biased=}")
        if problems:
            raise ValueError("This ΔConvBlock cannot be: " + "; ".join(problems) + ".")
        self.dim, self.kernel_size = dim, kernel_size
        self.scales, self.gate = tuple(map(float, scales)), gate
        self.biased = tuple(sorted(set(biased)))
        self.heads = heads
        self._lend = getattr(operations, "lend", lend_plain)
        self._project = SiteProjection()
        inner = dim // 2
        factory = {"dtype": dtype, "device": device}
        self.conv_up = operations.Linear(dim, inner, **factory)
        self.gates = nn.ModuleList(
            Gate(kernel_size, inner, level in self.biased, **factory)
            for level in range(len(scales))
        )
        self.conv_out = operations.Linear(inner // 2 * len(scales), dim, **factory)
        self.conv_pool = operations.Linear(dim, dim, **factory)
        if heads:
            self.tokens = PooledAttention(dim, heads, operations=operations, **factory)

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, torch.Tensor],
        *,
        gate: str = "scaled",
        scales: Sequence[float] | None = None,
        operations: ModuleType | type = nn,
    ) -> "DeltaConvBlock":
        """A block with copies of `state`'s tensors, in their dtype and on their device.

        `state` has the published names in any of the published layouts; dim, kernel and number of
        scales are read off the tensors. `scales` default to 1, 1/2, 1/3, as many as there are.
        Without `conv_up.bias` it is zero; a depthwise bias of zeros is none.
        Raises ValueError that lists every missing, surplus and misshapen tensor.
        """
        tensors = complete_state({name: tensor.detach() for name, tensor in state.items()})
        geometry = read_geometry({name: tensor.shape for name, tensor in tensors.items()})
        scales = default_scales(geometry.num_scales) if scales is None else tuple(scales)
        if len(scales) != geometry.num_scales:
            raise ValueError(f"Expected {geometry.num_scales} scales, one per gate, got {scales=}.")
        shape = (geometry.dim, geometry.kernel_size, scales, gate)
        own = {"biased": geometry.biased, "heads": geometry.heads}
        block = cls(*shape, **own, operations=operations, device="meta")
        # `assign`, because the host's modules may have no weight to copy into before they load.
        block.load_state_dict({name: t.clone() for name, t in tensors.items()}, assign=True)
        return block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, H, W, C] → [B, H, W, C], any B, H, W ≥ 1."""
        if not self.heads:
            return self.convolved(x)
        # Read the dictionary: Module's own lookup takes ten times as long.
        tokens = cast(PooledAttention, self._modules["tokens"])
        if torch.is_grad_enabled():
            return self.convolved(x) + tokens(x)
        hooked = tokens._forward_hooks or tokens._forward_pre_hooks
        if x.device.type == "cpu" and not hooked:
            with self._lend(self._linears(), x) as lent:
                if lent is not None:
                    return self._onto_tokens(x, tokens, lent)
        return self.convolved(x).add_(tokens(x))

    def convolved(self, x: torch.Tensor) -> torch.Tensor:
        """The published block, without pooled tokens: x [B, H, W, C] → [B, H, W, C]."""
        linears = self._linears()
        with self._lend(linears, x) as lent:
            if lent is not None:
                up_weight, up_bias, *rest = lent
                u = linear(x, up_weight, up_bias)
                kernels, biases = self.depthwise_like(u)
                projections = Projections(*rest)
                return self._project(x, u, kernels, self.scales, self.gate, projections, biases)
        conv_up, conv_out, conv_pool = linears
        u = conv_up(x)
        kernels, biases = self.depthwise_like(u)
        pyramid = gated_pyramid(u, kernels, self.scales, self.gate, biases)
        context = conv_pool(x.mean(dim=(1, 2), keepdim=True))
        return conv_out(pyramid) + context

    def _linears(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """conv_up, conv_out, conv_pool, in the order in which they are lent."""
        modules = cast(dict[str, nn.Module], self._modules)
        return modules["conv_up"], modules["conv_out"], modules["conv_pool"]

    def _onto_tokens(
        self, x: torch.Tensor, tokens: PooledAttention, lent: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """The same sum in fewer passes over the map, which are what a CPU takes long for.

        What is equal everywhere joins the few tokens, and the last product adds itself onto them.
        """
        up_weight, up_bias, out_weight, out_bias, pool_weight, pool_bias = lent
        u = linear(x, up_weight, up_bias)
        kernels, biases = self.depthwise_like(u)
        pyramid = gated_pyramid(u, kernels, self.scales, self.gate, biases)
        means = token_means(x)
        height, width = x.shape[1:3]
        even = height % means.shape[1] == 0 and width % means.shape[2] == 0
        mean = (means if even else x).mean(dim=(1, 2), keepdim=True)
        context = linear(mean, pool_weight, pool_bias + out_bias)
        result = spread(tokens.coarse(means) + context, height, width).contiguous()
        result.flatten(0, 2).addmm_(pyramid.flatten(0, 2), out_weight.t())
        return result

    def depthwise_like(self, u: torch.Tensor) -> tuple[list[torch.Tensor], Biases]:
        """Every scale's kernel [k, k, h], and bias [h] or None, in u's dtype and on its device."""
        # The host casts its modules' weights to the activations; plain parameters are cast here.
        dtype, device = u.dtype, u.device
        kernels, biases = [], []
        # Dictionaries, as in `forward`.
        gates = cast(nn.Module, self._modules["gates"])
        for gate in cast(dict[str, nn.Module], gates._modules).values():
            parameters = cast(DepthwiseKernel, gate._modules["conv_spatial"])._parameters
            kernels.append(_like(cast(torch.Tensor, parameters["weight"]), dtype, device))
            if self.biased:
                bias = parameters.get("bias")
                biases.append(None if bias is None else _like(bias, dtype, device))
        return kernels, biases

    def extra_repr(self) -> str:
        scales = ", ".join(f"{scale:.3g}" for scale in self.scales)
        biased = f", biased={self.biased}" if self.biased else ""
        biased += f", heads={self.heads}" if self.heads else ""
        shape = f"{self.dim}, kernel_size={self.kernel_size}, scales=({scales})"
        return f"{shape}, gate={self.gate}{biased}"
