"""What is wrong with a model, with a step's numbers or with a trained policy, if anything is."""
import re
from typing import NamedTuple

import torch
from torch import nn

from plumbing.errors import require

SOURCES = {  # of a rollout's numbers
    "reward": "--reward_model",
    "cost": "--cost_model",
    "log_probs": "the policy",
    "ref_log_probs": "the starting policy",
    "reward_values": "the reward critic",
    "cost_values": "the cost critic",
}
# Nats per token. In the tiny world RePO ends at 0.03 or above, PPO and PPO-Lag mostly below the
# floor: they give one answer to each request.
ENTROPY_FLOOR = 0.01
# Of a rollout's updates, on average. With SmolLM2-135M and adapters an early trial with --actor_lr
# 3e-4 gave .67 and 64 in the first step, and a policy of nonsense; seven runs with 2e-5 stayed
# below .22 and .08.
DESTRUCTIVE = {"clip_fraction": 0.5, "approx_kl": 1.0}


# ---- A step's numbers

class BadNumbers(Exception):
    """(what is not finite, rollout): an update that is not to be applied."""


def not_finite(rollout) -> str | None:
    """The first of a rollout's scores, log-probs and values that is NaN or infinite, as a
    sentence; None if all are finite."""
    for name, source in SOURCES.items():
        numbers = getattr(rollout, name)
        if numbers is None or numbers.isfinite().all():
            continue
        first = tuple((~numbers.isfinite()).nonzero()[0].tolist())
        return (f"{source} gave {numbers[first].item()}, not a finite number, "
                f"to the response {rollout.responses[first[0]][:60]!r}")
    return None


def bad_batch(rollout, threshold: float) -> list[dict]:
    """Prompts, responses and scores for a file; json knows no NaN, so such numbers become words."""
    def as_json(value):
        is_bad = isinstance(value, float) and not abs(value) < float("inf")
        return str(value) if is_bad else value

    return [{name: as_json(value) for name, value in record.items()}
            for record in rollout.records(threshold)]


def collapse(responses: list[str], entropy: float) -> str | None:
    """What says that a policy has stopped answering prompts, if anything does."""
    if not any(response.strip() for response in responses):
        return f"all {len(responses)} responses are empty"
    if len(responses) > 1 and len(set(responses)) == 1:
        return f"all {len(responses)} responses are the same, {responses[0][:60]!r}"
    if entropy < ENTROPY_FLOOR:
        return f"its entropy is {entropy:.2g} nats per token"
    return None


def destruction(metrics: dict) -> str | None:
    """What says that updates have left the policy that their responses were sampled from."""
    for name, limit in DESTRUCTIVE.items():
        if metrics[name] > limit:
            return (f"{name} is {metrics[name]:.2f}, above {limit}: the update has left the policy "
                    f"that was sampled from; lower --actor_lr ({metrics['actor_lr']:.2g})")
    return None


def drift(verdicts: list[dict]) -> str | None:
    """What says that a policy treats all prompts alike: a behaviour that none of the responses
    shows, to harmful or to harmless prompts, is gone, for what is never sampled is not
    reinforced."""
    count = len(verdicts)
    kinds = {verdict["harmful_prompt"] for verdict in verdicts}
    refused = {verdict["refused"] for verdict in verdicts}
    if count < 8 or len(kinds) < 2 or len(refused) > 1:
        return None
    if True in refused:
        return (f"all {count} responses refuse, those to harmless prompts too; a lower "
                "--lambda_init keeps answers alive")
    return (f"none of the {count} responses refuses, those to harmful prompts neither; begin with "
            "a policy that does (companions/supervised.py), or raise --lambda_init")


# ---- A model

def check_loaded(model, report: dict, source: str, needed: str, optional=frozenset()) -> None:
    """Raises UserError for weights that the library has made up, because the checkpoint has none
    or others, and for layers that it has left out."""
    missing = sorted(set(report["missing_keys"]) - optional)
    require(not missing, f"{source}: has no {', '.join(missing[:3])}; {needed}")

    other = sorted(f"{name} {list(there)}, not {list(here)}"
                   for name, there, here in report["mismatched_keys"])
    require(not other, f"{source}: has {', '.join(other[:3])}; {needed}")

    known = model.state_dict()
    left_out = sorted(name for name in report["unexpected_keys"]
                      if re.sub(r"\.\d+\.", ".0.", name, count=1) in known)
    require(not left_out, f"{source}: has {', '.join(left_out[:3])}, of which its config.json "
                          "knows nothing; correct num_hidden_layers there")


def check_weights(model, tokenizer, embeddings, source: str) -> None:
    """Raises UserError for fewer embeddings than tokens, and for weights that are no numbers."""
    tokens = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps
    require(tokens <= embeddings.num_embeddings,
            f"{source}: its tokenizer has {tokens} tokens, "
            f"the model only {embeddings.num_embeddings} embeddings")
    for name, weight in model.named_parameters():
        require(weight.is_meta or torch.stack(weight.detach().aminmax()).isfinite().all(),
                f"{source}: {name} holds numbers that are NaN or infinite")


def check_policy(policy, tokenizer, source: str) -> None:
    """Raises UserError unless it is a causal language model with whole weights."""
    check_weights(policy, tokenizer, policy.get_input_embeddings(), source)
    require(policy.device.type == "meta" or is_causal(policy),
            f"{source}: its tokens see the ones after them, as an encoder's do; "
            "a policy must be a causal language model")


def check_scorer(model, tokenizer, role: str, source: str) -> None:
    """Raises UserError unless it gives one number, from whole weights."""
    classifier = model[0] if isinstance(model, nn.Sequential) else None
    body = classifier or model.model
    check_weights(model, tokenizer, body.get_input_embeddings(), source)
    require(tokenizer.pad_token or tokenizer.eos_token,
            f"{source}: its tokenizer has neither a pad nor an EOS token; "
            "set one in tokenizer_config.json")
    require(role == "cost" or not classifier or classifier.num_labels == 1,
            f"{source}: a classifier of two labels; a reward is one number "
            "(a cost may come from two, label 1 being the unsafe one)")


@torch.no_grad()
def is_causal(policy) -> bool:
    """Whether the logits at a token are the same whatever follows it."""
    pair = torch.tensor([[0, 1], [0, 2]], device=policy.device)
    one, other = policy(pair).logits[:, 0].float()                             # [V] each
    # Exactly equal in every decoder tried, 0.008 apart in an untrained encoder.
    return bool((one - other).abs().max() <= 1e-3 * one.abs().max())


class Head(NamedTuple):
    """What a fused head does besides its product: logits = scale (hidden @ weight.T), or, with a
    soft cap, cap tanh(hidden @ weight.T / cap)."""

    scale: float = 1.0
    soft_cap: float = 0.0

    def logits(self, products: torch.Tensor) -> torch.Tensor:
        """hidden @ weight.T -> logits, any shape."""
        logits = self.scale * products if self.scale != 1 else products
        return self.soft_cap * (logits / self.soft_cap).tanh() if self.soft_cap else logits


@torch.no_grad()
def find_head(policy) -> Head | None:
    """What makes a policy's logits, or None if that is more than a Head can do (a bias, say).

    The config says what it should be; hidden states of our own, put in the body's place, show what
    it is: small ones a scale, large ones any cap.
    """
    output, config = policy.get_output_embeddings(), policy.config.get_text_config()
    scale, divisor, soft_cap = (  # None, or no number, where a config has the name for other things
        value if isinstance(value, (int, float)) and value > 0 else default
        for value, default in (
            (getattr(config, "logit_scale", None), 1.0),
            (getattr(config, "logits_scaling", None), 1.0),
            (getattr(config, "final_logit_softcapping", None), 0.0),
        )
    )
    head = Head(scale / divisor, soft_cap)
    if getattr(output, "bias", None) is not None or (head.soft_cap and head.scale != 1):
        return None
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2, output.weight.shape[1], generator=generator)
    hidden = (torch.tensor([1.0, 1e4])[:, None] * hidden).to(output.weight)    # [1, 2, H]

    def replace(body, inputs, outputs):
        outputs.last_hidden_state = hidden
        return outputs

    hook = policy.base_model.register_forward_hook(replace)
    ids = torch.zeros(1, 2, dtype=torch.long, device=policy.device)
    logits = policy(ids).logits.float()                                        # [1, 2, V]
    hook.remove()
    expected = head.logits((hidden @ output.weight.T).float())                 # [1, 2, V]
    errors = (logits - expected).norm(dim=-1)                                  # [1, 2]
    is_head = bool((errors < 0.02 * expected.norm(dim=-1)).all())              # bf16 is 0.4 % off
    return head if is_head else None
