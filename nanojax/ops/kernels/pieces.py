"""Cutting columns into pieces that register arrays can hold, which are powers of two long."""


def powers_of_two(columns: int, most: int | None = None) -> list[tuple[int, int]]:
    """(start, lanes) of pieces that fill the columns, each a power of two, as register arrays are."""
    found, start = [], 0
    while start < columns:
        lanes = min(most or columns, 1 << (columns - start).bit_length() - 1)
        found.append((start, lanes))
        start += lanes
    return found


def even_pieces(columns: int, most: int) -> list[tuple[int, int]]:
    """(start, lanes) of pieces of one size, a power of two, the last moved back over columns that are already taken."""
    lanes = min(most, 1 << columns.bit_length() - 1)
    return [(min(start, columns - lanes), lanes) for start in range(0, columns, lanes)]
