"""A finished distillation in words."""

from collections.abc import Sequence
from pathlib import Path

from .record import Record


def distil_report(records: Sequence[Record], folder: Path | None, seconds: float) -> str:
    """What each stage came to, what the guards did, and where the state is."""
    lines = []
    for stage in ("init", "layers", "joint"):
        found = [record for record in records if record.stage == stage and record.losses]
        if not found:
            continue
        if stage == "init":
            lines.append(
                "informed initialisation: mean relative error of the layers on held-out "
                f"images {found[0].loss:.4f}"
            )
            continue
        tail = max(1, len(found) // 10)
        first = sum(r.loss for r in found[:tail]) / tail
        last = sum(r.loss for r in found[-tail:]) / tail
        rate = sum(r.images_per_second for r in found) / len(found)
        lines.append(
            f"{stage}: {len(found)} steps, loss {first:.5g} → {last:.5g} (means of {tail}), "
            f"{rate:.1f} images per second"
        )
        if stage == "layers":
            worst = sorted(found[-1].losses.items(), key=lambda item: -item[1])[:3]
            lines.append("  worst: " + ", ".join(f"{site} {loss:.4f}" for site, loss in worst))
    lines += [f"{r.stage} {r.step}: {r.message}" for r in records if r.message][:20]
    lines.append(f"{seconds:.0f} s in all" + (f"; state in {folder}" if folder else ""))
    return "\n".join(lines)
