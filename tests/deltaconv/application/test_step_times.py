"""Times of whole steps: sizes that are asked for, turns, limits, the table."""

import pytest
import torch
from comfyui_deltaconv.deltaconv.application import step_times
from comfyui_deltaconv.deltaconv.application.step_times import CONTENDERS, Contender, SizeTimes

CPU = torch.device("cpu")
STEP, BLOCKS = CONTENDERS[:2]


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("", []),
        ("512", [(512, 512)]),
        (" 512, 768x1024;\n1024 X 768 , 768×1024,", [(512, 512), (768, 1024), (1024, 768)]),
    ],
)
def test_sizes_are_read(text, sizes):
    assert step_times.parse_sizes(text) == sizes


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("512, big", "such as 512, 1024 or 768x1024, got 'big'"),
        ("512x", "got '512x'"),
        ("-8", "got '-8'"),
        ("0", "from 1 to 16384 pixels, got '0'"),
        ("512x20000", "got '512x20000'"),
        (", ".join(map(str, range(8, 8 * 18, 8))), "at most 16 sizes, got 17"),
    ],
)
def test_what_is_no_size_is_refused(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        step_times.parse_sizes(text)


def test_pixels_become_latent_cells():
    assert step_times.latent_size((768, 1024), 8) == (128, 96)
    assert step_times.latent_size((768, 1024), 8, 2) == (128, 96)
    with pytest.raises(ValueError, match=r"multiples of 16 pixels .* got 1000 x 1024\. Take 992 x"):
        step_times.latent_size((1000, 1024), 8, 2)


def test_calls_take_turns_and_progress_ends_at_the_total():
    order, steps = [], []
    calls = {name: lambda name=name: order.append(name) for name in CONTENDERS}
    result = SizeTimes((8, 8))
    step_times.measure(result, calls, CPU, 3, 60.0, lambda *step: steps.append(step))
    assert order == list(CONTENDERS) * 4
    assert steps == [(n, 16) for n in range(1, 17)]
    assert {timing["samples"] for timing in result.times.values()} == {3}


def test_time_limits():
    calls = {name: lambda: None for name in CONTENDERS}
    result = step_times.measure(SizeTimes((8, 8)), calls, CPU, 50, 0.0)
    assert {timing["samples"] for timing in result.times.values()} == {1}
    slow = torch.ones(400, 400)
    calls[STEP] = lambda: [slow @ slow for _ in range(100)]
    result = step_times.measure(SizeTimes((8, 8)), calls, CPU, 5, 0.002)
    assert result.times[STEP]["samples"] == 1
    assert "(one call)" in step_times.table([result])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("Not enough memory, use lower resolution (max approx. 512x512)."),
    ],
)
@pytest.mark.parametrize("when", [1, 3])
def test_out_of_memory_ends_one_contender_alone(error, when):
    count = []

    def fails():
        count.append(1)
        if len(count) >= when:
            raise error

    calls = {name: lambda: None for name in CONTENDERS} | {STEP: fails}
    result = step_times.measure(SizeTimes((8, 8)), calls, CPU, 4, 60.0)
    assert result.problems == {STEP: "out of memory"}
    assert len(count) == when
    assert all(result.times[name]["samples"] == 4 for name in CONTENDERS[1:])
    assert "out of memory" in step_times.table([result])
    assert result.ratio("step") is None


def test_other_errors_and_interrupts_are_not_swallowed():
    def raises(error):
        raise error

    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("x")):
        with pytest.raises(type(error)):
            step_times.measure(
                SizeTimes((8, 8)), {STEP: lambda error=error: raises(error)}, CPU, 1, 1.0
            )
    with pytest.raises(KeyboardInterrupt):
        step_times.measure(
            SizeTimes((8, 8)),
            {STEP: lambda: None},
            CPU,
            1,
            1.0,
            lambda *_: raises(KeyboardInterrupt),
        )


def timed(size, attention, blocks, spread=0.01):
    """A size whose two steps took that many seconds."""
    times = {
        Contender("step", way): {
            "median": value,
            "low": value * (1 - spread),
            "high": value * (1 + spread),
            "samples": 5,
        }
        for way, value in zip(step_times.WAYS, (attention, blocks), strict=True)
    }
    return SizeTimes((size, size), times)


def test_the_table_says_who_is_faster_and_by_how_much():
    results = [timed(512, 0.02, 0.025), timed(768, 0.05, 0.0501), timed(1024, 0.2, 0.05)]
    results[2].memory = {STEP: 3 * 2**30, BLOCKS: 2**29}
    text = step_times.table(results)
    lines = text.split("\n")
    assert "0.80×" in lines[2] and "20 (19.8–20.2)" in lines[2]
    assert "4.00×" in lines[4] and lines[4].split()[-6:-1] == ["3072", "MiB", "|", "512", "MiB"]
    assert "with ΔConv at 1024 × 1024." in text
    assert "with attention at 512 × 512: choose" in text
    assert "less than the spread at 768 × 768." in text
    assert "memory" not in step_times.table(results[:2]).lower()
