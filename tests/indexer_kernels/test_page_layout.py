"""The index-key page: bytes where SGLang puts them, and back."""

import pytest
import torch

from indexer_kernels.page_layout import PAGE_BYTES, pack_pages, positions_to_slots, unpack_pages
from tests.support.inputs import make_batch


@pytest.mark.parametrize("num_tokens", [0, 1, 63, 64, 65, 200])
def test_round_trip(num_tokens):
    batch = make_batch([num_tokens], [0])
    k, k_scale = batch.k[0], batch.k_scale[0]
    pages = pack_pages(k, k_scale)
    assert pages.shape == (-(-num_tokens // 64), PAGE_BYTES) and pages.dtype == torch.uint8
    keys, scales = unpack_pages(pages, num_tokens)
    assert torch.equal(keys.view(torch.uint8), k.view(torch.uint8)) and torch.equal(scales, k_scale)


def test_bytes_of_a_page():
    """Token t of a page: key bytes at t * 128, its float32 scale at 8192 + t * 4; the tail of the last page is zero."""
    batch = make_batch([70], [0])
    raw, scales = batch.k[0].view(torch.uint8), batch.k_scale[0]
    pages = pack_pages(batch.k[0], scales)
    for token in (0, 1, 63, 64, 69):
        page, t = pages[token // 64], token % 64
        assert torch.equal(page[t * 128 : (t + 1) * 128], raw[token])
        assert page[8192 + 4 * t : 8196 + 4 * t].view(torch.float32) == scales[token]
    assert (pages[1, 6 * 128 : 8192] == 0).all() and (pages[1, 8192 + 24 :] == 0).all()


def test_packing_takes_views():
    batch = make_batch([100], [0])
    wide = torch.stack([batch.k[0].view(torch.uint8)] * 2, 1).view(torch.float8_e4m3fn)[:, 0]
    assert torch.equal(pack_pages(wide, batch.k_scale[0]), pack_pages(batch.k[0], batch.k_scale[0]))


def test_positions_to_slots():
    positions = torch.tensor([[0, 63, 64, 130, -1]], dtype=torch.int32)
    slots = positions_to_slots(positions, torch.tensor([[7, 0, 3]], dtype=torch.int32))
    assert slots.tolist() == [[448, 511, 0, 194, -1]] and slots.dtype == torch.int32
