"""What oracles of steps that leave out tokens share: a cell at a time."""

from __future__ import annotations

import torch


def on_grid(x: torch.Tensor, small: tuple[int, int], large: tuple[int, int]) -> torch.Tensor:
    """[large tokens, C]: each cell the mean of the cells of [small tokens, C] that it covers, in part or whole."""
    cells = []
    for y in range(large[0]):
        for z in range(large[1]):
            rows = range(y * small[0] // large[0], -(-(y + 1) * small[0] // large[0]))
            columns = range(z * small[1] // large[1], -(-(z + 1) * small[1] // large[1]))
            cells.append(torch.stack([x[r * small[1] + c] for r in rows for c in columns]).mean(0))
    return torch.stack(cells)


def standing_in(given: dict, name, out: torch.Tensor, tokens: list[int], keep: int | None, step, grids, s: int) -> torch.Tensor:
    """[all tokens, C]: what FastVAR's part adds to one row, of `out` [chosen, C]; it is kept at the step's cached scale."""
    if keep is not None:
        whole = on_grid(given[name], grids[step.cached_scale], grids[s])
        whole[tokens] = out
        out = whole
    if s == step.cached_scale:
        given[name] = out
    return out
