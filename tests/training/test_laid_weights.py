from __future__ import annotations

import pytest
import torch

from c3_hf.training.laid_weights import addresses, make_codes, next_address


def test_codes_of_words_are_far_apart():
    codes = make_codes(8192, 19)
    distances = (19 - codes @ codes.T) / 2
    assert codes.shape == (8192, 19)
    assert set(codes.unique().tolist()) == {-1.0, 1.0}
    assert distances.fill_diagonal_(19).min() == 4


@pytest.mark.parametrize(("num_words", "size"), [(1, 1), (2, 1), (5, 3), (264, 9), (264, 12), (264, 40)])
def test_codes_differ_however_few_signs_there_are(num_words, size):
    assert len(make_codes(num_words, size).unique(dim=0)) == num_words


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_linear_map_leads_from_each_address_to_the_next(size):
    table = addresses(torch.arange(2 * size), size)
    assert torch.equal(table @ next_address(size), table.roll(-1, dims=0))


def test_addresses_agree_with_themselves_only():
    table = addresses(torch.arange(6), 3)
    assert torch.equal((table @ table.T == 1), torch.eye(6, dtype=torch.bool))
    assert torch.equal(addresses(torch.tensor([-1, 6]), 3), torch.zeros(2, 3))
