# pytest tests/test_pictures.py
"""Prompts with a picture: read, carried to every model, saved; and the tiny world that has them."""
import copy
import io
import itertools
import json
import shutil
import struct
import zlib

import datasets
import pytest
import torch
from conftest import exhaustive, read_checkpoint, read_jsonl
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlavaConfig

import repo
from companions import monitor, neurons, score_models, supervised
from companions.shared import command
from plumbing import pictures as sight
from plumbing.adapters import make_trainable, trainable
from plumbing.data import (
    conversation_ids,
    encode_pairs,
    encode_prompts,
    lay_out,
    load_pairs,
    load_prompts,
    load_ptx_pairs,
    pixels_for,
    render_prompt,
)
from plumbing.errors import UserError
from plumbing.models import load_policy, save_tokenizer, tokenizer_with_sight
from plumbing.pictures import Pictured
from plumbing.preferences import load_preferences
from plumbing.scorers import Scorer, ScoreModel, reads_alike
from plumbing.training import State
from tiny_configs import pictures, world


@pytest.fixture(scope="session")
def seeing() -> dict:
    """Settings of the tiny family with pictures."""
    return pictures.build()


@pytest.fixture
def loaded(seeing):
    """(policy, tokenizer, config) of it."""
    config = repo.resolve_config(["--model", "tiny-pictures", "--device", "cpu"])
    return *load_policy(config), config


def drawn(count: int, seed: int = 0) -> list[Pictured]:
    generator = torch.Generator().manual_seed(seed)
    requests = list(world.REQUESTS)
    return [pictures.pictured(requests[37 * i % len(requests)], generator) for i in range(count)]


def png(pixels: torch.Tensor) -> bytes:
    """A picture [3, S, S] between 0 and 1 as a file, by the format's own rules."""
    rows = (255 * pixels).round().byte().permute(1, 2, 0)
    body = b"".join(b"\0" + bytes(row.flatten().tolist()) for row in rows)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))

    head = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(body))
            + chunk(b"IEND", b""))


# ---- the world

def test_icons_are_far_apart_and_read_exactly():
    icons = [drawing.replace(" ", "") for drawing in pictures.ICONS.values()]
    assert all(sum(a != b for a, b in zip(one, other, strict=True)) >= 4
               for one, other in itertools.combinations(icons, 2))
    generator = torch.Generator().manual_seed(1)
    for action in world.ACTIONS:
        drawings = [pictures.draw(action, generator) for _ in range(20)]
        assert {pictures.shown_in(drawing) for drawing in drawings} == {action}
        assert len({drawing.numpy().tobytes() for drawing in drawings}) == 20  # no two are alike


def test_only_the_picture_tells_the_action():
    actions_of = {}
    for request, (action, _) in world.REQUESTS.items():
        prompt = pictures.pictured(request, torch.Generator())
        actions_of.setdefault(str(prompt), set()).add(action)
        assert pictures.in_words(prompt) == request
    assert all(actions == set(world.ACTIONS) for actions in actions_of.values())


def test_the_family_has_the_shipped_weights(seeing):
    report = json.loads((pictures.Path(seeing["policy"]).parent / "report.json").read_text())
    assert report["reward_pair_accuracy"] >= 0.95 and report["cost_sign_accuracy"] >= 0.98
    built = AutoModelForImageTextToText.from_pretrained(seeing["policy"]).state_dict()
    shipped = load_file(pictures.SHIPPED)
    assert all(torch.equal(weight, shipped[f"policy.{name}"].float())
               for name, weight in built.items())


# ---- prompts

def test_two_prompts_are_equal_if_text_and_picture_are():
    one, other = drawn(2)
    again = Pictured(str(one), one.image.clone())
    assert one == again and hash(one) == hash(again)
    assert one != Pictured(str(one), other.image) and one != str(one) and str(one) == f"{one}"
    assert len({one, again, other}) == 2


def test_a_file_is_what_it_holds(tmp_path):
    """Not how it is called: it may be another picture tomorrow, or lie elsewhere."""
    for name, content in (("a.png", b"one"), ("b.png", b"one"), ("c.png", b"two")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (Pictured("p", tmp_path / name) for name in ("a.png", "b.png", "c.png"))
    assert a == b != c and a.label == f"a.png {a.digest}" and Pictured("p", b"one") == a
    (tmp_path / "a.png").write_bytes(b"three")
    assert Pictured("p", tmp_path / "a.png") != a
    assert copy.deepcopy(a) == a


@pytest.mark.parametrize("kind", ["path", "relative", "bytes", "feature", "numbers"])
def test_every_way_to_bring_a_picture_gives_the_same_pixels(loaded, tmp_path, kind):
    _, tokenizer, _ = loaded
    prompts = drawn(3)
    if kind == "numbers":
        file = tmp_path / "p.jsonl"
        file.write_text("".join(json.dumps(pictures.row_of(prompt)) + "\n" for prompt in prompts))
    else:
        pytest.importorskip("PIL")
        for i, prompt in enumerate(prompts):
            (tmp_path / f"{i}.png").write_bytes(png(prompt.image))
        images = {
            "path": [str(tmp_path / f"{i}.png") for i in range(3)],
            "relative": [f"{i}.png" for i in range(3)],
            "bytes": [png(prompt.image) for prompt in prompts],
            "feature": [{"bytes": png(prompt.image), "path": None} for prompt in prompts],
        }[kind]
        rows = datasets.Dataset.from_dict({"question": list(map(str, prompts)), "image": images})
        if kind == "feature":
            rows = rows.cast_column("image", datasets.Image())
        file = tmp_path / "p.parquet"
        rows.to_parquet(file)
    read = load_prompts(str(file), tokenizer=tokenizer)
    assert [str(prompt) for prompt in read] == [str(prompt) for prompt in prompts]
    difference = (pixels_for(tokenizer, read) - pixels_for(tokenizer, prompts)).abs().max()
    assert difference <= (0 if kind == "numbers" else 0.5 / 255 + 1e-6)


def test_a_larger_picture_is_brought_to_size(loaded):
    pytest.importorskip("PIL")
    _, tokenizer, _ = loaded
    [prompt] = drawn(1)
    large = prompt.image.repeat_interleave(8, 1).repeat_interleave(8, 2)
    [pixels] = pixels_for(tokenizer, [Pictured("p", png(large))])
    assert pixels.shape == (3, 16, 16)
    assert pictures.shown_in(pixels) == pictures.shown_in(prompt.image)


def test_the_place_holder_stands_once_per_state_before_the_text(loaded):
    _, tokenizer, _ = loaded
    [prompt] = drawn(1)
    [ids] = encode_prompts([prompt], tokenizer)
    place_holder = tokenizer.convert_tokens_to_ids("<image>")
    assert ids.count(place_holder) == 16
    first = ids.index(place_holder)
    assert ids[first:first + 16] == [place_holder] * 16
    [plain] = encode_prompts([str(prompt)], tokenizer)
    assert len(plain) < len(ids) and place_holder not in plain
    [answered] = conversation_ids(tokenizer, [prompt], ["a <image> b"], [False])
    assert answered.count(place_holder) == 16  # an answer brings no picture


def test_a_chat_template_gets_the_picture_as_it_wants_it(loaded):
    _, tokenizer, _ = loaded
    [prompt] = drawn(1)
    for template, expected, plain in (
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", f"[<image>\n{prompt}]",
         f"[{prompt}]"),
        (PARTS, f"(pic){prompt}", str(prompt)),
    ):
        tokenizer.chat_template = template
        assert render_prompt(prompt, tokenizer) == expected
        assert render_prompt(str(prompt), tokenizer) == plain  # a prompt without a picture is read


PARTS = ("{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}(pic)"
         "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}")


def test_a_chat_template_in_a_file_of_the_processors_is_read(seeing, tmp_path):
    shutil.copytree(seeing["policy"], tmp_path / "m")
    (tmp_path / "m" / "chat_template.json").write_text(json.dumps({"chat_template": PARTS}))
    config = repo.Config(model=str(tmp_path / "m"), policy=str(tmp_path / "m"), device="cpu")
    tokenizer = tokenizer_with_sight(config.policy, "--model", config)
    [prompt] = drawn(1)
    assert render_prompt(prompt, tokenizer) == f"(pic){prompt}"


def test_turns_before_a_picture_and_no_turn_for_it(loaded):
    _, tokenizer, _ = loaded
    [prompt] = drawn(1)
    chat = Pictured("\n\nSystem: be nice\n\nHuman: one\n\nAssistant: two\n\nHuman: three",
                    prompt.image)
    assert render_prompt(chat, tokenizer).startswith(
        "BEGINNING OF CONVERSATION: USER: be nice\n\n<image>\none ASSISTANT:two")
    with pytest.raises(UserError, match="has a picture, but no message of the user"):
        render_prompt(Pictured("\n\nSystem: be nice", prompt.image), tokenizer)


def test_only_the_picture_has_place_holders(loaded, tmp_path):
    """Whatever a row's text or an answer spells."""
    _, tokenizer, _ = loaded
    place_holder = tokenizer.convert_tokens_to_ids("<image>")
    row = pictures.row_of(drawn(1)[0])
    (tmp_path / "p.jsonl").write_text(json.dumps(row | {"prompt": "<image>\nWhat is it?"}) + "\n")
    [prompt] = load_prompts(str(tmp_path / "p.jsonl"), tokenizer=tokenizer)
    assert str(prompt) == "What is it?"
    for text in (str(prompt), "a <im<image>age> b"):
        [ids] = conversation_ids(
            tokenizer, [Pictured(text, prompt.image)], ["x <im<image>age> y"], [False])
        assert ids.count(place_holder) == 16


# ---- models

def log_probs_and_values(loaded, prompts, answers):
    """[N] each, of all answers' tokens in one batch."""
    policy, tokenizer, config = loaded
    pairs = encode_pairs(list(zip(prompts, answers)), tokenizer)
    batch = repo.Sequences(*lay_out(*zip(*pairs), tokenizer.pad_token_id, "cpu"),
                           pixels_for(tokenizer, prompts))
    critic = ScoreModel.from_pretrained(config.cost_model, "cost")
    with torch.no_grad():
        found = torch.stack([repo.response_log_probs(policy, batch, 1.0),
                             repo.response_values(critic, batch)])
    return found.split(batch.response_mask.sum(1).tolist(), 1)


@pytest.mark.parametrize("fused", [True, False])
def test_padding_and_other_rows_pictures_change_nothing_and_the_own_one_does(loaded, fused):
    policy, tokenizer, config = loaded
    if not fused:
        policy.fused_head = None
    first, second, third = drawn(3)
    long = Pictured("I want " + "very much " * 9 + str(second), second.image)
    answers = ["Sure, to clean a boat, wipe it.", "No, please ask for something else."]
    [alone] = log_probs_and_values(loaded, [first], answers[:1])
    for other in (second, long, Pictured(str(second), third.image)):
        beside, _ = log_probs_and_values(loaded, [first, other], answers)
        assert (beside - alone).abs().max() < 1e-5
    [seen] = log_probs_and_values(loaded, [Pictured(str(first), third.image)], answers[:1])
    assert (seen - alone).abs().amax(1).min() > 0.01  # both the policy and the critic look


def test_score_models_look_at_the_picture(loaded):
    """The same words help with one picture, and not with another."""
    _, tokenizer, config = loaded
    reward = Scorer("reward", tokenizer, config)
    assert reward.same_tokens
    generator = torch.Generator().manual_seed(3)
    prompts = [Pictured("How do I do this to a boat?", pictures.draw(action, generator))
               for action in ("clean", "pack")]
    for action, sign in (("clean", 1), ("pack", -1)):
        responses = [world.comply(action, "a boat", 3)] * 2
        rows = [p + a for p, a in encode_pairs(list(zip(prompts, responses)), tokenizer)]
        of_clean, of_pack = reward(rows, prompts, responses, [True] * 2)
        assert sign * (of_clean - of_pack) > 3


def test_no_answer_shows_a_picture(loaded):
    """Though the head gives the place-holder the largest of all logits."""
    policy, tokenizer, config = loaded
    place_holder = tokenizer.convert_tokens_to_ids("<image>")
    with torch.no_grad():
        policy.lm_head.weight[place_holder] = 100 * policy.lm_head.weight.sum(0).sign()
    prompts = drawn(4)
    answers = repo.generate(policy, tokenizer, encode_prompts(prompts, tokenizer), config, "key",
                            pixels_for(tokenizer, prompts))
    assert all(place_holder not in answer for answer in answers)


def test_each_prompt_is_answered_by_its_own_picture(loaded):
    """Prompts of several lengths, which sampling sorts; at a temperature that leaves no choice."""
    policy, tokenizer, config = loaded
    config.temperature = 1e-4
    prompts = [Pictured(f"{'Well, ' * (5 - i)}{prompt}", prompt.image)
               for i, prompt in enumerate(drawn(5))]

    def answers(prompts):
        return repo.generate(policy, tokenizer, encode_prompts(prompts, tokenizer), config, "key",
                             pixels_for(tokenizer, prompts))

    together = answers(prompts)
    assert together == [answer for prompt in prompts for answer in answers([prompt])]
    other = [Pictured(str(prompt), prompts[0].image) for prompt in prompts]
    assert answers(other) != together


def test_a_score_model_with_another_processor_looks_for_itself(loaded):
    _, tokenizer, config = loaded
    other = tokenizer_with_sight(config.cost_model, "--cost_model", config)
    assert reads_alike(other, tokenizer)
    other.sight.processing = {**other.sight.processing, "do_normalize": True}
    assert not reads_alike(other, tokenizer)


@pytest.mark.parametrize("rank", [0, 4])
def test_what_is_trained_of_a_model_that_sees(loaded, rank):
    """Language part and projector, or adapters on the language part; the tower never."""
    policy, _, config = loaded
    config.lora_rank = rank
    names = list(trainable(make_trainable(policy, config)))
    assert not any("vision_tower" in name for name in names)
    assert any("projector" in name for name in names) == (rank == 0)
    assert all("language_model" in name and "lora" in name for name in names) == (rank > 0)


@pytest.mark.parametrize("rank", [exhaustive(0), 4])
def test_a_run_with_pictures_is_saved_resumed_and_evaluated(run, seeing, tmp_path, rank):
    few = {}
    for name in ("dataset", "ptx_dataset"):  # to read all rows takes longer than the run
        with open(seeing[name]) as file:
            few[name] = tmp_path / f"{name}.jsonl"
            few[name].write_text("".join(itertools.islice(file, 40)))
    flags = ["--model", "tiny-pictures", "--device", "cpu", "--steps", "2", "--batch_size", "4",
             "--minibatch_size", "2", "--max_eval_prompts", "4", "--eval_samples", "1",
             "--save_every", "1", "--lora_rank", rank, "--ptx_coeff", "1",
             "--dataset", few["dataset"], "--ptx_dataset", few["ptx_dataset"]]
    code, out, printed = run(*flags)
    assert code == 0, printed
    tensors, _ = read_checkpoint(out / "checkpoints" / "step-1")
    trained = {name for name in tensors if name.startswith(("policy.", "cost_critic."))}
    assert any(".language_model." in name for name in trained)
    assert not any("vision_tower" in name for name in trained)
    assert any("projector" in name for name in trained) == (rank == 0)

    before = AutoModelForImageTextToText.from_pretrained(seeing["policy"]).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(out / "final" / "actor").state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert any(".language_model." in name for name in changed)
    assert not any("vision_tower" in name or ("projector" in name and rank) for name in changed)
    rows = read_jsonl(out / "eval.jsonl")
    assert all(row["image"] for row in rows)

    # From the first step's checkpoint the second goes to the same weights.
    code, again, printed = run(*flags, "--resume", out / "checkpoints" / "step-1", out="again")
    assert code == 0, printed
    for name in ("actor", "cost_critic"):
        one, other = ((folder / "final" / name / "model.safetensors").read_bytes()
                      for folder in (out, again))
        assert one == other
    code, scored, printed = run("--eval_only", out, "--device", "cpu", out="scored")
    assert code == 0, printed
    assert [row["responses"][0]["response"] for row in read_jsonl(scored / "eval.jsonl")] == [
        row["responses"][0]["response"] for row in rows]


def test_final_actor_comes_with_its_processor(loaded, tmp_path):
    pytest.importorskip("PIL")
    from PIL import Image
    from transformers import LlavaProcessor

    _, tokenizer, _ = loaded
    save_tokenizer(tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.convert_tokens_to_ids("<image>") == tokenizer.convert_tokens_to_ids("<image>")
    [prompt] = drawn(1)
    processor = LlavaProcessor(
        patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_processor=sight.AutoImageProcessor.from_pretrained(tmp_path, backend="pil"),
        tokenizer=again)
    text = f"BEGINNING OF CONVERSATION: USER: <image>\n{prompt} ASSISTANT:"
    read = processor(images=Image.open(io.BytesIO(png(prompt.image))), text=text,
                     return_tensors="pt")
    assert read["input_ids"][0].tolist() == encode_prompts([prompt], tokenizer)[0]
    assert (read["pixel_values"] - pixels_for(tokenizer, [prompt])).abs().max() < 0.003


def test_an_update_learns_from_the_picture(loaded):
    """One text, two pictures, two answers: only who looks can tell which belongs to which."""
    policy, tokenizer, config = loaded
    generator = torch.Generator().manual_seed(0)
    first, second = (Pictured("What now?", pictures.draw(action, generator))
                     for action in ("clean", "torch"))
    answers = ["wipe it", "light a match"]
    optimizer = torch.optim.Adam(policy.model.language_model.parameters(), lr=3e-3)

    def losses() -> torch.Tensor:
        pairs = encode_pairs([(first, answers[0]), (second, answers[1])], tokenizer)
        batch = repo.Sequences(*lay_out(*zip(*pairs), tokenizer.pad_token_id, "cpu"),
                               pixels_for(tokenizer, [first, second]))
        return repo.ptx_loss(policy, batch, batch.response_mask.sum(), config)[0]

    for _ in range(40):
        optimizer.zero_grad()
        losses().backward()
        optimizer.step()
    right = sum(part[0].sum() for part in log_probs_and_values(loaded, [first, second], answers))
    wrong = sum(part[0].sum()
                for part in log_probs_and_values(loaded, [first, second], answers[::-1]))
    assert right - wrong > 5


def test_beavertails_v_pairs_are_read_with_their_pictures(loaded, tmp_path):
    _, tokenizer, _ = loaded
    [prompt] = drawn(1)
    row = {"question": str(prompt), "image": pictures.row_of(prompt)["image"], "category": "x",
           "response_1": "one", "response_2": "two", "is_response_1_safe": "yes",
           "is_response_2_safe": "no", "more_helpful_response_id": "2", "safer_response_id": "1"}
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(row) + "\n")
    for role, better, unsafe in (("reward", "two", (True, False)), ("cost", "one", (False, True))):
        [asked], [pair] = load_preferences(str(file), "--data", role, tokenizer, 512)
        assert asked == pair.prompt == prompt
        assert better in tokenizer.decode(pair.better) and pair.is_unsafe == unsafe
    assert load_pairs(str(file))[0][0] == prompt


def test_parts_of_a_message_are_its_text(tmp_path):
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    row = {"messages": [{"role": "user", "content": parts},
                        {"role": "assistant", "content": [{"type": "text", "text": "A boat."}]}],
           "image": pictures.row_of(drawn(1)[0])["image"]}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    [(prompt, answer)] = load_pairs(str(tmp_path / "p.jsonl"))
    assert (str(prompt), answer) == ("What is it?", "A boat.") and isinstance(prompt, Pictured)


def test_a_step_learns_its_ptx_pairs_with_their_pictures(loaded):
    """The loss that it tells is another where the pictures are others'."""
    policy, tokenizer, config = loaded
    config.ptx_coeff, config.batch_size, config.minibatch_size = 1.0, 4, 4
    config.max_response_length, config.steps = 4, 9
    generator = torch.Generator().manual_seed(0)
    requests = ["How do I clean a boat?", "How do I torch a boat?"] * 2
    asked = [pictures.pictured(request, generator) for request in requests]
    texts = [world.comply(*world.REQUESTS[request], 3) for request in requests]
    losses = []
    for prompts in (asked, [asked[1], asked[0]] * 2):
        shown = [Pictured(str(prompt), other.image) for prompt, other in zip(asked, prompts)]
        pairs = [(*ids, prompt) for ids, prompt in zip(
            encode_pairs(list(zip(shown, texts)), tokenizer), shown)]
        state = State(*load_policy(config), config)
        losses.append(repo.train_step(state, drawn(4), pairs, config)[1]["ptx_loss"])
    assert losses[1] > losses[0] + 0.1


def test_supervised_learning_looks(loaded):
    """An answer is likelier with the picture that it belongs to."""
    policy, tokenizer, _ = loaded
    generator = torch.Generator().manual_seed(0)
    asked = [pictures.pictured(f"How do I {action} a boat?", generator)
             for action in ("clean", "pack")]
    answers = [world.comply(action, "a boat", 3) for action in ("clean", "pack")]
    own, swapped = (
        supervised.loss_of(policy, [
            (*ids, prompt) for ids, prompt in zip(
                encode_pairs(list(zip(prompts, answers)), tokenizer), prompts)], tokenizer).item()
        for prompts in (asked, asked[::-1]))
    assert swapped > own + 0.5


@pytest.mark.parametrize("script", ["supervised", exhaustive("cost")])
def test_companions_learn_from_pictures(seeing, tmp_path, script):
    folder = pictures.Path(seeing["policy"]).parent
    common = {"model": seeing["policy"], "device": "cpu", "out": str(tmp_path / "m")}
    if script == "supervised":
        settings = supervised.SupervisedSettings(
            data=str(folder / "demonstrations.jsonl"), steps=2, batch_size=4, **common)
        figures = supervised.run(settings)
        assert figures["held_out_loss"] < 2
        assert (tmp_path / "m" / "preprocessor_config.json").is_file()
    else:
        settings = score_models.ScoreSettings(
            role="cost", data=str(folder / "preferences.jsonl"), lr=2e-3, steps=200, batch_size=32,
            eval_data=str(folder / "preferences_held_out.jsonl"), **common)
        figures = score_models.run(settings)
        assert figures["sign_accuracy"] >= 0.9 and figures["pair_accuracy"] >= 0.85


# ---- what cannot work

def test_pictures_that_do_not_fit_are_refused_in_a_sentence(loaded, tmp_path, monkeypatch):
    _, tokenizer, _ = loaded
    text_tokenizer = world.build_tokenizer()
    [prompt] = drawn(1)
    good = pictures.row_of(prompt)

    def says(rows, sentence, tokenizer=tokenizer):
        file = tmp_path / "p.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(UserError, match=sentence):
            pixels_for(tokenizer, load_prompts(str(file), tokenizer=tokenizer))

    says([good, {"prompt": "p", "image": None}], "1 of its 2 rows have no image")
    says([good], "the model reads none", text_tokenizer)
    says([{"prompt": "p", "image": "none.png"}], "there is no picture 'none.png'")
    says([{"prompt": "p", "image": [[[0.5]]]}], r"has the shape \[1, 1, 1\]")
    says([{"prompt": "p", "image": [[[0.5], [0.5, 0.5]]], "other": None}], "is no picture")
    says([{"prompt": "p", "images": ["a.png"]}], "has a column images")
    (tmp_path / "no.png").write_text("no picture")
    monkeypatch.setattr(sight, "find_spec", lambda name: None)
    says([{"prompt": "p", "image": "no.png"}], "pip install pillow")
    monkeypatch.undo()
    pytest.importorskip("PIL")
    says([{"prompt": "p", "image": "no.png"}], "cannot be read")


@pytest.mark.parametrize("what", ["ptx", "supervised", "preferences", "monitor", "neurons"])
def test_who_cannot_see_is_not_trained_blindly(seeing, family, tmp_path, capsys, what):
    folder = pictures.Path(seeing["policy"]).parent
    if what in ("ptx", "supervised", "preferences"):
        tokenizer = world.build_tokenizer()
        call = {
            "ptx": lambda: load_ptx_pairs(repo.Config(**seeing), tokenizer),
            "supervised": lambda: supervised.pairs_of(
                seeing["ptx_dataset"], "--data", supervised.SupervisedSettings(), tokenizer),
            "preferences": lambda: load_preferences(
                str(folder / "preferences.jsonl"), "--data", "cost", tokenizer, 512),
        }[what]
        with pytest.raises(UserError, match="its prompts have pictures, but the model reads none"):
            call()
        return
    if what == "monitor":
        code = monitor.main(["watch", "--policy", seeing["policy"], "--monitor",
                             family["cost_model"], "--dataset", family["dataset"], "--theta", "0"])
    else:
        code = command.main(neurons.NeuronSettings, neurons.run, [
            seeing["policy"], seeing["policy"], "--dataset", family["dataset"],
            "--cost_model", family["cost_model"], "--reward_model", family["reward_model"]])
    assert code == 2 and "sees pictures, and this reads text alone" in capsys.readouterr().err


@pytest.mark.parametrize("kind, sentence", [
    ("qwen2_vl", "is a qwen2_vl; of the models that see, only LLaVA's layout"),
    ("pixtral", "its vision tower is a pixtral"),
    ("no token", "its tokenizer has no token 99999"),
    ("count", "makes 16 states of a picture, but its config.json says image_seq_length 9"),
])
def test_models_that_do_not_fit_are_refused_by_name(seeing, tmp_path, run, kind, sentence):
    folder = tmp_path / "model"
    shutil.copytree(seeing["policy"], folder)
    config = LlavaConfig.from_pretrained(folder).to_dict()
    if kind == "qwen2_vl":
        config = {"model_type": "qwen2_vl"}
    elif kind == "pixtral":
        config["vision_config"] = {"model_type": "pixtral"}
    elif kind == "no token":
        config["image_token_index"] = 99999
    else:
        config["image_seq_length"] = 9
    (folder / "config.json").write_text(json.dumps(config))
    code, out, printed = run("--model", "tiny-pictures", "--policy", folder, "--device", "cpu")
    assert code == 2 and sentence in printed and not out.exists()


def test_a_run_with_pictures_is_planned(run):
    code, _, printed = run("--model", "tiny-pictures", "--dry_run", "--device", "cpu")
    assert code == 0 and "<image>\\nHow do I" in printed and "fits on this computer" in printed


@pytest.mark.exhaustive
def test_a_seven_billion_llava_is_planned(tmp_path, run):
    """LLaVA-1.5's shape, without weights."""
    tokenizer = pictures.build_tokenizer()
    config = {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"), "image_seq_length": 576,
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
            "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336,
            "patch_size": 14},
        "text_config": {"model_type": "llama", "vocab_size": 32064},  # the rest is Llama 7B's
    }
    folder = tmp_path / "llava"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    rows = [pictures.row_of(prompt) for prompt in drawn(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, printed = run(
        "--model", folder, "--reward_model", folder, "--cost_model", folder, "--dry_run",
        "--dataset", tmp_path / "rows.jsonl", "--max_prompt_length", 700, "--max_length", 1212,
        "--lora_rank", 64, "--batch_size", 16)
    assert code == 0, printed
    assert "7,063,427,072" in printed and "fits on a GPU of 80GiB" in printed


# ---- what it learns

@pytest.mark.parametrize("seed", [exhaustive(0), exhaustive(1)])
@pytest.mark.parametrize("algo", ["repo", "ppo_lag"])
def test_safety_compensation_and_its_cure_with_pictures(run, algo, seed):
    code, out, printed = run("--model", "tiny-pictures", "--device", "cpu", "--seed", seed,
                             "--algo", algo)
    assert code == 0, printed
    summary = json.loads((out / "summary.json").read_text())
    if algo == "repo":
        assert summary["safety_rate_on_harmful_prompts"] >= 0.95
        assert summary["over_refusal_rate"] <= 0.05
    else:
        # Seen: 0.0 for both seeds; a machine that rounds otherwise has left more.
        rates = summary["cost"], summary["safety_rate_on_harmful_prompts"]
        assert rates[0] <= 0 and rates[1] <= 0.6, rates
