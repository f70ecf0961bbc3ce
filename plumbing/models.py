"""The models of a run: the policy, score models and critics, loaded, checked, made trainable.

Weights are data: what a checkpoint brings is safetensors or a pickle that may hold tensors only,
and Python of its own runs only with --trust_remote_code.
"""
import copy
import warnings
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, SupportsFloat

import datasets
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer

from plumbing.checks import Head, check_loaded, check_policy, check_scorer, find_head
from plumbing.errors import blame, failing_together, require, say
from plumbing.functions import check_function, is_function, load_function
from plumbing.hub import check_hub
from plumbing.pictures import (
    check_count,
    check_sight,
    in_call,
    language_part,
    load_sight,
    model_class,
    pixels_for,
    save_processor,
    sees,
    set_chat_template,
)
from plumbing.prompts import BEAVER_TEMPLATE, READERS, encode_prompts, pad_rows, render_prompt
from plumbing.ranks import RANKS, all_reduce, call_as_forward, rank_chunks, rank_rows, sharded
from plumbing.settings import PRESETS

MIN_SHARED = 16  # tokens: a second call of a body takes as long as a few

# ---- Loading


def load_pretrained(from_pretrained, source: str, flag: str, config, **options):
    """from_pretrained(source), which may be a .gguf file. Raises UserError for whatever is wrong
    with a folder, a file or a hub name."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        require(find_spec("gguf") and find_spec("accelerate"),
                f"{flag} {source}: reading .gguf files takes two more packages "
                "(pip install gguf accelerate)")
        source_or_path, options["gguf_file"] = str(path.parent), path.name
        problem = "cannot be loaded"
    elif path.exists():
        source_or_path = str(path)
        is_tokenizer = from_pretrained == AutoTokenizer.from_pretrained
        problem = "its tokenizer cannot be loaded" if is_tokenizer else "cannot be loaded"
    else:
        check_hub()
        source_or_path = source
        problem = (f"is none of {', '.join(PRESETS)}, no folder here, "
                   "and not to be had from the hub")
    with blame(f"{flag} {source}: {problem}"):
        return from_pretrained(source_or_path, trust_remote_code=config.trust_remote_code,
                               **options)


def shape_of(kind, path, dtype, trust_remote_code, **where) -> PreTrainedModel:
    """In the place of kind.from_pretrained: the model that the config alone describes, on the
    meta device, where tensors have no content."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **where)
    with torch.device("meta"):
        return kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def check_sources(config) -> None:
    """A first look at everything that a run will load.

    Raises one UserError that names all models and data sets that are neither here nor to be had
    from the hub, or one for the first model, judge or score function that is not one.
    """
    missing = [f"--{flag} {getattr(config, flag).partition(':')[0]}"
               for flag in ("policy", "reward_model", "cost_model", "dataset")
               if is_on_hub(getattr(config, flag)) and not is_reachable(flag, config)]
    require(not missing,
            f"cannot reach {', '.join(missing)}: no such folder here, and on the hub no such name, "
            "no network, or no access (hf auth login); fetch them where there is a network "
            "(hf download NAME; with --repo-type dataset for data) and point these flags to the "
            "folders or files")

    models = {
        config.policy_flag(): config.policy,
        "--reward_model": config.reward_model,
        "--cost_model": config.cost_model,
    }
    for flag, source in models.items():
        if is_function(source):
            check_function(source, flag)
        else:
            model_config = load_pretrained(AutoConfig.from_pretrained, source, flag, config)
            check_sight(model_config, f"{flag} {source}")
            load_pretrained(AutoTokenizer.from_pretrained, source, flag, config)
    if config.judge:
        check_function(config.judge, "--judge")


def is_on_hub(source: str) -> bool:
    """Whether a name can only mean owner/name on the hub."""
    name = source.partition(":")[0]
    is_file = ".py" in name or Path(name.removesuffix(".gz")).suffix in READERS
    is_path = name.startswith((".", "/", "~")) or Path(name).exists()
    return name.count("/") == 1 and not is_file and not is_path


def is_reachable(flag: str, config) -> bool:
    name = getattr(config, flag).partition(":")[0]
    check_hub()
    try:
        if flag == "dataset":
            datasets.load_dataset_builder(name)
        else:
            AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except Exception:  # whatever the library raises: it cannot be had
        return False
    return True


# ---- The policy and its tokenizer

def load_tokenizer(config):
    """The policy's tokenizer. Raises UserError if it cannot end a response."""
    source = f"{config.policy_flag()} {config.policy}"
    tokenizer = tokenizer_with_sight(config.policy, config.policy_flag(), config)
    require(tokenizer.eos_token, f"{source}: its tokenizer has no EOS token, so no response would "
                                 "end; set eos_token in tokenizer_config.json")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # masks tell where padding is

    unknown = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id}
    with blame(f"{source}: its tokenizer cannot be used"):
        [trial] = encode_prompts(["a"], tokenizer)
        require(not unknown & set(trial),
                f"{source}: its tokenizer cannot encode {render_prompt('a', tokenizer)!r}")
    return tokenizer


def tokenizer_with_sight(source: str, flag: str, config):
    """A model's tokenizer, and beside it how the model sees pictures, if it does."""
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, source, flag, config)
    tokenizer.sight = None
    if not source.endswith(".gguf"):  # a language model, whose config takes long to read
        model_config = load_pretrained(AutoConfig.from_pretrained, source, flag, config)
        tokenizer.sight = load_sight(model_config, tokenizer, source, flag)
        if tokenizer.sight:
            set_chat_template(tokenizer, tokenizer.sight.source)
    return tokenizer


def save_tokenizer(tokenizer, folder: Path) -> None:
    """And the image processor of a model that sees."""
    tokenizer.save_pretrained(folder)
    if getattr(tokenizer, "sight", None):
        save_processor(tokenizer.sight, folder)


def load_policy(config):
    """(policy, its tokenizer). Weights that are trained are fp32, others in the compute dtype.
    Raises UserError."""
    flag, tokenizer = config.policy_flag(), load_tokenizer(config)
    is_frozen = config.lora_rank or config.eval_only
    dtype = getattr(torch, config.dtype) if is_frozen else torch.float32
    kind = model_class(sees=bool(tokenizer.sight))
    if config.dry_run:
        policy = load_pretrained(partial(shape_of, kind), config.policy, flag, config, dtype=dtype)
    else:
        policy, report = load_pretrained(
            kind.from_pretrained, config.policy, flag, config, dtype=dtype,
            output_loading_info=True, ignore_mismatched_sizes=True)
        check_loaded(policy, report, f"{flag} {config.policy}",
                     "a policy must bring all its weights, in its config's shapes")
        if config.policy.endswith(".gguf"):  # its blocks are plain weights now, saved as such
            policy.hf_quantizer.remove_quantization_config(policy)
    policy.eval()
    check_policy(policy, tokenizer, f"{flag} {config.policy}")
    if tokenizer.sight:
        check_count(policy, tokenizer.sight, f"{flag} {config.policy}")

    policy.stop_token_ids = stop_token_ids(tokenizer, config)
    # Sampling must be from the plain softmax: a checkpoint's own top_p or temperature waits here
    # until the policy is saved.
    policy.published_generation_config = policy.generation_config
    policy.generation_config = GenerationConfig()
    policy.fused_head = Head() if config.dry_run else find_head(policy)
    if not policy.fused_head:
        say(f"{flag} {config.policy}: its logits are more than hidden states times a matrix, a "
            "scale or a soft cap (a bias, perhaps), so they are made whole: more memory")
    return policy, tokenizer


def stop_token_ids(tokenizer, config) -> set[int]:
    """EOS, and the end-of-turn tokens that chat models list in generation_config.json beside it.
    Raises UserError for a file that cannot be read; most models have none."""
    stops = {tokenizer.eos_token_id}
    file = Path(config.policy).expanduser() / "generation_config.json"
    unreadable = blame(f"{config.policy_flag()} {file}: cannot be read")
    with unreadable if file.is_file() else suppress(OSError):
        listed = GenerationConfig.from_pretrained(str(file.parent)).eos_token_id
        if not isinstance(listed, list):
            listed = [listed]
        stops |= {int(token) for token in listed if token is not None}
    return stops


# ---- Score models

def model_inputs(input_ids: Tensor, attention_mask: Tensor,
                 pixel_values: Tensor | None = None) -> dict:
    """Positions count from each row's first real token, so that left padding changes nothing."""
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)                       # [B, L]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "use_cache": False,
        **in_call(pixel_values, input_ids.device),
    }


def hidden_states(body, input_ids: Tensor, attention_mask: Tensor,
                  pixel_values: Tensor | None = None) -> Tensor:
    """A body's last hidden states, of no meaning at padding: [B, L], [B, L] -> [B, L, H]. What all
    rows begin with, a chat template's system prompt, is read once for all of them, unless each has
    a picture [3, S, S]."""
    if pixel_values is not None:
        inputs = model_inputs(input_ids, attention_mask, pixel_values)
        return body(**inputs).last_hidden_state                                      # [B, L, H]
    is_token = attention_mask.bool()                                                 # [B, L]
    lengths = is_token.sum(1)                                                        # [B]
    rows = input_ids[is_token].split(lengths.tolist())                               # B of [T_i]
    first, cache = shared_beginning(body, rows)                                      # [1, s, H]
    if cache is None:
        return body(**model_inputs(input_ids, attention_mask)).last_hidden_state     # [B, L, H]

    # Padded on the right, behind whatever attends.
    rest = pad_sequence([row[first.shape[1]:] for row in rows], batch_first=True)    # [B, M]
    states = body(rest, past_key_values=cache).last_hidden_state                     # [B, M, H]
    states = torch.cat([first.expand(len(rows), -1, -1), states], 1)                 # [B, s+M, H]
    is_state = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
    hidden = states.new_zeros(*input_ids.shape, states.shape[-1])                    # [B, L, H]
    hidden[is_token] = states[is_state]  # both go row by row
    return hidden


def shared_beginning(body, rows: tuple[Tensor]):
    """(hidden states [1, s, H] of the s tokens that B rows begin with, their cache for B rows); or
    (None, None) where that does not pay or cannot be: few tokens, one row, several processes (which
    must call a body equally often), layers that recompute, a cache of more than keys and values."""
    recomputes = any(layer.training and getattr(layer, "gradient_checkpointing", False)
                     for layer in body.modules())
    shared = 0 if recomputes or RANKS > 1 or len(rows) == 1 else count_shared(rows)
    if shared < MIN_SHARED:
        return None, None
    beginning = body(rows[0][None, :shared], use_cache=True)
    layers = getattr(beginning.get("past_key_values"), "layers", [None])
    if any(type(layer) is not DynamicLayer for layer in layers):
        return None, None
    beginning.past_key_values.batch_repeat_interleave(len(rows))
    return beginning.last_hidden_state, beginning.past_key_values


def count_shared(rows: tuple[Tensor]) -> int:
    """How many tokens all rows begin with, in whole eights lest chance add one in some batches; a
    token of each is left."""
    shortest = min(map(len, rows)) - 1
    beginnings = torch.stack([row[:shortest] for row in rows])                       # [B, shortest]
    are_equal = (beginnings == beginnings[0]).all(0)                                 # [shortest]
    return int(are_equal.cumprod(0).sum()) // 8 * 8


class ScoreModel(PreTrainedModel):
    """The Beaver layout: a causal backbone `model`, a linear `score_head`. The critics are
    ScoreModels too, read at every token."""

    config_class = PreTrainedConfig
    base_model_prefix = "model"
    # What kinds of attention there are, the backbone checks for itself.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _keep_in_fp32_modules_strict = ["score_head", "normalizer"]
    role = "reward"

    def __init__(self, config, backbone: nn.Module | None = None):
        super().__init__(config)
        self.model = AutoModel.from_config(config) if backbone is None else backbone
        self.score_head = nn.Linear(config.get_text_config().hidden_size, 1)
        if getattr(config, "do_normalize", False):
            self.normalizer = nn.ParameterDict({"mean": torch.zeros(1), "var": torch.ones(1)})
        self.post_init()

    @classmethod
    def from_pretrained(cls, path, role: Literal["reward", "cost"] = "reward",
                        dtype=torch.float32, dry_run=False, **options):
        """A Beaver-layout or sequence-classifier checkpoint, in whatever files.

        The state dict alone says what exists: the config's `bias`, `score_bias` and `score_type`
        contradict it in published checkpoints. Raises UserError if any weight but the head's bias
        is missing.
        """
        config = AutoConfig.from_pretrained(path, **options)
        is_classifier = (config.architectures or [""])[0].endswith("ForSequenceClassification")
        if dry_run and is_classifier:
            return SequenceClassifier(
                shape_of(AutoModelForSequenceClassification, path, dtype, **options))
        if dry_run:
            with torch.device("meta"):
                return cls(config).to(dtype)

        load = super().from_pretrained
        if is_classifier:
            load = AutoModelForSequenceClassification.from_pretrained
        model, report = load(path, config=config, dtype=dtype, output_loading_info=True,
                             ignore_mismatched_sizes=True, **options)
        check_loaded(model, report, f"--{role}_model {path}",
                     "a score model must bring its trained head, of one output, "
                     "and all other weights", optional={"score_head.bias"})
        if is_classifier:
            labels = model.config.num_labels
            require(labels <= 2, f"--{role}_model {path}: a classifier of {labels} labels; "
                                 "a score needs one or two")
            return SequenceClassifier(model.eval())
        if "score_head.bias" in report["missing_keys"]:
            nn.init.zeros_(model.score_head.bias)
        model.role = role
        return model.eval()

    def values(self, input_ids: Tensor, attention_mask: Tensor,
               pixel_values: Tensor | None = None) -> Tensor:
        """The head's fp32 output at every position: [B, L], [B, L] -> [B, L]."""
        hidden = hidden_states(self.model, input_ids, attention_mask, pixel_values)  # [B, L, H]
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score_head(hidden.float()).squeeze(-1)                       # [B, L]

    def score(self, input_ids: Tensor, attention_mask: Tensor,
              pixel_values: Tensor | None = None) -> Tensor:
        """The fp32 score at the last position whose mask is 1, normalised if the checkpoint says
        so: [B, L], [B, L] -> [B]."""
        values = self.values(input_ids, attention_mask, pixel_values)                # [B, L]
        last = attention_mask.cumsum(1).argmax(1, keepdim=True)                      # [B, 1]
        score = values.gather(1, last).squeeze(1)                                    # [B]
        if not hasattr(self, "normalizer"):
            return score
        # Shifting a cost would move the threshold.
        mean = self.normalizer["mean"] if self.role == "reward" else 0.0
        return (score - mean) / (self.normalizer["var"].sqrt() + 1e-8)


class SequenceClassifier(nn.Sequential):
    """What TRL trains: one label is the score; of two the score is logit[1] - logit[0], so label 1
    is a cost model's unsafe one."""

    def score(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, L], [B, L] -> fp32 [B]. The model finds the last token by its pad id, as it did when
        it was trained."""
        outputs = self[0](input_ids=input_ids, attention_mask=attention_mask)
        logits = outputs.logits.float()                                              # [B, labels]
        if logits.shape[1] == 2:
            return logits[:, 1] - logits[:, 0]                                       # [B]
        return logits[:, 0]                                                          # [B]


class Scorer:
    """Where rewards or costs come from: a model with its tokenizer, or a Python function."""

    def __init__(self, role: str, policy_tokenizer, config):
        self.flag, self.source = f"--{role}_model", getattr(config, f"{role}_model")
        self.config = config
        self.function, self.same_tokens = None, False
        if is_function(self.source):
            self.function = load_function(self.source, self.flag, config.scorer_timeout)
            return

        self.model = load_pretrained(
            ScoreModel.from_pretrained, self.source, self.flag, config,
            role=role, dtype=getattr(torch, config.dtype), dry_run=config.dry_run)
        self.model.requires_grad_(False)
        self.tokenizer = tokenizer_with_sight(self.source, self.flag, config)
        check_scorer(self.model, self.tokenizer, role, f"{self.flag} {self.source}")
        if self.tokenizer.sight:
            check_count(self.model.model, self.tokenizer.sight, f"{self.flag} {self.source}")
        self.set_pad_token()
        with blame(f"{self.flag} {self.source}: its tokenizer cannot be used"):
            self.same_tokens = reads_alike(self.tokenizer, policy_tokenizer)

    def set_pad_token(self) -> None:
        """EOS where the tokenizer has none: masks tell where padding is. A classifier finds the
        last token by the pad id of its config, so there both must be the same."""
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        if isinstance(self.model, SequenceClassifier):
            model_config = self.model[0].config
            if model_config.pad_token_id is None:
                model_config.pad_token_id = self.tokenizer.pad_token_id
            self.tokenizer.pad_token_id = model_config.pad_token_id

    def __call__(self, rows: list[list[int]], prompts: list[str], responses: list[str],
                 finished: list[bool]) -> Tensor:
        """Scores of whole responses, given as token ids and as text: fp32 [B]. Raises UserError
        unless all are numbers."""
        scores = torch.zeros(len(prompts), device=self.config.device)                # [B]
        mine = rank_rows(range(len(prompts)))
        with failing_together():
            if self.function:
                values = self.score_texts([prompts[i] for i in mine], [responses[i] for i in mine])
            else:
                if not self.same_tokens:
                    rows = self.encode(prompts, responses, finished)
                values = self.score_rows(rows, prompts)
            for i, value in zip(mine, values):
                self.put(value, scores, i, responses[i])
        return all_reduce(scores)                                                    # [B]

    def score_texts(self, prompts: list[str], responses: list[str]) -> list:
        return self.function(prompts, responses) if prompts else []

    def score_rows(self, rows: list[list[int]], prompts: list[str]) -> list[float]:
        """Of this rank's share of the rows, --micro_batch_size at a time."""
        values, pairs = [], list(zip(rows, prompts))
        for chunk in rank_chunks(pairs, self.config.micro_batch_size):
            chosen_rows, chosen_prompts = zip(*(chunk or pairs[:1]))  # all ranks call the model
            scored = self.score_tokens(chosen_rows, chosen_prompts)
            values += scored if chunk else []
        return values

    def encode(self, prompts, responses, finished) -> list[list[int]]:
        """In the score model's own tokens and template; EOS only where the response really
        ended."""
        rows = encode_prompts(prompts, self.tokenizer, responses)
        if self.tokenizer.eos_token is None:
            return rows
        eos = self.tokenizer.eos_token_id
        return [row + [eos] if ended else row for row, ended in zip(rows, finished)]

    @torch.no_grad()
    def score_tokens(self, rows: list[list[int]], prompts: list[str]) -> list[float]:
        ids, mask = pad_rows([[]] * len(rows), rows, self.tokenizer.pad_token_id)    # [b, L] each
        inputs = [ids, mask, pixels_for(self.tokenizer, prompts)]
        inputs = [part.to(self.config.device) for part in inputs if part is not None]
        return call_as_forward(self.model, type(self.model).score, *inputs).tolist()

    def put(self, value, scores: Tensor, i: int, response: str) -> None:
        """scores[i] = value. Raises UserError for what is no fp32 number."""
        problem = (f"{self.flag} {self.source}: gave {value!r}, not a number, "
                   f"to the response {response[:60]!r}")
        with blame(problem):
            require(isinstance(value, SupportsFloat), problem)
            scores[i] = float(value)  # raises for what fp32 cannot hold


def reads_alike(tokenizer, policy_tokenizer) -> bool:
    """Whether two tokenizers give the same ids to the same text, and their models the same pixels
    to the same picture."""
    if getattr(tokenizer, "sight", None) != getattr(policy_tokenizer, "sight", None):
        return False
    trial = BEAVER_TEMPLATE.format(prompt="Café №1?\n\n  x") + f"Yes.{tokenizer.eos_token}"
    same_ids = tokenizer(trial).input_ids == policy_tokenizer(trial).input_ids
    return same_ids and tokenizer.get_vocab() == policy_tokenizer.get_vocab()


# ---- What is trained

class LowRankLinear(nn.Module):
    """LoRA: y = W x + b + B (A x) with A [r, in] random and B [out, r] zero, so that it begins as
    the layer it replaces. W and b are frozen."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        # Shared with every other model on this backbone.
        self.weight, self.bias = linear.weight, linear.bias
        # A step of B moves y about twice as far as the same step of W would: learning rates carry
        # over, though embeddings, norms and LM head stand still.
        scale = 2 * linear.in_features ** 0.5 / rank
        device = linear.weight.device
        self.lora_a = nn.Parameter(scale * torch.randn(rank, linear.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)                                                  # [..., in]
        a, b = self.lora_a.to(x.dtype), self.lora_b.to(x.dtype)                      # [r, in], ...
        rows = x.reshape(-1, x.shape[-1])                                            # [n, in]
        y = AddLowRank.apply(rows, self.weight, self.bias, a, b)                     # [n, out]
        return y.view(*x.shape[:-1], len(self.weight))                               # [..., out]


class AddLowRank(torch.autograd.Function):
    """W x + b + B (A x) for n rows. The small products add into the results of the large ones: a
    sum of its own would pass over [n, out], and in the backward over [n, in], two times more."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b):
        low = x @ a.T                                                                # [n, r]
        ctx.save_for_backward(x, weight, a, b, low)
        return F.linear(x, weight, bias).addmm_(low, b.T)                            # [n, out]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, a, b, low = ctx.saved_tensors
        dlow = dy @ b                                                                # [n, r]
        dx = (dy @ weight).addmm_(dlow, a) if ctx.needs_input_grad[0] else None      # [n, in]
        return dx, None, None, dlow.T @ x, dy.T @ low


def merged(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights, with B A added to W where there are adapters."""
    layers = [name.removesuffix("lora_a") for name in weights if name.endswith(".lora_a")]
    for layer in layers:
        low_rank = weights.pop(f"{layer}lora_b") @ weights.pop(f"{layer}lora_a")
        weights[f"{layer}weight"] = weights[f"{layer}weight"].float() + low_rank
    return weights


def second_model(model: nn.Module, config) -> nn.Module:
    """A second model like this one: a full copy, or, with adapters, another on the same
    backbone's weights."""
    not_copied = {}
    if config.lora_rank:
        not_copied = {id(weight): weight for weight in model.base_model.parameters()}
    return copy.deepcopy(model, memo=not_copied)  # what the memo knows is taken as it is


def make_trainable(model: nn.Module, config) -> nn.Module:
    """All weights but a vision tower's, as fp32; with --lora_rank, only adapters on the linear
    layers of what speaks, and a score head if there is one. Raises UserError where there are no
    such layers."""
    if not config.lora_rank:
        model.float().requires_grad_(True)
        vision_tower(model).requires_grad_(False)
        return model

    model.requires_grad_(False)
    linear_layers = [(parent, name, layer)
                     for parent in language_part(model.base_model).modules()
                     for name, layer in parent.named_children() if type(layer) is nn.Linear]
    require(linear_layers,
            f"--lora_rank {config.lora_rank}: {type(model.base_model).__name__} has no linear "
            "layers to put adapters on; use --lora_rank 0")
    for parent, name, layer in linear_layers:
        setattr(parent, name, LowRankLinear(layer, config.lora_rank))
    if isinstance(model, ScoreModel):
        model.score_head.requires_grad_(True)
    return model


def vision_tower(model: nn.Module) -> nn.Module:
    """Empty where a model sees nothing."""
    return getattr(model.base_model, "vision_tower", nn.Module())


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, saved and resumed."""
    return {name: parameter for name, parameter in model.named_parameters()
            if parameter.requires_grad}


def make_critic(scorer: Scorer, policy, config) -> ScoreModel:
    """A trainable critic: the score model where it reads the policy's tokens, else the policy's
    body with a head of zeros."""
    if scorer.same_tokens and isinstance(scorer.model, ScoreModel):
        critic = second_model(scorer.model, config)
    else:
        body = scorer.model[0].base_model if scorer.same_tokens else policy.base_model
        critic = ScoreModel(body.config, second_model(body, config))
        head = critic.score_head.state_dict()
        critic.score_head.load_state_dict(
            {name: torch.zeros_like(weight) for name, weight in head.items()})
    return make_trainable(critic.eval(), config)


class Models:
    """Policy, reference, reward and cost model, and their critics, each in its place on the
    device (the critics only where they are trained). `trained`: the names of those that learn."""

    def __init__(self, policy, tokenizer, config):
        self.tokenizer = tokenizer
        self.trained = trained_by(config)
        # pi_ref, computed exactly as the policy is
        reference = second_model(policy, config).requires_grad_(False)
        if "policy" in self.trained:
            policy = make_trainable(policy, config)
        self.policy = sharded(policy, config)

        # Each model is sharded as soon as nothing is made from it any more: whole ones fill a
        # computer's memory.
        self.reward_model, self.reward_critic = score_model_and_critic(
            "reward", reference, tokenizer, config)
        self.cost_model, self.cost_critic = score_model_and_critic(
            "cost", reference, tokenizer, config)
        self.reference = sharded(reference, config)

        if recomputes(policy, config):
            for name in self.trained:
                set_checkpointing(getattr(self, name).base_model, True)


def trained_by(config) -> tuple[str, ...]:
    """Names of the models that learn."""
    if config.eval_only:
        return ()
    critics = ("reward_critic", "cost_critic") if config.baseline == "critic" else ()
    return ("policy", *critics)


def score_model_and_critic(role: str, reference, tokenizer, config):
    """(Scorer, critic), the second None where none is trained."""
    scorer, critic = Scorer(role, tokenizer, config), None
    if f"{role}_critic" in trained_by(config):
        critic = sharded(make_critic(scorer, reference, config), config)
    if not scorer.function:
        scorer.model = sharded(scorer.model, config)
    return scorer, critic


# ---- Gradient checkpointing: activations made again in the backward

def recomputes(policy, config) -> bool:
    if config.gradient_checkpointing is None:
        return policy.num_parameters() > 1e9
    return config.gradient_checkpointing


def set_checkpointing(body, on: bool) -> None:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of a new name to come
        if on:
            body.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            body.gradient_checkpointing_disable()


@contextmanager
def recomputing(models):
    """Gradient checkpointing works in layers that train, and everything here is in eval mode for
    want of dropout: a layer's own flag is enough."""
    layers = [layer for model in models for layer in model.modules()
              if getattr(layer, "gradient_checkpointing", False)]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


# ---- Saving what was trained

def save_policy(folder: Path, policy, weights: dict[str, Tensor], config) -> None:
    """Writes a plain model in the compute dtype: what the library's Auto classes read."""
    with torch.device("meta"):
        plain = model_class(sees(policy.config)).from_config(
            policy.config, dtype=getattr(torch, config.dtype),
            trust_remote_code=config.trust_remote_code)
    tied = plain.all_tied_weights_keys  # saved once, under the other name
    weights = {name: weight for name, weight in weights.items() if name not in tied}
    plain.generation_config = policy.published_generation_config
    plain.save_pretrained(folder, state_dict=typed_as_in(plain, weights))


def save_critic(folder: Path, critic: ScoreModel, weights: dict[str, Tensor], config) -> None:
    """Writes a critic in the Beaver layout, its body in the compute dtype, its head in fp32.

    A normaliser is its score model's, whose scores the critic has learned as they come out of it:
    its own values are not normalised again.
    """
    weights = {name: weight for name, weight in weights.items()
               if not name.startswith("normalizer.")}
    save_score_model(folder, critic, weights, getattr(torch, config.dtype))


def save_score_model(folder: Path, model: ScoreModel, weights: dict[str, Tensor], dtype) -> None:
    """Writes the Beaver layout: weights as a plain model like this one names them, and the
    backbone's config."""
    config = copy.deepcopy(model.config)
    config.update({"score_dim": 1, "score_bias": True, "do_normalize": False})
    body = type(model.model)  # which may come with the checkpoint, and is in no list of classes
    with torch.device("meta"):
        plain = ScoreModel(config, body(config))
    plain.model.to(dtype)
    plain.save_pretrained(folder, state_dict=typed_as_in(plain, weights))
    name = body.__name__.removesuffix("Model")
    plain.config.architectures = [f"{name}ForScore"]  # the library wrote its own name for the class
    plain.config.save_pretrained(folder)


def typed_as_in(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the types of a model's parameters; a buffer keeps its own."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: weight.to(parameters[name].dtype) if name in parameters else weight
            for name, weight in weights.items()}
