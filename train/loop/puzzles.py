"""Sudoku: full grids, and puzzles with exactly one solution."""

from collections.abc import Iterator
from functools import cache
from math import isqrt

import numpy as np
from jaxtyping import Float, Int

_EMPTY = -1


@cache
def _peers(side: int) -> list[list[int]]:
    """For each cell (row by row) those of its row, column and block."""
    k = isqrt(side)
    row, column = np.divmod(np.arange(side * side), side)
    units = np.stack([row, column, row // k * k + column // k])
    same = np.any(units[:, :, None] == units[:, None, :], axis=0) & ~np.eye(side * side, dtype=bool)
    return [np.flatnonzero(line).tolist() for line in same]


def solutions(board: list[int], side: int, rng: np.random.Generator | None = None) -> Iterator[list[int]]:
    """All solutions of a board (digits from 0, -1 where empty), in an order that `rng` shuffles.

    Depth first, at the empty cell with the fewest digits left.
    """
    peers, everything = _peers(side), (1 << side) - 1
    board, left = list(board), [everything] * (side * side)
    for cell, digit in enumerate(board):
        if digit != _EMPTY:
            if not left[cell] >> digit & 1:
                return
            for peer in peers[cell]:
                left[peer] &= ~(1 << digit)
    empty = {cell for cell, digit in enumerate(board) if digit == _EMPTY}

    def search() -> Iterator[list[int]]:
        if not empty:
            yield list(board)
            return
        cell = min(empty, key=lambda cell: (left[cell].bit_count(), cell))
        digits = [digit for digit in range(side) if left[cell] >> digit & 1]
        if rng is not None:
            digits = rng.permutation(digits).tolist()
        empty.remove(cell)
        for digit in digits:
            bit, board[cell] = 1 << digit, digit
            touched = [peer for peer in peers[cell] if left[peer] & bit and board[peer] == _EMPTY]
            for peer in touched:
                left[peer] ^= bit
            yield from search()
            for peer in touched:
                left[peer] ^= bit
        board[cell] = _EMPTY
        empty.add(cell)

    yield from search()


def full_grids(side: int, count: int | None = None, seed=0) -> Int[np.ndarray, "grids side side"]:
    """Solved boards, digits from 0: all of them (there are 288 of side 4), or `count` random ones."""
    blank = [_EMPTY] * side**2
    if count is None:
        return np.array(list(solutions(blank, side))).reshape(-1, side, side)
    rng = np.random.default_rng(seed)
    return np.array([next(solutions(blank, side, rng)) for _ in range(count)]).reshape(-1, side, side)


def make_puzzles(
    grids: Int[np.ndarray, "grids side side"], count: int, clues: tuple[int, int], seed
) -> tuple[Float[np.ndarray, "count side side side"], Float[np.ndarray, "count side side side"]]:
    """`count` puzzles that have one solution, which is among `grids`: (puzzles, solutions), one-hot in float32.

    Cells are removed from a grid in random order as long as the solution stays unique, until a random number of clues is left
    (another grid and number if that many cannot be removed, so few clues are rarer).
    """
    side = grids.shape[1]
    cells, rng = side * side, np.random.default_rng(seed)
    flat = grids.reshape(-1, cells)
    puzzles, solved = np.zeros((count, cells, side), np.float32), np.zeros((count, cells, side), np.float32)
    made = 0
    while made < count:
        solution, wanted = flat[rng.integers(len(flat))], rng.integers(clues[0], clues[1] + 1)
        board, given = solution.tolist(), cells
        for cell in rng.permutation(cells):
            if given == wanted:
                break
            board[cell] = _EMPTY
            if _other_digit_fits(board, cell, solution[cell], side):
                board[cell] = int(solution[cell])
            else:
                given -= 1
        if given == wanted:
            solved[made, np.arange(cells), solution] = 1
            puzzles[made] = solved[made] * (np.array(board) != _EMPTY)[:, None]
            made += 1
    shape = (count, side, side, side)
    return puzzles.reshape(shape), solved.reshape(shape)


def _other_digit_fits(board: list[int], cell: int, digit: int, side: int) -> bool:
    """Whether a board that had one solution before `cell` was emptied has another now: it must differ there."""
    for other in range(side):
        if other != digit:
            board[cell] = other
            found = next(solutions(board, side), None)
            board[cell] = _EMPTY
            if found is not None:
                return True
    return False
