"""TileLang body that finds the score which about `wanted` tokens reach, from the sampled scores. One CTA takes one row.

Counting passes would compare every sample once a bit. Instead two histograms in shared memory, of the upper bits and,
among the samples in the bin found there, of the next ones, tell the threshold's bits in two passes over registers.
"""

from typing import NamedTuple

import tilelang
import tilelang.language as T
import torch

from indexer_kernels.gpu import sample_kernel
from indexer_kernels.gpu.build_once import build_once
from indexer_kernels.gpu.target import PASS_CONFIGS, TARGET

# Samples that a CTA holds, by the longest row of the batch: threads, of 8 or 16 samples each.
HELD = {1024: 128, 2048: 256, 4096: 512, 8192: 512}
THREADS_PER_SM = 1536  # 40 registers a thread
UPPER_BITS, NEXT_BITS = 11, 7  # of the threshold's 32; the rest are 0, which lets a little more through
UPPER_SHIFT, NEXT_SHIFT = 32 - UPPER_BITS, 32 - UPPER_BITS - NEXT_BITS
UPPER_BINS, NEXT_BINS = 1 << UPPER_BITS, 1 << NEXT_BITS
OWN_NEXT = NEXT_BINS // 32  # bins of a lane, of the one warp that looks at them
SIGN = -(1 << 31)  # the sign bit
CONFIGS = {
    **PASS_CONFIGS,
    # Barriers are written by hand, and the histograms' atomics are no race.
    tilelang.PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True,
    tilelang.PassConfigKey.TL_DISABLE_DATA_RACE_CHECK: True,
}


class Thresholds(NamedTuple):
    """Of each place: a score [places] f32, and the most tokens [places] int32 that should reach it."""

    scores: torch.Tensor
    limits: torch.Tensor


def sample_threshold_prim_func(
    budget: int, first_tokens: int, local_tokens: int, cell: int, most: int, sigmas: float, held: int
):
    """thresholds[p] and limits[p] as `sample_threshold` says, of scores[p * score_stride + column].

    A score's bits are put in the order of scores: those of a negative one inverted, else the sign bit set.
    """
    threads, first_cell = HELD[held], -(-first_tokens // cell)
    own_samples, own_bins = held // threads, UPPER_BINS // threads
    places, num_rows, num_scores = T.dynamic("places"), T.dynamic("num_rows"), T.dynamic("num_scores")

    @T.prim_func
    def sample_threshold_of_rows(
        scores: T.Tensor((num_scores,), "float32"),
        score_stride: T.int32,
        rows: T.Tensor((places,), "int32"),
        lengths: T.Tensor((num_rows,), "int32"),
        thresholds: T.Tensor((places,), "float32"),
        limits: T.Tensor((places,), "int32"),
    ):
        with T.Kernel(places, threads=threads) as place:
            T.annotate_min_blocks_per_sm(THREADS_PER_SM // threads)
            upper_shared = T.alloc_shared((UPPER_BINS,), "int32")
            next_shared = T.alloc_shared((NEXT_BINS,), "int32")
            warp_shared = T.alloc_shared((threads // 32,), "int32")
            found_shared = T.alloc_shared((2,), "int32")  # the upper bin, and the rank wanted in it
            key = T.alloc_local((own_samples,), "uint32")
            own = T.alloc_local((max(own_bins, OWN_NEXT),), "int32")
            score, base = T.alloc_var("float32"), T.alloc_var("int64")
            row, length, local = T.alloc_var("int32"), T.alloc_var("int32"), T.alloc_var("int32")
            samples, step = T.alloc_var("int32"), T.alloc_var("int32")
            wanted, limit = T.alloc_var("int32"), T.alloc_var("int32")
            expected, deviations = T.alloc_var("float32"), T.alloc_var("float32")
            sample, bits = T.alloc_var("int32"), T.alloc_var("int32")
            upper = T.alloc_var("uint32")
            before, total, other = T.alloc_var("int32"), T.alloc_var("int32"), T.alloc_var("int32")
            thread = T.get_thread_binding()
            lane, warp = thread % 32, thread // 32

            row = rows[place]
            length = 0
            if row >= 0:
                length = lengths[row]
            limit = budget
            wanted = 0
            samples = 0
            step = 1
            if length > budget:
                local = T.max(length - local_tokens, first_tokens)
                samples = local // cell - first_cell
                while samples > most * step:
                    step = step * 2
                samples = samples // step
                expected = T.cast(budget - first_tokens - (length - local), "float32") / T.cast(
                    local - first_tokens, "float32"
                )
                expected = expected * T.cast(samples, "float32")
                deviations = T.float32(sigmas) * T.sqrt(expected) + T.float32(4)
                limit = budget + T.cast(T.float32(sample_kernel.LIMIT_DEVIATIONS) * deviations, "int32") * (cell * step)
                wanted = T.cast(expected + deviations, "int32")
            if wanted >= samples:
                if thread == 0:
                    thresholds[place] = -T.infinity("float32")
            else:
                for b in T.unroll(own_bins, explicit=True):
                    upper_shared[b * threads + thread] = 0
                if thread < NEXT_BINS:
                    next_shared[thread] = 0
                T.sync_threads()
                base = T.cast(place, "int64") * score_stride
                for i in T.unroll(own_samples, explicit=True):
                    sample = i * threads + thread
                    key[i] = T.uint32(0)  # below every score: no sample
                    if sample < samples:
                        score = scores[base + first_cell + sample * step]
                        if score == T.float32(0):
                            score = T.float32(0)  # one zero, so that -0.0 and 0.0 tie
                        bits = T.reinterpret(score, "int32")
                        key[i] = T.cast(bits ^ ((bits >> 31) | SIGN), "uint32")
                for i in T.unroll(own_samples, explicit=True):
                    T.atomic_add(upper_shared[key[i] >> UPPER_SHIFT], 1)
                T.sync_threads()
                # A thread's bins, from the highest down; before: samples in higher bins than its own.
                total = 0
                for b in T.unroll(own_bins, explicit=True):
                    own[b] = upper_shared[UPPER_BINS - 1 - thread * own_bins - b]
                    total = total + own[b]
                before = total
                for d in T.unroll(5, explicit=True):
                    other = T.shfl_up(before, 1 << d)
                    if lane >= 1 << d:
                        before = before + other
                if lane == 31:
                    warp_shared[warp] = before
                T.sync_threads()
                before = before - total
                other = 0
                if lane < warp:
                    other = warp_shared[lane]
                before = before + T.warp_reduce_sum(other)
                for b in T.unroll(own_bins, explicit=True):
                    if before < wanted and before + own[b] >= wanted:
                        found_shared[0] = UPPER_BINS - 1 - thread * own_bins - b
                        found_shared[1] = wanted - before
                    before = before + own[b]
                T.sync_threads()
                upper = T.cast(found_shared[0], "uint32")
                wanted = found_shared[1]
                for i in T.unroll(own_samples, explicit=True):
                    if key[i] >> UPPER_SHIFT == upper:
                        T.atomic_add(next_shared[(key[i] >> NEXT_SHIFT) & T.uint32(NEXT_BINS - 1)], 1)
                T.sync_threads()
                if warp == 0:
                    total = 0
                    for b in T.unroll(OWN_NEXT, explicit=True):
                        own[b] = next_shared[NEXT_BINS - 1 - lane * OWN_NEXT - b]
                        total = total + own[b]
                    before = total
                    for d in T.unroll(5, explicit=True):
                        other = T.shfl_up(before, 1 << d)
                        if lane >= 1 << d:
                            before = before + other
                    before = before - total
                    for b in T.unroll(OWN_NEXT, explicit=True):
                        if before < wanted and before + own[b] >= wanted:
                            key[0] = (upper << UPPER_SHIFT) | (
                                T.cast(NEXT_BINS - 1 - lane * OWN_NEXT - b, "uint32") << NEXT_SHIFT
                            )
                            bits = T.cast(key[0], "int32")
                            bits = bits ^ (~(bits >> 31) | SIGN)
                            thresholds[place] = T.reinterpret(bits, "float32")
                        before = before + own[b]
            if thread == 0:
                limits[place] = limit

    return sample_threshold_of_rows.with_attr("global_symbol", "sample_threshold")


@build_once
def build(budget: int, first_tokens: int, local_tokens: int, cell: int, most: int, sigmas: float, held: int):
    """Compiled once per setting and number of held samples, whatever the batch."""
    return tilelang.compile(
        sample_threshold_prim_func(budget, first_tokens, local_tokens, cell, most, sigmas, held),
        target=TARGET,
        execution_backend="tvm_ffi",
        pass_configs=CONFIGS,
    )


def build_for(budget: int, first_tokens: int, local_tokens: int, held: int):
    """The variant that a call with this setting finds."""
    constants = (sample_kernel.CELL, sample_kernel.MOST, sample_kernel.SIGMAS)
    return build(budget, first_tokens, local_tokens, *constants, held)


def held_for(samples: int) -> int:
    """The smallest compiled number of held samples that takes rows of at most `samples`, of which MOST are held."""
    return next(held for held in HELD if min(samples, sample_kernel.MOST) <= held)


def sample_threshold(
    scores: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    budget: int,
    first_tokens: int,
    local_tokens: int,
) -> Thresholds:
    """A score that a few more than `budget` tokens of each row should reach, and how many at most.

    With n sampled scores of the N tokens between the first first_tokens and the last local_tokens, of which b are to
    be found, it is the (e + d)-th largest sampled score, e = b n / N, d = 5 sqrt(e) + 4, rounded down in its last 14
    bits, and the limit is budget + 2.5 d tokens a sample; -inf where that is no sample, for rows within the budget and
    for places without a row. It depends on nothing but the row.

    scores [places, >= samples] f32 (contiguous), rows [places] int32 (-1: none), lengths [M] int32.
    """
    places = rows.shape[0]
    found = Thresholds(scores.new_empty(places), rows.new_empty(places))
    if places:
        search = build_for(budget, first_tokens, local_tokens, held_for(scores.shape[1]))
        search(scores.view(-1), scores.shape[1], rows, lengths, *found)
    return found
