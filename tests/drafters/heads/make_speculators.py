"""Writes the fixtures of `test_eagle3.py` with the EAGLE-3 forward of speculators 0.9, on tiny random heads.

    pip download speculators==0.9.0 --no-deps -d /tmp/wheels
    python -m zipfile -e /tmp/wheels/speculators-0.9.0-py3-none-any.whl /tmp/speculators
    PYTHONPATH=/tmp/speculators python tests/drafters/heads/make_speculators.py

It pins an older transformers than ours, so it is not installed; it ran with transformers 5.23. Each folder
holds a head in its format, and `expected.tensors`: states and tokens of a text, and the logits at each position after
0, 1, 2 and 3 drafts (here the text's own tokens).
"""

import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, Qwen3Config

HERE, VOCAB, TOKENS, STEPS = Path(__file__).parent, 61, 11, 4
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "vocab_size": VOCAB, "rms_norm_eps": 1e-6, "num_hidden_layers": 1,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "reduced": {"layer": LlamaConfig(**SIZES), "draft_vocab_size": 40, "norm_before_residual": True},
    "norm_before_fc": {"layer": LlamaConfig(**SIZES), "draft_vocab_size": VOCAB, "norm_before_fc": True},
    "qwen3": {
        "layer": Qwen3Config(**SIZES | {"num_hidden_layers": 2}), "draft_vocab_size": VOCAB, "fc_norm": True,
        "norm_output": True,
    },
}  # fmt: skip


@torch.no_grad()
def make(name: str, layer: Any, **options: Any) -> None:
    from speculators import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3 import Eagle3SpeculatorConfig
    from speculators.models.eagle3.core import Eagle3DraftModel
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    torch.manual_seed(len(name))
    layer._attn_implementation = "eager"
    method = GreedyTokenProposalConfig(speculative_tokens=5)
    verifier = VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"])
    about = SpeculatorsConfig(
        algorithm="eagle3", default_proposal_method="greedy", proposal_methods=[method], verifier=verifier
    )
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer, speculators_config=about, eagle_aux_hidden_state_layer_ids=[1, 2, 4], **options
    )
    model = Eagle3DraftModel(config).float().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
        else:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    if options["draft_vocab_size"] < VOCAB:
        known = torch.zeros(VOCAB, dtype=torch.bool)
        known[torch.randperm(VOCAB)[: options["draft_vocab_size"]]] = True
        model.load_vocab_mappings(known, known.nonzero()[:, 0] - torch.arange(options["draft_vocab_size"]))
    logits: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda _module, _args, output: logits.append(output[0].clone()))
    states = torch.randn(1, TOKENS, 3 * layer.hidden_size)
    tokens = torch.randint(VOCAB, (1, TOKENS + 1))
    model(states, tokens[:, 1:], torch.zeros(1, TOKENS, dtype=torch.long), ttt_steps=STEPS)
    model.save_pretrained(HERE / name)
    (HERE / name / "config.py").unlink()  # the code that reads the config
    expected = {
        "states": states[0],
        "tokens": tokens[0],
        "logits": torch.stack(logits),
    }  # logits: [steps, tokens, vocab]
    save_file(expected, HERE / name / "expected.tensors")


def stand_in_for_what_is_missing() -> None:
    """Import speculators, with a stand-in for each module that is not installed and not needed here."""
    while True:
        try:
            __import__("speculators.models.eagle3.core")
            return
        except ModuleNotFoundError as error:
            if not error.name or error.name.startswith("speculators"):
                raise
            sys.modules[error.name] = MagicMock()
            for name in [name for name in sys.modules if name.split(".")[0] == "speculators"]:
                del sys.modules[name]


if __name__ == "__main__":
    stand_in_for_what_is_missing()
    for name, options in VARIANTS.items():
        make(name, **options)
