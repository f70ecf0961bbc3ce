# pytest tests/test_families.py
"""Tiny random models of many families: each gives its own library's numbers, or is refused in one
sentence, with code 2 and nothing written.

    python tests/test_families.py    # writes plumbing/FAMILIES.md, which the exhaustive test reads
"""

import contextlib
import io
import re
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT, laid_out, random_beaver, write_beaver, write_policy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

import repo
from plumbing import models
from plumbing.adapters import make_trainable, merged
from plumbing.models import load_policy, save_policy
from plumbing.scorers import Scorer, ScoreModel, save_score_model
from tiny_configs import world

PAGE = ROOT / "plumbing" / "FAMILIES.md"

SIZES = (  # what families call them -> how large
    (("hidden_size", "d_model", "n_embd", "embed_dim", "emb_dim", "word_embed_proj_dim",
      "embedding_size", "dim"), 32),
    (("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim",
      "ffn_hidden_size", "hidden_dim"), 48),
    (("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    (("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
      "num_decoder_layers"), 2),
    (("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
      "encoder_attention_heads"), 4),
    (("num_key_value_heads", "num_experts_per_tok", "moe_k", "top_k_experts"), 2),
    (("head_dim", "d_kv", "rotary_dim"), 8),
    (("num_local_experts", "num_experts", "n_routed_experts"), 4),
)
LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
CHANGES = {  # where these sizes alone make no model
    "opt-350m": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "qwen3_next": LINEAR_AND_FULL,
    "qwen3_5_text": LINEAR_AND_FULL,
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "recurrent_gemma": {"num_hidden_layers": 3},
}
POLICIES = (
    "afmoe apertus arcee bamba bart bert biogpt bitnet blenderbot bloom codegen cohere cohere2 "
    "cpmant ctrl diffllama doge electra ernie4_5 exaone4 falcon falcon_mamba flex_olmo gemma "
    "gemma2 gemma3_text gemma4_text glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj "
    "granite granitemoe helium hunyuan_v1_dense internlm3 jamba jetmoe lfm2 llama llama4_text "
    "mamba mamba2 marian minimax minimax_m2 mistral mixtral modernbert-decoder mpt nemotron olmo "
    "olmo2 olmo3 olmoe openai-gpt opt opt-350m pegasus persimmon phi phi3 phimoe qwen2 qwen2_moe "
    "qwen3 qwen3_5_text qwen3_moe qwen3_next recurrent_gemma roberta roc_bert rwkv seed_oss "
    "smollm3 stablelm starcoder2 trocr vaultgemma whisper xglm xlnet"
).split()
CLASSIFIERS = (
    "albert bart bert bloom convbert ctrl deberta deberta-v2 distilbert electra falcon fnet "
    "funnel gemma2 gpt2 gpt_neox gpt_oss jamba llama longformer mistral mixtral modernbert mpt "
    "mt5 opt opt-350m phi3 qwen2 qwen3 roberta t5 xlm-roberta xlnet"
).split()
BEAVERS = ("bloom gemma2 gpt_oss gptj granitemoe jamba llama mamba minimax mistral mixtral mpt "
           "opt-350m qwen2_moe qwen3 rwkv").split()  # as the backbone of the Beaver layout

FEW = ("--device", "cpu", "--steps", "1", "--batch_size", "4", "--micro_batch_size", "4",
       "--eval_samples", "1", "--max_eval_prompts", "2", "--max_response_length", "4",
       "--max_prompt_length", "40", "--max_length", "60", "--sample_every", "0",
       "--actor_lr", "1e-30")
PROMPTS, RESPONSES = [[0, 4, 5, 6], [0, 9, 30, 31, 32, 33, 7]], [[7, 8, 1], [5, 34, 35]]
SHORT = {  # what a sentence says -> how the page puts it
    "sees? the tokens after": "later tokens are seen",
    "respect": "masks or positions are not respected",
    "cannot score|cannot read|no model of a known kind": "cannot read padded rows of ids",
}


# ---- Models


def family_config(name: str, vocab_size: int, **more):
    """A tiny config of a family."""
    known = AutoConfig.for_model(name.removesuffix("-350m")).to_dict()
    sizes = {key: size for keys, size in SIZES for key in keys if key in known}
    ids = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return AutoConfig.for_model(
        name.removesuffix("-350m"), **sizes | ids | CHANGES.get(name, {}) | more)


class Workshop:
    """A folder with a policy, score models and prompts, and the models that are tried."""

    def __init__(self, folder: Path):
        self.folder, self.tokenizer = folder, world.build_tokenizer()
        write_policy(folder / "policy", self.tokenizer)
        for role in ("reward", "cost"):
            write_beaver(folder / role, self.tokenizer, random_beaver(self.tokenizer)[1])
        prompts = [f"How do I paint {number} boats?" for number in range(24)]
        (folder / "prompts.txt").write_text("\n".join(prompts))

    def write(self, name: str, auto_class, **more) -> Path:
        torch.manual_seed(0)
        # A few rows more than tokens: some families' tokenizers bring tokens of their own.
        config = family_config(name, len(self.tokenizer) + 8, **more)
        return self.save(auto_class.from_config(config), name)

    def save(self, model, name: str) -> Path:
        path = self.folder / name
        model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        return path

    def run(self, *flags) -> tuple[int, Path, str]:
        """(exit code, output folder, what was printed)."""
        out = Path(tempfile.mkdtemp(dir=self.folder)) / "out"
        settings = {"--model": self.folder / "policy", "--reward_model": self.folder / "reward",
                    "--cost_model": self.folder / "cost",
                    "--dataset": self.folder / "prompts.txt", "--output_dir": out}
        settings |= dict(zip(flags[::2], flags[1::2]))
        words = [str(word) for pair in settings.items() for word in pair]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = repo.main([*FEW, *words])
        return code, out, printed.getvalue()

    def config(self, **changes):
        return repo.Config(device="cpu", dtype="float32", micro_batch_size=4, temperature=0.7,
                           max_response_length=3, **changes)


def refused(code: int, out: Path, printed: str) -> str:
    """The page's words for a refusal. It must be one sentence, with nothing written."""
    assert code == 2 and not out.exists()
    [sentence] = [line for line in printed.splitlines() if line.startswith("error: ")]
    return next(short for pattern, short in SHORT.items() if re.search(pattern, sentence))


# ---- Verdicts


def policy_verdict(name: str, shop: Workshop) -> str:
    """What becomes of a family as a policy."""
    path = shop.write(name, AutoModelForCausalLM)
    how = "the same numbers"
    code, out, printed = shop.run("--model", path, "--gradient_checkpointing", "true")
    if "--gradient_checkpointing true: this model cannot" in printed:
        assert code == 2 and not out.exists()
        how = "the same numbers, without gradient checkpointing"
        code, out, printed = shop.run("--model", path)
    if code:
        return refused(code, out, printed)
    assert "warning" not in printed
    own = AutoModelForCausalLM.from_pretrained(path).eval()
    check_log_probs(own, path, shop)
    ids = torch.tensor([PROMPTS[1] + RESPONSES[1]])
    saved = AutoModelForCausalLM.from_pretrained(out / "final" / "actor").eval()
    assert_same(saved(ids).logits, own(ids).logits)  # the learning rate was nearly 0
    check_adapters(ids, path, shop)
    return how


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).abs().max() <= 1e-3 * (other - other.mean()).abs().max()


def check_log_probs(own, path: Path, shop: Workshop) -> None:
    """Of padded rows, and of the distribution that was sampled from, against own."""
    policy, tokenizer = load_policy(shop.config(policy=str(path)))
    batch = laid_out(PROMPTS, RESPONSES, tokenizer.pad_token_id)
    logged = repo.response_log_probs(policy, batch, 0.7)
    is_token = torch.ones(len(own.get_output_embeddings().weight), dtype=torch.bool)
    is_token[policy.tokenless] = False

    def alone(row: list[int]) -> torch.Tensor:
        logits = own(torch.tensor([row])).logits[0].float().masked_fill(~is_token, -torch.inf)
        return (logits / 0.7).log_softmax(-1)                                        # [T, V]

    expected = [alone(prompt + response)[len(prompt) - 1:-1]
                for prompt, response in zip(PROMPTS, RESPONSES)]
    chosen = [rows[range(len(response)), response] for rows, response in zip(expected, RESPONSES)]
    assert_same(logged, torch.cat(chosen))

    seen = []

    class Watched(repo.Draw):
        def __call__(self, input_ids, scores):
            seen.append((scores / 0.7).log_softmax(-1))
            return super().__call__(input_ids, scores)

    uniform = torch.rand(2, 3, dtype=torch.float64)
    responses = models.generate(policy, tokenizer, PROMPTS, Watched(uniform, 7, 0.7), 3,
                                shop.config(policy=str(path)))
    for i, (prompt, response) in enumerate(zip(PROMPTS, responses)):
        expected = alone(prompt + response)[len(prompt) - 1:-1]
        for t in range(len(repo.up_to_stop(response, policy.stop_token_ids))):
            assert_same(seen[t][i][is_token], expected[t][is_token])


def check_adapters(ids, path: Path, shop: Workshop) -> None:
    """A policy with adapters that say something, and what is saved of it."""
    config = shop.config(policy=str(path), lora_rank=2)
    policy, _ = load_policy(config)
    if not any(type(layer) is torch.nn.Linear for layer in policy.base_model.modules()):
        return
    make_trainable(policy, config)
    policy(ids).logits.square().sum().backward()
    for weight_name, weight in policy.named_parameters():
        # Some layers of Mamba's kind are not called: their weights are taken out.
        if weight_name.endswith("lora_b") and weight.grad is not None:
            torch.nn.init.normal_(weight, std=0.01)
    save_policy(path / "merged", policy, merged(policy.state_dict()), config)
    saved = AutoModelForCausalLM.from_pretrained(path / "merged").eval()
    assert_same(saved(ids).logits, policy(ids).logits)


def classifier_verdict(name: str, shop: Workshop) -> str:
    """What becomes of a family as a classifier of one label: a reward model."""
    path = shop.write(name, AutoModelForSequenceClassification, num_labels=1)
    own = AutoModelForSequenceClassification.from_pretrained(path).eval()
    return scorer_verdict(path, shop, lambda row: own(row).logits[0, 0])


def beaver_verdict(name: str, shop: Workshop) -> str:
    """What becomes of a family as the backbone of a reward model in the Beaver layout."""
    torch.manual_seed(0)
    model = ScoreModel(family_config(name, len(shop.tokenizer) + 8)).eval()
    path = shop.folder / f"beaver-{name}"
    save_score_model(path, model, model.state_dict(), torch.float32)
    shop.tokenizer.save_pretrained(path)
    return scorer_verdict(path, shop, lambda row: model.score_head(
        model.model(row).last_hidden_state[0, -1]).squeeze())


def scorer_verdict(path: Path, shop: Workshop, own_score) -> str:
    code, out, printed = shop.run("--reward_model", path)
    if code:
        return refused(code, out, printed)
    scorer = Scorer("reward", shop.tokenizer,
                    shop.config(policy=str(shop.folder / "policy"), reward_model=str(path)))
    rows = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES)] + [[0, 3]]
    scores = torch.tensor(scorer.score_rows(rows, ["p"] * 3))
    expected = torch.stack([own_score(torch.tensor([row])) for row in rows])
    assert (scores - expected).norm() <= 1e-3 * expected.norm()
    return "the same numbers"


# ---- Tests

KINDS = {
    "policy": (policy_verdict, POLICIES),
    "classifier": (classifier_verdict, CLASSIFIERS),
    "score model in the Beaver layout": (beaver_verdict, BEAVERS),
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("families"))


@torch.no_grad()
def verdict_on(kind: str, name: str, shop: Workshop) -> str:
    verdict, _ = KINDS[kind]
    with torch.enable_grad(), warnings.catch_warnings(action="ignore"):
        return verdict(name, shop)


@pytest.mark.parametrize("kind, name, verdict", [
    ("policy", "mixtral", "the same numbers"),
    ("policy", "whisper", "masks or positions are not respected"),  # its cached steps
    ("classifier", "llama", "the same numbers"),
    ("classifier", "xlnet", "masks or positions are not respected"),
    ("classifier", "t5", "cannot read padded rows of ids"),
    ("score model in the Beaver layout", "rwkv", "masks or positions are not respected"),
    ("score model in the Beaver layout", "opt-350m", "the same numbers"),
])
def test_a_family(shop, kind, name, verdict):
    assert verdict_on(kind, name, shop) == verdict


BEYOND = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32,
            "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


@pytest.mark.parametrize("name, dtype, changes, says", [
    ("llama", "float32", {"max_position_embeddings": 32, "rope_parameters": BEYOND,
                          "initializer_range": 0.3}, "beside one"),
    ("phi3", "bfloat16", {"max_position_embeddings": 128, "rope_parameters": LONGROPE,
                          "original_max_position_embeddings": 32}, "beside one"),
    ("recurrent_gemma", "bfloat16", {}, "padded"),
    ("plbart", "bfloat16", {}, "padded"),
])
def test_what_padding_changes_is_refused_in_either_dtype(shop, name, dtype, changes, says):
    path = shop.write(name, AutoModelForCausalLM, **changes)
    code, out, printed = shop.run("--model", path, "--dtype", dtype)
    assert code == 2 and not out.exists()
    assert f"error: --policy {path}: a row {says}" in printed.replace("--model", "--policy")


def page_of(verdicts: dict) -> str:
    """{(kind, family): verdict} as tables."""
    lines = ["# Model families", "",
             "`python tests/test_families.py` tried tiny random models and wrote this page.",
             "\"The same numbers\": padded log-probs, scores, the sampled distribution, merged",
             "adapters and the saved policy are those that transformers gives. Every other family",
             "gets a trial when a run loads it."]
    for kind in KINDS:
        lines += ["", f"| as a {kind} | |", "|---|---|"]
        for verdict in sorted({found for (of, _), found in verdicts.items() if of == kind}):
            names = [name for (of, name), found in verdicts.items()
                     if (of, found) == (kind, verdict)]
            refusal = "" if verdict.startswith("the same") else "refused: "
            lines.append(f"| {refusal}{verdict} | {', '.join(names)} |")
    return "\n".join(lines) + "\n"


def all_verdicts(shop: Workshop) -> dict:
    verdicts = {}
    for kind, (_, names) in KINDS.items():
        for name in names:
            try:
                verdicts[kind, name] = verdict_on(kind, name, shop)
            except Exception as error:
                raise AssertionError(f"{name} as a {kind}") from error
    return verdicts


@pytest.mark.exhaustive
def test_the_page_says_what_becomes_of_each_family(shop):
    assert page_of(all_verdicts(shop)) == PAGE.read_text()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(page_of(all_verdicts(Workshop(Path(folder)))))
