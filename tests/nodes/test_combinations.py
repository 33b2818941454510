"""ΔConv beside ComfyUI's own nodes: the table of docs/combinations.md is what these tests measure.

Each node is put after Apply ΔConv and before it, on small models of eight families, and each way of
sampling is tried. DELTACONV_WRITE_COMBINATIONS=1 writes the table anew.
"""

import os
from functools import partial

import pytest
import torch
from combinations import CONDITIONS, FAMILIES, PATCHES, SAMPLED, SAMPLINGS, Missing
from comfyui_deltaconv.development import ROOT
from comfyui_deltaconv.development.comfyui.tree import NEWEST, version_of
from outcomes import WORDS, beside, sampled
from own_combinations import COMPILED, LOADING, OWN

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes", "one_thread")

DOCUMENT = ROOT / "docs" / "combinations.md"
WRITE = "DELTACONV_WRITE_COMBINATIONS"


def usual(case, model):
    return case.sample(model)


def conditioned(condition):
    return lambda case, model: case.sample(model, positive=condition(case))


def rows():
    """Row → what gives its word for a case and the log."""
    for name, change in PATCHES.items():
        yield name, partial(beside, change, SAMPLED.get(name, usual))
    for name, condition in CONDITIONS.items():
        yield name, partial(sampled, conditioned(condition), usual)
    for name, sampling in SAMPLINGS.items():
        yield name, partial(sampled, sampling, None)
    yield from OWN.items()


def documented() -> dict[str, dict[str, str]]:
    """Row → family → word, as docs/combinations.md has it."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines() if DOCUMENT.is_file() else []
    table = [line for line in lines if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {row[0]: dict(zip(cells[0][1:], row[1:], strict=True)) for row in cells[1:]}


# Each of them takes half a minute or more; PixArt and Anima stand for the transformers in the gate.
LONG = FAMILIES.keys() - {"PixArt", "Anima"}
# Rows that take seconds with a family of the gate: a compiler's trace, Anima's large text modules.
SLOW = {
    "PixArt": {COMPILED, "every sampler of KSampler"},
    "Anima": {COMPILED, *LOADING},
}
FAMILY = [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in FAMILIES]


@pytest.mark.parametrize("family", FAMILY)
def test_every_cell_is_what_happens(family, caplog, comfyui_tree):
    check(family, lambda name: name not in SLOW.get(family, ()), caplog, comfyui_tree)


@pytest.mark.long
@pytest.mark.parametrize("family", SLOW)
def test_every_slow_cell_is_what_happens(family, caplog, comfyui_tree):
    check(family, lambda name: name in SLOW[family], caplog, comfyui_tree)


def check(family, chosen, caplog, comfyui_tree):
    """What happens in the chosen rows of a family, against the document or written to it."""
    case, table = FAMILIES[family](), documented()
    stock, found = case.sample(case.model), {}
    for name, word in rows():
        if not chosen(name):
            continue
        try:
            found[name] = word(case, caplog)
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
    for row in table.values():
        assert set(row) == set(FAMILIES) and set(row.values()) <= WORDS


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
- **works, meaning the blocks stay behind, said**: the node takes the weights alone. A saved file is
  the stock model's, bit for bit, and loads as the model with self-attention; a merge draws as if
  its second model had no blocks. That node and the log say so.
- **works, meaning blocks run in both passes, said**: ComfyUI runs one loaded model as the first of
  its clones, so that what the first has acts in the second as well; the log says so.
- **works, meaning it does nothing without us either**: the node leaves this model's picture as it
  is, with blocks and without.
- **fails without us too**: ComfyUI refuses the node on this family, or it crashes on a CPU.
- **not run yet**: it needs a GPU. Without one every call runs as usual, to the bit, and the log
  says so.

ControlNet and T2I-Adapter are of ComfyUI's own classes, with random weights: for the UNets in their
layout, for the transformers, which have none of these, one of SD1.5's layout. torch.compile is
measured with the backend "eager", which traces as Inductor does and compiles nothing; Inductor
itself is a test of its own, `tests/nodes/host/test_application.py`. A saved CLIP and VAE are none
of our business: ModelSave is run, which CheckpointSave is with both.

"""


def write(family, found):
    """Put a family's column into the document."""
    table = documented()
    for name, word in found.items():
        table.setdefault(name, {})[family] = word
    table = {name: table[name] for name, _ in rows() if name in table}
    lines = [
        f"| node or way of sampling | {' | '.join(FAMILIES)} |",
        f"|{'---|' * (len(FAMILIES) + 1)}",
        *(
            f"| {name} | {' | '.join(row.get(family, '') for family in FAMILIES)} |"
            for name, row in table.items()
        ),
    ]
    DOCUMENT.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
