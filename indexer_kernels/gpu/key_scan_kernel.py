"""What `routed_scores_kernel` and `group_scan_kernel` have in common: the way of the keys to their products.

A product is that of a unit's rows, a tile or a part of one, and a persistent CTA takes shares of the keys of units. One
producer warp streams the request's pages through a ring of shared-memory stages by TMA; each consumer warpgroup owns
one page of a stage (64 keys are the A operand of its wgmma). The warpgroups take turns with the tensor cores, so that
one multiplies while another sums up.
"""

import tilelang.language as T

from indexer_kernels.gpu.target import FP8, HEAD_DIM, PAGE_TOKENS

STAGES = 4
PRODUCER_REGISTERS = 24
TURN = 1  # the first of the named barriers that hand the tensor cores on; 0 is the CTA's own


def key_scan(columns: int, stage_pages: int, units: int, num_tiles, splits, num_sms: int):
    """The macro `scan`, all that a CTA of (stage_pages + 1) * 128 threads does, for tiles of `units` units.

    columns: of a product, the rows of q that a unit has. stage_pages: consumer warpgroups. num_tiles, splits: dynamic;
    the keys of each unit go into `splits` shares. What differs between kernels, scan gets as three functions:

    unit_pages(unit): the pages of its request that the unit reads; asked in producer and consumers.
    load_unit(unit): the consumers load what else they need of the unit.
    sum_up(unit, first, n, product, k_scale): a consumer ends stage first + n of the unit's pages. product f32 [keys
    of a stage, columns] is not yet scaled by k_scale f32 [keys of a stage].

    A macro's T.Ref is a variable of its caller, which it may assign; any other argument is an expression.
    """
    shares = num_tiles * units * splits
    stage_keys = stage_pages * PAGE_TOKENS
    consumer_threads = stage_pages * 128
    consumer_registers = 240 if stage_pages == 2 else 160

    @T.macro
    def take_share(
        share, tile_request, unit_pages, unit: T.Ref, request: T.Ref, pages: T.Ref, first: T.Ref, last: T.Ref
    ):
        # Its stages are first .. last - 1 of the unit's.
        unit = share // splits
        pages = unit_pages(unit)
        request = tile_request[unit // units]  # noqa: F841 - the caller's variable
        stages = T.ceildiv(pages, stage_pages)
        first = share % splits * T.ceildiv(stages, splits)
        last = T.min(first + T.ceildiv(stages, splits), stages)  # noqa: F841 - the caller's variable

    @T.macro
    def scan(sm, q, keys, scales, page_table, tile_request, unit_pages, load_unit, sum_up):
        q_shared = T.alloc_shared((columns, HEAD_DIM), FP8)
        k_shared = T.alloc_shared((STAGES, stage_keys, HEAD_DIM), FP8)
        product = T.alloc_fragment((stage_keys, columns), "float32")
        k_scale = T.alloc_fragment((stage_keys,), "float32")
        full = T.alloc_barrier([1] * STAGES)
        empty = T.alloc_barrier([consumer_threads] * STAGES)
        q_full, q_empty = T.alloc_barrier(1), T.alloc_barrier(consumer_threads)
        produced, consumed = T.alloc_var("int32"), T.alloc_var("int32")
        loaded, used = T.alloc_var("int32"), T.alloc_var("int32")
        unit, first, last = T.alloc_var("int32"), T.alloc_var("int32"), T.alloc_var("int32")
        request, pages, page = T.alloc_var("int32"), T.alloc_var("int32"), T.alloc_var("int32")
        produced = 0
        consumed = 0
        loaded = 0
        used = 0
        thread = T.get_thread_binding()
        if thread >= consumer_threads:
            T.set_max_nreg(PRODUCER_REGISTERS, 0)
            if thread < consumer_threads + 32:
                for wave in T.serial(T.ceildiv(shares, num_sms)):
                    if wave * num_sms + sm < shares:
                        take_share(wave * num_sms + sm, tile_request, unit_pages, unit, request, pages, first, last)
                        if first < last:
                            T.barrier_wait(q_empty, (loaded & 1) ^ 1)
                            T.tma_copy(q[unit * columns, 0], q_shared, barrier=q_full, leader_scope_threads=32)
                            if T.shuffle_elect(32):
                                T.barrier_arrive(q_full)
                            loaded = loaded + 1
                            for n in T.serial(last - first):
                                T.barrier_wait(empty[produced % STAGES], ((produced // STAGES) & 1) ^ 1)
                                for c in T.unroll(stage_pages, explicit=True):
                                    # The table is garbage past the last page: read that page again instead.
                                    page = page_table[request, T.min((first + n) * stage_pages + c, pages - 1)]
                                    T.tma_copy(
                                        keys[page * 66 : page * 66 + PAGE_TOKENS, 0:HEAD_DIM],
                                        k_shared[
                                            produced % STAGES, c * PAGE_TOKENS : (c + 1) * PAGE_TOKENS, 0:HEAD_DIM
                                        ],
                                        barrier=full[produced % STAGES],
                                        leader_scope_threads=32,
                                    )
                                if T.shuffle_elect(32):
                                    T.barrier_arrive(full[produced % STAGES])
                                produced = produced + 1
        else:
            T.set_max_nreg(consumer_registers, 1)
            if thread >= consumer_threads - 128:
                # The last warpgroup gives the first one its first turn.
                T.named_barrier_arrive(TURN, 256)
            for wave in T.serial(T.ceildiv(shares, num_sms)):
                if wave * num_sms + sm < shares:
                    take_share(wave * num_sms + sm, tile_request, unit_pages, unit, request, pages, first, last)
                    if first < last:
                        load_unit(unit)
                        T.barrier_wait(q_full, used & 1)
                        page = page_table[request, T.min(first * stage_pages + thread // 128, pages - 1)]
                        for n in T.serial(last - first):
                            for i in T.Parallel(stage_keys):
                                k_scale[i] = scales[page * 33 + 32, i % PAGE_TOKENS]
                            # The next page id travels while this page is multiplied.
                            page = page_table[request, T.min((first + n + 1) * stage_pages + thread // 128, pages - 1)]
                            T.barrier_wait(full[consumed % STAGES], (consumed // STAGES) & 1)
                            T.sync_threads(thread // 128 + TURN, 256)
                            T.wgmma_gemm(
                                k_shared[consumed % STAGES, :, :],
                                q_shared,
                                product,
                                transpose_B=True,
                                clear_accum=True,
                                policy=T.GemmWarpPolicy.FullRow,
                            )
                            # Its products are queued: the next warpgroup's follow, while this one's are summed up.
                            T.named_barrier_arrive((thread // 128 + 1) % stage_pages + TURN, 256)
                            T.wait_wgmma(0)
                            T.warpgroup_fence_operand(product, num_regs=columns // 2)
                            T.barrier_arrive(empty[consumed % STAGES])
                            sum_up(unit, first, n, product, k_scale)
                            consumed = consumed + 1
                        used = used + 1
                        T.barrier_arrive(q_empty)

    return scan
