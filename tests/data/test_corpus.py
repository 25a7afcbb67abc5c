"""What a run reads: order, blending, splits, and the errors of a wrong `data` section."""

from __future__ import annotations

import gzip
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k2train.config.data import CorpusConfig, DataConfig
from k2train.config.errors import ConfigError
from k2train.data.corpus import Corpus, build_corpus
from k2train.data.order import BLOCK, Blend, epoch_seed
from k2train.data.split import SplitName, document_ranges, parse_split

from .conftest import WriteDataset, numbered_documents

SEQ_LEN = 32


def open_corpus(
    tmp_path: Path,
    *prefixes: str,
    seed: int = 0,
    seq_len: int = SEQ_LEN,
    split: str = "80,15,5",
    weights: tuple[float, ...] = (),
    vocab_size: int | None = None,
) -> Corpus:
    blend = tuple(
        CorpusConfig(prefix, weight)
        for prefix, weight in zip(prefixes, weights or (1.0,) * len(prefixes), strict=True)
    )
    config = DataConfig(name="test", blend=blend, split=split, cache_dir=str(tmp_path / "cache"))
    return build_corpus(config, seq_len, seed, vocab_size)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_batch_is_the_same_however_it_is_cut_up(
    tmp_path: Path, write_dataset: WriteDataset, split: SplitName
) -> None:
    """Across an epoch's end too, and in a corpus opened anew, as after a restart."""
    prefixes = (
        write_dataset("a", numbered_documents(90, "a")),
        write_dataset("b", numbered_documents(70, "b")),
    )
    corpus = open_corpus(tmp_path, *prefixes, weights=(3.0, 1.0))
    count = 3 * corpus.num_samples(split) + 5
    whole = corpus.batch(split, 0, count)
    assert whole.shape == (count, SEQ_LEN + 1)
    assert whole.dtype == torch.int64
    pieces = [corpus.batch(split, start, min(7, count - start)) for start in range(0, count, 7)]
    assert torch.equal(torch.cat(pieces), whole)
    reopened = open_corpus(tmp_path, *prefixes, weights=(3.0, 1.0))
    assert torch.equal(reopened.batch(split, count - 4, 4), whole[-4:])
    assert reopened.identity == corpus.identity


def test_reading_backwards_gives_the_same_samples(tmp_path: Path, write_dataset: WriteDataset) -> None:
    corpus = open_corpus(tmp_path, write_dataset("a", numbered_documents(50)))
    count = 4 * corpus.num_samples("train")
    forwards = [corpus.batch("train", i, 1) for i in range(count)]
    backwards = [corpus.batch("train", i, 1) for i in reversed(range(count))]
    assert all(torch.equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))


def test_an_epoch_makes_every_token_a_target_once_and_epochs_are_shuffled_anew(
    tmp_path: Path, write_dataset: WriteDataset
) -> None:
    """The stream of an epoch is every document once; its windows overlap by one token, and only the
    first token and a rest shorter than a window are no targets."""
    documents = numbered_documents(80)
    corpus = open_corpus(tmp_path, write_dataset("a", documents), split="1,0,0")
    tokens = sum(len(text) + 1 for text in documents)
    per_epoch = (tokens - 1) // SEQ_LEN
    assert corpus.num_tokens("train") == tokens
    assert corpus.num_samples("train") == per_epoch
    everything = Counter(byte for text in documents for byte in text.encode())
    everything[256] = len(documents)
    epochs = [corpus.batch("train", e * per_epoch, per_epoch)[:, 1:] for e in range(3)]
    for epoch in epochs:
        missing = everything - Counter(epoch.flatten().tolist())
        assert Counter(epoch.flatten().tolist()) - everything == Counter()
        assert missing.total() == tokens - per_epoch * SEQ_LEN
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])


def test_the_first_epoch_is_what_megatron_cores_own_builder_gives(
    tmp_path: Path, write_dataset: WriteDataset
) -> None:
    """Oracle: BlendedMegatronDatasetBuilder with one epoch and the seed of that epoch, tokens and
    labels alike."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    prefix = write_dataset("a", numbered_documents(90))
    corpus = open_corpus(tmp_path, prefix, seed=5, split="80,20,0")

    class Tokenizer:
        vocab_size, eod, unique_identifiers = 257, 256, {"tokenizer": "byte"}

    config = GPTDatasetConfig(
        random_seed=epoch_seed(5, 0, 0),
        sequence_length=SEQ_LEN,
        blend=([prefix], None),
        split="80,20,0",
        path_to_cache=str(tmp_path / "oracle"),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train = BlendedMegatronDatasetBuilder(GPTDataset, [None, None, None], lambda: True, config).build()[0]
    assert len(train) == corpus.num_samples("train")
    batch = corpus.batch("train", 0, len(train))
    for i in range(len(train)):
        assert torch.equal(batch[i, :-1], train[i]["tokens"])
        assert torch.equal(batch[i, 1:], train[i]["labels"])


def test_seeds_change_the_training_order_and_nothing_else(
    tmp_path: Path, write_dataset: WriteDataset
) -> None:
    prefix = write_dataset("a", numbered_documents(90))
    zero, one = (open_corpus(tmp_path, prefix, seed=seed) for seed in (0, 1))
    assert not torch.equal(zero.batch("train", 0, 16), one.batch("train", 0, 16))
    assert torch.equal(zero.batch("valid", 0, 8), one.batch("valid", 0, 8))
    assert zero.identity != one.identity
    assert open_corpus(tmp_path, prefix, seed=2**40).batch("train", 0, 1).shape == (1, SEQ_LEN + 1)


def test_no_document_of_one_split_shows_in_another(tmp_path: Path, write_dataset: WriteDataset) -> None:
    """Every word names its document, so the whole words of a split's samples say which documents it
    read."""
    corpus = open_corpus(tmp_path, write_dataset("a", numbered_documents(100)), split="70,20,10")
    seen = {}
    for split in ("train", "valid", "test"):
        text = b" ".join(
            corpus.tokenizer.decode(row.numpy()) for row in corpus.batch(split, 0, corpus.num_samples(split))
        )
        words = {word for word in text.replace(b"d", b" d").split() if word.startswith(b"d")}
        seen[split] = {f"d{i}" for i in range(100) if f"d{i}".encode() in words}
    assert all(seen.values())
    assert seen["train"] <= {f"d{i}" for i in range(70)}
    # a sample's last word may be cut, and a cut number is a smaller one, hence only the upper
    # bounds of the others
    assert {w for w in seen["valid"] if len(w) == 3} <= {f"d{i}" for i in range(100)} - {
        f"d{i}" for i in range(10, 70)
    }
    assert corpus.num_documents("train") == 70


@given(
    st.integers(1, 5000), st.lists(st.floats(0, 100), min_size=1, max_size=3).filter(lambda s: s[0] > 0.01)
)
@settings(deadline=None)
def test_splits_are_disjoint_and_complete(num_documents: int, shares: list[float]) -> None:
    ranges = document_ranges(parse_split(",".join(map(str, shares))), num_documents)
    listed = [document for part in ranges.values() for document in part]
    assert listed == list(range(num_documents))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3), (5.0, 3.0, 2.0), (1.0, 10.0, 100.0), (0.2,) * 5])
def test_a_blend_keeps_its_shares_to_one_sample_at_every_length(weights: tuple[float, ...]) -> None:
    """The corpus furthest behind is served first. Of two corpora neither strays from its due by
    more than one sample; of more, megatron-core's rule looks at the due of the sample before and
    may fall behind by a little more."""
    blend = Blend(weights)
    corpora, _ = blend.locate(0, 3000)
    for corpus, weight in enumerate(weights):
        due = weight / sum(weights) * np.arange(1, 3001)
        got = np.cumsum(corpora == corpus)
        assert np.abs(got - due).max() <= (1 if len(weights) == 2 else 2) + 1e-6
    far, _ = blend.locate(5 * BLOCK, 3000)
    assert np.array_equal(far, corpora)


def test_a_blend_hands_out_each_corpus_in_order_without_gaps() -> None:
    corpora, samples = Blend((2.0, 1.0)).locate(BLOCK - 1000, 2000)
    for corpus in (0, 1):
        own = samples[corpora == corpus]
        assert np.array_equal(own, np.arange(own[0], own[0] + len(own)))


def test_the_end_of_a_pass_is_where_the_first_corpus_would_repeat() -> None:
    blend = Blend((2.0, 1.0))
    count = blend.first_beyond((100, 10))
    corpora, samples = blend.locate(0, count + 1)
    assert corpora[-1] == 1
    assert samples[-1] == 10
    assert samples[:-1][corpora[:-1] == 1].max() == 9


def test_held_out_text_is_the_text_of_the_samples_evaluated(
    tmp_path: Path, write_dataset: WriteDataset
) -> None:
    """Whole documents in order, so that a compressor sees what the documents hold and not torn
    windows."""
    documents = numbered_documents(100)
    corpus = open_corpus(tmp_path, write_dataset("a", documents), split="50,50,0")
    for count in (1, 5, corpus.num_samples("valid")):
        text = corpus.held_out_text(count)
        assert len(text) == corpus.num_bytes(corpus.batch("valid", 0, count)[:, 1:])
    assert corpus.held_out_text(10**9) == text
    held_out = [document.encode() for document in documents[50:]]
    assert sum(document in text for document in held_out) >= len(held_out) - 2
    assert corpus.held_out_text(5) == text[: len(corpus.held_out_text(5))]


def test_every_pass_over_held_out_text_is_whole_documents_end_to_end(
    tmp_path: Path, write_dataset: WriteDataset
) -> None:
    """The last target of a window is the first input of the next, in the second pass too, which has
    another order."""
    corpus = open_corpus(tmp_path, write_dataset("a", numbered_documents(100)), split="50,50,0")
    count = corpus.num_samples("valid")
    passes = [corpus.batch("valid", start, count) for start in (0, count)]
    for rows in passes:
        assert torch.equal(rows[:-1, -1], rows[1:, 0])
    assert not torch.equal(*passes)


def test_a_dataset_of_another_program_without_a_side_car_is_read(
    tmp_path: Path, foreign_dataset: str
) -> None:
    corpus = open_corpus(tmp_path, foreign_dataset, split="90,10,0")
    batch = corpus.batch("train", 0, 4)
    assert int(batch.max()) == 256
    assert int(batch.min()) >= 65


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, foreign_dataset: str) -> None:
    """Without a side-car this shows only when the ids are read."""
    data = Path(foreign_dataset + ".bin")
    ids = np.fromfile(data, dtype=np.int32)
    (ids + 100).tofile(data)
    with pytest.raises(ConfigError, match=r"holds token id 3\d\d, the vocabulary has ids 0 to 256"):
        open_corpus(tmp_path, foreign_dataset).batch("train", 0, 8)


def test_a_rebuilt_dataset_is_not_read_with_the_old_shuffle(
    tmp_path: Path, write_dataset: WriteDataset
) -> None:
    prefix = write_dataset("a", numbered_documents(90))
    first = open_corpus(tmp_path, prefix).batch("train", 0, 8)
    write_dataset("a", numbered_documents(40, "other"))
    corpus = open_corpus(tmp_path, prefix)
    assert corpus.batch("train", 0, 2 * corpus.num_samples("train")).shape[1] == SEQ_LEN + 1
    assert not torch.equal(corpus.batch("train", 0, 8), first)


@pytest.fixture
def second_of_two_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A default process group in which this process is rank 1 of 2 and any barrier is a failure."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("the data room communicated")

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    for name in ("barrier", "all_reduce", "broadcast", "all_gather_object", "broadcast_object_list"):
        monkeypatch.setattr(torch.distributed, name, fail)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("second_of_two_ranks")
def test_a_rank_that_is_not_the_first_reads_without_communicating(
    tmp_path: Path, write_dataset: WriteDataset
) -> None:
    """megatron-core's datasets write their indices on rank 0 alone and wait at barriers once a
    process group exists."""
    prefix = write_dataset("a", numbered_documents(60))
    assert torch.distributed.get_rank() == 1
    first = open_corpus(tmp_path, prefix).batch("train", 0, 4)
    assert torch.equal(open_corpus(tmp_path, prefix).batch("train", 0, 4), first), "read from the cache"


@pytest.mark.parametrize(
    ("split", "rule"),
    [
        ("a,b", "numbers"),
        ("0,0", "sums to zero"),
        ("0,1", "no training"),
        ("-5,1", "negative"),
        ("1,1,1,1", "at most three"),
        ("", "numbers"),
        ("nan,1", "negative"),
        ("inf", "negative"),
    ],
)
def test_a_split_that_cannot_be_is_refused(split: SplitName, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule) as caught:
        parse_split(split)
    assert caught.value.field == "data.split"
    assert "95,5,0" in caught.value.remedy


def test_a_split_too_small_for_a_sample_is_named(tmp_path: Path, write_dataset: WriteDataset) -> None:
    prefix = write_dataset("a", ["x" * 100, "y" * 100, "short"])
    with pytest.raises(
        ConfigError, match="its valid documents hold 6 tokens, less than one sample of 33"
    ) as caught:
        open_corpus(tmp_path, prefix, split="67,33,0")
    assert "data.split" in caught.value.remedy
    with pytest.raises(ConfigError, match="its valid documents hold 0 tokens"):
        open_corpus(tmp_path, prefix, split="95,5,0")
    with pytest.raises(
        ConfigError, match="its train documents hold 208 tokens, less than one sample of 1001"
    ):
        open_corpus(tmp_path, prefix, split="1,0,0", seq_len=1000)
    corpus = open_corpus(tmp_path, prefix, split="67,0,33")
    assert corpus.num_samples("valid") == corpus.num_samples("test") == 0
    with pytest.raises(ConfigError, match="its test documents hold 6 tokens"):
        corpus.batch("test", 0, 1)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_is_no_share_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match="weight"):
        CorpusConfig("x", weight)


def test_files_that_are_missing_cut_short_or_not_an_index_are_named(
    tmp_path: Path, write_dataset: WriteDataset
) -> None:
    prefix = write_dataset("a", numbered_documents(30))
    index, data = Path(prefix + ".idx"), Path(prefix + ".bin")
    good_index, good_data = index.read_bytes(), data.read_bytes()
    cases = [
        (prefix + "x", None, None, r"ax\.idx and .*ax\.bin not found", prefix),
        (prefix + ".bin", None, None, "not its prefix", f"write {prefix}"),
        (prefix, good_index, good_data[:-3], r"a\.bin: is cut short", "again"),
        (prefix, good_index[:-9], good_data, r"a\.idx: is cut short", "again"),
        (prefix, good_index[:20], good_data, "not an index", "again"),
        (prefix, b"x" * len(good_index), good_data, "not an index", "again"),
        (prefix, good_index[:17] + b"\x06" + good_index[18:], good_data, "type code 6", ""),
    ]
    for given_prefix, new_index, new_data, message, remedy in cases:
        index.write_bytes(new_index or good_index)
        data.write_bytes(new_data or good_data)
        with pytest.raises(ConfigError, match=message) as caught:
            open_corpus(tmp_path, given_prefix)
        assert caught.value.field == "data.blend[0].prefix"
        assert remedy in caught.value.remedy


def test_a_corpus_of_another_tokenizer_or_a_vocabulary_too_small_is_refused(
    tmp_path: Path, write_dataset: WriteDataset
) -> None:
    prefix = write_dataset("a", numbered_documents(30))
    with pytest.raises(ConfigError, match=r"model\.vocab_size=100: is smaller than the 257 ids"):
        open_corpus(tmp_path, prefix, vocab_size=100)
    assert open_corpus(tmp_path, prefix, vocab_size=300).batch("train", 0, 1).shape == (1, SEQ_LEN + 1)
    sidecar = Path(prefix + ".json")
    sidecar.write_text(sidecar.read_text().replace('"byte"', '"other"'))
    with pytest.raises(ConfigError, match="was built with the tokenizer other, this run has byte"):
        open_corpus(tmp_path, prefix)
    sidecar.write_text("{")
    with pytest.raises(ConfigError, match="not a readable side-car"):
        open_corpus(tmp_path, prefix)


def test_a_weight_too_small_to_be_kept_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.blend\[1\]\.weight"):
        Blend((1.0, 1e-9))


def test_bits_per_byte_need_no_more_than_the_corpus(tmp_path: Path, write_dataset: WriteDataset) -> None:
    """A uniform model over 257 ids costs log2(257) bits a token; the end-of-document tokens add
    bits but no bytes."""
    corpus = open_corpus(tmp_path, write_dataset("a", numbered_documents(60)), split="50,50,0")
    targets = corpus.batch("valid", 0, corpus.num_samples("valid"))[:, 1:]
    ends = int((targets == 256).sum())
    bits = targets.numel() * math.log2(257) / corpus.num_bytes(targets)
    assert bits == pytest.approx(math.log2(257) * (1 + ends / (targets.numel() - ends)))
    assert len(gzip.compress(corpus.held_out_text(10**9), 9)) < corpus.num_bytes(targets)
