"""A corpus from any source of text, and training samples out of it.

    python examples/new_dataset.py

`k2train data build` reads text, JSON lines and Parquet. Whatever else yields documents can be
written by the same writer. It makes the indexed dataset of megatron-core, which `data.blend` takes.
The example writes into `data/example` below the working directory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from k2train.config.compose import load_config
from k2train.config.data import TokenizerConfig
from k2train.config.schema import Config
from k2train.data.corpus import build_corpus
from k2train.data.tokenizer import build_tokenizer
from k2train.data.writer import DatasetWriter

PREFIX = Path("data/example/squares")


def documents() -> Iterator[str]:
    """Any source of text: here the squares of the numbers up to 999, a document for every ten."""
    for start in range(0, 1000, 10):
        yield "".join(f"{n} * {n} = {n * n}\n" for n in range(start, start + 10))


def main() -> None:
    """Write the corpus, open it as a run does, and show the beginning of a sample."""
    PREFIX.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(TokenizerConfig(kind="byte"))
    writer = DatasetWriter(PREFIX, tokenizer)
    for text in documents():
        writer.add(tokenizer.encode(text), num_bytes=len(text.encode()))
    sidecar = writer.finish()
    print(f"{sidecar.num_documents} documents, {sidecar.num_tokens} tokens")
    config: Config = load_config(["data=own", f"data.blend=[{{prefix: {PREFIX}, weight: 1}}]"])
    corpus = build_corpus(config.data, config.train.seq_len, config.train.seed)
    sample = corpus.batch("train", start=0, count=1)[0]
    print(tokenizer.decode(sample.numpy()[:40]).decode())


if __name__ == "__main__":
    main()
