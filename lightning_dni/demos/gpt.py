"""A small GPT: a pre-norm transformer decoder, in blocks worth cutting."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_dni.demos.arguments import check_count, check_fraction


class Embedding(nn.Module):
    """Token plus position, with dropout; at most `context_length` positions."""

    def __init__(self, vocabulary: int, context_length: int, width: int, dropout: float) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context_length, width)
        self.dropout = nn.Dropout(dropout)

    @override
    def forward(self, tokens: Int[Tensor, " batch positions"]) -> Float[Tensor, " batch positions width"]:
        """`[batch, positions, width]`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.dropout(self.token(tokens) + self.position(positions))  # type: ignore[no-any-return]


class CausalSelfAttention(nn.Module):
    """Every position attends to itself and to those before it, in `heads` heads."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    @override
    def forward(self, h: Float[Tensor, " batch positions width"]) -> Float[Tensor, " batch positions width"]:
        """`[batch, positions, width]`."""
        query, key, value = self.query_key_value(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        heard = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return self.out(heard.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention, then a GELU layer four times as wide; each sees the normalised h and is added to h."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        attention, mlp = CausalSelfAttention(width, heads, dropout), nn.Linear(width, 4 * width)
        self.attention = nn.Sequential(nn.LayerNorm(width), attention, nn.Dropout(dropout))
        wide = [mlp, nn.GELU(), nn.Linear(4 * width, width)]
        self.mlp = nn.Sequential(nn.LayerNorm(width), *wide, nn.Dropout(dropout))

    @override
    def forward(self, h: Float[Tensor, " batch positions width"]) -> Float[Tensor, " batch positions width"]:
        """`[batch, positions, width]`."""
        h = h + self.attention(h)
        return h + self.mlp(h)  # type: ignore[no-any-return]


class GPT(nn.Sequential):
    """Scores of each position's next token: `embedding`, `block_0`, `block_1`, ..., `head`.

    Args:
        vocabulary: number of tokens.
        context_length: positions that it can see.
        width: of every position; a multiple of `heads`.
        heads: attention heads.
        layers: number of blocks.
        dropout: after the embedding, in attention and after each half of a block.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> GPT(vocabulary=11)(torch.zeros(2, 5, dtype=torch.long)).shape
        torch.Size([2, 5, 11])
    """

    def __init__(
        self,
        vocabulary: int = 64,
        context_length: int = 64,
        width: int = 64,
        heads: int = 4,
        layers: int = 3,
        dropout: float = 0.1,
    ) -> None:
        counts = {"context_length": context_length, "width": width, "heads": heads, "layers": layers}
        for name, count in {"vocabulary": vocabulary, **counts}.items():
            check_count(name, count)
        check_fraction("dropout", dropout)
        if width % heads:
            raise ValueError(f"Expected `width` to be a multiple of heads={heads}, but got {width}.")
        super().__init__()
        self.embedding = Embedding(vocabulary, context_length, width, dropout)
        for i in range(layers):
            self.add_module(f"block_{i}", Block(width, heads, dropout))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False))
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
