"""Write chat text to measure divergences on: the conversations of chatterbot-corpus, as ChatML.

    pip download --no-deps chatterbot-corpus==1.3.3
    python docs/chat_text.py chatterbot_corpus-1.3.3-py2.py3-none-any.whl chat.txt

ChatML is the chat template of SmolLM2 and Qwen2.5. One conversation of each topic follows another,
so that the beginning of the file has all topics.
"""

import sys
from itertools import chain, zip_longest
from pathlib import Path
from zipfile import ZipFile

import yaml

TOPICS = "chatterbot_corpus/data/english/"


def conversations(wheel: Path) -> list[list[str]]:
    """Return the turns of each conversation."""
    topics = []
    with ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(TOPICS):
                topics.append(yaml.safe_load(archive.read(name))["conversations"])
    found = (x for x in chain.from_iterable(zip_longest(*topics)) if x)
    return [[str(turn).strip() for turn in conversation] for conversation in found]


def chat_ml(turns: list[str]) -> str:
    """Return a conversation that the user begins."""
    roles = ("user", "assistant")
    return "".join(
        f"<|im_start|>{roles[i % 2]}\n{turn}<|im_end|>\n" for i, turn in enumerate(turns)
    )


if __name__ == "__main__":
    wheel, target = map(Path, sys.argv[1:])
    target.write_text("".join(map(chat_ml, conversations(wheel))), encoding="utf-8")
