"""The transformers model of a checkpoint on the meta device, where it weighs nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from parity.errors import ModelError
from parity.record.attention import check_attention
from parity.record.chain import find_layers
from parity.reference.checkpoint import Checkpoint, first_sentence, foreign_code


def build(checkpoint: Checkpoint, dtype: torch.dtype, attention: str) -> Any:
    """The model in a dtype, with an attention.

    Raises ModelError if transformers cannot build it, UsageError if it has no such attention.
    """
    from transformers import AutoConfig

    check_attention(attention)
    trust = checkpoint.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust)
        with torch.device("meta"):
            model = auto_class(config).from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust
            )
    except Exception as error:
        # Validation errors of a config are of many classes, some of them the hub client's own.
        reason = foreign_code(checkpoint, error) or first_sentence(error)
        raise ModelError(
            f"model {checkpoint.name!r}: transformers cannot build it from {checkpoint.path / 'config.json'}: {reason}"
        ) from error
    choose_experts(model)
    _leave_towers_out(model)
    _to_meta(model)
    return model.eval()


def auto_class(config: Any) -> Any:
    """The class of transformers that makes a decoder of a config, or a model of images and text around one."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    is_around = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and hasattr(config, "text_config")
    return (
        AutoModelForImageTextToText
        if is_around and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        else AutoModelForCausalLM
    )


def _leave_towers_out(model: Any) -> None:
    """What sees or hears beside the decoder gets no text: its layers are not the decoder's, its weights not needed."""
    from transformers import PreTrainedModel

    if model.config.get_text_config() is model.config:
        return
    layers = find_layers(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, PreTrainedModel) and layers and layers[0] not in set(module.modules()):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Module())


def _to_meta(model: nn.Module) -> None:
    """A parameter that was drawn before it knew its device would seem to be loaded already."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


def choose_experts(model: Any) -> None:
    """Let a model of transformers compute its experts one by one where its default, a grouped product, cannot."""
    if not _grouped_products_fit(model):
        model.config.get_text_config()._experts_implementation = "eager"


def _grouped_products_fit(model: nn.Module) -> bool:
    """Whether the grouped product of experts, transformers' default, takes these sizes: rows of 16 bytes or more."""
    experts = (p for p in model.parameters() if p.dim() == 3)
    return not any(size * p.element_size() % 16 for p in experts for size in p.shape[1:])
