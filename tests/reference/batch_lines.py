"""Lines for `polyhead batch` and its answers, as tests of the command write and read them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

EXACT = ("--device", "cpu", "--set", "runtime.deterministic=true", "--set", "runtime.block_size=4")


def completion(custom_id: str, prompt: Any = "the rain", **body: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 4, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def chat(custom_id: str, *texts: str, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text} for text in texts]
    body = {"messages": messages, "max_tokens": 4, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def texts(answers: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The choices' texts by custom_id, of answers of which each has one."""
    found = {each["custom_id"]: [choice["text"] for choice in each["response"]["body"]["choices"]] for each in answers}
    assert len(found) == len(answers)
    return found


def workload(count: int) -> list[dict[str, Any]]:
    words = ["the", "rain", "and", "sea", "are", "one", "thing", "he", "sings", "in", "it", "is", "on"]
    rng = random.Random(7)
    return [
        completion(f"request-{i}", " ".join(rng.choices(words, k=rng.randint(1, 4))), max_tokens=rng.randint(1, 16))
        for i in range(count)
    ]
