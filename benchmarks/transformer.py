"""A small causal transformer on the bytes of Python's own sources, to predict the next byte."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn

# Long-lived modules of the standard library; a Python release changes their text, so the digest is reported.
SOURCES = ("argparse", "ast", "dataclasses", "datetime", "decimal", "doctest", "inspect", "mailbox", "pickletools")
SYMBOLS = 256


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the stream.

    Attention and norm are written out in operations that every tool here can differentiate twice, forward over reverse
    and under vmap; the fused kernels cannot be.
    """

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale1, self.scale2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.register_buffer("future", torch.ones(context, context).triu(1).bool(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(rms_norm(x, self.scale1)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)
        weights = scores.masked_fill(self.future[:length, :length], float("-inf")).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(rms_norm(x, self.scale2))))


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """``x / sqrt(mean x^2) * scale`` over the last dimension (Zhang and Sennrich 2019)."""
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale


class Transformer(nn.Module):
    """Bytes (B, T) to logits (B, 256, T), as ``nn.CrossEntropyLoss`` takes them."""

    def __init__(self, width: int = 48, layers: int = 2, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(SYMBOLS, width), nn.Parameter(torch.randn(context, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, context) for _ in range(layers)))
        self.scale, self.head = nn.Parameter(torch.ones(width)), nn.Linear(width, SYMBOLS)
        nn.init.normal_(self.symbols.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.blocks(self.symbols(x) + self.places[: x.shape[1]])
        return self.head(rms_norm(stream, self.scale)).transpose(1, 2)


def text_bytes(sequences: int, context: int) -> tuple[Tensor, Tensor, str]:
    """``(inputs, targets, digest)``: int64 (sequences, context) each, the targets one byte on.

    Sequences follow each other without a gap.
    """
    library = Path(sysconfig.get_path("stdlib"))
    text = b"".join((library / f"{name}.py").read_bytes() for name in SOURCES)
    if len(text) < sequences * context + 1:
        raise SystemExit(f"The text has {len(text)} bytes, but {sequences} sequences of {context} are wanted.")
    text = text[: sequences * context + 1]
    symbols = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    shape = (sequences, context)
    return symbols[:-1].view(shape), symbols[1:].view(shape), hashlib.sha256(text).hexdigest()
