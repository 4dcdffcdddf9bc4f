"""The oracle is torch's own attention in float32."""

import pytest
import torch

from app.serving.decode_attention import DecodeAttention, decode_attention


@pytest.fixture(scope="module")
def attend() -> DecodeAttention:
    found = decode_attention()
    assert found
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 4, 64), (6, 2, 32), (3, 1, 80), (2, 2, 7)])
def test_it_is_attention_over_each_rows_own_positions(
    attend: DecodeAttention, dtype: torch.dtype, heads: int, groups: int, size: int
) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([1, 70, 128, 33])
    keys, values = (torch.randn(5, groups, 200, size).to(dtype)[:4, :, :128] for _ in range(2))
    query = torch.randn(4, heads, size).to(dtype)
    assert attend.takes(query, keys, values)
    found = attend(query, keys, values, torch.arange(4), lengths, 0.3)
    visible = (torch.arange(128) < lengths.unsqueeze(1))[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.float().unsqueeze(2), keys.float(), values.float(), attn_mask=visible, scale=0.3, enable_gqa=True
    ).squeeze(2)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)


def test_a_row_gets_the_same_bits_in_any_company_and_at_any_length_of_the_others(attend: DecodeAttention) -> None:
    torch.manual_seed(0)
    keys, values, query = torch.randn(8, 4, 256, 64), torch.randn(8, 4, 256, 64), torch.randn(8, 4, 64)
    lengths = torch.tensor([100, 256, 7, 64, 65, 200, 1, 128])
    rows = torch.tensor([3, 1, 1, 7, 0, 2, 2, 5])
    together = attend(query, keys, values, rows, lengths, 0.125)
    for token, row in enumerate(rows.tolist()):
        one, its, upto = slice(token, token + 1), slice(row, row + 1), int(lengths[token])
        alone = attend(query[one], keys[its, :, :upto], values[its, :, :upto], torch.tensor([0]), lengths[one], 0.125)
        assert torch.equal(alone[0], together[token])


def test_what_it_cannot_do_it_does_not_take(attend: DecodeAttention) -> None:
    keys = torch.zeros(2, 4, 8, 64)
    assert attend.takes(torch.zeros(2, 4, 64), keys, keys)
    assert not attend.takes(torch.zeros(2, 4, 32), keys, keys)
    assert not attend.takes(torch.zeros(2, 4, 64).half(), keys.half(), keys.half())
    assert not attend.takes(torch.zeros(2, 4, 64), keys, torch.zeros(2, 4, 64, 8).transpose(2, 3))
