"""Bits per byte: a loss that needs no tokenizer to be understood, beside what gzip makes of the
same text."""

from __future__ import annotations

import math
import zlib


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int) -> float:
    """`loss` in nats a token over `num_tokens` tokens that stand for `num_bytes` bytes of text."""
    return loss / math.log(2) * num_tokens / num_bytes


def gzip_bits_per_byte(text: bytes) -> float:
    """What `gzip -9` needs for `text`, in bits a byte, header and trailer included."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    return 8 * len(compressor.compress(text) + compressor.flush()) / len(text)
