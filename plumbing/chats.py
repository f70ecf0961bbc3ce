"""Conversations: prompts of several turns.

A prompt is a string: what the user says or, if there were turns before, a transcript
"\\n\\nHuman: ...\\n\\nAssistant: ...\\n\\nHuman: ...". Where a transcript would be read as other
messages than it was made of, the string is a Chat, which carries them.
"""
import re

TURN = re.compile(r"\n\n(Human|Assistant|System):[ ]?")
ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}
MARKS = re.compile(  # of turns in formats that are not read
    r"\s*(### ?(Human|User|Instruction)\b|<\|(im_start|user|system)|<extra_id_1>|\[INST\]|USER:)")
FOREIGN = ("human", "gpt", "prompter", "bot", "model", "chatgpt")  # for user and assistant
NAMES = {role: name for name, role in ROLES.items()}


class Chat(str):
    """A transcript, for people and files, and its `messages`, for templates. Two are equal if both
    are."""

    def __new__(cls, transcript: str, messages: list[dict] | None):
        prompt = super().__new__(cls, transcript)
        prompt.messages = messages
        return prompt

    def __getnewargs__(self):
        return str(self), self.messages

    def __eq__(self, other) -> bool:
        return str(self) == str(other) and self.messages == getattr(other, "messages", None)

    def __ne__(self, other) -> bool:  # str has one of its own
        return not self == other

    __hash__ = str.__hash__

    def __repr__(self) -> str:
        return super().__repr__() + (f" of {self.messages}" if self.messages else "")


def to_messages(text: str) -> list[dict]:
    """Plain text or a transcript as a list of {"role": ..., "content": ...}. A stripped transcript
    is one too, if it holds an answer's turn."""
    if text.startswith(("Human:", "System:")) and "\n\nAssistant:" in text:
        text = f"\n\n{text}"
    before, *turns = TURN.split(text)
    if before.strip() or not turns:
        return [{"role": "user", "content": text}]
    return [{"role": ROLES[name], "content": content.strip()}
            for name, content in zip(turns[::2], turns[1::2])]


def messages_of(prompt: str) -> list[dict]:
    return getattr(prompt, "messages", None) or to_messages(str(prompt))


def prompt_of(messages: list[dict]) -> str:
    """The prompt whose messages_of are these."""
    if [message["role"] for message in messages] == ["user"]:
        text = messages[0]["content"]
    else:
        text = "".join(f"\n\n{NAMES.get(message['role'], message['role'].title())}: "
                       f"{message['content']}" for message in messages)
    return text if to_messages(text) == messages else Chat(text, messages)


def to_pair(chat: str | list[dict],
            answer: str | list[dict] | None = None) -> tuple[str, str | None]:
    """Plain text, a transcript or a list of messages as (prompt, answer). If the last turn is the
    assistant's, it is the answer. An answer that is a list of messages goes on with the chat."""
    messages = read_messages(chat)
    if isinstance(answer, list):
        messages, answer = messages + read_messages(answer), None
    if messages[-1]["role"] == "assistant":
        answer = messages.pop()["content"] or answer
    return prompt_of(messages), answer


def read_messages(chat: str | list[dict]) -> list[dict]:
    return list(map(as_text, chat)) if isinstance(chat, list) else to_messages(chat)


def require_turns(chat: str | list[dict]) -> None:
    """Raises ValueError for plain text, which may be an answer alone."""
    if isinstance(chat, str) and len(to_messages(chat)) == 1:
        raise ValueError(f"{chat[:60]!r} is no conversation, and no column prompt is beside it")


def is_whole(chat: str | list[dict]) -> bool:
    """Whether it is a conversation that ends with an answer, perhaps an empty one."""
    messages = read_messages(chat)
    return len(messages) > 1 and messages[-1]["role"] == "assistant"


def as_text(message: dict) -> dict:
    """Role and content of a message, whose content may be a list of parts. Raises ValueError for
    what is not text; a picture comes from its column, see without_picture."""
    role, content = message["role"], message["content"]
    if role in FOREIGN:
        raise ValueError(f"a message has the role {role}; name the roles user and assistant")
    if isinstance(content, list) and all(part["type"] == "text" for part in content):
        content = "\n".join(part["text"] for part in content)
    calls_a_tool = message.get("tool_calls") or message.get("function_call")
    if calls_a_tool or not isinstance(content, str):
        raise ValueError(f"a message of role {role} calls a tool or has no text; only text is read")
    return {"role": role, "content": content}


def without_picture(message: dict) -> dict:
    """A message without the part that marks the place of the row's picture."""
    content = message["content"]
    if isinstance(content, list):
        content = [part for part in content if part["type"] != "image"]
    return {**message, "content": content}
