"""ΔConv beside ComfyUI's own nodes: the table of docs/combinations.md is what these tests measure.

Each node is put after Apply ΔConv and before it, on small models of eight families, and each way of
sampling is tried. DELTACONV_WRITE_COMBINATIONS=1 writes the table anew.
"""

import logging
import os
from dataclasses import dataclass

import pytest
import torch
from combinations import CONDITIONS, FAMILIES, PATCHES, SAMPLED, SAMPLINGS, Missing
from comfyui_deltaconv.development import ROOT
from comfyui_deltaconv.development.comfyui.tree import NEWEST, version_of
from patched_models import apply

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes", "one_thread")

DOCUMENT = ROOT / "docs" / "combinations.md"
WORKS, RESTS, BOTH_FAIL = "works", "rests there, said", "fails without us too"
INERT = "works, meaning its part on replaced layers rests, said"
NOTHING = "works, meaning it does nothing without us either"
# Of the largest value: what other instructions of a CPU make of the same sums.
ROUNDING = 4e-6
WRITE = "DELTACONV_WRITE_COMBINATIONS"


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


def outcome(case, change, sample, caplog) -> str:
    """The word for one cell; asserts what no cell may do."""
    try:
        alone = sample(case, change(case, case.model))
    except (Missing, AssertionError):
        raise
    except Exception as error:
        logging.getLogger(__name__).info("stock: %r", error)
        return BOTH_FAIL
    plain = case.frozen.setdefault(sample, sample(case, case.model))
    change_of = float((alone - plain).abs().max() / plain.abs().max())
    nothing = change is not unchanged and change_of < ROUNDING
    words = []
    for before in (False, True):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            first = change(case, case.model) if before else case.model
            patched, report = apply(first, case.weights)
            told = Told(report, caplog, counted(patched))
            last = patched if before else change(case, patched)
            result = sample(case, last)
        assert result.shape == alone.shape
        assert result.isfinite().all() == alone.isfinite().all()
        words.append(_word(case, told, result, alone))
    # What was done is undone with the nodes, to the bit.
    assert (sample(case, change(case, case.model)) - alone).abs().max() == 0
    if nothing and set(words) == {WORKS}:
        return NOTHING
    # The worse of both orders, which are the same where nothing is said of one.
    return next(word for word in (RESTS, INERT, WORKS) if word in words)


def _word(case, told, result, alone) -> str:
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


def unchanged(case, model):
    return model


def usual(case, model):
    return case.sample(model)


def conditioned(condition):
    return lambda case, model: case.sample(model, positive=condition(case))


def rows():
    """Row → (what it does to a MODEL, how it samples)."""
    for name, change in PATCHES.items():
        yield name, (change, SAMPLED.get(name, usual))
    for name, condition in CONDITIONS.items():
        yield name, (unchanged, conditioned(condition))
    for name, sampling in SAMPLINGS.items():
        yield name, (unchanged, sampling)


def documented() -> dict[str, dict[str, str]]:
    """Row → family → word, as docs/combinations.md has it."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines() if DOCUMENT.is_file() else []
    table = [line for line in lines if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {row[0]: dict(zip(cells[0][1:], row[1:], strict=True)) for row in cells[1:]}


# Each of them takes half a minute or more; PixArt and Anima stand for the transformers in the gate.
LONG = FAMILIES.keys() - {"PixArt", "Anima"}


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in FAMILIES],
)
def test_every_cell_is_what_happens(family, caplog, comfyui_tree):
    case, table = FAMILIES[family](), documented()
    stock, found = case.sample(case.model), {}
    for name, (change, sample) in rows():
        try:
            found[name] = outcome(case, change, sample, caplog)
        except Missing:
            continue
        except Exception as error:
            raise AssertionError(f"{family}, {name}: {error!r}") from error
    assert torch.equal(case.sample(case.model), stock)
    if os.environ.get(WRITE):
        write(family, found)
        return
    if version_of(comfyui_tree) != NEWEST.version:
        # An older one does less for Anima: what may not happen is asserted all the same.
        return
    wrong = {
        name: (word, table.get(name, {}).get(family))
        for name, word in found.items()
        if table.get(name, {}).get(family) != word
    }
    assert not wrong, "what happens, and what docs/combinations.md says"


def test_no_cell_is_empty_or_of_another_word():
    table = documented()
    names = {name for name, _ in rows()}
    assert names <= table.keys()
    words = {WORKS, RESTS, INERT, NOTHING, BOTH_FAIL}
    for row in table.values():
        assert set(row) == set(FAMILIES) and set(row.values()) <= words


HEAD = """# ΔConv beside other nodes
What happens where a node of ComfyUI's own stands before **Apply ΔConv** or after it, measured by
`tests/nodes/test_combinations.py`: on the packaged demo model, a UNet as SD1.5's, and on small
models of the other families with random weights. In every cell removing the nodes restores the
model's own pictures to the bit.

- **works**: blocks run in every layer, and the node does its part.
- **works, meaning its part on replaced layers rests, said**: the report or the log names what has
  no effect where blocks stand.
- **rests there, said**: in the layers that the node takes over, or in all, attention runs instead
  of blocks; the report or the log says so.
- **works, meaning it does nothing without us either**: the node leaves this model's picture as it
  is, with blocks and without.
- **fails without us too**: ComfyUI refuses the node on this family.

"""


def write(family, found):
    """Put a family's column into the document."""
    table = documented()
    for name, word in found.items():
        table.setdefault(name, {})[family] = word
    lines = [
        f"| node or way of sampling | {' | '.join(FAMILIES)} |",
        f"|{'---|' * (len(FAMILIES) + 1)}",
        *(
            f"| {name} | {' | '.join(row.get(family, '') for family in FAMILIES)} |"
            for name, row in table.items()
            if name != "node or way of sampling"
        ),
    ]
    DOCUMENT.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
