"""`requant_eval.scoring.score_loop` against a slow loop in fp64 on pico models."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from requant_eval.errors import EvaluationError
from requant_eval.scoring import score_loop
from requant_eval.scoring.lm_head import Head, HeadTap, extract, prove_head
from requant_eval.scoring.reference_states import Reference, prove
from requant_eval.scoring.score_loop import score
from requant_eval.scoring.token_scores import TokenScores
from requant_eval.scoring.windows import Document, EvalSet, make_set

VOCAB = 97
PICO: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def pico(kind: str = "llama", seed: int = 0) -> Any:
    """A random two-layer model with logits of std about 3, so that wrong post-processing shows."""
    torch.manual_seed(seed)
    if kind == "gemma2":
        config = Gemma2Config(**PICO, head_dim=8, final_logit_softcapping=3.0, sliding_window=16)
        model: Any = Gemma2ForCausalLM(config)
    elif kind == "granite":
        model = GraniteForCausalLM(GraniteConfig(**PICO, logits_scaling=4.0))
    elif kind == "cohere":
        model = CohereForCausalLM(CohereConfig(**PICO, logit_scale=0.25))
    else:
        model = LlamaForCausalLM(LlamaConfig(**PICO))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(25)
    return model.eval()


@pytest.fixture
def eval_set() -> EvalSet:
    rng = np.random.default_rng(0)
    lengths = [40, 16, 7, 16, 33, 16, 2]
    documents = [Document(tuple(rng.integers(3, VOCAB, size=n).tolist())) for n in lengths]
    masked = Document(documents[0].ids, tuple(i > 10 for i in range(40)))
    return make_set("pico", [*documents, masked], window=16, bos_id=1, tail=3)


def slow(model: Any, eval_set: EvalSet) -> torch.Tensor:
    """fp64 log-probabilities [n, vocab] of the model's logits at each window's scored positions."""
    rows = []
    with torch.no_grad():
        for w in eval_set.windows:
            logits = model(input_ids=w.ids[None]).logits[0].double().log_softmax(-1)
            rows.append(logits[:-1][w.scored[1:]])
    return torch.cat(rows)


def decided(log_probabilities: torch.Tensor) -> torch.Tensor:
    """Where the best two are apart by far more than fp32 rounding, bool [n].

    Elsewhere either may be the best.
    """
    best = log_probabilities.topk(2).values
    apart: torch.Tensor = best[:, 0] - best[:, 1] > 1e-3
    assert apart.double().mean() > 0.9
    return apart


def targets(eval_set: EvalSet) -> torch.Tensor:
    return torch.cat([w.ids[w.scored] for w in eval_set.windows])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "cohere"])
def test_score_is_the_slow_loop(kind: str, eval_set: EvalSet) -> None:
    model = pico(kind)
    got = score(model, eval_set, batch=3, device="cpu", chunk_tokens=5)
    expected = slow(model, eval_set)
    wanted = targets(eval_set)
    nll = -expected.gather(1, wanted[:, None])[:, 0].numpy()
    np.testing.assert_allclose(got.nll, nll, rtol=1e-5, atol=1e-5)
    assert (got.top1 == (expected.argmax(-1) == wanted).numpy())[decided(expected).numpy()].all()
    assert got.document.tolist() == [w.document for w in eval_set.windows for _ in range(int(w.scored.sum()))]
    assert (got.nonfinite, got.digest, got.kl, got.agree) == (0, eval_set.digest, None, None)
    assert len(got.nll) == eval_set.n_scored


def test_uniform_logits_give_the_vocabulary_as_perplexity(eval_set: EvalSet) -> None:
    model = pico()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    got = score(model, eval_set, batch=2, device="cpu")
    assert math.exp(got.nll.mean()) == pytest.approx(VOCAB, rel=1e-6)


def test_batch_and_chunk_change_only_rounding(eval_set: EvalSet) -> None:
    model = pico()
    one = score(model, eval_set, batch=1, device="cpu", chunk_tokens=1000)
    for batch, chunk in ((4, 1), (100, 7)):
        other = score(model, eval_set, batch=batch, device="cpu", chunk_tokens=chunk)
        np.testing.assert_allclose(other.nll, one.nll, rtol=1e-5, atol=1e-5)


def test_dropout_is_off(eval_set: EvalSet) -> None:
    model = pico()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    first = score(model, eval_set, batch=2, device="cpu")
    assert np.array_equal(first.nll, score(model, eval_set, batch=2, device="cpu").nll)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_kl_and_agreement_are_the_slow_loops(kind: str, eval_set: EvalSet, tmp_path: Path) -> None:
    reference, variant = pico(kind, seed=0), pico(kind, seed=1)
    path = tmp_path / "reference.safetensors"
    score(reference, eval_set, batch=3, device="cpu", write_reference=path)
    got = score(variant, eval_set, batch=2, device="cpu", reference=path, chunk_tokens=6)
    r, v = slow(reference, eval_set), slow(variant, eval_set)
    assert got.kl is not None
    assert got.agree is not None
    np.testing.assert_allclose(got.kl, (r.exp() * (r - v)).sum(-1).numpy(), rtol=1e-4, atol=1e-6)
    assert (got.agree == (r.argmax(-1) == v.argmax(-1)).numpy())[(decided(r) & decided(v)).numpy()].all()
    assert 0 < got.agree.mean() < 1 or got.kl.mean() > 0.1


def test_an_opened_reference_gives_what_its_file_gives(eval_set: EvalSet, tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    score(pico(seed=0), eval_set, batch=3, device="cpu", write_reference=path)
    opened = Reference(path, digest=eval_set.digest, device=torch.device("cpu"))
    got, expected = (score(pico(seed=1), eval_set, batch=2, device="cpu", reference=r) for r in (opened, path))
    assert expected.kl is not None
    assert np.array_equal(got.kl, expected.kl)
    other = Reference.__new__(Reference)
    other.path, other.digest = path, "of another set"
    again = score(pico(seed=1), eval_set, batch=2, device="cpu", reference=other)
    assert np.array_equal(again.kl, expected.kl), (
        "opened for another set: the file is opened again, and refused if wrong"
    )


def test_references_of_one_model_share_its_head(eval_set: EvalSet, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "other", "capped")]
    for path, model in zip(paths, (pico(), pico(), pico(seed=1), pico("gemma2")), strict=True):
        score(model, eval_set, batch=3, device="cpu", write_reference=path)
    opened: list[Reference] = []
    for path in paths:
        opened.append(Reference(path, digest=eval_set.digest, device=torch.device("cpu"), beside=opened))
    assert opened[1].head is opened[0].head
    assert len({id(one.head) for one in opened}) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_against_itself_through_the_disk_is_zero(dtype: torch.dtype, eval_set: EvalSet, tmp_path: Path) -> None:
    model = pico("gemma2").to(dtype)
    path = tmp_path / "reference.safetensors"
    score(model, eval_set, batch=2, device="cpu", write_reference=path)
    got = score(model, eval_set, batch=2, device="cpu", reference=path)
    assert got.kl is not None
    assert got.agree is not None
    assert np.abs(got.kl).max() < 1e-9
    assert got.agree.all()
    assert list(tmp_path.iterdir()) == [path]


def test_reference_file_holds_the_rows_of_the_scored_positions(eval_set: EvalSet, tmp_path: Path) -> None:
    model = pico().to(torch.bfloat16)
    path = tmp_path / "reference.safetensors"
    score(model, eval_set, batch=3, device="cpu", write_reference=path)
    opened = Reference(path, digest=eval_set.digest, device=torch.device("cpu"))
    with torch.no_grad():
        rows = [model.model(w.ids[None]).last_hidden_state[0, :-1][w.scored[1:]] for w in eval_set.windows]
    got = opened.hidden(0, eval_set.n_scored)
    assert got.dtype == torch.bfloat16
    assert torch.allclose(got.float(), torch.cat(rows).float(), rtol=0.02, atol=0.02)
    assert torch.equal(opened.head.weight, model.lm_head.weight)


def test_a_flipped_bit_of_a_reference_is_seen(eval_set: EvalSet, tmp_path: Path) -> None:
    """The number that it changed would have gone into the report: the scores still have their checksum."""
    path = tmp_path / "reference.safetensors"
    score(pico("gemma2"), eval_set, batch=2, device="cpu", write_reference=path)
    assert prove(path, digest=eval_set.digest) == eval_set.n_scored
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    random = Random(0)
    for at in [*random.choices(range(start), k=150), *random.choices(range(start, len(whole)), k=50)]:
        changed = bytearray(whole)
        changed[at] ^= 1 << random.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(EvaluationError):
            prove(path, digest=eval_set.digest)
    path.write_bytes(whole[:-2])
    with pytest.raises(EvaluationError):
        prove(path, digest=eval_set.digest)


def test_reference_of_another_set_or_vocabulary_is_refused(eval_set: EvalSet, tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    score(pico(), eval_set, batch=2, device="cpu", write_reference=path)
    other = make_set("other", [Document((5, 6, 7))], bos_id=1)
    with pytest.raises(EvaluationError, match="other tokens are never compared"):
        score(pico(), other, batch=1, device="cpu", reference=path)
    wide = LlamaForCausalLM(LlamaConfig(**PICO | {"vocab_size": VOCAB + 3}))
    with pytest.raises(EvaluationError, match="97 vocabulary entries"):
        score(wide, eval_set, batch=1, device="cpu", reference=path)
    with pytest.raises(EvaluationError, match="score the reference first"):
        score(pico(), eval_set, batch=1, device="cpu", reference=tmp_path / "none")


def test_nan_fails_and_leaves_no_reference(eval_set: EvalSet, tmp_path: Path) -> None:
    model = pico()
    bad = int(eval_set.windows[4].ids[3])
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = math.nan
    fine = [w for w in eval_set.windows if bad not in w.ids.tolist()]
    assert fine, "the proof must not see it first"
    if bad in eval_set.windows[0].ids.tolist():
        pytest.fail("choose another token")
    with pytest.raises(EvaluationError, match=r"NaN/inf in logits: set 'pico', window \d+"):
        score(model, eval_set, batch=1, device="cpu", write_reference=tmp_path / "r.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_nan_in_the_first_window_names_the_model_type(eval_set: EvalSet) -> None:
    model = pico()
    with torch.no_grad():
        model.lm_head.weight[3] = math.inf
    with pytest.raises(EvaluationError, match="llama: NaN/inf"):
        score(model, eval_set, batch=1, device="cpu")


def test_unknown_post_processing_is_refused(eval_set: EvalSet) -> None:
    model = pico("gemma2")
    forward = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    model.forward = scaled
    with pytest.raises(EvaluationError, match=r"gemma2: .*not supported"):
        score(model, eval_set, batch=1, device="cpu")


@pytest.mark.parametrize("bias", [False, True])
def test_any_head_is_read_through_the_identity(bias: bool) -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(300, VOCAB, bias=bias, dtype=torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    torch.manual_seed(0)
    module = Wrapped()
    with torch.inference_mode():
        head = extract(module, torch.zeros(1, 300, dtype=torch.bfloat16))
    if not bias:
        assert torch.equal(head.weight, module.inner.weight)
        assert head.bias is None
        return
    assert head.bias is not None
    assert torch.equal(head.bias, module.inner.bias)
    # W + b was rounded to bf16 once: half a step of the sum, at most 2^-9 of it.
    bound = (module.inner.weight.abs() + module.inner.bias[:, None].abs()).float() * 2**-8
    assert ((head.weight - module.inner.weight.float()).abs() <= bound).all()


@pytest.mark.parametrize("where", ["target_modules", "modules_to_save"])
def test_peft_heads_are_scored_like_any_other(where: str, eval_set: EvalSet, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    options: dict[str, Any] = {"target_modules": ["q_proj"]}
    options[where] = ["q_proj", "lm_head"] if where == "target_modules" else ["lm_head"]
    model = get_peft_model(pico(), LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, **options))
    if where == "modules_to_save":
        with torch.no_grad():
            model.get_output_embeddings().modules_to_save["default"].weight.mul_(1.7)
    expected = slow(model.eval(), eval_set)
    got = score(model, eval_set, batch=2, device="cpu", write_reference=tmp_path / "r.safetensors")
    nll = -expected.gather(1, targets(eval_set)[:, None])[:, 0].numpy()
    np.testing.assert_allclose(got.nll, nll, rtol=1e-4, atol=1e-5)
    again = score(model, eval_set, batch=2, device="cpu", reference=tmp_path / "r.safetensors")
    assert again.kl is not None
    assert np.abs(again.kl).max() < 1e-9


def test_the_model_never_makes_all_logits(eval_set: EvalSet) -> None:
    model = pico()
    tap = HeadTap(model)
    with torch.inference_mode():
        prove_head(model, tap, eval_set.windows[0].ids[None])
        hidden, logits = tap.run(model, eval_set.windows[0].ids[None])
    assert (hidden.shape[1], logits.shape[1]) == (16, 1)
    assert model(eval_set.windows[0].ids[None]).logits.shape[1] == 16


def test_progress_ends_at_the_number_of_windows(eval_set: EvalSet) -> None:
    seen: list[tuple[int, int]] = []
    score(pico(), eval_set, batch=2, device="cpu", on_progress=lambda done, of: seen.append((done, of)))
    assert seen[-1] == (len(eval_set.windows), len(eval_set.windows))
    assert seen == sorted(seen)


def test_scores_survive_the_disk(eval_set: EvalSet, tmp_path: Path) -> None:
    got = score(pico(), eval_set, batch=2, device="cpu")
    got.kl, got.agree = np.arange(len(got.nll)) / 7, got.top1.copy()
    got.save(tmp_path / "deep" / "s.safetensors")
    back = TokenScores.load(tmp_path / "deep" / "s.safetensors")
    for name in ("nll", "document", "top1", "kl", "agree"):
        assert np.array_equal(getattr(back, name), getattr(got, name))
        assert getattr(back, name).dtype == getattr(got, name).dtype
    assert (back.digest, back.seconds, back.nonfinite) == (got.digest, got.seconds, 0)
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(EvaluationError, match="score the variant again"):
        TokenScores.load(tmp_path / "bad")


def test_kl_survives_underflow_and_keeps_tiny_values() -> None:
    from requant_eval.scoring.kl import kl_divergence

    r = torch.tensor([[0.0, -300.0, -5.0], [0.0, 0.0, 0.0]]).log_softmax(-1)
    v = torch.tensor([[0.0, -2.0, -300.0], [0.0, 1e-4, -1e-4]]).log_softmax(-1)
    expected = (r.double().exp() * (r.double() - v.double())).sum(-1)
    assert kl_divergence(r, v)[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    # KL of a small shift s of uniform logits is var(s) / 2 to second order.
    assert kl_divergence(r, v)[1].item() == pytest.approx((2e-8 / 3) / 2, rel=1e-2)


def test_a_documents_sums_do_not_depend_on_the_others_or_on_the_batch(tmp_path: Path) -> None:
    """Another order and another batch: the same numbers for each document, KL included."""
    rng = np.random.default_rng(3)
    documents = [Document(tuple(rng.integers(3, VOCAB, size=n).tolist())) for n in (30, 16, 9, 16, 21)]
    order = [3, 0, 4, 1, 2]
    found = []
    for name, chosen, batch in (("one", range(5), 1), ("two", order, 4), ("three", order, 3)):
        made = make_set(name, [documents[i] for i in chosen], window=16, bos_id=1, tail=3)
        path = tmp_path / name
        score(pico(seed=0), made, batch=batch, device="cpu", write_reference=path)
        got = score(pico(seed=1), made, batch=batch, device="cpu", reference=path)
        assert got.kl is not None
        at = {i: got.document == k for k, i in enumerate(chosen)}
        found.append([(got.nll[at[i]].sum(), got.kl[at[i]].sum()) for i in range(5)])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-5)


def test_the_same_model_scored_twice_differs_by_exactly_zero(eval_set: EvalSet, tmp_path: Path) -> None:
    from requant_eval.metrics import statistics as st

    path = tmp_path / "reference.safetensors"
    one = score(pico(), eval_set, batch=2, device="cpu", write_reference=path)
    two = score(pico(), eval_set, batch=2, device="cpu", reference=path)
    pair = st.paired(st.sums(two.nll, two.document), st.sums(one.nll, one.document))
    assert pair.delta == st.Estimate(0.0, 0.0, 0.0, 0.0)
    assert two.agree is not None
    assert two.agree.all()
    assert np.array_equal(one.top1, two.top1), "no flip"


def test_excluded_tokens_do_not_make_kl_nan() -> None:
    """Logits of -inf, in both models, in one, in none: against the sum in fp64 over the reference's support."""
    from requant_eval.scoring.kl import kl_divergence

    generator = torch.Generator().manual_seed(3)
    r, p = (torch.randn(8, 50, generator=generator) * 4 for _ in range(2))
    r[:, :5] = p[:, :5] = -math.inf
    r[4:, 5:20] = -math.inf  # only the reference excludes these
    p[7, 30] = -math.inf  # only the variant excludes this
    p[6, 40] = 200.0  # far from the reference
    log_r, log_p = r.double().log_softmax(-1), p.double().log_softmax(-1)
    inside = torch.isfinite(log_r)
    terms = torch.where(inside, log_r.exp() * (log_r - log_p), torch.zeros_like(log_r))
    found = kl_divergence(r.log_softmax(-1), p.log_softmax(-1))
    assert found[:7].tolist() == pytest.approx(terms[:7].sum(-1).tolist(), rel=1e-5)
    assert found[7].item() == math.inf


def test_a_token_that_one_model_excludes_and_the_other_as_good_as() -> None:
    """Under R its probability underflows, so it adds nothing: 0 times infinity made the KL no number."""
    from requant_eval.scoring.kl import kl_divergence, near_kl_divergence

    r, p = (torch.randn(2, 50, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    without = kl_divergence(r[:, 1:].log_softmax(-1), p[:, 1:].log_softmax(-1))
    r[:, 0], p[:, 0] = -150.0, -math.inf
    log_r, log_p = r.log_softmax(-1), p.log_softmax(-1)
    assert near_kl_divergence(log_r, log_p)[1].tolist() == [math.inf, math.inf], "asks for the other formula"
    assert kl_divergence(log_r, log_p).tolist() == pytest.approx(without.tolist(), rel=1e-5)


@pytest.mark.slow
def test_infinite_kl_is_refused_by_name(eval_set: EvalSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models exclude a token: scored. One alone does: an error that says so, no NaN in a report."""

    def excluding(*tokens: int) -> None:
        bias = torch.zeros(VOCAB)
        bias[list(tokens)] = -math.inf  # after the proof of the head, which refuses such logits where it sees them
        monkeypatch.setattr(score_loop, "prove_head", lambda *of: replace(prove_head(*of), bias=bias))

    reference, other = tmp_path / "reference", pico(seed=1)
    excluding(2)
    score(pico(), eval_set, batch=2, device="cpu", write_reference=reference)
    both = score(other, eval_set, batch=2, device="cpu", reference=reference)
    assert both.kl is not None
    assert np.isfinite(both.kl).all()
    assert both.nonfinite == 0
    excluding(0, 2)
    with pytest.raises(EvaluationError, match=r"KL from the reference is not finite: set 'pico', window \d+"):
        score(other, eval_set, batch=2, device="cpu", reference=reference)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_16_bit_factors_are_summed_in_fp32(dtype: torch.dtype) -> None:
    """As near to fp64 as fp32 products of the same factors, and far nearer than 16-bit logits."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (torch.randn(n, 4096, generator=generator, device="cuda").to(dtype) for n in (300, 33000))
    head = Head(weight * 0.03)
    exact = hidden.double() @ head.weight.double().T

    def error(logits: torch.Tensor) -> float:
        return float((logits.double() - exact).abs().max())

    mine = head.logits(hidden)
    assert mine.dtype == torch.float32
    assert error(mine) < 20 * error(head.logits(hidden.float()))
    assert 20 * error(mine) < error(hidden @ head.weight.T)
