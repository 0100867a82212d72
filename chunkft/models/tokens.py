"""Which token pads.

Many chat models pad with the token that ends an answer. Whoever masks padding out of the loss then
masks the end as well, and the model never learns to stop; and nn.Embedding(padding_idx=eos), which
is what transformers builds from such a config, gives the row of that token no gradient.
"""

from typing import Any, cast

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# special tokens that nothing in a text needs, most fitting first; the unknown token comes last
PAD_TOKENS = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>")


def choose_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a pad token other than eos, where its vocabulary has one.

    The vocabulary never grows: a new row would be a parameter that the checkpoint does not have.
    Without any candidate, eos pads, which is better than a tokenizer that cannot pad at all.
    """
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    names = cast(Any, tokenizer)  # its attributes are typed as anything a config may hold
    special = {*names.all_special_tokens, *names.get_added_vocab()}
    taken = {names.eos_token, names.bos_token}
    for token in (*PAD_TOKENS, tokenizer.unk_token):
        if token in special and token not in taken:
            tokenizer.pad_token = token
            return
    tokenizer.pad_token = tokenizer.eos_token


def pad_overrides(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What to change in a config whose padding row is the row of eos; else nothing."""
    eos = getattr(config, "eos_token_id", None)
    eos = eos if isinstance(eos, list) else [eos]
    padded = getattr(config, "pad_token_id", None)
    if padded is None or padded not in eos:
        return {}
    pad = tokenizer.pad_token_id
    return {"pad_token_id": None if pad in eos else pad}
