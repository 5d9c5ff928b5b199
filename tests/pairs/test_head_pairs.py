"""Pairs whose draft is a head: loaded, checked, run, saved, exported; public heads; what tools say about them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dflash_reference
import pytest
import torch
from conftest import VOCAB, make_prompts
from eagle3_reference import kindred_head, make_parts, random_head, some_tokens
from mtp_reference import make_tensors, save_with, write_tensors
from test_dflash import parallel_head
from test_dflash_files import deepspec, zlab
from test_eagle3 import make_target
from test_head_files import safeailab
from test_pair import make_tokenizer
from test_shared_entries import make_assistant
from test_shared_entries import make_target as make_gemma
from transformers import PreTrainedModel

import hf_specdec
from hf_specdec import ModelDrafter, SpeculationStats, SuffixDrafter
from hf_specdec.cli import main
from hf_specdec.drafters.heads import DFlashHead, Eagle3Head, MtpHead
from hf_specdec.drafters.heads.saving import save_folder
from hf_specdec.pairs import DEMO_PAIR, SpecPair
from hf_specdec.pairs.catalogue import read_catalogue
from hf_specdec.pairs.export import export_pair, pair_to_export
from hf_specdec.pairs.head_compatibility import kind_of
from hf_specdec.pairs.heads import DEMO_HEAD

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 14}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown names are not looked up on the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return make_target()


@pytest.fixture(scope="module")
def folders(target: PreTrainedModel, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target with its tokenizer, and heads for it, by kind."""
    place = tmp_path_factory.mktemp("heads")
    tensors = make_tensors(target)
    made = {"target": save_with(place / "target", target, tensors)}
    tokenizer.save_pretrained(place / "target")
    sizes = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}
    made["EAGLE-3 head"] = safeailab(kindred_head(target, some_tokens(80)), place / "eagle3", **sizes)
    save_folder(parallel_head(target), place / "peagle", target)
    made["P-EAGLE head"] = place / "peagle"
    made["DFlash head"] = zlab(dflash_reference.kindred_head(target), place / "dflash", **sizes)
    head = dflash_reference.kindred_head(target, dspark=True, noise=0.4)
    made["DSpark head"] = deepspec(head, place / "dspark", **sizes)
    made["MTP layers"] = write_tensors(place / "mtp", tensors)
    (place / "mtp" / "config.json").write_text("{}")
    return made


KINDS: dict[str, type] = {
    "EAGLE-3 head": Eagle3Head,
    "P-EAGLE head": Eagle3Head,
    "DFlash head": DFlashHead,
    "DSpark head": DFlashHead,
    "MTP layers": MtpHead,
}


def stats_of(pair: SpecPair) -> SpeculationStats:
    """Of a call that gives vanilla's tokens, with drafts accepted in part."""
    stats = SpeculationStats()
    expected = pair.target.generate(**make_prompts(2), **GREEDY)
    got = pair.generate(**make_prompts(2), **GREEDY, num_assistant_tokens=3, speculation_stats=stats)
    assert got.equal(expected)
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    return stats


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_with_a_head_is_loaded_run_and_saved(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    pair = SpecPair.from_pretrained(folders["target"], folders[kind], dtype=torch.float32)
    assert isinstance(pair.draft, KINDS[kind]) and kind_of(pair.draft) == kind
    assert pair.draft_tokenizer is None and not pair.has_two_tokenizers
    assert not pair.compatibility.errors
    before = stats_of(pair)
    pair.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"{kind} that makes its `generate()` faster" in card and "a draft model" not in card
    again = SpecPair.from_pretrained(tmp_path, dtype=torch.float32)
    assert isinstance(again.draft, KINDS[kind])
    assert stats_of(again).accepted_tokens == before.accepted_tokens
    assert type(again.draft).__name__ in repr(again) and type(again.draft).__name__ in again._repr_html_()
    ids = pair.target.generate(**make_prompts(1), **GREEDY, strategy="spec", assistant_model=str(tmp_path))
    assert ids.equal(pair.target.generate(**make_prompts(1), **GREEDY))  # a pair's name as that of its draft


def test_layers_in_the_targets_own_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    pair = SpecPair.from_pretrained(folders["target"], folders["target"], dtype=torch.float32)
    assert isinstance(pair.draft, MtpHead)
    stats_of(pair)
    with pytest.raises(ValueError, match="MtpHead that was read from the target's own checkpoint"):
        pair.save_pretrained(tmp_path)


def test_assistants_on_the_targets_entries(tmp_path: Path) -> None:
    target = make_gemma()
    pair = SpecPair(target, make_assistant(target), make_tokenizer(VOCAB))
    stats_of(pair)
    findings = {finding.property: finding for finding in pair.compatibility.findings}
    assert findings["architecture"].draft == "assistant on the target's entries" and not pair.compatibility.errors


def test_heads_that_cannot_be_written_are_named(target: PreTrainedModel, tmp_path: Path) -> None:
    pair = SpecPair(target, dflash_reference.kindred_head(target), make_tokenizer(VOCAB))
    with pytest.raises(
        ValueError, match="DFlashHead that was made in memory, and hf_specdec writes EAGLE-3 heads only"
    ):
        pair.save_pretrained(tmp_path)
    SpecPair(target, random_head(make_parts()), make_tokenizer(VOCAB)).save_pretrained(tmp_path)
    assert (tmp_path / "draft" / "config.json").is_file()


# ------------------------------------------------------------------------------------------------------------ the check


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({"target_hidden_size": 48, "has_embeddings": True}, "hidden states"),
        ({"vocab_size": VOCAB + 1, "has_embeddings": True}, "vocabulary"),
        ({"aux_ids": (1, 2, 9)}, "hidden states"),
    ],
    ids=["width", "vocabulary", "layers"],
)
def test_a_head_for_another_target_is_told_in_the_table(
    changes: dict[str, Any], row: str, target: PreTrainedModel, folders: dict[str, Path], tmp_path: Path
) -> None:
    save_folder(random_head(make_parts(**changes)), tmp_path, target)
    with pytest.raises(ValueError, match="does not fit the target") as error:
        SpecPair.from_pretrained(folders["target"], tmp_path)
    pair = SpecPair(target, random_head(make_parts(**changes)), make_tokenizer(VOCAB))
    (finding,) = pair.compatibility.errors
    assert finding.property == row and finding.advice.split()[0] in str(error.value)


def test_the_report_about_a_head(target: PreTrainedModel) -> None:
    head = random_head(make_parts(draft_vocab_size=40), some_tokens(40))
    findings = {f.property: f for f in SpecPair(target, head, make_tokenizer(VOCAB)).compatibility.findings}
    assert findings["architecture"].draft == "EAGLE-3 head"
    assert findings["hidden states"].draft == "before layers 0, 1, 2, of width 32"
    assert (findings["vocabulary"].target, findings["vocabulary"].draft) == ("96", "40")
    assert "never drafts the other 56" in findings["vocabulary"].advice
    layer = 32 * 3 * 32 + 2 * 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48 + 4 * 32  # fc, q k v, o, MLP, norms
    read = 4 * (layer + 32 + 40 * 32 - 32)  # one more norm, and the output layer
    assert f"{read / 1000:.3g} kB" in findings["cost ratio"].draft.replace(" ", " ")
    half = random_head(make_parts(has_lm_head=False)).to(torch.bfloat16)
    findings = {f.property: f for f in SpecPair(target, half, make_tokenizer(VOCAB)).compatibility.findings}
    assert findings["dtype"].verdict == "note" and findings["dtype"].draft == "bfloat16"


def test_the_command_line_checks_heads(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--target", str(DEMO_PAIR / "target"), "--draft", str(DEMO_HEAD)]
    assert main(["check", *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "EAGLE-3 head" in "\n".join(lines[:-1])
    assert {finding["verdict"] for finding in json.loads(lines[-1])} <= {"ok", "note"}
    assert main(["check", "--target", str(folders["target"]), "--draft", str(DEMO_HEAD)]) == 1
    assert "hidden states" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- exports


@pytest.fixture
def exported(folders: dict[str, Path], tmp_path: Path) -> Callable[..., tuple[dict[str, Any], str]]:
    def run(kind: str, to: str, gamma: int = 3) -> tuple[dict[str, Any], str]:
        """What is written for a server, and the page beside it."""
        pair = pair_to_export(None, str(folders["target"]), str(folders[kind]))
        pair.recommended["num_assistant_tokens"] = gamma
        found = export_pair(pair, to, tmp_path / f"{to} {kind}")
        file = next(file for file in found.files if file.suffix == ".json")
        return json.loads(file.read_text()), (file.parent / "README.md").read_text()

    return run


VLLM = {
    "EAGLE-3 head": {"method": "eagle3", "num_speculative_tokens": 3},
    "P-EAGLE head": {"method": "eagle3", "num_speculative_tokens": 3, "parallel_drafting": True},
    "DFlash head": {"method": "dflash", "num_speculative_tokens": 3},
    "DSpark head": {"method": "dspark", "num_speculative_tokens": 3},
}


@pytest.mark.parametrize("kind", VLLM)
def test_vllm_gets_the_method_of_the_head(kind: str, exported: Any, folders: dict[str, Path]) -> None:
    config, page = exported(kind, "vllm")
    assert config == VLLM[kind] | {"model": str(folders[kind])}
    assert "with the head" in page and "No vLLM has read these options here" in page


SGLANG: dict[str, dict[str, Any]] = {
    "EAGLE-3 head": {
        "speculative_algorithm": "EAGLE3", "speculative_num_steps": 3, "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 4,
    },
    "DFlash head": {"speculative_algorithm": "DFLASH", "speculative_num_draft_tokens": 4},
    "DSpark head": {"speculative_algorithm": "DSPARK", "speculative_dspark_block_size": 3},
}  # fmt: skip


@pytest.mark.parametrize("kind", SGLANG)
def test_sglang_gets_the_algorithm_of_the_head(kind: str, exported: Any, folders: dict[str, Path]) -> None:
    flags, page = exported(kind, "sglang")
    places = {"model_path": str(folders["target"]), "speculative_draft_model_path": str(folders[kind])}
    assert flags == SGLANG[kind] | places
    assert "No SGLang has read these options here" in page


def test_layers_in_the_target_are_named_by_the_method_alone(
    exported: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    assert exported("target", "vllm")[0] == {"method": "mtp", "num_speculative_tokens": 3}
    flags, _ = exported("target", "sglang")
    assert flags["speculative_algorithm"] == "EAGLE" and "speculative_draft_model_path" not in flags
    with pytest.raises(ValueError, match="`use_mtp=True`"):
        export_pair(pair_to_export(None, *[str(folders["target"])] * 2), "custom-generate", tmp_path)


def test_a_head_drafts_no_more_than_it_can_on_a_server_either(exported: Any) -> None:
    config, page = exported("DFlash head", "vllm", gamma=9)
    assert config["num_speculative_tokens"] == 3 and "drafts at most 3 tokens" in page
    assert exported("EAGLE-3 head", "vllm", gamma=9)[0]["num_speculative_tokens"] == 9


def test_what_sglang_has_no_word_for(folders: dict[str, Path], tmp_path: Path) -> None:
    pair = pair_to_export(None, str(folders["target"]), str(folders["P-EAGLE head"]))
    with pytest.raises(ValueError, match=r"no algorithm for \(P-EAGLE head\)"):
        export_pair(pair, "sglang", tmp_path)


@pytest.mark.parametrize("mask_token", [None, 4])
@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_servers_need_the_heads_own_output_weights(
    server: str, mask_token: int | None, folders: dict[str, Path], target: PreTrainedModel, tmp_path: Path
) -> None:
    save_folder(random_head(make_parts(has_lm_head=False, mask_token=mask_token)), tmp_path / "head", target)
    pair = pair_to_export(None, str(folders["target"]), str(tmp_path / "head"))
    with pytest.raises(ValueError, match=r"no output weights .* trained without `--share-output`"):
        export_pair(pair, server, tmp_path / "out")
    export_pair(pair, "custom-generate", tmp_path / "out")  # there it is we who read it


def test_a_repository_with_code_loads_the_head(folders: dict[str, Path], target: PreTrainedModel) -> None:
    pair = pair_to_export(None, str(folders["target"]), str(folders["EAGLE-3 head"]))
    export_pair(pair, "custom-generate", folders["target"])
    loaded = type(target).from_pretrained(folders["target"])
    loaded.generation_config.pad_token_id = 0
    stats = SpeculationStats()
    way = {"custom_generate": str(folders["target"]), "trust_remote_code": True, "speculation_stats": stats}
    got = loaded.generate(**make_prompts(2), **GREEDY, **way)
    assert got.tolist() == target.generate(**make_prompts(2), **GREEDY).tolist()
    assert stats.accepted_tokens > 0


# ------------------------------------------------------------------------------------------------- names and thresholds


def test_public_heads() -> None:
    found = hf_specdec.suggest_heads("qwen/qwen3-8b")
    kinds = {head.note.split(".")[0] for head in found}
    assert {"EAGLE-3 head", "P-EAGLE head", "DFlash head", "DSpark head"} <= kinds
    assert {head.target for head in found} == {"Qwen/Qwen3-8B"} and len({head.draft for head in found}) == len(found)
    assert hf_specdec.suggest_heads("someone/Model") == ()
    for head in read_catalogue()["heads"]:
        assert head["license"] and head["source"].startswith("https://") and "/" in head["head"]


def test_a_target_with_heads_but_no_smaller_draft_is_told_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="pass a head on its hidden states as `assistant_model`, such as"):
        hf_specdec.suggest_draft("openai/gpt-oss-20b")
    assert main(["suggest", "openai/gpt-oss-20b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("head     RedHatAI/gpt-oss-20b-speculator.eagle3") for line in lines)
    assert len(json.loads(lines[-1])["heads"]) == 2


def test_a_threshold_beside_a_drafter_is_an_error(target: PreTrainedModel) -> None:
    call = {"strategy": "spec", "assistant_confidence_threshold": 0.3, **make_prompts(1), **GREEDY}
    draft = make_target(layers=2)
    for drafter, match in (
        (SuffixDrafter(), "is a SuffixDrafter, .*pass a draft model, which takes it"),
        (ModelDrafter(draft), r"make it with `confidence_threshold=0\.3`"),
        (ModelDrafter(draft, confidence_threshold=0.5), r"make it with `confidence_threshold=0\.3`"),
    ):
        with pytest.raises(ValueError, match=f"`assistant_confidence_threshold` is 0.3, but .*{match}"):
            target.generate(**call, assistant_model=drafter)
    target.generate(**call, assistant_model=ModelDrafter(draft, confidence_threshold=0.3))
    target.generate(**call | {"assistant_confidence_threshold": 0.0}, assistant_model=SuffixDrafter())


# ---------------------------------------------------------------------------------------------------------------- tools

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))


FEW = ["--new-tokens", "6", "--prompts", "1", "--prompt-tokens", "8", "--device", "cpu"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a script on the tiny target: its last line, and all of its output in one line."""

    def run(module: Any, *given: Any) -> tuple[dict[str, Any], str]:
        monkeypatch.setattr(sys, "argv", [module.__name__, *FEW, *map(str, given)])
        module.main()
        out = capsys.readouterr().out
        return json.loads(out.splitlines()[-1]), " ".join(out.split())

    return run


def test_tune_tries_heads_and_their_thresholds(
    folders: dict[str, Path], script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    import tune

    monkeypatch.setattr(tune.tuning, "doubt", lambda best, setting: "")
    pair = "--target", folders["target"], "--draft", folders["EAGLE-3 head"], "--minutes", "0", "--gamma", "2"
    found, _ = script(tune, *pair, "--drafter", f"head:{folders['DFlash head']}", "--schedule", "optimal")
    assert set(found["tried"]) == {"γ=2", "optimal", "γ≤2, confidence 0.3", "γ≤2, confidence 0.5"}
    assert found["differing_rows"] == 0 and found["measured"]["cost_ratio"] > 0
    found, _ = script(tune, *pair, "--drafter", "suffix", "--schedule")
    assert set(found["tried"]) == {"γ=2"} and found["measured"]["cost_ratio"] is None
    with pytest.raises(SystemExit):
        script(tune, *pair, "--drafter", "suffix", "--confidence", "0.3")
    assert "--confidence is for models and heads" in capsys.readouterr().err
    found, _ = script(tune, *pair, "--schedule", "--confidence", "--write", tmp_path)
    assert found["measured"]["cost_ratio"] > 0
    again = SpecPair.from_pretrained(tmp_path)
    assert isinstance(again.draft, Eagle3Head) and again.config.measured == [found["measured"]]


def test_the_benchmark_knows_what_heads_cost(folders: dict[str, Path], script: Any) -> None:
    """The ideal of a head rests on the head's own forwards; where these were not measured, there is none."""
    import benchmark_speed

    given = "--target", folders["target"], "--draft", folders["EAGLE-3 head"], "--batch", "1", "--context", "own"
    drafters = "model", f"head:{folders['MTP layers']}", f"head:{folders['P-EAGLE head']}", "exit:1"
    found, said = script(
        benchmark_speed, *given, "--rounds", "1", "--lookup", "3", "--spec", "2", "--drafter", *drafters
    )
    setting = found["settings"][0]
    methods = {name.split()[1]: figures for name, figures in setting["methods"].items() if "hf_specdec" in name}
    model, mtp, parallel, early = (methods["γ=2" if name == "model" else name] for name in drafters)
    assert found["identical"] and not any("HF assisted" in name for name in setting["methods"])
    assert set(setting["bare"]["heads_ms"]) == {drafters[1]}
    assert model["ideal"] > 0 and mtp["ideal"] > 0 and mtp["efficiency"] > 0
    assert parallel["ideal"] is None and early["ideal"] is None
    names = f"hf_specdec {drafters[2]} γ=2, hf_specdec exit:1 γ=2"
    assert f"no ideal, because forwards of these drafts were not measured alone: {names}" in said


def test_the_ideal_takes_the_time_of_the_drafter_that_is_meant() -> None:
    from hf_specdec.tools.bare import BareForwards

    bare = BareForwards(*[None] * 2, {"head": None, "head:p": None})  # type: ignore[arg-type]
    bare.target_seconds, bare.draft_seconds = {1: [0.1], 5: [0.12]}, [0.05]
    bare.head_seconds["head"] = [0.01]
    assert bare.ideal(3.0, 5, 4, "head") == pytest.approx(3.0 * 0.1 / (0.12 + 4 * 0.01))
    assert bare.ideal(3.0, 5, 4) == pytest.approx(3.0 * 0.1 / (0.12 + 4 * 0.05))
    assert bare.ideal(3.0, 5, 4, "head:p") is None and bare.ideal(3.0, 5, 4, "exit:1") is None
    assert bare.ideal(3.0, 5, 0, "lookup") == pytest.approx(3.0 * 0.1 / 0.12)
    assert bare.cost_ratio("head") == 0.1 and bare.cost_ratio("lookup") is None


@pytest.mark.parametrize("kind", ["EAGLE-3 head", "DFlash head", "MTP layers", "P-EAGLE head"])
def test_bare_forwards_of_heads(kind: str, target: PreTrainedModel, folders: dict[str, Path]) -> None:
    """They run again and again at the same place."""
    from hf_specdec.tools.bare import REPEATS, BareForwards

    draft = SpecPair.from_pretrained(folders["target"], folders[kind]).draft
    bare = BareForwards(target, draft, {"one": draft})
    bare.prepare(make_prompts(2), [[5, 6, 7, 8]] * 2, [3])
    bare.measure()
    bare.measure()
    count = 0 if kind == "P-EAGLE head" else 2 * REPEATS
    assert len(bare.draft_seconds) == len(bare.head_seconds["one"]) == count
    assert ("missing" in bare.to_dict()) == (count == 0)
