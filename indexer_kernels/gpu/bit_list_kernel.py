"""TileLang body that lists the tokens whose bit the scan has set. One warp lists one row.

A CTA takes neighbouring rows and reads their words once. Each word, 8 keys of 4 rows, is transposed on its way through
shared memory, so that a lane then holds 64 consecutive tokens of its warp's row. A loop over the set bits gathers a
chunk's tokens in shared memory and full warps write them out: stores to where each token belongs would cost a sector of
32 bytes apiece.
"""

import tilelang
import tilelang.language as T
import torch

from indexer_kernels.gpu.build_once import build_once
from indexer_kernels.gpu.lists import Lists
from indexer_kernels.gpu.target import PAGE_TOKENS, PASS_CONFIGS, TARGET

ROWS = 16  # rows, and warps, of a CTA; a divisor of a unit's rows
CTAS_PER_SM = 3  # 40 registers a thread; the loops wait for shared memory more than they would gain from registers
LANE_WORDS = 2  # of 32 tokens
CHUNK = LANE_WORDS * 32 * 32  # tokens of a row per step
OCTETS = CHUNK // 8
PADDED = OCTETS + 4  # so that the words of one octet lie in different banks
CHUNK_PAGES = CHUNK // PAGE_TOKENS
EVERY = 0xFFFFFFFF
CONFIGS = {
    **PASS_CONFIGS,
    # Barriers are written by hand: TileLang would add some inside branches that only part of the warps take.
    tilelang.PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True,
    tilelang.PassConfigKey.TL_DISABLE_DATA_RACE_CHECK: True,
}


def to_move(word, high: int, low: int):
    """What moves in `word` if bits `high` and `low` of each bit's index change places: at the lower of both indices."""
    lower = sum(1 << i for i in range(32) if not i >> high & 1 and i >> low & 1)
    return ((word >> ((1 << high) - (1 << low))) ^ word) & T.uint32(lower)


def before_token(last, first_token):
    """The bits, of 32 tokens from first_token on, of those before token `last`."""
    inside = T.max(last - first_token, 0)
    return T.if_then_else(inside >= 32, T.uint32(EVERY), (T.uint32(1) << T.cast(inside, "uint32")) - T.uint32(1))


def bit_list_prim_func(
    unit_rows: int, budget: int, first_tokens: int, local_tokens: int, with_positions: bool, by_row: bool = False
):
    """slots[p * width + c], and positions if wanted: the c-th of the ascending tokens t of place p's row that have
    their bit in `mask` or are t < first_tokens or t >= length - local_tokens; of all its tokens if length <= budget.
    With by_row lists, counts and unsure are numbered by row instead of by place.

    mask [units * octets * unit_rows / 4] int32 holds in word 2 * (place // 8) + place % 2 of a unit's octet, place
    counted in the unit, in bit 4 * (t % 8) + (place % 8) // 2 the row's bit of token t = 8 * octet + t % 8. counts[p]
    is how many are listed, unsure[p] 1 where they are fewer than min(length, budget) or more than limits[p]. Nothing is
    written past the width. Matrices are flat, so that the loops add up their indices and do not multiply.
    """
    octet_words, own_words, parts = unit_rows // 4, ROWS // 4, unit_rows // ROWS
    thread_octets = ROWS * 32 // own_words  # between the octets of a thread's words
    num_units, words, num_rows = T.dynamic("num_units"), T.dynamic("words"), T.dynamic("num_rows")
    table_entries, entries = T.dynamic("table_entries"), T.dynamic("entries")
    num_places = num_units * unit_rows
    num_lists = num_rows if by_row else num_places

    @T.prim_func
    def bit_list(
        mask: T.Tensor((words,), "int32"),
        octets: T.int32,
        rows: T.Tensor((num_places,), "int32"),
        lengths: T.Tensor((num_rows,), "int32"),
        limits: T.Tensor((num_places,), "int32"),
        request: T.Tensor((num_rows,), "int32"),
        page_table: T.Tensor((table_entries,), "int32"),
        table_width: T.int32,
        positions: T.Tensor((entries,), "int32"),
        slots: T.Tensor((entries,), "int32"),
        width: T.int32,
        counts: T.Tensor((num_lists,), "int32"),
        unsure: T.Tensor((num_lists,), "int32"),
    ):
        with T.Kernel(num_units * parts, threads=ROWS * 32) as part:
            T.annotate_min_blocks_per_sm(CTAS_PER_SM)
            octet_shared = T.alloc_shared((2, own_words, PADDED), "uint32")
            token_shared = T.alloc_shared((ROWS * CHUNK,), "uint16")
            word, kept = T.alloc_local((LANE_WORDS,), "uint32"), T.alloc_local((LANE_WORDS,), "uint32")
            four, moved = T.alloc_local((4,), "uint32"), T.alloc_var("uint32")
            row, length = T.alloc_var("int32"), T.alloc_var("int32")
            longest, local = T.alloc_var("int32"), T.alloc_var("int32")
            source, pages, entry = T.alloc_var("int64"), T.alloc_var("int64"), T.alloc_var("int64")
            page, token, other = T.alloc_var("int32"), T.alloc_var("int32"), T.alloc_var("int32")
            count, before, total = T.alloc_var("int32"), T.alloc_var("int32"), T.alloc_var("int32")
            stop, written, first = T.alloc_var("int32"), T.alloc_var("int32"), T.alloc_var("int32")
            thread = T.get_thread_binding()
            lane, warp = thread % 32, thread // 32
            place = part * ROWS + warp

            # The CTA goes on for its longest row.
            row = rows[part * ROWS + lane % ROWS]
            longest = 0
            if row >= 0:
                longest = lengths[row]
            longest = T.warp_reduce_max(longest)
            row = rows[place]
            length = 0
            pages = T.int64(0)
            if row >= 0:
                length = lengths[row]
                pages = T.cast(request[row], "int64") * table_width
            local = T.max(length - local_tokens, first_tokens)
            written = 0
            listed = row if by_row else place
            entry = T.cast(listed, "int64") * width + lane
            source = (T.cast(part // parts, "int64") * octets + thread // own_words) * octet_words
            source = source + part % parts * own_words + thread % own_words
            for w in T.unroll(LANE_WORDS, explicit=True):
                if w * thread_octets + thread // own_words < octets:
                    word[w] = T.cast(mask[source + w * thread_octets * octet_words], "uint32")
            for chunk in T.serial(T.ceildiv(longest, CHUNK)):
                for w in T.unroll(LANE_WORDS, explicit=True):
                    # Bit 4 * key + row becomes bit 8 * row + key: its index (k2 k1 k0 r1 r0) becomes (r1 r0 k2 k1 k0).
                    moved = to_move(word[w], 4, 1)
                    word[w] = word[w] ^ moved ^ (moved << 14)
                    moved = to_move(word[w], 3, 0)
                    word[w] = word[w] ^ moved ^ (moved << 7)
                    moved = to_move(word[w], 2, 1)
                    word[w] = word[w] ^ moved ^ (moved << 2)
                    moved = to_move(word[w], 1, 0)
                    word[w] = word[w] ^ moved ^ (moved << 1)
                    octet_shared[chunk % 2, thread % own_words, thread // own_words + w * thread_octets] = word[w]
                # The next words and this chunk's pages travel meanwhile.
                source = source + OCTETS * octet_words
                for w in T.unroll(LANE_WORDS, explicit=True):
                    if (chunk + 1) * OCTETS + w * thread_octets + thread // own_words < octets:
                        word[w] = T.cast(mask[source + w * thread_octets * octet_words], "uint32")
                page = page_table[pages + T.min(chunk * CHUNK_PAGES + lane, table_width - 1)]
                T.sync_threads()
                if chunk * CHUNK < length:
                    for w in T.unroll(LANE_WORDS, explicit=True):
                        for i in T.vectorized(4):
                            four[i] = octet_shared[chunk % 2, warp // 8 * 2 + warp % 2, (lane * LANE_WORDS + w) * 4 + i]
                        kept[w] = T.uint32(0)
                        for i in T.unroll(4, explicit=True):
                            kept[w] = kept[w] | (
                                ((four[i] >> T.cast(warp % 8 // 2 * 8, "uint32")) & T.uint32(255)) << (8 * i)
                            )
                    if length <= budget:
                        for w in T.unroll(LANE_WORDS, explicit=True):
                            kept[w] = T.uint32(EVERY)
                    if chunk * CHUNK < first_tokens or (chunk + 1) * CHUNK > local:
                        for w in T.unroll(LANE_WORDS, explicit=True):
                            # A variable: TileLang 0.1.12 simplifies "32 - 64 * lane - 2048 * chunk >= 32" to
                            # "chunk == 0".
                            first = chunk * CHUNK + (lane * LANE_WORDS + w) * 32
                            kept[w] = kept[w] | before_token(first_tokens, first) | ~before_token(local, first)
                            kept[w] = kept[w] & before_token(length, first)
                    count = 0
                    for w in T.unroll(LANE_WORDS, explicit=True):
                        count = count + T.cast(T.popcount(kept[w]), "int32")
                    before = count
                    for d in T.unroll(5, explicit=True):
                        other = T.shfl_up(before, 1 << d)
                        if lane >= 1 << d:
                            before = before + other
                    total = T.shfl_sync(before, 31)
                    before = before - count + warp * CHUNK
                    for w in T.unroll(LANE_WORDS, explicit=True):
                        while kept[w] != T.uint32(0):
                            token_shared[before] = T.cast(
                                T.popcount(~kept[w] & (kept[w] - T.uint32(1)))
                                + T.cast((lane * LANE_WORDS + w) * 32, "uint32"),
                                "uint16",
                            )
                            before = before + 1
                            kept[w] = kept[w] & (kept[w] - T.uint32(1))
                    T.sync_warp()
                    stop = T.min(total, width - written)
                    for i in T.serial(T.ceildiv(total, 32)):
                        # Past the total a lane reads anything and stores nothing.
                        token = T.cast(token_shared[warp * CHUNK + i * 32 + lane], "int32")
                        other = T.shfl_sync(page, token // PAGE_TOKENS)
                        if i * 32 + lane < stop:
                            slots[entry + i * 32] = other * PAGE_TOKENS + token % PAGE_TOKENS
                            if with_positions:
                                positions[entry + i * 32] = chunk * CHUNK + token
                    entry = entry + total
                    written = written + total
            if lane == 0 and (not by_row or row >= 0):
                counts[listed] = T.min(written, width)
                unsure[listed] = T.if_then_else(
                    row < 0 or (written >= T.min(length, budget) and written <= limits[place]), 0, 1
                )

    return bit_list.with_attr("global_symbol", f"bit_list_u{unit_rows}{'_by_row' if by_row else ''}")


@build_once
def build(
    unit_rows: int, budget: int, first_tokens: int, local_tokens: int, with_positions: bool, by_row: bool = False
):
    """Compiled once per setting, whatever the batch."""
    return tilelang.compile(
        bit_list_prim_func(unit_rows, budget, first_tokens, local_tokens, with_positions, by_row),
        target=TARGET,
        execution_backend="tvm_ffi",
        pass_configs=CONFIGS,
    )


def list_bits(
    mask: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    limits: torch.Tensor,
    request: torch.Tensor,
    page_table: torch.Tensor,
    lists: Lists,
    budget: int,
    first_tokens: int,
    local_tokens: int,
    by_row: bool = False,
) -> None:
    """Write to `lists` every token whose bit is set, the first first_tokens and last local_tokens.

    mask [units, cells, words] int32 of `routed_scores_kernel`, rows [places] int32 (-1: none), limits [places] int32.
    lists are numbered by place or, with by_row, by row: then [M] like lengths, and those in rows are written.
    A row that sees at most `budget` tokens keeps them all, whatever its bits. A list is unsure with fewer than budget
    tokens, or more than its limit.
    """
    if rows.shape[0]:
        positions, slots, counts = lists.written
        with_positions = lists.positions is not None
        build(2 * mask.shape[2], budget, first_tokens, local_tokens, with_positions, by_row)(
            mask.view(-1),
            2 * mask.shape[1],
            rows,
            lengths,
            limits,
            request,
            page_table.view(-1),
            page_table.shape[1],
            positions.view(-1),
            slots.view(-1),
            slots.shape[1],
            counts,
            lists.unsure,
        )
