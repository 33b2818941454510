"""`python dev.py families`: the tables of model families, from what their tests came to.

Runs the tests that are a family's evidence, Anima's of the long tier too, and writes the table of
README.md and, by formula, that of docs/families.md. --no-tests writes the latter alone.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..benchmarks.shapes import Row, bytes_moved
from ..deltaconv.families import FAMILIES, Family, resolution_level
from ..deltaconv.flops import attention_flops, block_flops, halved
from ..deltaconv.geometry import BlockGeometry
from . import ROOT, DevelopmentError
from .comfyui.tree import chosen_tree

README, DOCUMENT = ROOT / "README.md", ROOT / "docs" / "families.md"
BEGIN, END = "<!-- families: dev.py families -->\n", "<!-- end of the families -->\n"
YES, NO = "yes", "**no**"
SIZES = (1024, 2048)
SCALES = (1.0, 0.5)

_KINDS, _DISTILL = "tests/nodes/host/test_kinds.py", "tests/nodes/test_distill_kinds.py"
_PATCH, _TRAIN = "tests/nodes/host/test_patch.py", "tests/nodes/test_distill.py"
_SITES = "tests/deltaconv/test_families.py"
_BASES = "tests/nodes/test_distill_bases.py"
# Capability → tests of a transformer's kind, whose parameter names the kind.
_OF_A_KIND = {
    "applied": (
        f"{_KINDS}::test_blocks_take_attentions_place_and_leave_without_a_trace",
        f"{_KINDS}::test_a_block_computes_the_padded_map",
        f"{_KINDS}::test_percent_range_and_sites",
    ),
    "beside a LoRA": (f"{_KINDS}::test_a_lora_on_attention_rests_and_one_beside_it_works",),
    "16 and 8 bits": (f"{_KINDS}::test_bases_of_other_dtypes_are_computed_and_restored",),
    "where faster": (f"{_KINDS}::test_layers_are_timed_alone_at_the_size_of_a_latent",),
    "measured": (
        f"{_KINDS}::test_attention_is_seen_as_it_acts",
        f"{_KINDS}::test_locality_is_that_of_brute_force",
    ),
    "distilled": (
        f"{_DISTILL}::test_three_stages_from_latents_leave_the_base_as_it_was",
        f"{_DISTILL}::test_informed_blocks_beat_random_ones",
    ),
    "judged, chosen": (f"{_DISTILL}::test_own_samples_are_drawn_judged_and_chosen_from",),
    "benchmarked": (f"{_KINDS}::test_its_locality_is_measured_and_its_steps_are_timed",),
}
_OF_UNETS = {
    "applied": (
        f"{_PATCH}::test_ab_alternation_is_bit_for_bit",
        f"{_PATCH}::test_the_map_reaches_the_block_with_height_before_width",
        f"{_PATCH}::test_percent_range",
    ),
    "beside a LoRA": (
        f"{_PATCH}::test_a_lora_on_attn1_is_inert_and_said_once",
        f"{_PATCH}::test_a_lora_beside_the_blocks_works",
    ),
    "16 and 8 bits": (f"{_BASES}::test_layers_train_on_every_base_and_leave_its_bits[demo",),
    "where faster": (
        "tests/nodes/host/test_application.py::test_where_faster_runs_what_was_measured_to_be",
    ),
    "measured": (
        "tests/nodes/test_locality.py::test_measuring_is_stock_bit_for_bit_and_meets_brute_force",
    ),
    "distilled": (
        f"{_TRAIN}::test_node_distils_and_leaves_the_base_as_it_was",
        f"{_TRAIN}::test_loss_falls_on_the_demo_teacher_and_informed_is_better",
    ),
    "judged, chosen": (
        f"{_TRAIN}::test_evaluate_node_tells_good_weights_from_bad",
        "tests/nodes/test_choose.py::test_node_chooses_layers_and_a_start_that_apply_takes",
    ),
    "benchmarked": ("tests/nodes/test_benchmark.py::test_every_contender_runs_what_it_says",),
}
_OF_PIXART = {
    "applied": (
        f"{_PATCH}::test_pixart_alternates_bit_for_bit",
        f"{_PATCH}::test_pixart_blocks_see_the_map_in_patches",
        f"{_PATCH}::test_pixart_percent_range",
    ),
    "beside a LoRA": ("tests/nodes/test_combinations.py::test_every_cell_is_what_happens[PixArt",),
    "16 and 8 bits": (f"{_BASES}::test_layers_train_on_every_base_and_leave_its_bits[pixart",),
    "where faster": ("tests/nodes/host/test_application.py::test_where_faster_on_pixart",),
    "measured": ("tests/nodes/test_locality.py::test_pixart_is_measured_without_changing_it",),
    "distilled": (
        f"{_BASES}::test_informed_initialisation_on_stored_bases[pixart",
        f"{_BASES}::test_joint_trains_on_every_base_or_is_refused_by_name[pixart]",
    ),
    "judged, chosen": (),
    "benchmarked": ("tests/nodes/test_benchmark.py::test_pixart_is_measured_in_whole_patches",),
}
CAPABILITIES = tuple(_OF_A_KIND)
# A UNet that draws videos from a picture: what is not a matter of its layers was not tried.
_OF_SVD = {
    **dict.fromkeys(CAPABILITIES, ()),
    "applied": (f"{_SITES}::test_blocks_stand_in_variants_and_leave_without_a_trace[svd]",),
}
_DEMO = "the trained demo model, of this class"
_RANDOM = "random weights in ComfyUI's class"
# Family → the name by which tests know its kind.
_KIND_OF = {
    "cosmos-predict2": "Cosmos-Predict2",
    "cosmos-predict2-14b": "Cosmos-Predict2",
    "anima": "Anima",
    "hunyuandit": "HunyuanDiT",
    "wan-1.3b": "Wan",
    "wan-14b": "Wan",
    "wan2.2-5b": "Wan",
    "kandinsky5-image": "Kandinsky 5",
    "ltxv-2b": "LTX-Video",
    "ltxv-13b": "LTX-Video",
}
_UNETS_BY_NAME = {"sd1", "sd2", "sdxl", "sdxl-refiner"}


class Evidence(NamedTuple):
    """Tests whose names begin so, of parameters that hold `parameter`; all have to pass."""

    test: str
    parameter: str = ""


def evidence(family: Family) -> dict[str, list[Evidence]]:
    """Capability → the tests that show it, and beside them that the family's layers are found."""
    name = family.name
    if name in _KIND_OF:
        tests, kind = _OF_A_KIND, _KIND_OF[name]
        found = Evidence(f"{_KINDS}::test_families_are_the_rows_that_real_sizes_have", f"-{name}]")
    elif name == "pixart":
        tests, kind = _OF_PIXART, ""
        found = Evidence(f"{_SITES}::test_pixart_sites_are_those_of_the_real_class")
    else:
        tests, kind = _OF_SVD if name == "svd" else _OF_UNETS, ""
        function = "unet_sites_are_those_of_the_real_class"
        if name not in _UNETS_BY_NAME:
            function = "variants_are_of_their_family"
        found = Evidence(f"{_SITES}::test_{function}", name)
    return {
        capability: [found, *(Evidence(test, kind) for test in shown)] if shown else []
        for capability, shown in tests.items()
    }


def table(results: Mapping[str, bool]) -> str:
    """Test → whether it passed → the table of README.md, a row per family.

    Raises DevelopmentError for evidence that no test is.
    """
    head = ["family", *CAPABILITIES, "published blocks", "tested on"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for family in FAMILIES.values():
        cells = [_cell(shown, results) for shown in evidence(family).values()]
        published = "yes" if family.published_base else "none: distill them"
        random = family.name in _KIND_OF or family.name in ("pixart", "svd")
        tested = _RANDOM if random else _DEMO
        lines.append(f"| {' | '.join([family.title, *cells, published, tested])} |")
    return "\n".join(lines) + "\n"


def _cell(shown: Iterable[Evidence], results: Mapping[str, bool]) -> str:
    passed = []
    for wanted in shown:
        found = [
            result
            for test, result in results.items()
            if test.startswith(wanted.test) and wanted.parameter in test
        ]
        if not found:
            raise DevelopmentError(f"Expected results of {wanted}, got none. Was it renamed?")
        passed += found
    if not passed:
        return "not tested"
    return YES if all(passed) else NO


def results_of(report: Path) -> dict[str, bool]:
    """Test → whether it passed, of a JUnit report; skipped ones are left out."""
    results = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        if case.find("skipped") is None:
            file = case.get("classname", "").replace(".", "/") + ".py"
            broken = case.find("failure") is not None or case.find("error") is not None
            results[f"{file}::{case.get('name')}"] = not broken
    return results


def counted() -> str:
    """The table of docs/families.md: what a block saves, by formula, in one step of one image."""
    head = ("family", "layers", "C", "k", "map", "attention", "blocks", "saved", "floor")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for family in FAMILIES.values():
        for pixels in SIZES:
            lines.append(_counted_row(family, pixels))
    return "\n".join(lines) + "\n"


def _counted_row(family: Family, pixels: int) -> str:
    attention = blocks = moved = 0
    sides, kernels = [], []
    for site, dim in family.dims.items():
        level = resolution_level(site, family.num_res_blocks) if family.num_res_blocks else 0
        side = halved(pixels // family.token, level)
        # As Distill ΔConv takes them where nobody publishes any.
        kernel = family.published_kernel(site) or max(7, 11 - 2 * level)
        attention += attention_flops(dim, side, side)
        blocks += block_flops(BlockGeometry(dim, kernel, len(SCALES)), SCALES, side, side)
        moved += bytes_moved(Row("", dim, kernel, side, 1, 1), 1, 2)
        sides.append(side)
        kernels.append(kernel)
    cells = (
        family.title,
        f"{len(family.dims)}",
        _range(family.dims.values()),
        _range(kernels),
        f"{_range(sides)} at {pixels}²",
        f"{attention / 1e12:.3g} TFLOP",
        f"{blocks / 1e12:.3g} TFLOP",
        f"{attention / blocks:.1f} ×",
        f"{moved / 1e9:.2f} GB",
    )
    return f"| {' | '.join(cells)} |"


def _range(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]}–{found[-1]}"


def with_table(text: str, drawn: str) -> str:
    """`text` with what stands between the marks replaced."""
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise DevelopmentError(f"Expected the marks {BEGIN.strip()} and {END.strip()}, got none.")
    return f"{before}{BEGIN}\n{drawn}\n{END}{after}"


def functions() -> list[str]:
    """The tests that are evidence, without their parameters."""
    named = {
        shown.test.partition("[")[0]
        for family in FAMILIES.values()
        for tests in evidence(family).values()
        for shown in tests
    }
    return sorted(named)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py families", description=__doc__)
    parser.add_argument("--no-tests", action="store_true", help="count operations alone")
    options = parser.parse_args(argv)
    written = with_table(DOCUMENT.read_text(encoding="utf-8"), counted())
    DOCUMENT.write_text(written, encoding="utf-8")
    if options.no_tests:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "results.xml"
        line = [sys.executable, "-I", "-m", "pytest", "-q", "-m", "", f"--junitxml={report}"]
        environment = {**os.environ, "DELTACONV_COMFYUI": str(chosen_tree())}
        # Of the table of combinations PixArt's column alone is evidence; others take minutes.
        chosen = [*functions(), "-k", "not test_every_cell_is_what_happens or PixArt"]
        code = subprocess.run([*line, *chosen], cwd=ROOT, env=environment).returncode
        drawn = table(results_of(report))
    README.write_text(with_table(README.read_text(encoding="utf-8"), drawn), encoding="utf-8")
    return code
