# pytest tests/test_gguf.py
"""Policies in .gguf files, here written by hand, are read like their originals."""
import json

import pytest
import torch
from conftest import tiny_config, write_python
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from companions import supervised
from companions.shared import command
from plumbing import models

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

START, END, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIAL = [START, END, UNKNOWN]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "hell", "hello"]
MERGES = ["h e", "l l", "he ll", "hell o"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def interleaved(weight, heads: int):
    """The format turns neighbouring dimensions of a head, the library those half a head apart."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def write_gguf(file, model, in_blocks=()) -> dict:
    """Writes a Llama model with the tokenizer above; tensors named in_blocks are quantised to 8
    bits, and returned as what they have become."""
    config, state, became = model.config, model.state_dict(), {}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control] * len(SPECIAL) + [normal] * (len(TOKENS) - len(SPECIAL)))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_chat_template(TEMPLATE)

    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    if not config.tie_word_embeddings:
        names["output"] = "lm_head"
    for number in range(config.num_hidden_layers):
        names |= {f"blk.{number}.{theirs}": f"model.layers.{number}.{ours}"
                  for theirs, ours in LAYER.items()}
    for theirs, ours in names.items():
        weight = state[f"{ours}.weight"].numpy()
        if theirs.endswith(("attn_q", "attn_k")):
            weight = interleaved(weight, config.num_attention_heads)
        if ours in in_blocks:
            kind = gguf.GGMLQuantizationType.Q8_0
            blocks = gguf.quantize(weight, kind)
            became[f"{ours}.weight"] = torch.from_numpy(gguf.dequantize(blocks, kind))
            writer.add_tensor(f"{theirs}.weight", blocks, raw_dtype=kind)
        else:
            writer.add_tensor(f"{theirs}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return became


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def original(request):
    torch.manual_seed(0)
    size = {"vocab_size": len(TOKENS), "tie_word_embeddings": request.param, "pad_token_id": 1}
    return LlamaForCausalLM(tiny_config(TOKENS, **size)).eval()


@pytest.fixture(scope="module")
def file(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    became = write_gguf(path, original, in_blocks=["model.layers.0.mlp.up_proj"])
    assert became.keys() <= original.state_dict().keys()
    original.load_state_dict(became, strict=False)
    return path


def prompts(folder):
    rows = [json.dumps({"prompt": f"hello {i}", "response": "hell"}) + "\n" for i in range(32)]
    (folder / "prompts.jsonl").write_text("".join(rows))
    return folder / "prompts.jsonl"


def run_on(file, tmp_path, *more):
    scores = write_python(tmp_path / "scores.py", """
        def lengths(prompts, responses):
            return [float(len(response)) for response in responses]
    """)
    return ["--policy", file, "--reward_model", f"{scores}:lengths", "--cost_model",
            f"{scores}:lengths", "--dataset", prompts(tmp_path), "--device", "cpu",
            "--steps", 1, "--batch_size", 2, "--max_response_length", 4, "--max_eval_prompts", 2,
            "--eval_samples", 1, *more]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_reads_it_and_saves_a_plain_model(run, original, file, tmp_path, rank):
    """Where nothing is learned, what is saved is the original, and its tokenizer writes chats."""
    flags = run_on(file, tmp_path, "--actor_lr", 1e-30, "--lora_rank", rank)
    code, out, printed = run(*flags)
    assert code == 0, printed
    final = out / "final" / "actor"
    saved = AutoModelForCausalLM.from_pretrained(final)
    assert "quantization_config" not in json.loads((final / "config.json").read_text())
    weights = saved.state_dict()
    for name, weight in original.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-6, atol=1e-8)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(saved(ids).logits, original(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(final)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False,
                                         add_generation_prompt=True)
    assert chat == f"{START}user\nhello{END}\n{START}assistant\n"
    assert tokenizer(f"hello{END}").input_ids == [TOKENS.index("hello"), TOKENS.index(END)]


def test_a_plan_knows_its_sizes(run, original, file, tmp_path):
    code, _, printed = run(*run_on(file, tmp_path, "--dry_run"))
    assert code == 0, printed
    assert f"{sum(weight.numel() for weight in original.parameters()):,}" in printed


def test_supervised_learning_begins_with_one(original, file, tmp_path):
    flags = ["--model", file, "--data", prompts(tmp_path), "--out", tmp_path / "new",
             "--batch_size", 4, "--steps", 2, "--device", "cpu"]
    code = command.main(supervised.SupervisedSettings, supervised.run, [*map(str, flags)])
    assert code == 0
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "new").state_dict()
    first = "model.layers.0.self_attn.q_proj.weight"
    assert 0 < (trained[first] - original.state_dict()[first]).abs().max() < 1e-3


def test_without_the_packages_it_says_so(run, file, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == "gguf" else name)
    code, _, printed = run(*run_on(file, tmp_path))
    assert code == 2 and "pip install gguf accelerate" in printed


def test_a_file_that_is_none(run, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but no more")
    code, _, printed = run(*run_on(tmp_path / "broken.gguf", tmp_path))
    assert code == 2 and "broken.gguf: cannot be loaded" in printed


def test_a_score_model_is_none(run, file, tmp_path):
    code, _, printed = run(*run_on(file, tmp_path), "--cost_model", file)
    assert code == 2 and "score" in printed.split("error: ")[1]
