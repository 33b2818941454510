"""Pictures from folders and shards, buckets, and the store: what is read back, in which order."""

import gc
import io
import tarfile

import psutil
import pytest
import torch
import toy_teacher as toy
from comfyui_deltaconv.deltaconv import demo
from comfyui_deltaconv.deltaconv.distillation import Dataset, DistillationError, distill
from comfyui_deltaconv.deltaconv.pictures.metrics import to_pil
from comfyui_deltaconv.deltaconv.scale.buckets import buckets, nearest
from comfyui_deltaconv.deltaconv.scale.sources import Corruption, pictures_of
from comfyui_deltaconv.deltaconv.scale.store import Store, StoredData, StoredItem, packed, unpacked


def png(index=0, size=(8, 8)):
    found = to_pil((demo.pictures()[0][index].movedim(0, -1) + 1) / 2).resize(size)
    content = io.BytesIO()
    found.save(content, "PNG")
    return content.getvalue()


def shard(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def read(source, share=0.5):
    corruption = Corruption(share)
    found = [
        (item.name, pair[1], pair[0].size)
        for part in range(source.parts)
        for item in source.items(part)
        if (pair := corruption.read(item))
    ]
    return found, corruption


def test_folders_are_read_with_their_captions_and_what_is_corrupt_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(png(0))
    (tmp_path / "a" / "1.txt").write_text(" one \n", encoding="utf-8")
    (tmp_path / "2.PNG").write_bytes(png(1, (6, 4)))
    (tmp_path / "3.jpg").write_bytes(png(2)[:60])
    (tmp_path / "4.png").write_bytes(png(3))
    (tmp_path / "4.txt").write_bytes(b"\xff\xfe\xfa")
    found, corruption = read(pictures_of(str(tmp_path)))
    assert found == [("2.PNG", "", (6, 4)), ("a/1.png", "one", (8, 8))]
    assert set(corruption.skipped) == {"3.jpg", "4.png"} and corruption.items == 4
    corruption.check()
    with pytest.raises(DistillationError, match=r"25\.00%.* 2 of 4.*4\.png"):
        corruption.share = 0.25
        corruption.check()
    with pytest.raises(DistillationError, match=r"3\.jpg"):
        read(pictures_of(str(tmp_path)), share=0.0)


def test_shards_are_read_and_one_that_breaks_off_is_one_corrupt_item(tmp_path):
    whole = {"x/1.png": png(0), "x/1.txt": b"one", "x/2.webp": png(1), "x/3.txt": b"no picture"}
    shard(tmp_path / "s-00.tar", whole)
    shard(tmp_path / "s-01.tar", {"4.png": png(2), "4.txt": b"four", "5.png": png(3, (64, 64))})
    cut = (tmp_path / "s-01.tar").read_bytes()[:2600]
    (tmp_path / "s-01.tar").write_bytes(cut)
    for pattern in ("s-{00..01}.tar", "s-*.tar", ""):
        found, corruption = read(pictures_of(str(tmp_path / pattern)))
        names = [(name, caption) for name, caption, _ in found]
        assert names == [("s-00.tar/x/1", "one"), ("s-00.tar/x/2", ""), ("s-01.tar/4", "four")]
        assert set(corruption.skipped) == {"s-00.tar/x/3", "s-01.tar (its end)"}
    with pytest.raises(DistillationError, match=r"no .*s-02\.tar"):
        pictures_of(str(tmp_path / "s-{00..02}.tar"))
    with pytest.raises(DistillationError, match="neither"):
        pictures_of(str(tmp_path / "nothing"))


def test_buckets_have_one_area_and_the_nearest_ratio_is_chosen():
    found = buckets(1024, 64)
    assert found[0] == (1024, 1024) and (1344, 768) in found and (768, 1344) in found
    for width, height in found:
        assert width % 64 == height % 64 == 0 and 0.85 * 1024**2 < width * height <= 1024**2
        assert 0.5 <= width / height <= 2
    assert nearest(1920, 1080, found) == (1344, 768) and nearest(500, 500, found) == (1024, 1024)
    assert buckets(8, 8) == [(8, 8)]


def test_conditioning_entries_come_back():
    options = {"pooled_output": torch.randn(1, 5), "ids": torch.arange(3), "guidance": 3.5}
    tensor, found = unpacked(packed((torch.randn(1, 4, 6), {**options, "nothing": None})))
    assert tensor.shape == (1, 4, 6) and tensor.dtype == torch.float32
    assert torch.equal(found["ids"], options["ids"]) and found["guidance"] == 3.5
    assert torch.equal(found["pooled_output"], options["pooled_output"].half().float())
    huge = torch.tensor([[[1e6]]])
    assert torch.equal(unpacked(packed((huge, {})))[0], huge)
    with pytest.raises(DistillationError, match="list as area"):
        packed((huge, {"area": [1]}))


def stored(folder, latents, contexts, parts=3, skipped=None):
    """A store of these in as many parts; the toy's conditions are rows."""
    store = Store(folder)
    empty = (torch.zeros(1, 1, toy.CHANNELS), {})
    store.begin({"base": toy.ToyTeacher().fingerprint, "parts": parts}, empty)
    for part in range(parts):
        rows = range(part * len(latents) // parts, (part + 1) * len(latents) // parts)
        items = (
            StoredItem(
                f"{row}.png", f"picture {row}", latents[row], (contexts[row][None, None], {})
            )
            for row in rows
        )
        assert store.write(part, items, (skipped or {}) if part == 0 else {}) == len(rows)
    return folder


class StoredToy(toy.ToyTeacher):
    """The toy with conditioning entries, as a host has them."""

    def predict(self, x, sigma, conditions, *others):
        return super().predict(x, sigma, [entry[0][0, 0] for entry in conditions], *others)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_a_store_is_training_on_its_tensors(tmp_path, workers):
    data = toy.toy_data(26)
    latents = [
        (latent[:, :8] if index % 3 == 0 else latent).half().float()
        for index, latent in enumerate(data.latents)
    ]
    contexts = [context.half().float() for context in data.conditions]
    entries = [(context[None, None], {}) for context in contexts]
    plain = Dataset(latents, entries, (torch.zeros(1, 1, toy.CHANNELS), {}))
    kept = StoredData(stored(tmp_path, latents, contexts), base="toy-0", workers=workers)
    assert len(kept) == 26
    settings = toy.toy_settings(6, 3)
    found, expected = (
        [r.loss for r in distill(StoredToy(), toy.PLAN, each, settings)] for each in (kept, plain)
    )
    assert found == expected


def test_a_resumed_epoch_has_the_order_of_a_whole_one(tmp_path):
    latents = [torch.zeros(1, 2, 2) for _ in range(40)]
    contexts = [torch.zeros(toy.CHANNELS) for _ in range(40)]
    folder = stored(tmp_path, latents, contexts)

    def drawn(positions, workers, rows=(0, 1, 2, 3)):
        data = StoredData(folder, base="toy-0", workers=workers)
        return [data.images(7, 4, position, rows)[0] for position in positions]

    straight = drawn(range(14), 0)
    assert sorted(index for draw in straight[:10] for index in draw) == list(range(40))
    assert drawn(range(6), 1) + drawn(range(6, 14), 2) == straight
    shares = [drawn(range(14), 0, rows) for rows in ((0, 2), (1, 3))]
    for whole, one, other in zip(straight, *shares, strict=True):
        assert whole == [one[0], other[0], one[1], other[1]]


def test_processes_that_read_ahead_end_with_their_data(tmp_path):
    """One that is left to the end of the program is waited for, five seconds each."""
    latents = [torch.zeros(1, 2, 2) for _ in range(8)]
    folder = stored(tmp_path, latents, [torch.zeros(toy.CHANNELS) for _ in range(8)])
    data = StoredData(folder, base="toy-0", workers=2)
    for position in range(3):
        data.images(7, 4, position, (0, 1, 2, 3))
    processes = data._ahead._workers
    assert all(process.is_alive() for process in processes)
    # No collection may be needed: it comes when it comes.
    gc.disable()
    try:
        del data
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        gc.enable()


def test_stores_of_another_model_or_data_and_unfinished_ones_are_refused(tmp_path):
    latents = [torch.zeros(1, 2, 2) for _ in range(8)]
    contexts = [torch.zeros(toy.CHANNELS) for _ in range(8)]
    folder = stored(tmp_path, latents, contexts, skipped={"9.png": "no picture"})
    with pytest.raises(DistillationError, match="of this model"):
        StoredData(folder, base="other")
    with pytest.raises(DistillationError, match=r"at most 0\.00%.* 1 of 9"):
        StoredData(folder, base="toy-0")
    assert StoredData(folder, base="toy-0", corrupt=0.2).skipped == {"9.png": "no picture"}
    with pytest.raises(DistillationError, match="store of this parts"):
        Store(folder).begin({"base": "toy-0", "parts": 4}, (latents[0], {}))
    (folder / "part-000001.json").unlink()
    with pytest.raises(DistillationError, match="number 1 is missing"):
        StoredData(folder, base="toy-0", corrupt=0.2)
    (folder / "store.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DistillationError, match="store of format 1"):
        StoredData(folder, base="toy-0", corrupt=0.2)


@pytest.mark.long
def test_memory_stays_flat_over_fifty_thousand_items(tmp_path):
    """SD1.5's sizes: 32 kB of latent and 118 kB of conditioning each, 7.5 GB in all."""
    count, generator = 50_000, torch.Generator().manual_seed(0)
    store = Store(tmp_path / "store")
    store.begin({"base": "toy-0", "parts": 100}, (torch.zeros(1, 77, 768), {}))
    latents, contexts = torch.randn(8, 4, 64, 64, generator=generator), torch.randn(8, 1, 77, 768)
    for part in range(100):
        items = (
            StoredItem(f"{row}", "", latents[row % 8], (contexts[row % 8], {}))
            for row in range(part * 500, (part + 1) * 500)
        )
        assert store.write(part, items, {}) == 500
    data = StoredData(tmp_path / "store", base="toy-0", workers=2)
    assert len(data) == count
    process, seen = psutil.Process(), []
    for position in range(count // 16):
        indices, found, entries = data.images(0, 16, position, range(16))
        assert len(indices) == len(found) == len(entries) == 16
        if position in (200, count // 16 - 1):
            # What the kernel keeps of the files is shared, and goes when it is needed elsewhere.
            seen.append(process.memory_full_info().uss)
    assert seen[1] - seen[0] < 50 * 2**20, seen
