"""Writes goldens/: what Hugging Face transformers computes, in float32, for the tiny models and for SmolLM2-135M.

    pip install torch transformers gguf numpy
    python make_goldens.py                                            # the tiny models
    python make_goldens.py --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf  # that model only

Not needed to run tests. Knows nothing of this project's code; the file conventions are in hf_reference.py.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import golden
import numpy as np
import tiny_models
import torch
from hf_checkpoints import checkpoints
from hf_reference import Float64, GGUFFile, load_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import gguf

VERSIONS = {name: version(name) for name in ("torch", "transformers", "gguf", "numpy")}

RAW = [
    "Once upon a time, in a small village by the sea,",
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "In 1969, 3 astronauts travelled 384400 km; 2 of them",
    "Crème brûlée — a dessert “à la carte” that isn't\thard to make. You need:\n1.",
]
CHAT = [
    [{"role": "user", "content": "What is the capital of Italy?"}],
    [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    [
        {"role": "user", "content": "My name is Ada and I like 17 kinds of tea."},
        {"role": "assistant", "content": "Nice to meet you, Ada!"},
        {"role": "user", "content": "What is my name?"},
    ],
    [{"role": "user", "content": "Write a Python function that returns the sum of a list."}],
    [{"role": "user", "content": "List three animals that live in the ocean.\n\nUse bullet points."}],
]
PARAGRAPH = """\
The harbour town had always kept two clocks. The older one hung in the tower of the church and was wound every morning \
by a man who lived across the square; the other stood above the railway station and was set by telegraph from the \
capital. For most of the year they agreed to within a minute, and nobody thought about them. But in winter, when the \
wind came in from the north and the oil in the tower thickened, the church clock would fall behind, a little more each \
day, until the difference was large enough to matter. Shopkeepers opened by the church and closed by the station, \
which gave them a shorter day. The schoolteacher did the opposite and was thought to be strict. The fishermen ignored \
both and watched the tide. One January the difference reached eleven minutes, and a traveller missed the only train of \
the afternoon because he had trusted the bells. He wrote to the council, the council met, and after a long evening it \
was decided that the town needed a third clock, to be placed exactly halfway between the other two, which would show \
the average. It was built in the spring. By then the oil had warmed, the old clocks agreed again, and the new one, \
which had been set in haste, was wrong by four minutes. People grew fond of it all the same. When strangers asked what \
time it was, the answer depended on where they were standing, and most of them found that charming rather than useful. \
The traveller never came back, but his letter is still kept in a drawer at the town hall, beside the key to the tower.\
"""


def random_ids(seed: int, count: int, vocab: int) -> list[int]:
    return (np.random.PCG64(seed).random_raw(count) % vocab).tolist()


@torch.no_grad()
def logits(model: PreTrainedModel, ids: list[int]) -> np.ndarray:
    return model(torch.tensor([ids])).logits[0].numpy()


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], steps: int) -> tuple[list[int], np.ndarray]:
    """(tokens, top-2 margins). Chosen step by step with the KV cache, then confirmed by one pass over everything."""
    ids, cache = torch.tensor([prompt]), None
    tokens: list[int] = []
    for _ in range(steps):
        out = model(ids, past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
    teacher_forced = logits(model, prompt + tokens)[len(prompt) - 1 : -1]
    assert teacher_forced.argmax(-1).tolist() == tokens
    best = np.sort(teacher_forced, axis=-1)
    return tokens, best[:, -1] - best[:, -2]


def tame_prompt(model: PreTrainedModel, vocab: int) -> tuple[list[int], list[int], np.ndarray]:
    """A random 7-token prompt with a continuation that is varied, free of the end-of-text token and far from ties."""
    end = tiny_models.vocabulary(vocab)[0].index("<|endoftext|>")
    for seed in range(1000, 2000):
        prompt = random_ids(seed, 7, vocab)
        tokens, margins = greedy(model, prompt, 16)
        if end not in tokens and len(set(tokens)) >= 8 and margins.min() > 0.02:
            return prompt, tokens, margins
    raise RuntimeError("no prompt with a usable continuation: change the model's seed")


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def tiny_golden(name: str, path: Path) -> dict[str, object]:
    """Writes goldens/NAME.npz and returns the model's entry in the index."""
    spec = tiny_models.SPECS[name]
    tiny_models.build(name, path)
    file = GGUFFile(path)
    model = load_model(file)
    with Float64():
        exact = load_model(file)

    full = spec.hidden < 256  # the wide models are about storage types: fewer logits, no checkpoints
    arrays, errors, spread = {}, [], []
    for i, length in enumerate((7, 1, 33, spec.context - 1) if full else (7, 33)):
        ids = random_ids(i, length, spec.vocab)
        kept = np.arange(length)
        if length > 33 or not full:  # a few early positions, the last 8, and where a window or YaRN's ramp bites
            kept = kept if length <= 7 else np.r_[0, 5, 17, length - 8 : length]
        got = logits(model, ids)
        with Float64():
            want = logits(exact, ids)
        assert want.dtype == np.float64
        errors.append(relative_error(got, want))
        spread.append(float(want.std()))
        arrays[f"ids.{i}"] = np.array(ids, np.int32)
        arrays[f"positions.{i}"] = kept.astype(np.int32)
        arrays[f"logits.{i}"] = got[kept]

    layer = spec.layers - 1
    if full:
        with checkpoints(file, model, layer) as found:
            logits(model, arrays["ids.0"].tolist())
        arrays |= {f"checkpoint.{key}": array for key, array in found.items()}
    prompt, tokens, margins = tame_prompt(model, spec.vocab)
    arrays |= {"prompt": np.array(prompt, np.int32), "tokens": np.array(tokens, np.int32), "margins": margins}
    np.savez_compressed(golden.FOLDER / f"{name}.npz", **arrays)
    assert max(errors) < 1e-5, f"{name}: float32 is {max(errors):.1e} from float64, too ill-conditioned to be a golden"
    return {
        "sha256": golden.sha256(path),
        "layer": layer,
        "float32_error": float(f"{max(errors):.2e}"),
        "logits_std": round(min(spread), 3),
        "smallest_margin": round(float(margins.min()), 4),
    }


def make_tiny(only: list[str]) -> None:
    index_path = golden.FOLDER / "index.json"
    index = json.loads(index_path.read_text()) if only else {"versions": VERSIONS, "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in only or tiny_models.SPECS:
            index["models"][name] = tiny_golden(name, Path(folder) / f"{name}.gguf")
            print(name, index["models"][name])
    index_path.write_text(json.dumps(index, indent=1) + "\n")


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The file's tokenizer, built from its vocabulary with the pipeline that its pre-tokenizer's name stands for.

    ``smollm``: single digits, then GPT-2's byte-level splitting. (transformers' own GGUF loader ignores that name, so
    it is used only as a check on text without digits.)
    """
    fields = gguf.GGUFReader(path).fields
    kind, tokens, types, merges, template = (
        fields[key].contents()
        for key in (
            *("tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"),
            *("tokenizer.ggml.merges", "tokenizer.chat_template"),
        )
    )
    assert kind == "smollm"
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)
    assert [fast.convert_tokens_to_ids(token) for token in control] == [vocab[token] for token in control]

    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in (PARAGRAPH, *(text for text in RAW if not any(c.isdigit() for c in text))):
        assert fast.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert fast.decode(fast.encode(text)) == text
    return fast


def make_smollm2(path: Path) -> None:
    """Writes goldens/smollm2.npz and .json."""
    file = GGUFFile(path)
    model, tokenizer = load_model(file), gguf_tokenizer(path)
    arrays, prompts = {}, []
    for i, prompt in enumerate([*RAW, *CHAT]):
        chat = None if isinstance(prompt, str) else prompt
        text = (
            prompt if chat is None else tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        )
        ids = tokenizer.encode(text, add_special_tokens=False)
        tokens, margins = greedy(model, ids, 32)
        last = logits(model, ids)[-1]
        top = np.argsort(-last, kind="stable")[:64]
        some = np.sort(np.unique(np.random.PCG64(i).random_raw(600) % file.vocab)[:512])
        arrays |= {f"{i}.prompt": np.array(ids, np.int32), f"{i}.tokens": np.array(tokens, np.int32)}
        arrays |= {f"{i}.margins": margins, f"{i}.top_ids": top.astype(np.int32), f"{i}.top_logits": last[top]}
        arrays |= {f"{i}.some_ids": some.astype(np.int32), f"{i}.some_logits": last[some]}
        prompts.append({"text": text, "messages": chat, "greedy_text": tokenizer.decode(tokens)})
        print(len(ids), f"smallest margin {margins.min():.4f}", repr(prompts[-1]["greedy_text"]))
    ids = tokenizer.encode(PARAGRAPH, add_special_tokens=False)
    scores = logits(model, ids)[:-1].astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    nll = np.log(np.exp(scores).sum(-1)) - scores[np.arange(len(ids) - 1), ids[1:]]
    arrays |= {"paragraph_ids": np.array(ids, np.int32), "token_nll": nll.astype(np.float32)}
    np.savez_compressed(golden.FOLDER / "smollm2.npz", **arrays)
    entry = {"versions": VERSIONS, "sha256": golden.sha256(path), "nll": float(nll.mean())}
    entry |= {"paragraph": PARAGRAPH, "prompts": prompts}
    text = json.dumps(entry, indent=1, ensure_ascii=False)
    (golden.FOLDER / "smollm2.json").write_text(text + "\n", encoding="utf-8")
    print(len(ids), "tokens, mean NLL", nll.mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only these tiny models")
    parser.add_argument("--smollm2", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    golden.FOLDER.mkdir(exist_ok=True)
    if arguments.smollm2:
        make_smollm2(arguments.smollm2)
    else:
        make_tiny(arguments.names)
