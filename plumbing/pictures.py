"""Prompts with a picture, and the models that see them: LLaVA's layout.

A vision tower makes of a picture of one fixed size as many states as the text has place-holder
tokens for it; they take the place of the place-holders' embeddings. Everything else is a language
model, and nothing in the method changes.
"""
import hashlib
import io
import json
import shutil
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import datasets
import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import cached_file

from plumbing.chats import Chat, messages_of, prompt_of
from plumbing.errors import blame, require

TOWERS = "clip_vision_model", "siglip_vision_model"  # pictures of one size, patches on one grid
PROCESSOR_FILES = "preprocessor_config.json", "processor_config.json"  # a template is a tokenizer's


# ---- prompts

class Pictured(Chat):
    """A prompt with a picture: the text or Chat, as prompts are everywhere, and `image`, a path,
    the bytes of a file, or a tensor of pixels as the model takes them, [3, S, S]. Two are equal if
    both are."""

    def __new__(cls, text: str, image):
        prompt = super().__new__(cls, text, getattr(text, "messages", None))
        prompt.image = image
        content = image
        if isinstance(image, Path):
            content = image.read_bytes()
        elif isinstance(image, Tensor):
            content = image.numpy().tobytes()
        prompt.digest = hashlib.sha256(content).hexdigest()[:16]
        return prompt

    def __getnewargs__(self):
        return Chat(str(self), self.messages), self.image

    @property
    def label(self) -> str:
        """What people find the picture by: its file's name, if it has one, and a hash."""
        name = [self.image.name] if isinstance(self.image, Path) else []
        return " ".join([*name, self.digest])

    def __eq__(self, other) -> bool:
        return super().__eq__(other) and self.digest == getattr(other, "digest", None)

    def __hash__(self) -> int:
        return hash((str(self), self.digest))

    def __repr__(self) -> str:
        return f"{super().__repr__()} with picture {self.digest}"


def undecoded(rows: datasets.Dataset) -> datasets.Dataset:
    """Columns of pictures as bytes or paths: pillow is for whoever looks at them."""
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def with_picture(text: str, image, folder: Path) -> Pictured:
    """The prompt of a row, whose image is a path (relative ones are looked up in its file's
    folder), bytes, what a datasets Image column holds, or nested lists of pixels; an "<image>" in
    the text, as such data often have it, is taken out. Raises UserError for what is no picture."""
    if isinstance(image, dict):
        image = image["bytes"] or image["path"]
    if isinstance(image, str):
        found = [path for path in (folder / image, Path(image)) if path.is_file()]
        require(found, f"there is no picture {image!r}, neither in {folder} nor here; a column "
                       "image is for pictures, so leave it out where there are none")
        image = found[0].resolve()
    with blame(f"the image of {text[:60]!r} is no picture"):
        if isinstance(image, list):
            image = torch.tensor(image, dtype=torch.float32)
        messages = [{**message, "content": message["content"].replace("<image>", "").strip()}
                    for message in messages_of(text)]
        return Pictured(prompt_of(messages), image)


# ---- models that see

def sees(model_config) -> bool:
    """Whether a model of this config takes pictures."""
    return model_config.model_type == "llava"


def model_class(sees: bool):
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def check_sight(model_config, source: str) -> None:
    """Raises UserError for models whose pictures do not fit: patches of many sizes, positions in
    several dimensions, several pictures."""
    kind = type(model_config)
    if sees(model_config):
        tower = model_config.vision_config.model_type
        require(tower in TOWERS, f"{source}: its vision tower is a {tower}; pictures are read by "
                                 f"towers of one fixed size alone ({', '.join(TOWERS)})")
    else:
        only_sees = (kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
                     and kind not in MODEL_FOR_CAUSAL_LM_MAPPING)
        require(not only_sees, f"{source}: is a {model_config.model_type}; of the models that see, "
                               "only LLaVA's layout (one picture of a fixed size per prompt) fits")


def check_blind(tokenizer, source: str) -> None:
    """Raises UserError for a model that sees, where text alone is read."""
    require(not tokenizer.sight, f"{source}: sees pictures, and this reads text alone")


def language_part(body):
    """What a body that sees speaks with; another body as a whole."""
    return getattr(body, "language_model", body)


@dataclass
class Sight:
    """What a model takes of a picture, and the place-holder for it in a text. Two models see alike
    if these are equal."""

    place_holder: str        # a token
    count: int               # of them, in a prompt
    size: int                # S  pixels on a side
    processing: dict         # how a file becomes [3, S, S]
    source: str = field(compare=False)
    processor: object = field(default=None, compare=False)

    def without_place_holder(self, text: str) -> str:
        """Nothing but a picture's own place-holders may stand for a picture."""
        while self.place_holder in text:  # taken out of "<im<image>age>", it stands there again
            text = text.replace(self.place_holder, "")
        return text

    def pixels(self, prompts: list[str]) -> Tensor | None:
        """What the prompts' pictures are to the model: [B, 3, S, S]; None if there are none."""
        if not isinstance(prompts[0], Pictured):
            return None
        of_each = {prompt: self.pixels_of(prompt) for prompt in set(prompts)}
        return torch.stack([of_each[prompt] for prompt in prompts])

    def pixels_of(self, prompt: Pictured) -> Tensor:
        """[3, S, S]. Raises UserError for what is no picture, or of another shape."""
        image, what = prompt.image, f"the picture of the prompt {prompt[:60]!r}"
        if not isinstance(image, Tensor):
            image = self.read(image, what)
        shape = 3, self.size, self.size
        require(image.shape == shape, f"{what}: has the shape {list(image.shape)}, "
                                      f"but {self.source} takes {list(shape)}")
        return image

    def read(self, image: Path | bytes, what: str) -> Tensor:
        """A file's pixels, as the checkpoint wants them. Raises UserError without pillow."""
        require(find_spec("PIL"),
                f"{what}: reading image files takes one more package (pip install pillow)")
        from PIL import Image  # optional
        with blame(f"{what}: cannot be read"):
            if not self.processor:
                self.processor = AutoImageProcessor.from_pretrained(self.source, backend="pil")
            opened = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
            return self.processor(opened.convert("RGB"), return_tensors="pt").pixel_values[0]


def load_sight(model_config, tokenizer, source: str, flag: str) -> Sight | None:
    """How a model sees; None if it does not. Raises UserError for pictures that do not fit."""
    check_sight(model_config, f"{flag} {source}")
    if not sees(model_config):
        return None
    if Path(source).expanduser().exists():
        source = str(Path(source).expanduser())
    place_holder = tokenizer.convert_ids_to_tokens(model_config.image_token_id)
    require(place_holder, f"{flag} {source}: its tokenizer has no token "
                          f"{model_config.image_token_id}, the place-holder for a picture")
    with blame(f"{flag} {source}: its image processor cannot be loaded"):
        processing, _ = ImageProcessingMixin.get_image_processor_dict(source)
    return Sight(
        place_holder=place_holder,
        count=model_config.image_seq_length,
        size=model_config.vision_config.image_size,
        processing=processing,
        source=source,
    )


def set_chat_template(tokenizer, source: str) -> None:
    """Where a checkpoint keeps its chat template in a file of its processor's."""
    file = in_checkpoint(source, "chat_template.json")
    if file and not tokenizer.chat_template:
        tokenizer.chat_template = json.loads(Path(file).read_text())["chat_template"]


def in_checkpoint(source: str, name: str) -> str | None:
    """Where a file of a checkpoint is, in a folder or fetched from the hub; None if it has none."""
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_connection_errors=False)


def check_count(model, sight: Sight, source: str) -> None:
    """Raises UserError if a model makes another number of states of a picture than its config
    promises."""
    blank = torch.zeros(1, 3, sight.size, sight.size, dtype=model.dtype, device=model.device)
    with torch.no_grad():
        [states] = model.get_image_features(blank).pooler_output                     # [count, H]
    require(len(states) == sight.count,
            f"{source}: makes {len(states)} states of a picture, but its config.json says "
            f"image_seq_length {sight.count}")


def save_processor(sight: Sight, folder: Path) -> None:
    """The checkpoint's own files, beside what has been made of it."""
    for name in PROCESSOR_FILES:
        file = in_checkpoint(sight.source, name)
        if file and not (folder / name).exists():
            shutil.copyfile(file, folder / name)


def in_call(pixel_values: Tensor | None, device) -> dict:
    """The argument of a model's call: the library wants no None."""
    return {} if pixel_values is None else {"pixel_values": pixel_values.to(device)}
