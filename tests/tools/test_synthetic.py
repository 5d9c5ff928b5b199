"""The synthetic pairs agree with their originals exactly as often as documented."""

import argparse

import pytest
import torch
from conftest import make_pair
from transformers import PreTrainedModel

import hf_specdec
from hf_specdec.pairs import SpecPair
from hf_specdec.tools import arguments, synthetic
from hf_specdec.tools.synthetic import big_pair, enlarged, first_layers, random_like

SMALL = {"layers": 6, "hidden_size": 128, "intermediate_size": 256}


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits


@pytest.fixture(scope="module")
def embedded() -> PreTrainedModel:
    return hf_specdec.demo_pair()[0]


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(2, 4000, (2, 40), generator=torch.Generator().manual_seed(0))


def test_an_enlarged_model_computes_the_same_function(embedded: PreTrainedModel, ids: torch.Tensor) -> None:
    big = enlarged(embedded, layers=21, intermediate_size=480)
    assert big.num_parameters() > 1.3 * embedded.num_parameters()
    torch.testing.assert_close(logits(big, ids), logits(embedded, ids), atol=1e-4, rtol=1e-5)
    assert torch.equal(logits(big, ids).argmax(-1), logits(embedded, ids).argmax(-1))


def test_what_is_added_has_weights_to_read(embedded: PreTrainedModel) -> None:
    """Pages never written to share one page of zeros, and would cost nothing to read."""
    big = enlarged(embedded, layers=19, intermediate_size=400)
    own = embedded.config.intermediate_size
    assert big.model.layers[0].mlp.gate_proj.weight[own:].std() > 0
    assert big.model.layers[18].self_attn.q_proj.weight.std() > 0


def test_enlarging_refuses_to_shrink(embedded: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="at least 18 layers and an intermediate size of 352, got 3 and 352"):
        enlarged(embedded, layers=3, intermediate_size=352)


def test_first_layers_share_the_weights_of_the_target() -> None:
    target, _ = make_pair("llama")
    draft = first_layers(target, 1)
    assert draft.num_parameters() < target.num_parameters()
    shared = draft.model.layers[0].mlp.up_proj.weight
    assert shared.data_ptr() == target.model.layers[0].mlp.up_proj.weight.data_ptr()
    with torch.no_grad():  # a target whose second layer adds nothing is its first layer
        target.model.layers[1].self_attn.o_proj.weight.zero_()
        target.model.layers[1].mlp.down_proj.weight.zero_()
    prompt = torch.arange(2, 20)[None]
    torch.testing.assert_close(logits(draft, prompt), logits(target, prompt), atol=0, rtol=0)


def test_epsilon_sets_how_often_the_big_pair_agrees(ids: torch.Tensor) -> None:
    """On 80 tokens the shares are far apart; at 0, draft and target are the same function."""
    shares = []
    for epsilon in (0.0, 0.1, 1.0):
        pair = big_pair(torch.float32, **SMALL, epsilon=epsilon)
        agree = logits(pair.target, ids).argmax(-1) == logits(pair.draft, ids).argmax(-1)
        shares.append(agree.float().mean().item())
    assert shares[0] == 1
    assert 0.3 < shares[1] < 0.97
    assert shares[2] < shares[1] - 0.2


def test_the_big_pair_has_300_million_parameters() -> None:
    with torch.device("meta"):
        parameters = big_pair(torch.bfloat16, "meta").target.num_parameters()
    assert 290e6 < parameters < 320e6


def test_a_random_draft_never_agrees(embedded: PreTrainedModel, ids: torch.Tensor) -> None:
    """By chance one token in 4096 would agree; two of these 240 do with odds of 1 : 600."""
    stats = hf_specdec.SpeculationStats()
    draft = random_like(hf_specdec.demo_pair()[1])
    options = {"max_new_tokens": 24, "do_sample": False, "strategy": "spec", "num_assistant_tokens": 5}
    embedded.generate(ids, assistant_model=draft, speculation_stats=stats, **options)
    assert stats.drafted_tokens > 150
    assert stats.accepted_tokens <= 1


def parsed(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    arguments.add_pair_arguments(parser)
    synthetic.add_arguments(parser)
    return parser.parse_args(given)


def test_a_synthetic_pair_is_not_another_pair_as_well() -> None:
    with pytest.raises(SystemExit, match="expected --synthetic, or --pair or --target, got both"):
        synthetic.load(parsed("--synthetic", "big", "--target", "x"))


def test_random_draft_goes_with_any_pair() -> None:
    pair = synthetic.load(parsed("--random-draft", "--device", "cpu"))
    assert isinstance(pair, SpecPair) and pair.sources is None
    assert pair.draft.num_parameters() > 1_000_000
    assert not torch.equal(pair.draft.get_input_embeddings().weight, pair.draft.get_output_embeddings().weight)
