"""ΔConv beside ComfyUI's own nodes: the table of docs/combinations.md is what these tests measure.

Each node is put after Apply ΔConv and before it, on small models of four families with random
weights, and each way of sampling is tried. DELTACONV_WRITE_COMBINATIONS=1 writes the table anew.
"""

import logging
import os
from dataclasses import dataclass

import pytest
import torch
from combinations import CONDITIONS, FAMILIES, PATCHES, SAMPLINGS, Missing
from comfyui_deltaconv.development import ROOT
from patched_models import apply

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes", "one_thread")

DOCUMENT = ROOT / "docs" / "combinations.md"
WORKS, RESTS, BOTH_FAIL = "works", "rests there, said", "fails without us too"
INERT = "works, meaning its part on replaced layers rests, said"
NOTHING = "works, meaning it does nothing without us either"
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
    stock = case.frozen.setdefault("stock", case.sample(case.model))
    try:
        alone = sample(case, change(case, case.model))
    except Missing:
        raise
    except Exception as error:
        logging.getLogger(__name__).info("stock: %r", error)
        return BOTH_FAIL
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
        words.append(_word(case, told, result, alone, stock))
    # What was done is undone with the nodes, to the bit.
    restored = sample(case, change(case, case.model)), case.sample(case.model)
    for got, expected in zip(restored, (alone, stock), strict=True):
        assert (got - expected).abs().max() == 0
    # The worse of both orders, which are the same where nothing is said of one.
    return next(word for word in (RESTS, INERT, WORKS) if word in words)


def _word(case, told, result, alone, stock) -> str:
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


def rows():
    """Row → (what it does to a MODEL, how it samples)."""
    for name, change in PATCHES.items():
        yield name, (change, lambda case, model: case.sample(model))
    for name, condition in CONDITIONS.items():
        yield (
            name,
            (
                lambda case, model: model,
                lambda case, model, condition=condition: case.sample(
                    model, positive=condition(case)
                ),
            ),
        )
    for name, sampling in SAMPLINGS.items():
        yield name, (lambda case, model: model, sampling)


def documented() -> dict[str, dict[str, str]]:
    """Row → family → word, as docs/combinations.md has it."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines() if DOCUMENT.is_file() else []
    table = [line for line in lines if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {row[0]: dict(zip(cells[0][1:], row[1:], strict=True)) for row in cells[1:]}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cell_is_what_happens(family, caplog):
    case, table = FAMILIES[family](), documented()
    found = {}
    for name, (change, sample) in rows():
        try:
            found[name] = outcome(case, change, sample, caplog)
        except Missing:
            # An older ComfyUI: the table is of the newest.
            continue
        except Exception as error:
            raise AssertionError(f"{family}, {name}: {error!r}") from error
    if os.environ.get(WRITE):
        write(family, found)
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
`tests/nodes/test_combinations.py` on small models of each family with random weights. In every
cell removing the nodes restores the model's own pictures to the bit.

- **works**: blocks run in every layer, and the node does its part.
- **works, meaning its part on replaced layers rests, said**: the report or the log names what has no
  effect where blocks stand.
- **rests there, said**: in the layers that the node takes over, or in all, attention runs instead of
  blocks; the report or the log says so.
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
