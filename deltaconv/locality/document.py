"""Read a saved locality report. It may come from anybody, so it is checked before it is used."""

import base64
import math
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import chain

import torch
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from .decomposition import STRICT
from .profile import ring_distances
from .report import FORMAT, LocalityReport, Measurement, SiteLocality

# Characters, and numbers, lists and entries by name together; SDXL's 70 sites at three sigmas have
# less than 400 000.
_LONGEST = 1 << 26
_MOST_VALUES = 2_000_000
# Far above any figure of a report, and below what overflows in what is made of them.
_LARGEST = 1e9
_MOST_SITES, _MOST_SIZES, _MOST_TOKENS = 1000, 16, 1 << 18


@dataclass(frozen=True, config=STRICT)
class _Maps:
    shape: list[int]
    float16: str


@dataclass(frozen=True, config=STRICT)
class _Document:
    """The entries of the JSON; those not named are derived from these."""

    format: int
    family: str
    latent: tuple[int, int]
    sigmas: list[float]
    percents: list[float]
    share: float
    sampled_queries: int | None
    source: str
    points: list[tuple[float, float]]
    left_out: dict[str, str]
    sites: dict[str, SiteLocality]
    maps: dict[str, _Maps]


def read_report(text: str) -> LocalityReport:
    """The report that `LocalityReport.to_json` wrote, without its pictures.

    Raises ValueError for anything else, before more memory is taken than such a report needs.
    """
    try:
        if len(text) > _LONGEST or sum(map(text.count, ",[{")) > _MOST_VALUES:
            raise ValueError("it is larger than any report")
        document = _adapter().validate_json(text.encode())
        _check(document)
        maps = {path: _decoded(entry) for path, entry in document.maps.items()}
        _check_maps(document, maps)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(f"{part!s:.40}" for part in first["loc"])
        raise _refuse(f"{where}: {first['msg']}") from None
    except ValueError as error:
        raise _refuse(str(error)) from None
    return LocalityReport(
        family=document.family,
        latent=document.latent,
        sigmas=document.sigmas,
        percents=document.percents,
        sites=document.sites,
        share=document.share,
        sampled_queries=document.sampled_queries,
        points=document.points,
        maps=maps,
        left_out=document.left_out,
        source=document.source,
    )


@cache
def _adapter() -> TypeAdapter:
    return TypeAdapter(_Document)


def _refuse(reason: str) -> ValueError:
    return ValueError(
        f"Expected a locality report of format {FORMAT} in JSON, got something else: "
        f"{reason:.300}. Measure again and save it anew."
    )


def _check(document: _Document) -> None:
    """Raise ValueError where parts of a report do not fit each other."""
    if document.format != FORMAT:
        raise ValueError(f"its format is {document.format}")
    sites, sigmas = document.sites, document.sigmas
    sizes = {(site.height, site.width) for site in sites.values()}
    if not 1 <= len(sites) <= _MOST_SITES or len(sizes) > _MOST_SIZES:
        raise ValueError(f"it has {len(sites)} layers with maps of {len(sizes)} sizes")
    if min(document.latent) < 1 or not 0 < document.share < 1:
        raise ValueError(f"latent {document.latent} or share {document.share}")
    if not sigmas or len(sigmas) != len(document.percents):
        raise ValueError(f"{len(sigmas)} sigmas at {len(document.percents)} percents")
    costs = [site.sensitivity.window_error or [] for site in sites.values()]
    costs += [site.sensitivity.block_error or [] for site in sites.values()]
    if not all(abs(figure) < _LARGEST for figure in chain(*costs, sigmas, document.percents)):
        raise ValueError(f"figures beyond {_LARGEST:g}")
    for path, site in sites.items():
        if problem := _site_problem(path, site, len(sigmas)):
            raise ValueError(f"{path:.100}: {problem}")


def _site_problem(path: str, site: SiteLocality, sigmas: int) -> str:
    if site.path != path or site.level < 0 or site.dim < 1:
        return f"path {site.path:.100}, level {site.level}, {site.dim} channels"
    if min(site.height, site.width) < 1 or site.tokens > _MOST_TOKENS:
        return f"a map of {site.width} × {site.height}"
    if len(site.measurements) != sigmas:
        return f"{len(site.measurements)} measurements at {sigmas} sigmas"
    heads, windows = site.heads, len(site.widths)
    for one in site.measurements:
        lists = (one.mass, one.distance, one.entropy, one.content, one.fits)
        if not heads or any(len(each) != heads for each in lists):
            return f"lists of {[len(each) for each in lists]} for {heads} heads"
        if any(len(row) != windows for row in one.mass):
            return f"other than {windows} windows"
        if not all(abs(figure) < _LARGEST for figure in _figures(one)):
            return f"figures beyond {_LARGEST:g}"
        if not all(-0.01 < nats < math.log(site.tokens) + 0.01 for nats in one.entropy):
            return "an entropy beyond that of even attention"
        # A ring at least every two cells, so that a short list asks for no large table.
        if len(one.profile) < max(site.height, site.width) / 2:
            return f"a profile of {len(one.profile)}"
        if len(one.profile) != _rings(site.height, site.width):
            return f"a profile of {len(one.profile)}"
    return ""


def _figures(one: Measurement) -> Iterator[float]:
    yield one.sigma
    yield from chain(*one.mass, one.distance, one.content, one.profile)
    for fit in one.fits:
        yield from (fit.a, fit.b, fit.c, fit.local_share, fit.constant_share, fit.r2)
    if one.error:
        yield from (*one.error["mass"], one.error["distance"], one.error["entropy"])


@cache
def _rings(height: int, width: int) -> int:
    return len(ring_distances(2 * height - 1, 2 * width - 1)[0])


def _decoded(entry: _Maps) -> torch.Tensor:
    shape, data = entry.shape, base64.b64decode(entry.float16, validate=True)
    if len(shape) != 5 or min(shape) < 1 or 2 * math.prod(shape) != len(data):
        raise ValueError(f"maps of {len(data)} bytes for {shape!s:.100}")
    return torch.frombuffer(bytearray(data), dtype=torch.float16).view(shape)


def _check_maps(document: _Document, maps: Mapping[str, torch.Tensor]) -> None:
    for path, of_site in maps.items():
        site = document.sites.get(path)
        if site is None:
            raise ValueError(f"maps of {path:.100}, which it has not")
        points = len(document.points)
        expected = (len(document.sigmas), points, site.heads, site.height, site.width)
        if tuple(of_site.shape) != expected:
            raise ValueError(f"maps of {tuple(of_site.shape)} for {expected} of {path:.100}")
