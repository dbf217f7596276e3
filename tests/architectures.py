"""Tiny classifiers of transformers, one of each way in which its models come to their logits; weights are random."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY, HIDDEN, PAD, EOS = 40, 16, 0, 2
_SIZES = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 1}
_ENCODER = {
    **_SIZES,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
_BART = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in (("layers", 1), ("ffn_dim", 24))}

# What the names of the sizes are, and whether the loss is written in the model's own forward or called by it.
SETTINGS: dict[str, dict[str, Any]] = {
    "Bert": _ENCODER,
    "Roberta": _ENCODER,
    "DistilBert": {**_SIZES, "dim": HIDDEN, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "DebertaV2": {
        **_ENCODER,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
    },
    "ModernBert": {
        **_ENCODER,
        "cls_token_id": 1,
        "sep_token_id": EOS,
        "classifier_dropout": 0.1,
        "attn_implementation": "sdpa",
        "reference_compile": False,
    },
    "Llama": {**_ENCODER, "num_key_value_heads": 1},
    "Electra": {**_ENCODER, "embedding_size": 8},
    "Albert": {**_ENCODER, "embedding_size": 8, "classifier_dropout_prob": 0.1},
    "XLNet": {**_SIZES, "d_model": HIDDEN, "n_layer": 2, "n_head": 2, "d_inner": 24},
    "GPT2": {**_SIZES, "n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "T5": {
        **_SIZES,
        "decoder_start_token_id": PAD,
        "d_model": HIDDEN,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
    },
    "Bart": {**_SIZES, **_BART, "d_model": HIDDEN, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
}


def classifier(name: str, num_labels: int, **settings: Any) -> Any:
    """A model with dropout, in training mode, of the same weights at every call."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SETTINGS[name], "num_labels": num_labels, **settings})
    model = getattr(transformers, f"{name}ForSequenceClassification")(config).train()
    with torch.no_grad():  # a bias of zero would hide what is lost of it
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def texts(rows: int, length: int = 6) -> dict[str, Tensor]:
    """Token ids with an attention mask: rows of several lengths, each with its end once."""
    ids = 3 + torch.randint(VOCABULARY - 3, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(rows):
        end = length - 1 - row % 3
        ids[row, end], ids[row, end + 1 :], mask[row, end + 1 :] = EOS, PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def step(model: Any, inputs: dict[str, Any], **more: Any) -> tuple[Any, dict[str, Tensor]]:
    """Output and gradients of a step, whose dropout is always the same."""
    model.zero_grad()
    torch.manual_seed(2)
    output = model(**inputs, **more)
    output[0].backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# What test_patch.py and test_patch_state.py give them.
LABELS = 5
INPUTS = texts(4)
MULTI, SINGLE, REGRESSION = "multi_label_classification", "single_label_classification", "regression"
MULTI_HOT = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [1, 0, 0, 0, 1]])
TARGETS = {
    MULTI: MULTI_HOT.float(),
    SINGLE: torch.tensor([1, 4, -100, 0]),
    REGRESSION: torch.linspace(-1, 1, 20).view(4, LABELS),
}


def check_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Within the rounding of sums in another order: some units of the last place of the largest."""
    assert got.keys() == expected.keys()
    largest = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(
            got[name], grad, rtol=1e-5, atol=1e-6 * float(largest), msg=lambda m, n=name: f"{n}: {m}"
        )
