"""Runs the choice of pages in Triton's interpreter, on a CPU, against the reference.

A program of its own, like `interpreted_kernels`.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_page_select

Prints how many rows were compared; an assertion ends it.
"""

from tests.support.inputs import make_batch
from tests.support.interpreted_kernels import scores_of
from tests.support.page_choice import check_choice, score_columns

# Every capacity.
SHAPES = (([2100, 131, 1, 385, 384], [6, 3, 1, 3, 2]), ([40000], [3]), ([70000], [2]), ([140000], [1]), ([270000], [1]))


def main() -> None:
    compared = 0
    for lengths, rows in SHAPES:
        batch = make_batch(lengths, rows, num_heads=1, seed=5)
        for budget, unit_pages, values in ((8, 1, 4), (4, 2, 1), (30, 1, 1)):
            for kind in ("normal", "ties"):
                columns = score_columns(batch, unit_pages, values)
                scores = scores_of(kind, batch.plan.tile_rows.numel(), columns)
                check_choice(batch, scores, budget, unit_pages, values)
                compared += batch.plan.num_rows
    print(f"{compared} rows compared")


if __name__ == "__main__":
    main()
