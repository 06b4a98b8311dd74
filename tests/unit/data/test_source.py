"""The locations of rows, through every change of their order."""

import numpy as np

from bertdist.data.source import (
    concat_locations,
    locate_lines,
    locate_rows,
    select_locations,
    slice_locations,
)


def test_locations_follow_rows_through_concatenation_slices_and_selections() -> None:
    lines = locate_lines("a.csv", 2, np.array([0, 3, 4]))
    rows = locate_rows("x.parquet", 10)
    both = concat_locations([(3, lines), (0, rows), (2, rows)])
    expected = [
        "a.csv line 2",
        "a.csv line 5",
        "a.csv line 6",
        "x.parquet row 10",
        "x.parquet row 11",
    ]
    assert [str(both(row)) for row in range(5)] == expected
    later = slice_locations(both, 2)
    assert [str(later(row)) for row in range(3)] == expected[2:]
    some = select_locations(later, np.array([2, 0]))
    assert [str(some(row)) for row in range(2)] == [expected[4], expected[2]]
    again = concat_locations([(2, some), (1, locate_lines("b.txt", 1))])
    assert [str(again(row)) for row in range(3)] == [expected[4], expected[2], "b.txt line 1"]
