"""SAM's embeddings on disk: exact names, stated errors, a limit that holds, no half-written
entry."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch

from cores.dataset.collate import collate, collate_prompts
from cores.dataset.mixture import EvalDataset
from cores.model import CoresForReasoningSegmentation, CoresProcessor
from cores.model.segmenting import embedding_cache as embeddings
from cores.model.segmenting.embedding_cache import SamCache, encoder_fingerprint, pack, unpack
from cores.utils import build
from cores.utils.precompute import sam_cache
from cores.utils.settings.arguments import parse
from cores.utils.settings.flags import UsageError
from tests.backbone_toys import flags, toys
from tests.helpers import LEVELS, TEMPLATE, conversation, sample, tiny_model
from tests.scripted import scripted_model


def embedding(seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(8, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", embeddings.DTYPES)
def test_what_is_kept_is_what_is_loaded_within_the_stated_error(tmp_path, dtype):
    cache, values = SamCache(tmp_path, "name", dtype), embedding()
    kept = cache.store("abc", values)
    assert torch.equal(kept, cache.load("abc"))
    assert torch.equal(kept, SamCache(tmp_path, "name", dtype).load("abc"))
    largest = values.abs().amax(dim=(1, 2), keepdim=True)
    allowed = (
        values.abs() * 2**-11 if dtype == "fp16" else (largest / 254 * 1.001).expand_as(values)
    )
    assert ((kept - values).abs() <= allowed).all()
    assert not torch.equal(kept, values), "the rounding is seen when it is fresh, too"


def test_a_channel_of_zeros_stays_zero():
    values = embedding()
    values[2] = 0
    assert torch.equal(unpack(pack(values, "int8"))[2], values[2])


def test_names_follow_content(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    other = image.copy()
    other[5, 7, 2] ^= 1
    names = {SamCache.key(i) for i in (image, image.copy(), other, image.reshape(8, 6, 3))}
    assert len(names) == 3
    assert SamCache.key(image[:, ::-1]) == SamCache.key(np.ascontiguousarray(image[:, ::-1]))
    model, _ = tiny_model()
    encoder = model.segmenting.sam.image_encoder
    before = encoder_fingerprint(encoder, 64)
    assert encoder_fingerprint(encoder, 64) == before != encoder_fingerprint(encoder, 32)
    assert encoder_fingerprint(encoder.bfloat16(), 64) != before
    encoder.float()
    with torch.no_grad():
        encoder.neck[0].weight[0, 0, 0, 0] += 1e-3
    assert encoder_fingerprint(encoder, 64) != before


def test_the_limit_holds_for_all_writers_together(tmp_path, caplog):
    size = len(embeddings.seal(pack(embedding(), "fp16")))
    first, second = (
        SamCache(tmp_path, name, limit_gb=(3.5 * size) / 1e9) for name in ("one", "two")
    )
    for i in range(3):
        (first, second)[i % 2].store(f"a{i}", embedding(i))
    assert first.used() == 3 * size
    assert torch.equal(second.store("zz", embedding(9)), unpack(pack(embedding(9), "fp16")))
    assert second.load("zz") is None
    assert second.closed
    assert "full" in caplog.text
    assert second.load("a1") is not None, "what is there stays in use"
    assert SamCache(tmp_path, "one", limit_gb=1).used() == 3 * size


def test_a_broken_entry_is_computed_again(tmp_path, caplog):
    cache = SamCache(tmp_path, "name")
    cache.store("abc", embedding())
    path = cache._path("abc")
    path.write_bytes(path.read_bytes()[:-7])
    assert cache.load("abc") is None
    assert "abc.safetensors" in caplog.text
    assert torch.equal(cache.store("abc", embedding()), cache.load("abc"))


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    cache = SamCache(tmp_path, "name")
    cache.store("abc", embedding())
    old, new = (cache._path("abc").with_name(f"x.{name}.partial") for name in ("old", "new"))
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    (tmp_path / "used").write_text("nonsense")
    assert cache.used() == cache._path("abc").stat().st_size + 4
    assert not old.exists()
    assert new.exists(), "its writer may be at work"


def test_a_disk_that_cannot_be_written_stops_the_cache_only(tmp_path, monkeypatch, caplog):
    cache = SamCache(tmp_path, "name")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embeddings.os, "fsync", full)
    kept = cache.store("abc", embedding())
    assert torch.equal(kept, unpack(pack(embedding(), "fp16")))
    assert "No space left" in caplog.text
    assert not list(tmp_path.glob("*/*/*"))


@pytest.mark.parametrize(
    ("options", "words"), [({"dtype": "fp8"}, "fp16, int8"), ({"limit_gb": -1}, "not be negative")]
)
def test_mistakes(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        SamCache(tmp_path, "name", **options)


# ------------------------------------------------------------------------------------- in the model


def counted(model):
    """The sizes of the batches that SAM's encoder sees from now on."""
    calls: list[int] = []
    model.segmenting.sam.image_encoder.register_forward_hook(
        lambda module, args, output: calls.append(len(args[0]))
    )
    return calls


def samples():
    return [
        sample(conversation(1), conversation(2), name="0"),
        sample(conversation(1), name="1", seed=1),
    ]


@pytest.mark.parametrize("dtype", embeddings.DTYPES)
def test_masks_with_a_cache_deviate_by_its_rounding_only(tmp_path, dtype):
    model, processor = tiny_model()
    plain = model.segment(collate(samples(), processor, LEVELS, TEMPLATE))
    expected = model(collate(samples(), processor, LEVELS, TEMPLATE))
    processor.sam_cache = SamCache(tmp_path, "name", dtype)
    model.segmenting.store_embedding = processor.sam_cache.store
    calls = counted(model)
    first = model(collate(samples(), processor, LEVELS, TEMPLATE))
    assert calls == [1, 1]
    batch = collate(samples(), processor, LEVELS, TEMPLATE)
    again = model(batch)
    assert calls == [1, 1], "nothing is computed twice"
    assert batch.sam_pixels.shape == (0, 3, 64, 64)
    assert torch.equal(first.loss, again.loss), "what the cache held makes no difference"
    assert abs(float((again.loss - expected.loss).detach())) < {"fp16": 1e-3, "int8": 1e-2}[
        dtype
    ] * float(expected.loss.detach())
    assert [a.masks.shape for a in model.segment(batch)] == [p.masks.shape for p in plain]
    prompts = collate_prompts(samples(), processor, LEVELS, TEMPLATE)
    model.generate(prompts, processor.tokenizer, max_new_tokens=2)
    assert calls == [1, 1], "free generation uses it, too"


def test_a_batch_of_which_the_cache_has_a_part(tmp_path):
    model, processor = tiny_model()
    processor.sam_cache = SamCache(tmp_path, "name")
    model.segmenting.store_embedding = processor.sam_cache.store
    both = samples()
    model(collate(both[1:], processor, LEVELS, TEMPLATE))
    calls = counted(model)
    mixed = model(collate(both, processor, LEVELS, TEMPLATE))
    assert calls == [1]
    assert torch.equal(mixed.loss, model(collate(both, processor, LEVELS, TEMPLATE)).loss)


def test_free_answers_get_the_same_masks_from_what_is_cached(tmp_path):
    model = CoresForReasoningSegmentation.from_pretrained(scripted_model()).eval()
    processor = CoresProcessor.from_pretrained(scripted_model())
    asked = [sample(conversation(0, question="where?"), name=str(i), seed=i) for i in range(2)]

    def masks(samples):
        prompts = collate_prompts(samples, processor, LEVELS, TEMPLATE)
        return [
            found.masks for found in model.generate(prompts, processor.tokenizer, max_new_tokens=8)
        ]

    plain = masks(asked)
    assert all(len(m) == 1 for m in plain)
    processor.sam_cache = SamCache(tmp_path, "name")
    model.segmenting.store_embedding = processor.sam_cache.store
    calls = counted(model)
    # nothing cached, the second, both
    for samples, seen in ((asked[1:], [1]), (asked, [1, 1]), (asked, [1, 1])):
        for found, expected in zip(masks(samples), plain[-len(samples) :], strict=True):
            assert (found != expected).float().mean() < 0.01  # fp16
        assert calls == seen


# ------------------------------------------------------------------------------------------ filling


def fill(folder, **changes) -> tuple[int, list[str]]:
    return sam_cache.main(flags(toys(), sam_cache=folder, **changes)), sorted(
        p.name for p in folder.glob("*/*/*.safetensors")
    )


def test_filling_covers_training_and_validation_and_resumes(tmp_path, capsys):
    code, names = fill(tmp_path)
    assert (code, len(names)) == (0, 7)
    assert "7 computed, 0 present" in capsys.readouterr().out
    (tmp_path / next(tmp_path.glob("*/*/*.safetensors"))).unlink()
    assert fill(tmp_path) == (0, names)
    assert "1 computed, 6 present" in capsys.readouterr().out
    settings = parse(flags(toys(), sam_cache=tmp_path))
    model, processor = build.build_model(settings)
    data = EvalDataset(settings.dataset_dir, settings.val_dataset, processor.levels, 0)
    batch = collate([data[0]], processor, processor.levels, processor.template)
    assert batch.sam_embeddings[0] is not None, "training finds what the command stored"
    own = model.segmenting.encode(processor.sam(data[0].image)[0][None])[0]
    assert torch.allclose(batch.sam_embeddings[0], own, rtol=2**-10, atol=1e-6)


def test_ranks_share_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, count in ((0, 4), (1, 7)):
        monkeypatch.setenv("RANK", str(rank))
        assert len(fill(tmp_path)[1]) == count


def test_a_full_cache_ends_the_filling(tmp_path, capsys):
    code, names = fill(tmp_path, sam_cache_gb=2.5e-6)
    assert code == 0
    assert 0 < len(names) < 7
    assert "full, the rest is computed" in capsys.readouterr().out


def test_filling_nowhere_is_refused(capsys):
    assert sam_cache.main(flags(toys())) == 2
    assert "--sam_cache" in capsys.readouterr().err


def test_a_wrong_limit_is_refused():
    with pytest.raises(UsageError, match="sam_cache_gb"):
        parse(flags(toys(), sam_cache_gb=-1))


def _write_for_ever(folder: str) -> None:
    cache = SamCache(folder, "name", limit_gb=1)
    for i in range(10**9):
        cache.store(f"{i % 64:02d}", embedding(i % 64))
        if i % 64 == 63:
            for file in cache.folder.glob("*/*.safetensors"):
                file.unlink(missing_ok=True)


@pytest.mark.chaos
def test_killed_writers_leave_whole_entries(tmp_path):
    context = multiprocessing.get_context("spawn")
    for round_ in range(6):
        writers = [context.Process(target=_write_for_ever, args=(str(tmp_path),)) for _ in range(2)]
        for writer in writers:
            writer.start()
        while not list(tmp_path.glob("*/*/*.safetensors")) and all(w.is_alive() for w in writers):
            time.sleep(0.05)
        time.sleep(0.01 * round_)
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        cache = SamCache(tmp_path, "name")
        for file in cache.folder.glob("*/*.safetensors"):
            assert torch.equal(
                cache.load(file.stem), unpack(pack(embedding(int(file.stem)), "fp16"))
            )
