"""Which optimizer takes which weights."""

import pytest
import torch
from conftest import ARCHITECTURES, make_model
from eagle3_reference import make_parts, random_head, some_tokens
from torch import nn

from hf_specdec.tools.recipe import optimizers


def names(draft: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    taken = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    return {name for name, weight in draft.named_parameters() if id(weight) in taken}


@pytest.fixture(params=["model", "head"])
def draft(request: pytest.FixtureRequest) -> nn.Module:
    if request.param == "model":
        return make_model(ARCHITECTURES["llama"]())
    return random_head(make_parts(draft_vocab_size=40), some_tokens(40))


def test_muon_takes_the_matrices_between_embeddings_and_output(draft: nn.Module) -> None:
    every = {name for name, _ in draft.named_parameters()}
    muon, adamw = (names(draft, each) for each in optimizers(draft, 1e-3, "muon"))
    assert muon == {name for name in every if "proj" in name or name == "fc.weight"}
    assert muon and adamw == every - muon
    (adamw,) = (names(draft, each) for each in optimizers(draft, 1e-3))
    assert adamw == every


def test_without_muon_the_error_says_which_version_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=r"expected PyTorch 2\.9 or newer with optimizer='muon', found"):
        optimizers(nn.Linear(2, 2), 1e-3, "muon")
