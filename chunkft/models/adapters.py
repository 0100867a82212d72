"""Adapters by name, on PEFT: the configuration of a method, its size, and what merges.

Elements trained in a layer [out, in] at size d (`--lora_r`, or chosen by `--trainable`):

    lora rslora pissa   d (in + out)            W + (alpha / d) B A       2106.09685, 2312.03732,
    dora                d (in + out) + out      ... with a magnitude      2404.02948, 2402.09353
    adalora             d (in + out + 1)        W + P diag(l) Q, pruned   2303.10512
    oft                 in (d - 1) / 2          block-diagonal rotation   2306.07280
    boft                in d                    butterfly of rotations    2311.06243
    vera                d + out                 scales of a shared A, B   2310.11454
    miss                d out                   shared rows               2409.15371
    ia3                 out, or in              scales of activations     2205.05638
    prefix              2 d layers width(KV)    virtual tokens, in all    2101.00190
    prompt              d width                                           2104.08691
    ptuning             about d^2 + 2 d width   virtual tokens by an MLP  2103.10385

Defaults are PEFT's own but for those in METHODS, and for target modules: all linear layers but the
head (ia3: PEFT's table of models). Learning rates are the papers', not tuned here.
"""

import copy
import dataclasses
import difflib
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import gcd
from typing import Any, NamedTuple

import peft
import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from chunkft.errors import FOREIGN, InputError, one_line

ALL_LINEAR = "all-linear"
OPEN = 1 << 30  # AdaLoRA's total_step until the trainer knows it
Settings = Callable[[int], dict[str, Any]]


class Method(NamedTuple):
    """What a name stands for."""

    config: type[PeftConfig]
    dial: int | None
    """The default of what decides the size; None: nothing does."""
    learning_rate: float
    settings: Settings = lambda d: {"r": d}
    in_blocks: bool = False
    """The dial is a block size, which must divide the layers' inputs."""

    @property
    def is_virtual(self) -> bool:
        """Whether it trains tokens in front of the text and leaves the layers alone."""
        return issubclass(self.config, peft.PromptLearningConfig)


def _lora(d: int, **more: Any) -> dict[str, Any]:
    return {"r": d, "lora_alpha": 2 * d} | more


METHODS: dict[str, Method] = {
    "lora": Method(peft.LoraConfig, 16, 2e-4, _lora),
    "dora": Method(peft.LoraConfig, 16, 2e-4, partial(_lora, use_dora=True)),
    # alpha / sqrt(d) is lora's scale of 2 at d = 16
    "rslora": Method(peft.LoraConfig, 16, 2e-4, partial(_lora, lora_alpha=8, use_rslora=True)),
    "pissa": Method(
        peft.LoraConfig, 16, 2e-4, lambda d: _lora(d, lora_alpha=d, init_lora_weights="pissa")
    ),
    "adalora": Method(
        peft.AdaLoraConfig,
        12,
        5e-4,
        lambda d: (
            {"init_r": d, "target_r": max(1, 2 * d // 3), "lora_alpha": 2 * d}
            | {"total_step": OPEN}
        ),
    ),
    "oft": Method(peft.OFTConfig, 32, 1e-4, lambda d: {"r": 0, "oft_block_size": d}, True),
    "boft": Method(peft.BOFTConfig, 4, 1e-4, lambda d: {"boft_block_size": d}, True),
    "vera": Method(peft.VeraConfig, 256, 4e-3),
    "ia3": Method(peft.IA3Config, None, 3e-3, lambda d: {}),
    "miss": Method(peft.MissConfig, 64, 2e-4),
    "prefix": Method(peft.PrefixTuningConfig, 20, 1e-2, lambda d: {"num_virtual_tokens": d}),
    "prompt": Method(peft.PromptTuningConfig, 20, 3e-2, lambda d: {"num_virtual_tokens": d}),
    "ptuning": Method(
        peft.PromptEncoderConfig,
        128,
        1e-3,
        lambda d: {"num_virtual_tokens": 20, "encoder_hidden_size": d},
    ),
}


class Sized(NamedTuple):
    """A dial's value and the elements that are trained with it."""

    dial: int
    count: int


def configure(
    name: str,
    model: nn.Module,
    dial: int | None = None,
    targets: str | Sequence[str] | None = None,
    more: Mapping[str, Any] | None = None,
) -> PeftConfig:
    """PEFT's configuration of method `name` for `model`.

    Args:
        model: a transformers model; only its layers and config are looked at.
        dial: rank, block size or number of virtual tokens; None is the method's default.
        targets: modules by PEFT's own rules (names, a regular expression, all-linear).
        more: settings of PEFT's configuration class by its own names; they go before ours.

    Raises:
        InputError: an unknown method or setting, or a value that PEFT refuses.
    """
    method = _method(name)
    known = [field.name for field in dataclasses.fields(method.config)]
    for key in more or {}:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            told = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
            raise InputError(f"{name}: {method.config.__name__} has no setting {key!r}; {told}")
    if dial is not None and dial < 1:
        raise InputError(f"{name}: size {dial} must be at least 1")
    if method.dial is None and dial is not None:
        raise InputError(f"{name} has no rank, block size or tokens to set; leave {dial} out")
    settings = method.settings(dial or method.dial or 0)
    settings["task_type"] = "CAUSAL_LM"
    if type(model).__name__.endswith("ForSequenceClassification"):
        settings["task_type"] = "SEQ_CLS"
    elif getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        settings["task_type"] = "SEQ_2_SEQ_LM"
    if "target_modules" in known and (targets is not None or method.dial is not None):
        chosen = targets or ALL_LINEAR
        settings["target_modules"] = chosen if isinstance(chosen, str) else list(chosen)
    elif targets is not None:
        raise InputError(f"{name} trains virtual tokens and has no target modules; leave them out")
    if "fan_in_fan_out" in known and any(isinstance(m, Conv1D) for m in model.modules()):
        settings["fan_in_fan_out"] = True
    try:
        return method.config(**settings | dict(more or {}))
    except FOREIGN as error:
        raise InputError(f"{name}: {one_line(error)}") from error


def attach(model: nn.Module, config: PeftConfig) -> PeftModel:
    """`model` with an adapter around it; the layers inside are changed in place.

    Raises:
        InputError: PEFT does not know the method for one of the layers.
    """
    try:
        with warnings.catch_warnings():
            # sizes that do not divide a layer are made to, which the count tells
            warnings.filterwarnings("ignore", "Invalid .*oft_block_size")
            return settle(peft.get_peft_model(model, config))  # pyright: ignore[reportArgumentType]
    except FOREIGN as error:
        kind = type(config).__name__
        raise InputError(
            f"{kind} on {type(model).__name__}: {one_line(error)}; choose other "
            f"--lora_target_modules or another --method"
        ) from error


def settle(model: Any) -> Any:
    """Undo what PEFT and TRL do to an adapter's parameters; returns the model.

    Beside 16-bit weights PEFT makes AdaLoRA's rank counts trainable. On quantized ones TRL casts
    adapters to bf16, and PEFT casts them back when they are loaded: they are fp32 here, as on any.
    And bitsandbytes packs 4-bit weights anew for a CPU once they are called in eval mode, after
    which they have no backward: an adapter below them would lose its gradient without a word.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)
        elif parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    return model


def trained(model: nn.Module) -> int:
    """Elements that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def trained_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def parse_budget(text: str, parameters: int) -> int:
    """Elements that `0.2%` of `parameters`, or a plain number, asks for.

    Raises:
        InputError: it is neither, or not above 0 and at most the model's size.
    """
    try:
        share = text.strip().endswith("%")
        number = float(text.strip().rstrip("%"))
    except ValueError:
        raise InputError(
            f"--trainable {text!r} is no share (0.2%) and no number (500000)"
        ) from None
    count = round(parameters * number / 100 if share else number)
    if not 0 < count <= parameters:
        raise InputError(
            f"--trainable {text} is {count:,} elements; it must be above 0 and at most the model's "
            f"{parameters:,}"
        )
    return count


def size_for(
    name: str,
    model: Any,
    budget: int,
    targets: str | Sequence[str] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Sized:
    """The dial of `name` whose count of trained elements comes closest to `budget`.

    Counted on outlines of the model, which have no weights.

    Raises:
        InputError: the method has no dial, or no value comes within half and twice the budget.
    """
    method = _method(name)

    def adapted(dial: int | None) -> PeftModel:
        # no singular values of weights that are not there
        plain = dict(more or {}) | ({"init_lora_weights": True} if name == "pissa" else {})
        with torch.device("meta"):
            bare = type(model)(copy.deepcopy(model.config))
        return attach(bare, configure(name, bare, dial, targets, plain))

    @functools.cache
    def count(dial: int) -> int:
        return trained(adapted(dial))

    if method.dial is None:
        raise InputError(
            f"--trainable: {name} always trains {trained(adapted(None)):,} elements of this model; "
            f"leave it out"
        )
    dials = _blocks(adapted(2)) if method.in_blocks else _around(count, budget)
    found = min((Sized(d, count(d)) for d in dials), key=lambda sized: abs(sized.count - budget))
    if not budget / 2 <= found.count <= 2 * budget:
        raise InputError(
            f"--trainable {budget:,}: the closest that {name} comes is {found.count:,} elements, "
            f"with {found.dial}; take that number, other --lora_target_modules, or another --method"
        )
    return found


def _around(count: Callable[[int], int], budget: int) -> list[int]:
    """The last dial below `budget` and the next; of one that has a limit the last one there is."""

    def below(dial: int) -> bool:
        try:
            return count(dial) < budget
        except InputError:  # wider than a layer
            if dial == 1:
                raise
            return False

    low, high = 1, 2
    while below(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if below(middle) else (low, middle)
    try:
        count(high)
    except InputError:
        return [low]
    return [low, high]


def _blocks(adapted: nn.Module) -> list[int]:
    """Sizes of blocks that divide the inputs of all adapted layers."""
    layers: list[Any] = [m for m in adapted.modules() if isinstance(m, BaseTunerLayer)]
    widest = gcd(*(layer.in_features for layer in layers if hasattr(layer, "in_features")))
    return [d for d in range(2, widest + 1) if widest % d == 0]


def _method(name: str) -> Method:
    if name not in METHODS:
        raise InputError(f"unknown adapter {name!r}; one of {', '.join(METHODS)}")
    return METHODS[name]


def dial_of(config: PeftConfig) -> str:
    """The setting that decides an adapter's size, with its value."""
    names = ("init_r", "oft_block_size", "boft_block_size", "encoder_hidden_size")
    for name in (*names, "num_virtual_tokens", "r"):
        if getattr(config, name, None):
            return f"{name}={getattr(config, name)}"
    return ""
