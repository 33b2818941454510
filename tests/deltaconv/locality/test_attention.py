"""Locality of attention against closed forms and against the whole N × N map."""

import math

import pytest
import torch
from comfyui_deltaconv.deltaconv.distillation.offsets import OffsetMeans
from comfyui_deltaconv.deltaconv.locality import attention, profile
from comfyui_deltaconv.deltaconv.locality.attention import (
    attention_of,
    measure_attention,
    memory_bound,
    uniform_offsets,
    windowed_attention,
)
from comfyui_deltaconv.deltaconv.locality.decomposition import decompose, receptive_field
from comfyui_deltaconv.deltaconv.locality.profile import (
    content,
    mean_distance,
    ring_distances,
    ring_mass,
    window_mass,
    window_widths,
)
from comfyui_deltaconv.deltaconv.locality.report import measure_site

SIZES = [(1, 1), (1, 5), (7, 4), (6, 6), (9, 16)]


def cells(height, width):
    """dy, dx [N, N] between every query and every key."""
    y, x = torch.arange(height * width).div(width, rounding_mode="floor"), None
    x = torch.arange(height * width) % width
    return y[None] - y[:, None], x[None] - x[:, None]


def of_map(attention, height, width):
    """q, k [1, heads, N, N] whose attention is this one [heads, N, N]."""
    tokens = height * width
    return attention.clamp_min(1e-30).log()[None], torch.eye(tokens).expand(attention.shape)[None]


def measured(attention, height, width):
    return measure_attention(*of_map(attention, height, width), height, width, scale=1.0)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_uniform_attention_has_its_closed_form(height, width):
    tokens = height * width
    q, k = torch.randn(2, 3, tokens, 4) * 0, torch.randn(2, 3, tokens, 4)
    found = measure_attention(q, k, height, width)
    dy, dx = cells(height, width)
    near = torch.maximum(dy.abs(), dx.abs())
    distance = (dy**2 + dx**2).double().sqrt().mean()
    expected = [(near <= w // 2).double().mean() for w in window_widths(height, width)]
    for offsets in (found.offsets[0], found.pairs, uniform_offsets(height, width)[None]):
        assert torch.allclose(mean_distance(offsets), distance.expand(len(offsets)), atol=1e-6)
        mass = window_mass(offsets)
        assert torch.allclose(mass, torch.stack(expected).expand(mass.shape), atol=1e-6)
    assert torch.allclose(found.entropy[0], torch.tensor(math.log(tokens)).double(), atol=1e-5)


def test_identity_map_is_all_in_the_middle():
    found = measured(torch.eye(35)[None], 5, 7)
    assert window_mass(found.offsets)[0, 0, 0] == pytest.approx(1, abs=1e-6)
    assert float(mean_distance(found.offsets)) == pytest.approx(0, abs=1e-6)
    assert float(found.entropy) == pytest.approx(0, abs=1e-5)
    site = measure_site([found], 1.0)
    assert site.fits[0].local_share == pytest.approx(1, abs=0.05)
    assert site.content[0] == pytest.approx(0, abs=1e-5)


def test_gaussian_window_has_its_closed_form():
    height, width, spread = 12, 9, 1.7
    dy, dx = cells(height, width)
    attention = torch.exp(-(dy**2 + dx**2).double() / (2 * spread**2))
    attention = (attention / attention.sum(dim=-1, keepdim=True)).float()[None]
    found = measured(attention, height, width)
    near = torch.maximum(dy.abs(), dx.abs())
    for index, window in enumerate(window_widths(height, width)):
        inside = (attention[0] * (near <= window // 2)).sum(dim=-1).double().mean()
        assert window_mass(found.offsets)[0, 0, index] == pytest.approx(float(inside), abs=1e-5)
    # Rows far from the edge: the entropy of a Gaussian over whole cells is log(2πe·spread²).
    middle = attention[0, (height // 2) * width + width // 2].double()
    entropy = float(-(middle * middle.log()).sum())
    assert entropy == pytest.approx(math.log(2 * math.pi * math.e * spread**2), abs=0.05)
    assert float(found.entropy) < math.log(2 * math.pi * math.e * spread**2)


@pytest.mark.parametrize("chunk_bytes", [1, 5000, 2**24])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_random_attention_meets_brute_force(height, width, chunk_bytes):
    tokens = height * width
    generator = torch.Generator().manual_seed(height)
    q, k = (torch.randn(2, 3, tokens, 8, generator=generator) * 2 for _ in range(2))
    found = measure_attention(q.half(), k.half(), height, width, chunk_bytes=chunk_bytes)
    p = (q.half().double() @ k.half().double().transpose(-1, -2) / 8**0.5).softmax(dim=-1)
    dy, dx = cells(height, width)
    near = torch.maximum(dy.abs(), dx.abs())
    for index, window in enumerate(window_widths(height, width)):
        inside = (p * (near <= window // 2)).sum(dim=-1).mean(dim=(0, 2))
        assert torch.allclose(window_mass(found.offsets)[0, :, index], inside, atol=1e-5)
    distance = (p * (dy**2 + dx**2).double().sqrt()).sum(dim=-1).mean(dim=(0, 2))
    assert torch.allclose(mean_distance(found.offsets)[0], distance, atol=1e-4)
    entropy = -(p * p.log()).sum(dim=-1).mean(dim=(0, 2))
    assert torch.allclose(found.entropy[0], entropy, atol=1e-4)


def test_content_is_the_divergence_from_the_mean_map():
    height, width = 6, 5
    tokens = height * width
    p = (
        torch.randn(1, tokens, tokens, generator=torch.Generator().manual_seed(0))
        .mul(2)
        .softmax(-1)
    )
    found = measured(p, height, width)
    dy, dx = cells(height, width)
    place = (dy + height - 1) * (2 * width - 1) + dx + width - 1
    per_offset = torch.zeros(found.offsets[0, 0].numel(), dtype=torch.float64)
    per_offset.index_add_(0, place.flatten(), p[0].double().flatten())
    pairs = torch.bincount(place.flatten(), minlength=len(per_offset)).clamp_min(1)
    expected = (p[0].double() * (p[0].double() / (per_offset / pairs)[place]).log()).sum(-1).mean()
    got = content(found.offsets, found.pairs[:, None], found.entropy)
    assert float(got) == pytest.approx(float(expected), abs=1e-5)


def test_a_sample_of_queries_states_an_error_that_holds():
    height = width = 24
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 2, height * width, 8, generator=generator) * 2 for _ in range(2))
    whole = measure_attention(q, k, height, width)
    assert whole.exact and whole.standard_error(whole.entropy) is None
    truth = float(whole.entropy.mean())
    within = 0
    for seed in range(20):
        part = measure_attention(q, k, height, width, queries=160, seed=seed)
        assert part.queries == 160 and not part.exact
        assert part.offsets.sum(dim=(-2, -1)).sub(1).abs().max() < 1e-5
        per_group = part.entropy.mean(dim=1)
        error = float(part.standard_error(per_group))
        within += abs(float(per_group.mean()) - truth) <= 2 * error
    assert within >= 16
    with pytest.raises(ValueError, match="at least 32 queries"):
        measure_attention(q, k, height, width, queries=31)


def test_refuses_keys_of_another_map():
    with pytest.raises(ValueError, match=r"Expected q and k of one map.*\[1, 1, 6, 4\]"):
        measure_attention(torch.zeros(1, 1, 6, 4), torch.zeros(1, 1, 5, 4), 2, 3)


def test_stops_between_chunks():
    class Stop(BaseException):
        pass

    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 3:
            raise Stop

    q = torch.zeros(1, 1, 64, 4)
    with pytest.raises(Stop):
        measure_attention(q, q, 8, 8, chunk_bytes=1, between_chunks=stop)
    assert len(calls) == 3


def test_memory_stays_within_what_is_stated(monkeypatch):
    """Every tensor the measurement makes, counted as it is made and dropped."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Peak(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.live, self.peak = {}, 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            import weakref

            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    key = storage.data_ptr()
                    if key not in self.live:
                        self.live[key] = storage.nbytes()
                        weakref.finalize(storage, self.live.pop, key, None)
            self.peak = max(self.peak, sum(self.live.values()))
            return out

    height = width = 32
    q, k = torch.randn(1, 2, 1024, 16), torch.randn(1, 2, 1024, 16)
    with Peak() as peak:
        measure_attention(q, k, height, width, chunk_bytes=2**20)
    bound = memory_bound(1, 2, 16, height, width, chunk_bytes=2**20)
    assert peak.peak <= bound + q.nbytes + k.nbytes
    assert bound < 4 * 2 * 1024**2, "less than the map itself"
    # SD1.5 at 1024 × 1024: the largest map that the stated gibibyte is promised for.
    assert memory_bound(1, 8, 40, 128, 128) < 2**30 / 4


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("c", [0.2, 3.0])
def test_decomposition_finds_what_was_put_in(share, c):
    height = width = 32
    pairs = ring_mass(uniform_offsets(height, width))
    distances, _ = ring_distances(2 * height - 1, 2 * width - 1)
    shape = 1 / (distances**2 + c)
    local = shape / (shape @ pairs)
    mass = (share * local + (1 - share)) * pairs
    found = decompose(mass, pairs, distances, height, width)
    assert found.local_share == pytest.approx(share, abs=1e-3)
    assert found.constant_share == pytest.approx(1 - share, abs=1e-3)
    assert found.r2 == pytest.approx(1, abs=1e-6)
    if share:
        assert found.c == pytest.approx(c, rel=1e-2)
        expected = (share * local + 1 - share) / (height * width)
        assert torch.allclose(found.weight(distances), expected, rtol=1e-3)


def test_receptive_field_leaves_the_constant_out():
    uniform = window_mass(uniform_offsets(16, 16))
    inside = torch.tensor([0.1, 0.5, 0.9] + [1.0] * 13, dtype=torch.float64)
    mass = 0.3 * inside + 0.7 * uniform
    assert receptive_field(mass.tolist(), uniform.tolist(), 0.7) == 5
    assert receptive_field(mass.tolist(), uniform.tolist(), 0.7, share=0.5) == 3
    assert receptive_field(uniform.tolist(), uniform.tolist(), 1.0) is None


def test_chosen_queries_have_their_rows():
    q, k = torch.randn(2, 3, 20, 4), torch.randn(2, 3, 20, 4)
    whole = (q @ k.transpose(-1, -2) / 2).softmax(dim=-1)
    assert torch.allclose(attention_of(q, k, [7, 0]), whole[:, :, [7, 0]], atol=1e-6)


@pytest.mark.parametrize("window", [1, 3, 5, 31])
def test_attention_cut_to_a_window(window):
    height, width = 5, 7
    q, k, v = (torch.randn(2, 3, 35, 4) for _ in range(3))
    dy, dx = cells(height, width)
    far = torch.maximum(dy.abs(), dx.abs()) > window // 2
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill(far, -math.inf)
    expected = scores.softmax(dim=-1) @ v
    got = windowed_attention(q, k, v, height, width, window)
    assert torch.allclose(got, expected, atol=1e-5)


def test_rings_hold_every_offset_once():
    assert attention.GROUPS > 1
    offsets = torch.rand(9, 13, dtype=torch.float64)
    assert float(profile.ring_mass(offsets).sum()) == pytest.approx(float(offsets.sum()))
    distances, ring = ring_distances(9, 13)
    assert (distances.diff() > 0).all() and len(ring) == 9 * 13


def test_initialization_sees_the_same_mass_by_offset():
    height, width, heads = 5, 7, 2
    generator = torch.Generator().manual_seed(4)
    query, key = (torch.randn(12, 8, generator=generator) for _ in range(2))
    x = torch.randn(height, width, 8, generator=generator)
    means = OffsetMeans(heads, height, width)
    q, k = (
        (x.flatten(0, 1) @ weight.T).unflatten(-1, (heads, -1)).transpose(0, 1)
        for weight in (query, key)
    )
    means.add(q, k, torch.arange(height * width))
    found = measure_attention(q[None], k[None], height, width)
    queries = height * width
    assert torch.allclose(means.mass.double() / queries, found.offsets[0], atol=1e-6)
    assert torch.allclose(means.pairs.double() / queries**2, found.pairs[0])
