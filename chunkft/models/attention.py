"""Attention for records packed end to end, each by itself.

    out[s:e] = softmax(scale q[s:e] k[s:e]^T + causal) v[s:e]    for each record [s, e)

sum L_i^2 products in the place of (sum L_i)^2, and no mask of tokens x tokens. Records come from
`cu_seq_lens_q` (their ends, as FlashAttention has them) or, without it, from position_ids that
restart at 0; so a cache that is on changes nothing. Rows that are not packed, and whatever needs a
mask (padding, sliding windows, a custom pattern), take transformers' sdpa as it is.

It runs on any device. On CUDA FlashAttention's own kernel is faster where it is installed.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

NAME = "chunkft_varlen"


def choose_attention() -> str:
    """The attention for packed rows on this machine, by transformers' name."""
    register()
    on_card = torch.cuda.is_available() and is_flash_attn_2_available()
    return "flash_attention_2" if on_card else NAME


def register() -> None:
    """Make `attn_implementation="chunkft_varlen"` known to transformers; twice is once."""
    AttentionInterface.register(NAME, varlen_attention)
    AttentionMaskInterface.register(NAME, varlen_mask)


def varlen_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """No mask where `varlen_attention` can do without, else sdpa's."""
    whole = q_length == kv_length and batch_size == 1
    if whole and attention_mask is None and local_size is None and not use_vmap:
        return None
    kwargs |= {"attention_mask": attention_mask, "local_size": local_size, "use_vmap": use_vmap}
    return sdpa_mask(batch_size, q_length, kv_length, *args, **kwargs)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One sdpa a record.

    Args:
        query: [1, heads, tokens, width].  key, value: [1, key heads, tokens, width].
        attention_mask: None, or of transformers' sdpa.
        **kwargs: of transformers' attention functions; `cu_seq_lens_q` [records + 1], a list of
            numbers where tensors have no values.

    Returns: [1, tokens, heads, width], and no weights.
    """
    tokens = query.shape[2]
    packed = attention_mask is None and query.shape[0] == 1 and key.shape[2] == tokens
    lengths = _lengths(kwargs, tokens) if packed else []
    if len(lengths) < 2:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    records = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    out = [sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in records]
    return torch.cat(out, dim=1), None


def _lengths(kwargs: dict[str, Any], tokens: int) -> list[int]:
    ends, positions = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if isinstance(ends, list):
        return [stop - start for start, stop in itertools.pairwise(ends)]
    if ends is None and positions is not None and positions.shape == (1, tokens):
        starts = (positions[0] == positions[0, 0]).nonzero()[:, 0]
        ends = torch.cat([starts, starts.new_tensor([tokens])])
    return [] if ends is None else ends.diff().tolist()
