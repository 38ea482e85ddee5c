"""Our GGUF files in a real llama.cpp: `pip install xllamacpp`, then `pytest -m llamacpp`.

REQUANT_LLAMACPP_PYTHON names an interpreter that has the package, where this one has not.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import pico
from helpers.e2e import make_pieces, make_tokenizer, one_thread

from requant.deploy import engine_processes
from requant.deploy.gguf_export import export
from requant.deploy.gguf_verification import verify_gguf
from requant.deploy.scored_sample import Sample
from requant.evaluate import variants
from requant.numerics.grid import Grid

PYTHON = engine_processes.interpreter("llamacpp")
pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.skipif(PYTHON is None, reason="no llama.cpp here: pip install xllamacpp"),
]
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] | trim }}</s>{% endfor %}"
TEXTS = ["Hello world, it's 12345!\n\n  def f(x):\n\treturn x**2", " two  spaces ", "<s>user</s>", "naïve 日本語\r\n%"]
SIZES = {
    "vocab_size": 300, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 256,
}  # fmt: skip

# Runs in the interpreter that has llama.cpp: its own server, asked over loopback.
ASK = """
import json, sys, urllib.request
import xllamacpp
asked = json.load(sys.stdin)
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = asked["file"], 256, 1, False
settings.cpuparams.n_threads = 1
server = xllamacpp.Server(settings)
def post(path, body):
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=60))
def following(ids):  # the bias makes it say a letter: half of a character, or the end, it would keep to itself
    made = post("/completion", {"prompt": ids, "n_predict": 1, "n_probs": 20, "temperature": -1,
                                "logit_bias": [[asked["letter"], 1000]]})
    return {t["id"]: t["logprob"] for t in made["completion_probabilities"][0]["top_logprobs"]}
print("ANSWER", json.dumps({
    "tokens": [post("/tokenize", {"content": t, "add_special": True, "parse_special": True})["tokens"]
               for t in asked["texts"]],
    "chat": post("/apply-template", {"messages": asked["messages"]})["prompt"],
    "following": [following(ids) for ids in asked["rows"]],
}))
"""


def ask(folder: Path, rows: list[list[int]]) -> dict[str, Any]:
    (file,) = folder.glob("*.gguf")
    messages = [{"role": "user", "content": " What is 2 + 2? "}]
    letter = transformers.AutoTokenizer.from_pretrained(folder.parent / "gptq").convert_tokens_to_ids("a")
    asked = {"file": str(file), "texts": TEXTS, "messages": messages, "rows": rows, "letter": letter}
    outside = {k: v for k, v in os.environ.items() if not k.startswith("OMP")}
    done = subprocess.run(
        [str(PYTHON), "-c", ASK], input=json.dumps(asked), capture_output=True, text=True, check=False, env=outside
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout.split("ANSWER ")[1])
    return answer


OWN: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 64},
    "gemma3_text": {
        "head_dim": 64, "query_pre_attn_scalar": 64, "num_hidden_layers": 7, "sliding_window": 8, "vocab_size": 512,
        "bos_token_id": 2, "pad_token_id": 0, "hidden_activation": "gelu_pytorch_tanh",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(4, 64, symmetric=False), Grid(8, 64)], ids=["Q4_0", "Q4_1", "Q8_0"])
def test_llama_cpp_reads_our_numbers(tmp_path: Path, kind: str, grid: Grid) -> None:
    """Tokens and template as transformers, and log-probabilities within the rounding of its activations to 8 bits."""
    model = pico.model(kind, **SIZES | OWN.get(kind, {}))
    if kind == "gemma3_text":  # norms and windows that matter
        for name, value in model.named_parameters():
            value.data += 0.2 * torch.randn_like(value) if name.endswith("norm.weight") else 0
    pico.save(model, tmp_path / "m", torch.bfloat16)
    (make_pieces if kind == "gemma3_text" else make_tokenizer)(tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(TEMPLATE)
    pico.packed(tmp_path / "m", tmp_path / "gptq", grid, dtype=torch.bfloat16)
    export(tmp_path / "gptq", tmp_path / "out")
    rows = [row.tolist() for row in torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(1))]
    answer = ask(tmp_path / "out", rows)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "gptq")
    assert answer["tokens"] == [tokenizer(text)["input_ids"] for text in TEXTS]
    messages = [{"role": "user", "content": " What is 2 + 2? "}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # Where text gets a first token anyhow, llama.cpp takes the template's away, and adds it with the tokens.
    assert answer["chat"] == (chat.removeprefix("<s>") if kind == "gemma3_text" else chat)
    model = variants.quantized(tmp_path / "gptq", device=torch.device("cpu"), dtype=torch.float32)
    with one_thread(), torch.no_grad():
        ours = model(input_ids=torch.tensor(rows)).logits[:, -1].float().log_softmax(-1)
    differences = [ours[i, int(t)] - p for i, row in enumerate(answer["following"]) for t, p in row.items()]
    spread = float(ours.std())
    assert float(torch.tensor(differences).abs().mean()) < 0.05 * spread


@pytest.mark.parametrize("grid", [Grid(4, 32, signed=True), Grid(4, 64, symmetric=False), Grid(8, 64, signed=True)])
def test_verify_with_llama_cpp(tmp_path: Path, grid: Grid) -> None:
    """Its scores of every token, the end and halves of characters among them, are ours within its rounding."""
    pico.save(pico.model("llama", **SIZES), tmp_path / "m", torch.bfloat16)
    make_tokenizer(tmp_path / "m")
    pico.packed(tmp_path / "m", tmp_path / "gptq", grid, dtype=torch.bfloat16)
    done = export(tmp_path / "gptq", tmp_path / "out")
    rows = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1)).tolist()
    rows[0][5] = 1  # the end of a text
    Sample(tuple(map(tuple, rows)), (0, 1)).save(tmp_path)
    with one_thread():
        proof = verify_gguf(tmp_path / "out" / done.file, source=tmp_path / "gptq", load_in=["llamacpp"])
    assert [str(finding) for finding in proof.findings] == []
    (engine,) = proof.engines
    assert engine["versions"]["xllamacpp"]
    assert engine["difference"] is not None
    assert abs(engine["difference"]) < 0.01
    assert (engine["n_documents"], engine["n_tokens"]) == (2, 62)
