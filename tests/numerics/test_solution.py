"""`requant.numerics.solution`: the checksum that a written file must decode to."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from requant.numerics import solution
from requant.numerics.solution import checksum


def parts(seed: int = 0, rows: int = 40, columns: int = 96) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=g, dtype=torch.uint8)
    scale = torch.rand(rows, columns // 32, generator=g).half().float()
    return codes, scale, torch.full_like(scale, 8.0)


def test_it_is_the_sum_that_it_says() -> None:
    """Python's whole numbers give the same: no width of a machine's sum shows."""

    def odd(count: int) -> list[int]:
        wide = [(i * 0x9E3779B97F4A7C15) % 2**64 for i in range(1, count + 1)]
        return [((w - 2**64 if w >= 2**63 else w) >> 7) | 1 for w in wide]

    total = 0
    codes, scale, zero = parts(rows=5, columns=32)
    for values in (codes, scale.view(torch.int32), zero.view(torch.int32)):
        table, rows, columns = values.tolist(), odd(values.shape[0]), odd(values.shape[1])
        weighted = sum(
            v * r * c for line, r in zip(table, rows, strict=True) for v, c in zip(line, columns, strict=True)
        )
        total = total * (0x9E3779B97F4A7C15 - 2**64) + weighted
    assert int(checksum(codes, scale, zero)) == total % 2**48


@given(st.integers(0, 2), st.integers(0, 39), st.integers(0, 95), st.integers(1, 15))
def test_any_value_that_differs_changes_it(which: int, row: int, column: int, by: int) -> None:
    before = parts()
    after = [t.clone() for t in before]
    column %= after[which].shape[1]
    after[which][row, column] = (after[which][row, column] + by) % 16 if which == 0 else after[which][row, column] + by
    assert int(checksum(*after)) != int(checksum(*before))


def test_places_count_and_parts_do_not() -> None:
    codes, scale, zero = parts()
    whole = int(checksum(codes, scale, zero))
    assert int(checksum(codes.flip(0), scale, zero)) != whole
    assert int(checksum(codes[:, torch.randperm(96)], scale, zero)) != whole
    before, solution._PART = solution._PART, 200
    try:
        assert int(checksum(codes, scale, zero)) == whole
    finally:
        solution._PART = before
