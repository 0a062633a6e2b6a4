"""Comparing selections: exactly, up to ties within a tolerance, and by overlap."""

from collections.abc import Sequence

import torch


def entries(row: torch.Tensor, length: int, top_k: int, name: str = "row") -> list[int]:
    """The selected entries of one row, after checking their form.

    Exactly min(length, top_k) distinct entries come first, all inside [0, length); the rest is -1.
    """
    values, count = row.tolist(), min(max(length, 0), top_k)
    assert len(values) == top_k, f"{name}: {len(values)} columns, expected top_k={top_k}"
    chosen, rest = values[:count], values[count:]
    outside = [value for value in chosen if not 0 <= value < length]
    assert not outside, f"{name}: {len(outside)} of its first {count} entries outside [0, {length}): {outside[:8]}"
    assert len(set(chosen)) == count, f"{name}: {count - len(set(chosen))} duplicates"
    assert all(value == -1 for value in rest), f"{name}: entries after the first {count} must be -1: {rest[:8]}"
    return chosen


def assert_form(got: torch.Tensor, lengths: Sequence[int], top_k: int) -> list[list[int]]:
    """`entries` of every row, and int32 [len(lengths), top_k]."""
    assert got.dtype == torch.int32, f"dtype {got.dtype}, expected int32"
    assert tuple(got.shape) == (len(lengths), top_k), f"shape {list(got.shape)}, expected {[len(lengths), top_k]}"
    return [entries(row, length, top_k, f"row {m}") for m, (row, length) in enumerate(zip(got.cpu(), lengths))]


def assert_same_selection(got: torch.Tensor, want_sets: Sequence[set[int]], lengths: Sequence[int], top_k: int) -> None:
    """got [M, top_k] int32 has the right form and each row selects exactly its wanted set."""
    assert len(want_sets) == len(lengths)
    for m, (chosen, want) in enumerate(zip(assert_form(got, lengths, top_k), want_sets)):
        missing, extra = sorted(want - set(chosen)), sorted(set(chosen) - want)
        assert not missing and not extra, f"row {m}: missing {missing[:8]}, extra {extra[:8]}, of {len(want)}"


def assert_selection_up_to_ties(
    got: torch.Tensor, scores: torch.Tensor, lengths: Sequence[int], top_k: int, rel_tol: float
) -> None:
    """Like `assert_same_selection` with the top_k best by scores [M, N], but near the boundary either choice is right.

    The boundary is the top_k-th best score of the row; a token left out may be better, or one taken worse, by at most
    rel_tol times the row's largest visible |score|. Ineligible tokens have score -inf and may never be taken.
    """
    for m, chosen in enumerate(assert_form(got, lengths, top_k)):
        row = scores[m, : max(int(lengths[m]), 0)].double().cpu()
        if len(chosen) == len(row):
            continue
        boundary = row.topk(len(chosen)).values[-1]
        margin = rel_tol * row[row.isfinite()].abs().max()
        taken = torch.zeros(len(row), dtype=torch.bool)
        taken[chosen] = True
        worse = (taken & (row < boundary - margin)).nonzero().flatten().tolist()
        missed = (~taken & (row > boundary + margin)).nonzero().flatten().tolist()
        assert not worse and not missed, (
            f"row {m}: took {[(n, float(row[n])) for n in worse[:4]]}, "
            f"left {[(n, float(row[n])) for n in missed[:4]]}, "
            f"boundary {float(boundary):.6g} +- {float(margin):.2g}"
        )


def overlap(got: torch.Tensor, want: torch.Tensor | Sequence[set[int]]) -> float:
    """Mean over the rows of the share of the wanted entries that got holds; 1.0 where nothing is wanted."""
    shares = []
    for row, wanted in zip(got.tolist(), want.tolist() if isinstance(want, torch.Tensor) else want):
        wanted = {entry for entry in wanted if entry >= 0}
        shares.append(len(wanted & set(row)) / len(wanted) if wanted else 1.0)
    return sum(shares) / max(len(shares), 1)


def assert_nothing_lost(got: torch.Tensor, want: torch.Tensor, native: torch.Tensor, share: float) -> None:
    """Of native's tokens that `want` finds, got finds all but `share`: it may find more. All int32 [M, top_k]."""
    lost = found = 0
    for mine, theirs, every in zip(got.tolist(), want.tolist(), native.tolist()):
        kept = set(theirs) & set(every) - {-1}
        lost, found = lost + len(kept - set(mine)), found + len(kept)
    assert lost <= share * found, f"{lost} of {found} tokens lost"
