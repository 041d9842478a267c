"""How many rows a GPU's piece has, by the memory that is free."""

import pytest

from ldalign.kernels.pieces import FEWEST_ROWS, LEAST_ROWS, WORKSPACE_BYTES, piece_rows

GB = 10**9


@pytest.mark.parametrize(
    ("vocabulary", "free", "rows"),
    [
        (32_000, 80 * GB, 16_384),
        (49_152, 80 * GB, 8192),
        (151_936, 80 * GB, 4096),
        (151_936, None, 4096),
        (262_144, 80 * GB, 4096),  # 4.3 GB: never fewer rows where they fit
        (262_144, 8 * GB, 2048),  # they do not fit half of what is free
        (32_000, 1 * GB, 2048),
        (32_000, 0, 256),  # what is then out of memory says so
    ],
)
def test_rows_by_free_memory(vocabulary: int, free: int | None, rows: int) -> None:
    assert piece_rows(4 * vocabulary, free) == rows


def test_pieces_fit_and_are_as_long_as_promised() -> None:
    for row_bytes in (1, 256, 128_000, 607_744, 2**20, 2**24):
        for free in (2**20, 10**9, 5 * 10**9, 10**10, 10**11):
            rows = piece_rows(row_bytes, free)
            most = max(WORKSPACE_BYTES, FEWEST_ROWS * row_bytes)
            assert rows * row_bytes <= max(min(most, free / 2), LEAST_ROWS * row_bytes)
            assert 2 * rows * row_bytes > min(most, free / 2)  # twice as many would be too many
            assert rows >= FEWEST_ROWS or FEWEST_ROWS * row_bytes > free / 2


def test_a_little_memory_changes_no_piece() -> None:
    assert {piece_rows(128_000, free) for free in range(5 * GB, 6 * GB, GB // 16)} == {16_384}
