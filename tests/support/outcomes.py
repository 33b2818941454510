"""What a node did beside Apply ΔConv, in one word, and what no combination may do."""

import logging
from dataclasses import dataclass

import pytest
import torch
from combinations import Missing
from patched_models import apply

WORKS, RESTS, BOTH_FAIL = "works", "rests there, said", "fails without us too"
INERT = "works, meaning its part on replaced layers rests, said"
NOTHING = "works, meaning it does nothing without us either"
LEFT = "works, meaning the blocks stay behind, said"
BOTH_PASSES = "works, meaning blocks run in both passes, said"
NOT_RUN = "not run yet"
WORDS = {WORKS, RESTS, BOTH_FAIL, INERT, NOTHING, LEFT, BOTH_PASSES, NOT_RUN}
# Of the largest value: what other instructions of a CPU make of the same sums.
ROUNDING = 4e-6


@dataclass
class Told:
    """What the pack's report and log said, and how often blocks ran."""

    report: str
    log: pytest.LogCaptureFixture
    calls: list

    @property
    def said(self) -> bool:
        ours = (record for record in self.log.records if "ΔConv" in record.getMessage())
        words = ("no effect", "no block runs", "plain attention", "runs only where")
        return any(word in self.report for word in words) or any(
            record.levelno >= logging.WARNING for record in ours
        )


def counted(model) -> list:
    """Grows by the site's number at every call of a block."""
    (blocks,) = model.get_additional_models_with_key("deltaconv")
    calls = []
    for number, block in enumerate(blocks.model.blocks):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    return calls


def beside(change, sample, case, caplog) -> str:
    """The word for a node that stands before Apply ΔConv or after it."""
    alone = _stock(sample, change, case)
    if alone is None:
        return BOTH_FAIL
    if sample not in case.frozen:
        case.frozen[sample] = sample(case, case.model)
    words = []
    for before in (False, True):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            first = change(case, case.model) if before else case.model
            patched, report = apply(first, case.weights)
            told = Told(report, caplog, counted(patched))
            result = sample(case, patched if before else change(case, patched))
        words.append(word_for(case, told, result, alone))
    # What was done is undone with the nodes, to the bit.
    assert torch.equal(sample(case, change(case, case.model)), alone)
    if _same(alone, case.frozen[sample]) and set(words) == {WORKS}:
        return NOTHING
    # The worse of both orders, which are the same where nothing is said of one.
    return next(word for word in (RESTS, INERT, WORKS) if word in words)


def sampled(sample, plain, case, caplog) -> str:
    """The word for a way of sampling; it does nothing where it draws what `plain` does."""
    alone = _stock(sample, _unchanged, case)
    if alone is None:
        return BOTH_FAIL
    caplog.clear()
    with caplog.at_level(logging.INFO):
        patched, report = apply(case.model, case.weights)
        told = Told(report, caplog, counted(patched))
        result = sample(case, patched)
    word = word_for(case, told, result, alone)
    assert torch.equal(sample(case, case.model), alone)
    if plain is None or word != WORKS:
        return word
    if plain not in case.frozen:
        case.frozen[plain] = plain(case, case.model)
    return NOTHING if _same(alone, case.frozen[plain]) else WORKS


def _unchanged(case, model):
    return model


def _stock(sample, change, case):
    """What is drawn without us; None where ComfyUI cannot."""
    try:
        return sample(case, change(case, case.model))
    except (Missing, AssertionError):
        raise
    except Exception as error:
        logging.getLogger(__name__).info("stock: %r", error)
        return None


def _same(one, other) -> bool:
    return float((one - other).abs().max() / other.abs().max()) < ROUNDING


def word_for(case, told, result, alone) -> str:
    assert result.shape == alone.shape
    assert result.isfinite().all() == alone.isfinite().all()
    sites = len(case.weights.sites)
    ran = set(told.calls)
    if len(ran) < sites or not ran:
        assert told.said, f"blocks ran in {len(ran)} of {sites} layers, and nothing was said"
        return RESTS
    # Blocks with random weights: what they draw is not what attention draws.
    assert not torch.equal(result, alone)
    if "no effect" in told.report or any("no effect" in r.getMessage() for r in told.log.records):
        return INERT
    rests = any("plain attention" in record.getMessage() for record in told.log.records)
    return RESTS if rests else WORKS
