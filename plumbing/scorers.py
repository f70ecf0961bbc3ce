"""Where rewards and costs come from: score models, classifiers, Python functions. Critics are score
models too.
"""
import re
from pathlib import Path
from typing import Literal, SupportsFloat

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from plumbing.data import (
    BEAVER_TEMPLATE,
    check_turns,
    closing,
    closing_ids,
    conversation_texts,
    encode,
    pad_rows,
    pixels_for,
    render_prompt,
)
from plumbing.errors import blame, failing_together, require, say
from plumbing.functions import is_function, load_function
from plumbing.models import (
    check_loaded,
    check_weights,
    hidden_states,
    learned_length,
    load_pretrained,
    published_config,
    shape_of,
    take_out_dropout,
    tokenizer_with_sight,
    typed_as_in,
)
from plumbing.pictures import check_count
from plumbing.ranks import all_reduce, call_as_forward, rank_chunks, rank_rows


class ScoreModel(PreTrainedModel):
    """The Beaver layout: a causal backbone `model` and a linear `score_head`. Critics are
    ScoreModels too; they are read at every token."""

    config_class = PreTrainedConfig
    base_model_prefix = "model"
    _keep_in_fp32_modules_strict = ["score_head", "normalizer"]
    role = "reward"
    scale = 0.0, 1.0  # mean and standard deviation of scores, see published_scale

    def __init__(self, config, backbone: nn.Module | None = None):
        super().__init__(config)
        self.model = AutoModel.from_config(config) if backbone is None else backbone
        # Not the config's hidden_size: OPT-350m projects its states back to the embeddings' size.
        self.score_head = nn.Linear(self.model.get_input_embeddings().weight.shape[1], 1)
        if getattr(config, "do_normalize", False):
            self.normalizer = nn.ParameterDict({"mean": torch.zeros(1), "var": torch.ones(1)})
        self.post_init()

    # Which kinds of attention and experts there are, the backbone itself checks.
    def get_correct_attn_implementation(self, requested_attention, is_init_check=False):
        return requested_attention

    def get_correct_experts_implementation(self, requested_experts):
        return requested_experts

    @classmethod
    def from_pretrained(cls, path, role: Literal["reward", "cost"] = "reward",
                        dtype=torch.float32, dry_run=False, **options):
        """A Beaver-layout or sequence-classifier checkpoint, in any file format. Only the state
        dict says what exists: in published checkpoints the config's `bias`, `score_bias` and
        `score_type` contradict it. Raises UserError if a weight other than the head's bias is
        missing."""
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
                     "and all other weights", optional={"score_head.bias"},
                     may_have_heads=True)
        take_out_dropout(model)
        names = label_names(config, f"--{role}_model {path}") if is_classifier else ["score"]
        scale = published_scale(config, role, len(names), f"--{role}_model {path}")
        if is_classifier:
            classifier = SequenceClassifier(model.eval())
            classifier.scale = scale
            if len(names) == 1:
                check_label(names[0], role, f"--{role}_model {path}")
            elif role == "cost":
                classifier.unsafe = unsafe_label(names, f"--{role}_model {path}")
            return classifier
        if "score_head.bias" in report["missing_keys"]:
            nn.init.zeros_(model.score_head.bias)
        model.role, model.scale = role, scale
        return model.eval()

    def values(self, input_ids: Tensor, attention_mask: Tensor,
               pixel_values: Tensor | None = None) -> Tensor:
        """The head's fp32 output at every position: [B, L], [B, L] -> [B, L]."""
        hidden = hidden_states(self.model, input_ids, attention_mask, pixel_values)  # [B, L, H]
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score_head(hidden.float()).squeeze(-1)                       # [B, L]

    def score(self, input_ids: Tensor, attention_mask: Tensor,
              pixel_values: Tensor | None = None) -> Tensor:
        """The fp32 score at the last position whose mask is 1, normalised if the checkpoint has a
        normaliser: [B, L], [B, L] -> [B]."""
        values = self.values(input_ids, attention_mask, pixel_values)                # [B, L]
        last = attention_mask.cumsum(1).argmax(1, keepdim=True)                      # [B, 1]
        score = scaled(values.gather(1, last).squeeze(1), self.scale)                # [B]
        if not hasattr(self, "normalizer"):
            return score
        # Shifting a cost would move the threshold.
        mean = self.normalizer["mean"] if self.role == "reward" else 0.0
        return (score - mean) / (self.normalizer["var"].sqrt() + 1e-8)


class SequenceClassifier(nn.Sequential):
    """A sequence classifier, as TRL trains them. With one label its logit is the score. With two
    the score is the unsafe label's logit minus the other's."""

    scale, unsafe = (0.0, 1.0), 1

    def score(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, L], [B, L] -> fp32 [B]. The model finds the last token by its pad id, as in its
        training."""
        outputs = self[0](input_ids=input_ids, attention_mask=attention_mask)
        logits = outputs.logits.float()                                              # [B, labels]
        if logits.shape[1] == 2:
            return logits[:, self.unsafe] - logits[:, 1 - self.unsafe]               # [B]
        return scaled(logits[:, 0], self.scale)                                      # [B]


def published_scale(config, role: str, labels: int, source: str) -> tuple[float, float]:
    """(mean, standard deviation) of the scores, if the config keeps them, as OpenRLHF's do; else
    (0, 1). Shifting a cost would move the threshold. Raises UserError."""
    mean, std = kept = [getattr(config, name, None) for name in ("mean", "std")]
    if kept == [None, None]:
        return 0.0, 1.0
    require(all(isinstance(value, int | float) for value in kept) and std > 0 and labels == 1,
            f"{source}: its config.json has mean {mean!r} and std {std!r}; a run can use two "
            "numbers, the second above 0, for the only score of a model; correct them, or take "
            "them out")
    mean = mean if role == "reward" else 0.0
    say(f"{source}: its config.json keeps a mean and a standard deviation of scores; the run uses "
        f"(score - {mean:g}) / {std:g}")
    return mean, std


def scaled(score: Tensor, scale: tuple[float, float]) -> Tensor:
    mean, std = scale
    return score if scale == (0.0, 1.0) else (score - mean) / std


HARM = (r"harm(ful|fulness)?|toxic(ity)?|hate(ful|speech)?|offensive|abusive|obscene|bad|"
        r"malicious|jailbreak|injection|violation|nsfw|rejected")
NO_HARM = (r"safe(ty)?|harmless(ness)?|benign|clean|neutral|good|ok|normal|acceptable|appropriate|"
           r"chosen|other")


def is_harm(label: str) -> bool | None:
    """Whether a label's name means harm: "non-toxic" and "nontoxic" do not, "UnsafeContent" does.
    None if the name does not tell."""
    words = re.split(r"[\W_]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", label).lower())
    for is_harm, names in ((True, HARM), (False, NO_HARM)):
        for found in filter(None, (re.fullmatch(f"(un|in|non|not)?({names})", word)
                                   for word in words)):
            return is_harm != bool(found[1] or {"not", "non", "no"} & set(words))
    return None


def label_names(config, source: str) -> list[str]:
    """The names of a classifier's one or two labels. Raises UserError."""
    names = config.id2label
    require(len(names) <= 2, f"{source}: a classifier of {len(names)} labels; a score needs one or "
                             "two")
    require(sorted(names) == list(range(len(names))),
            f"{source}: id2label in its config.json numbers the labels {sorted(names)}; it must "
            "begin with 0")
    return [str(names[label]) for label in sorted(names)]


def check_label(name: str, role: str, source: str) -> None:
    """Raises UserError if the name of a classifier's only label says the opposite of its role."""
    require(is_harm(name) in (None, role == "cost"),
            f"{source}: its label is {name!r}, so a high score would be a "
            f"{'low cost' if role == 'cost' else 'low reward'}; use a model of the other sign, or "
            "correct id2label in config.json")


def unsafe_label(names: list[str], source: str) -> int:
    """Which of a cost classifier's two labels is the unsafe one: the one whose name says so, or
    label 1 if both are only numbered. Raises UserError for two names that mean the same, and for a
    name that is not known."""
    told = [is_harm(name) for name in names]
    are_clear = all(harm is not None or re.fullmatch(r"(label\W*_?)?\d+", name.lower())
                    for harm, name in zip(told, names))
    both = f"{names[0]!r} (label 0) and {names[1]!r} (label 1)"
    require(are_clear and (None in told or told[0] != told[1]),
            f"{source}: its labels {both} do not tell which one is unsafe; correct id2label in "
            "config.json")
    unsafe = 0 if told[0] is True or told[1] is False else 1
    say(f"{source}: of its labels {both}, label {unsafe} is taken as unsafe")
    return unsafe


class Scorer:
    """Where rewards or costs come from: a model with its tokenizer, or a Python function."""

    def __init__(self, role: str, policy_tokenizer, config):
        self.flag, self.source = f"--{role}_model", getattr(config, f"{role}_model")
        self.config = config
        self.function, self.same_tokens, self.has_warned = None, False, False
        if is_function(self.source):
            self.function = load_function(self.source, self.flag)
            return

        self.model = load_pretrained(
            ScoreModel.from_pretrained, self.source, self.flag, config,
            role=role, dtype=getattr(torch, config.dtype), dry_run=config.dry_run)
        self.model.requires_grad_(False)
        self.tokenizer = tokenizer_with_sight(self.source, self.flag, config)
        with blame(f"{self.flag} {self.source}: is no model of a known kind"):
            check_scorer(self.model, self.tokenizer, role, f"{self.flag} {self.source}")
        if self.tokenizer.sight:
            check_count(self.model.model, self.tokenizer.sight, f"{self.flag} {self.source}")
        self.set_pad_token()
        with blame(f"{self.flag} {self.source}: its tokenizer cannot be used"):
            self.same_tokens = reads_alike(self.tokenizer, policy_tokenizer)
            self.closing = closing_ids(self.tokenizer)

    def model_config(self):
        return (self.model[0] if isinstance(self.model, SequenceClassifier) else self.model).config

    def set_pad_token(self) -> None:
        """Takes EOS as the pad token if the tokenizer has none; masks mark the padding. A
        classifier finds the last token by the pad id of its config, so tokenizer and config must
        agree."""
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        if isinstance(self.model, SequenceClassifier):
            model_config = self.model_config()
            text_config = model_config.get_text_config()
            if text_config.pad_token_id is None or text_config.pad_token_id < 0:
                text_config.pad_token_id = self.tokenizer.pad_token_id
            self.tokenizer.pad_token_id = text_config.pad_token_id
            model_config.pad_token_id = text_config.pad_token_id

    def __call__(self, rows: list[list[int]], prompts: list[str], responses: list[str],
                 finished: list[bool]) -> Tensor:
        """Scores of responses, given as the policy's token ids of prompt and response, with the
        token that ended it, and as text: fp32 [B]. Raises UserError unless all are numbers."""
        scores = torch.zeros(len(prompts), device=self.config.device)                # [B]
        mine = rank_rows(range(len(prompts)))
        with failing_together():
            if self.function:
                values = self.score_texts([prompts[i] for i in mine], [responses[i] for i in mine])
            else:
                rows = self.encode(rows, prompts, responses, finished)
                self.warn_of_length(max(map(len, rows)))
                values = self.score_rows(rows, prompts)
            for i, value in zip(mine, values):
                self.put(value, scores, i, responses[i])
        return all_reduce(scores)                                                    # [B]

    def score_texts(self, prompts: list[str], responses: list[str]) -> list:
        return self.function(prompts, responses) if prompts else []

    def score_rows(self, rows: list[list[int]], prompts: list[str]) -> list[float]:
        """The scores of this rank's share of the rows, --micro_batch_size at a time."""
        values, pairs = [], list(zip(rows, prompts))
        for chunk in rank_chunks(pairs, self.config.micro_batch_size):
            chosen_rows, chosen_prompts = zip(*(chunk or pairs[:1]))  # all ranks call the model
            longest = max(map(len, chosen_rows))
            with blame(f"{self.flag} {self.source}: cannot score a row of {longest} of its tokens; "
                       "lower --max_length"):
                scored = self.score_tokens(chosen_rows, chosen_prompts)
            values += scored if chunk else []
        return values

    def warn_of_length(self, longest: int) -> None:
        """Warns once of a row that is longer than what the model has learned to read. --max_length
        is in the policy's tokens; the same text may be more of these."""
        limit, extrapolates = learned_length(self.model_config())
        if longest > limit and not (extrapolates or self.has_warned):
            self.has_warned = True
            say(f"warning: {self.flag} {self.source}: a row has {longest} of its tokens, and it "
                f"has learned to read {limit}; such scores mean little: lower --max_length")

    def encode(self, rows: list[list[int]], prompts: list[str], responses: list[str],
               finished: list[bool]) -> list[list[int]]:
        """What the score model reads: the conversations in its own template and tokens. Where it
        has the policy's tokens and the template leaves prompt and answer as they are, these are the
        policy's tokens, with all that the template writes after an answer in the place of the token
        that ended this one."""
        texts = conversation_texts(self.tokenizer, prompts, responses, finished)
        read, end = encode(texts, self.tokenizer), closing(self.tokenizer)
        if not self.same_tokens:
            return read
        for i, (row, ended) in enumerate(zip(rows, finished)):
            said = render_prompt(prompts[i], self.tokenizer) + responses[i]
            if texts[i] == said + end * ended:
                read[i] = row[:-1] + self.closing if ended else row
        return read

    def check_prompts(self, prompts: list[str]) -> None:
        """Raises UserError for prompts that the score model's template refuses or writes in
        part."""
        if not self.function and not self.same_tokens:
            check_turns(((f"{self.flag} {self.source}: the prompt {prompt[:60]!r}", prompt)
                         for prompt in prompts), self.tokenizer)

    @torch.no_grad()
    def score_tokens(self, rows: list[list[int]], prompts: list[str]) -> list[float]:
        ids, mask = pad_rows([[]] * len(rows), rows, self.tokenizer.pad_token_id)    # [b, L] each
        inputs = [ids, mask, pixels_for(self.tokenizer, prompts)]
        inputs = [part.to(self.config.device) for part in inputs if part is not None]
        return call_as_forward(self.model, type(self.model).score, *inputs).tolist()

    def put(self, value, scores: Tensor, i: int, response: str) -> None:
        """Sets scores[i]. Raises UserError for a value that is not an fp32 number."""
        problem = (f"{self.flag} {self.source}: gave {value!r}, not a number, "
                   f"to the response {response[:60]!r}")
        with blame(problem):
            require(isinstance(value, SupportsFloat), problem)
            scores[i] = float(value)  # raises for what fp32 cannot hold


def reads_alike(tokenizer, policy_tokenizer) -> bool:
    """Whether two tokenizers give a text the same ids and a conversation the same text, and their
    models a picture the same pixels."""
    one, other = (
        (getattr(each, "sight", None), each.chat_template, each.bos_token, each.eos_token,
         each.get_vocab()) for each in (tokenizer, policy_tokenizer))
    if one != other:
        return False
    trial = BEAVER_TEMPLATE.format(prompt="Café №1?\n\n  x") + f"Yes.{tokenizer.eos_token}"
    return tokenizer(trial).input_ids == policy_tokenizer(trial).input_ids


def check_scorer(model, tokenizer, role: str, source: str) -> None:
    """Raises UserError unless a score model gives one number, from finite weights."""
    classifier = model[0] if isinstance(model, nn.Sequential) else None
    body = classifier or model.model
    start = getattr(body.config, "decoder_start_token_id", None)
    require(start is not None or not getattr(body.config, "is_encoder_decoder", False),
            f"{source}: cannot read rows: an encoder with a decoder, and its config.json has no "
            "decoder_start_token_id")
    check_weights(model, tokenizer, body.get_input_embeddings(), source)
    require(tokenizer.pad_token or tokenizer.eos_token,
            f"{source}: its tokenizer has neither a pad nor an EOS token; "
            "set one in tokenizer_config.json")
    require(role == "cost" or not classifier or classifier.config.num_labels == 1,
            f"{source}: a classifier of two labels; a reward is one number "
            "(a cost may come from two, of which one is unsafe)")


def save_critic(folder: Path, critic: ScoreModel, weights: dict[str, Tensor], config) -> None:
    """Writes a critic in the Beaver layout, its body in the compute dtype, its head in fp32. It
    leaves its score model's normaliser out, because the critic has learned normalised scores."""
    weights = {name: weight for name, weight in weights.items()
               if not name.startswith("normalizer.")}
    save_score_model(folder, critic, weights, getattr(torch, config.dtype))


def save_score_model(folder: Path, model: ScoreModel, weights: dict[str, Tensor], dtype) -> None:
    """Writes the Beaver layout: the weights, under the names of a plain model, and the backbone's
    config."""
    config = published_config(model.model)
    for name in ("mean", "std"):  # the critic has learned scores that were scaled
        vars(config).pop(name, None)
    config.update({"score_dim": 1, "score_bias": True, "do_normalize": False})
    body = type(model.model)  # it may come with the checkpoint and be in no list of classes
    with torch.device("meta"):
        plain = ScoreModel(config, body(config))
    plain.model.to(dtype)
    plain.save_pretrained(folder, state_dict=typed_as_in(plain, weights))
    name = body.__name__.removesuffix("Model")
    plain.config.architectures = [f"{name}ForScore"]  # the library wrote its own name for the class
    plain.config.save_pretrained(folder)
