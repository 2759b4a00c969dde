"""Cross-attention to texts of unequal lengths where flash-attn is not installed."""

from __future__ import annotations

import warnings

import adapter_checks as checks
import lookalikes
import pytest
import torch

from sparvar_tune import adapters
from sparvar_tune.adapters.cross_attention import flash_attn_stand_in, varlen_cross_attention


@pytest.mark.parametrize("lens", [[5], [3, 9, 1], [4, 4]])
def test_cross_attention_of_unequal_texts_is_the_oracle(lens):
    g = torch.Generator().manual_seed(1)
    rows, queries = len(lens), 6
    q, kv = torch.randn(rows * queries, 2, 8, generator=g), torch.randn(sum(lens), 2, 2, 8, generator=g)
    ends = torch.tensor([0, *lens]).cumsum(0).int()
    starts = torch.arange(0, (rows + 1) * queries, queries).int()
    want = lookalikes.flash_attn_varlen_kvpacked_func(q, kv, starts, ends, queries, max(lens), softmax_scale=0.3)
    got = varlen_cross_attention(q, kv, starts, ends, queries, max(lens), 0, 0.3)
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="no dropout"):
        varlen_cross_attention(q, kv, starts, ends, queries, max(lens), 0.1, 0.3)
    with pytest.raises(ValueError, match=f"want {rows} x 5"):
        varlen_cross_attention(q, kv, starts, ends, 5, max(lens), 0.0, 0.3)


def test_infinity_without_flash_attn_gets_cross_attention(monkeypatch):
    driven = lookalikes.Infinity()
    want = checks.draw(driven, batch=2)
    monkeypatch.setattr(lookalikes, "flash_attn_varlen_kvpacked_func", None)
    before = checks.everything(driven)
    attend, _ = checks.attention_of(driven, checks.policies(len(driven.blocks), len(driven.grids()))["dense"])
    with adapters.apply(driven.model, attend):
        got = checks.draw(driven, batch=2)
    assert checks.near(got, want, "fp32") and checks.everything(driven) == before
    with pytest.raises(TypeError):
        driven.sample()


def test_the_stand_in_for_flash_attn_is_there_while_it_lasts():
    with flash_attn_stand_in():
        from flash_attn import flash_attn_func, flash_attn_varlen_kvpacked_func

        assert flash_attn_varlen_kvpacked_func is varlen_cross_attention
        q = torch.randn(1, 3, 2, 8)
        torch.testing.assert_close(flash_attn_func(q, q, q, softmax_scale=0.5), lookalikes.flash_attn_func(q, q, q, 0.0, 0.5))
    with pytest.raises(ImportError), warnings.catch_warnings():
        import flash_attn  # noqa: F401
