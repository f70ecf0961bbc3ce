"""Everything that changes while a run trains: its models, their optimiser, and a few numbers."""
import math
import time
import warnings
from contextlib import contextmanager

import torch

from plumbing.adapters import make_trainable, second_model, trainable
from plumbing.errors import blame
from plumbing.metrics import Clock
from plumbing.ranks import RANKS, call_as_forward, sharded
from plumbing.scorers import Scorer, ScoreModel

# ---- Models


def trained_by(config) -> tuple[str, ...]:
    """Names of the models that learn. A critic of the cost is for losses in which the cost has a
    weight."""
    if config.eval_only:
        return ()
    if config.baseline == "group":
        return ("policy",)
    if config.algo in ("gate", "ppo"):
        return ("policy", "reward_critic")
    return ("policy", "reward_critic", "cost_critic")


class Models:
    """Policy, reference, reward and cost model, and their critics, each in its place on the
    device. `trained` names those that learn; a critic that does not learn is None."""

    def __init__(self, policy, tokenizer, config):
        self.tokenizer = tokenizer
        self.trained = trained_by(config)
        # pi_ref, computed exactly as the policy is
        reference = second_model(policy, config).requires_grad_(False)
        if "policy" in self.trained:
            policy = make_trainable(policy, config)
        self.policy = sharded(policy, config)

        # Each model is sharded as soon as no other model is made from it, because several whole
        # models fill a computer's memory.
        self.reward_model, self.reward_critic = self.score_model_and_critic(
            "reward", reference, config)
        self.cost_model, self.cost_critic = self.score_model_and_critic(
            "cost", reference, config)
        self.reference = sharded(reference, config)

        if recomputes(policy, config):
            for name in self.trained:
                set_checkpointing(getattr(self, name).base_model, True)

    def trained_models(self) -> list[tuple]:
        """(name, model) of each model that learns."""
        return [(name, getattr(self, name)) for name in self.trained]

    def score_model_and_critic(self, role: str, reference, config):
        """(Scorer, critic), the second None if it is not trained."""
        scorer, critic = Scorer(role, self.tokenizer, config), None
        if f"{role}_critic" in self.trained:
            critic = sharded(make_critic(scorer, reference, config), config)
        if not scorer.function:
            scorer.model = sharded(scorer.model, config)
        return scorer, critic


def make_critic(scorer: Scorer, policy, config) -> ScoreModel:
    """A trainable critic. It starts as the score model if that reads the policy's tokens, else as
    the policy's body with a head of zeros."""
    if scorer.same_tokens and isinstance(scorer.model, ScoreModel):
        critic = second_model(scorer.model, config)
    else:
        body = scorer.model[0].base_model if scorer.same_tokens else policy.base_model
        critic = ScoreModel(body.config, second_model(body, config))
        head = critic.score_head.state_dict()
        critic.score_head.load_state_dict(
            {name: torch.zeros_like(weight) for name, weight in head.items()})
    return make_trainable(critic.eval(), config)


class State(Models):
    """The models of a run, and everything else that changes while it trains.

    A checkpoint holds the `trained` models, their optimiser and schedule, and what RESUMED names.
    """

    RESUMED = ("lam", "step", "seconds", "tokens", "costs", "before", "logs", "data")

    def __init__(self, policy, tokenizer, config):
        super().__init__(policy, tokenizer, config)
        has_lambda = config.algo in ("repo", "ppo_lag")
        self.lam = min(config.lambda_init, config.lambda_max) if has_lambda else 0.0
        self.step = 0         # steps done
        self.seconds = 0.0    # of all steps so far, over all sessions of the run
        self.tokens = 0       # sampled in those steps
        self.costs = []       # the latest cost_window x RANKS, for ppo_lag
        self.before = None    # scores of the starting policy
        self.data = None      # a hash of prompts and pairs
        self.functions = {}   # hashes of the files of score functions and judge
        self.logs = {"metrics.jsonl": [], "samples.jsonl": []}  # lines, as the files hold them
        self.clock = Clock()
        self.started = time.perf_counter()  # minus the seconds of earlier sessions
        self.saved_step = None              # of the newest checkpoint
        if not config.eval_only:
            self.optimizer = self.make_optimizer(config)
            self.schedule = make_schedule(self.optimizer, config.steps)

    def make_optimizer(self, config):
        """AdamW in three groups: the policy's matrices, which alone decay, its biases and norms,
        and the critics. The moments are made at once, because a checkpoint is loaded into them."""
        policy, *critics = [list(trainable(getattr(self, name)).values()) for name in self.trained]
        matrices = [parameter for parameter in policy if parameter.ndim > 1]
        vectors = [parameter for parameter in policy if parameter.ndim <= 1]
        critic_parameters = [parameter for parameters in critics for parameter in parameters]
        groups = [
            {"params": matrices, "lr": config.actor_lr, "weight_decay": 0.01},
            {"params": vectors, "lr": config.actor_lr},
            {"params": critic_parameters, "lr": config.critic_lr},
        ]
        is_fused = config.device == "cuda"  # one pass, no temporaries
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=is_fused)
        for group in groups:
            for parameter in group["params"]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device if is_fused else None),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        return optimizer


def make_schedule(optimizer, steps: int):
    """For the policy a linear warm-up over 3 % of the steps, then a cosine that is zero after the
    last one; constant for critics. No step has the rate zero: its rollout would be wasted."""
    warmup = int(0.03 * steps)

    def warmup_and_cosine(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    def constant(step: int) -> float:
        return 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, [warmup_and_cosine] * 2 + [constant])


# ---- Backward, with or without gradient checkpointing

def backward(model, loss_function, *arguments, config, scale: float = 1.0):
    """Computes loss_function(model, *arguments, config) and its gradients times scale. Returns the
    loss as a number and the function's second result. One model's activations live at a time."""
    with recomputing([model]):
        with config.autocast():
            loss, statistics = call_as_forward(model, loss_function, *arguments, config)
        # FSDP takes the mean of the ranks' gradients, but their losses are parts of one sum.
        (scale * RANKS * loss).backward()
    return loss.item(), statistics


def recomputes(policy, config) -> bool:
    """Whether the backward makes activations again (gradient checkpointing)."""
    if config.gradient_checkpointing is None:
        return policy.num_parameters() > 1e9
    return config.gradient_checkpointing


def set_checkpointing(body, on: bool) -> None:
    with (
        blame("--gradient_checkpointing true: this model cannot; set it to false"),
        warnings.catch_warnings(action="ignore", category=FutureWarning),  # of a new name to come
    ):
        if on:
            body.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            body.gradient_checkpointing_disable()


@contextmanager
def recomputing(models):
    """Lets layers checkpoint: the library does so only in layers whose training flag is set, and
    all models here are in eval mode, because there is no dropout."""
    layers = [layer for model in models for layer in model.modules()
              if getattr(layer, "gradient_checkpointing", False)]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
