"""Corpora, tokenizers and the order of samples.

Public names, by module:
- `corpus`: `build_corpus(DataConfig, seq_len, seed, vocab_size) -> Corpus`; `Corpus.batch`,
  `.num_samples`, `.num_tokens`, `.num_documents`, `.num_bytes`, `.held_out_text`, `.identity`,
  `.tokenizer`
- `tokenizer`: `Tokenizer` (protocol), `ByteTokenizer`, `build_tokenizer(TokenizerConfig)`
- `build`: `build_dataset(DataBuildConfig, progress) -> BuildReport`
- `read_ahead`: `ReadAhead(read, indices, ahead)`, a background thread that reads before it is asked
- `sidecar`: `Sidecar`, `read_sidecar`
- `indexed`: `open_indexed`

Storage is megatron-core's indexed format, read through its IndexedDataset and GPTDataset;
`megatron` is the only module that imports it.
"""
