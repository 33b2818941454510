"""The demo's prompts as people write them, with punctuation and unknown words."""

import pytest
import torch
from comfyui_deltaconv.deltaconv import demo


@pytest.fixture(scope="module")
def encoder():
    return demo.text_encoder()


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("woman, red apple.", "woman red apple"),
        ("Red, apple!", "red apple"),
        ("(tiger face:1)", "tiger face 1"),
        ("“cat_face” — octopus/hibiscus", "cat face octopus hibiscus"),
        ("woman’s hat & man's shoe", "womans hat mans shoe"),
        ("x-ray, upside-down -", "x-ray upside-down"),
    ],
)
def test_punctuation_does_not_hide_words(encoder, written, plain):
    assert demo.words_of(written) == plain.split()
    assert torch.equal(encoder.encode(written), encoder.encode(plain))


def test_every_word_and_caption_is_read_as_it_was(encoder):
    assert all(demo.words_of(word) == [word] for word in encoder.vocabulary)
    for caption in demo.CAPTIONS_PATH.read_text(encoding="utf-8").splitlines():
        assert demo.words_of(caption) == caption.lower().split()


def test_what_is_ignored_is_named_without_its_punctuation(encoder):
    assert encoder.unknown("zebrafish, woman, ZEBRAFISH") == ["zebrafish"]
    assert "ignored: zebrafish, 🍎." in encoder.report("zebrafish, woman, 🍎")
    assert encoder.report("woman, apple") == "All 2 words are known to the demo model."
    assert encoder.report("octopus") == "The word is known to the demo model."
    assert encoder.report(" ,. ") == encoder.report("")
