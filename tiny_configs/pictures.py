"""The tiny world with pictures: only the picture shows whether a request is harmful.

The text of a request names the object ("How do I do this to a boat?"). Its picture shows the action
as an icon of 4 x 4 cells, in a random tint, with noise. Answers, demonstrations, rankings and judge
are those of world.py. The models have LLaVA's layout: a small CLIP tower, a projector, and
world.py's policy. Reward and cost model are learned from rankings on the same body.

    python -m tiny_configs.pictures             # build the family
    python -m tiny_configs.pictures --ship      # train the standard one again
    python repo.py --model tiny-pictures
"""
import hashlib
import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from plumbing.fitting import answer_loss, fit
from plumbing.pictures import Pictured, load_sight
from plumbing.data import encode_pairs, pixels_for
from tiny_configs import world

HERE = Path(__file__).resolve().parent
SHIPPED = HERE / "pictures.safetensors"

# ---- the pictures

CELLS = 4   # on a side
CELL = 4    # pixels on a side: a patch of the vision tower
ICONS = {   # row by row
    "clean": "#... .#.. ..#. ...#",
    "paint": "#### #### .... ....",
    "repair": ".##. #..# #..# .##.",
    "photograph": "#..# .##. .##. #..#",
    "decorate": "#.#. .#.# #.#. .#.#",
    "pack": "#### #..# #..# ####",
    "sell": ".... #### .... ####",
    "steal": "##.. ##.. ##.. ##..",
    "smash": "..## ...# #... ##..",
    "torch": ".#.. ###. .#.. .###",
}


def draw(action: str, generator: torch.Generator) -> Tensor:
    """An action's icon in a random tint, with noise: [3, 16, 16], from 0 to 1, rounded to
    hundredths."""
    cells = torch.tensor([[float(cell == "#") for cell in row] for row in ICONS[action].split()])
    icon = cells.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)                   # [16, 16]
    tint = 0.5 + 0.4 * torch.rand(3, 1, 1, generator=generator)                          # [3, 1, 1]
    noise = 0.1 * torch.rand(3, 16, 16, generator=generator)
    return (100 * (tint * icon + noise)).round() / 100


def shown_in(picture: Tensor) -> str:
    """The action that a picture shows. This is exact, because noise is far below any tint."""
    cells = picture.view(3, CELLS, CELL, CELLS, CELL).mean((0, 2, 4)) > 0.3              # [4, 4]
    icon = " ".join("".join(".#"[int(cell)] for cell in row) for row in cells)
    return {drawing: action for action, drawing in ICONS.items()}[icon]


# ---- requests and their judge

def pictured(request: str, generator: torch.Generator) -> Pictured:
    """A request of world.py with its action in a picture instead of words."""
    action, thing = world.REQUESTS[request]
    text = request.replace(f"{action} {thing}", f"do this to {thing}")
    return Pictured(text, draw(action, generator))


def in_words(prompt: Pictured) -> str:
    """The request of world.py that a prompt with its picture stands for."""
    return prompt.replace("do this to", shown_in(prompt.image))


def judge(prompts: list[Pictured], responses: list[str]) -> list[dict]:
    """world.py's exact judge."""
    return world.judge([in_words(prompt) for prompt in prompts], responses)


# ---- data

def write_data(folder: Path, rng: random.Random, generator: torch.Generator):
    """Writes prompts, demonstrations and preference pairs, the pairs in BeaverTails-V's columns.
    Returns (demonstrations, rankings, held-out rankings). Each has a picture of its own."""
    train, held_out = world.split_requests()
    demonstrations = [(pictured(request, generator), world.random_answer(request, rng))
                      for request in train for _ in range(12)]
    rankings = [ranking(request, 8, rng, generator) for request in train for _ in range(3)]
    held_out_rankings = [ranking(request, 2, rng, generator)
                         for request in held_out for _ in range(12)]
    files = {
        "train.jsonl": [row_of(pictured(request, generator)) for request in train],
        "held_out.jsonl": [row_of(pictured(request, generator)) for request in held_out],
        "demonstrations.jsonl": [row_of(prompt) | {"response": answer}
                                 for prompt, answer in demonstrations[::6]],
        "preferences.jsonl": [pair for ranked in rankings[::3] for pair in pairs_of(ranked)[:2]],
        "preferences_held_out.jsonl": [pair for ranked in held_out_rankings[::3]
                                       for pair in pairs_of(ranked)],
    }
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return demonstrations, rankings, held_out_rankings


def ranking(request: str, size: int, rng: random.Random, generator: torch.Generator) -> dict:
    return world.ranking(request, size, rng) | {"prompt": pictured(request, generator)}


def row_of(prompt: Pictured) -> dict:
    hundredths = (100 * prompt.image).round().int().tolist()
    image = [[[value / 100 for value in row] for row in channel] for channel in hundredths]
    return {"prompt": prompt, "image": image}


def pairs_of(ranked: dict) -> list[dict]:
    """world.py's preference pairs in the columns of BeaverTails-V, which counts from 1."""
    image = row_of(ranked["prompt"])["image"]
    return [{
        "question": ranked["prompt"],
        "image": image,
        "response_1": pair["response_0"],
        "response_2": pair["response_1"],
        "is_response_1_safe": "yes" if pair["is_response_0_safe"] else "no",
        "is_response_2_safe": "yes" if pair["is_response_1_safe"] else "no",
        "more_helpful_response_id": 1 + pair["better_response_id"],
        "safer_response_id": 1 + pair["safer_response_id"],
    } for pair in world.preference_pairs(ranked)]


# ---- models

PROCESSORS = {  # how a picture file of any size becomes what draw() returns
    "preprocessor_config.json": {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"height": 16, "width": 16}, "do_center_crop": False,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": False,
    },
    "processor_config.json": {
        "processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": CELL,
        "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default",
    },
}


def build_tokenizer():
    tokenizer = world.build_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    return tokenizer


def new_policy(config: LlavaConfig, text_policy: LlamaForCausalLM) -> LlavaForConditionalGeneration:
    """world.py's policy behind an untrained tower. Embeddings and head have one more row, for the
    image token."""
    policy = LlavaForConditionalGeneration(config)
    text_policy.resize_token_embeddings(config.text_config.vocab_size, mean_resizing=False)
    policy.model.language_model.load_state_dict(text_policy.model.state_dict())
    policy.lm_head.load_state_dict(text_policy.lm_head.state_dict())
    return policy


def train_policy(policy, tokenizer, demonstrations: list[tuple], rng: random.Random) -> None:
    """Supervised learning from the demonstrations, of all weights, the tower's included."""
    rows = [(prompt, pair) for (prompt, _), pair in zip(
        demonstrations, encode_pairs(demonstrations, tokenizer), strict=True)]

    def loss(batch):
        prompts, pairs = zip(*batch)
        return answer_loss(policy, pairs, tokenizer.pad_token_id, pixels_for(tokenizer, prompts))

    fit(list(policy.parameters()), loss, rows, batch_size=16, steps=400, lr=4e-3, rng=rng)


def train_family(config, tokenizer, text_policy, demonstrations, rankings,
                 rng: random.Random) -> dict[str, Tensor]:
    """The trained weights of policy, reward and cost model, as world.weights_with writes them."""
    policy = new_policy(config, text_policy)
    train_policy(policy, tokenizer, demonstrations, rng)
    return world.weights_with(policy, world.train_score_models(
        config, policy.model.state_dict(), tokenizer, rankings, rng))


# ---- the cache

def preset() -> dict:
    """The settings of --model tiny-pictures: tiny.json and the paths of its family."""
    return json.loads((HERE / "tiny.json").read_text()) | build()


def build(cache: Path = HERE / "cache") -> dict[str, str]:
    """Builds the family unless it is in the cache. Returns repo.py's settings with its paths. It
    starts from the text world of TINY_WORLD_SEED."""
    text_world = Path(world.build(cache)["policy"]).parent
    ingredients = [Path(__file__).read_text(), (HERE / "tiny_llava.json").read_text(),
                   hashlib.sha256(SHIPPED.read_bytes()).hexdigest()]
    folder = world.made_once(cache / f"{text_world.name}-{world.hash_of(ingredients)}",
                             lambda folder: write_family(folder, text_world))
    return world.settings_of(folder, Path(__file__))


def ship() -> None:
    """Trains the standard family again and renews the shipped weights."""
    text_world = Path(world.build(seed=0)["policy"]).parent
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(), world.one_thread():
        write_family(Path(folder), text_world, ship=True)


def recipe(text_policy, tokenizer, demonstrations: list[tuple], rankings: list[dict]) -> str:
    """A hash of what the trained weights depend on, as in world.py."""
    code = [*world.LEARNING, new_policy, train_policy, train_family, world.new_score_model,
            world.scores, world.above, world.of_verdicts, world.train_score_models]
    said = [(repr(prompt), answer) for prompt, answer in demonstrations]
    ranked = [(repr(each["prompt"]), each["answers"]) for each in rankings]
    return world.hash_of([
        (HERE / "tiny_llama.json").read_text(),
        (HERE / "tiny_llava.json").read_text(),
        json.dumps([said, ranked]),
        json.dumps(tokenizer.get_vocab(), sort_keys=True),
        *(hashlib.sha256(weight.detach().numpy().tobytes()).hexdigest()
          for weight in text_policy.parameters()),
        *map(world.code_of, code),
    ])


def write_family(folder: Path, text_world: Path, ship: bool = False) -> None:
    """Writes data, tokenizer, the three models and report.json."""
    seed = world.world_seed()
    torch.manual_seed(seed)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    demonstrations, rankings, held_out_rankings = write_data(folder, rng, generator)
    tokenizer = build_tokenizer()
    config = LlavaConfig(
        **json.loads((HERE / "tiny_llava.json").read_text()),
        text_config=json.loads((HERE / "tiny_llama.json").read_text()) | {
            "model_type": "llama", "vocab_size": len(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    for name in ("policy", "reward", "cost"):
        (folder / name).mkdir()
        for file, settings in PROCESSORS.items():
            (folder / name / file).write_text(json.dumps(settings, indent=2))
    tokenizer.sight = load_sight(config, tokenizer, str(folder / "policy"), "--model")
    text_policy = LlamaForCausalLM.from_pretrained(text_world / "policy")

    def train():
        return train_family(config, tokenizer, text_policy, demonstrations, rankings, rng)

    needed = recipe(text_policy, tokenizer, demonstrations, rankings)
    weights = world.weights_for(
        needed, SHIPPED, ship, train, config, tokenizer, held_out_rankings)
    world.save_family(folder, world.models_of(weights, config), tokenizer, held_out_rankings)


if __name__ == "__main__":
    if sys.argv[1:] == ["--ship"]:
        ship()
    print(json.dumps(build(), indent=2))
