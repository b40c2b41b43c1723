"""M-RoPE positions of a prompt with pictures."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from qwenvl_app.engine.pixels import Grid


def mrope_positions(
    length: int, pictures: Iterable[tuple[range, Grid]], merge: int
) -> torch.Tensor:
    """Positions (3, length) of a prompt, as ``Qwen3VLModel.get_rope_index``.

    ``pictures``: where the tokens of each are, in order, and its patches, of which ``merge`` a side
    make a token. Text counts on in all three dimensions; a picture's tokens are placed in time,
    rows and columns; what comes after it goes on after the larger of its sides.
    """
    parts, end, following = [], 0, 0
    for tokens, grid in pictures:
        text = tokens.start - end
        parts.append(torch.arange(following, following + text).expand(3, -1))
        time, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
        placed = torch.cartesian_prod(torch.arange(time), torch.arange(rows), torch.arange(columns))
        following += text
        parts.append(placed.T + following)
        following += max(rows, columns)
        end = tokens.stop
    parts.append(torch.arange(following, following + length - end).expand(3, -1))
    return torch.cat(parts, dim=1)
