"""Many requests at once, some of them dropped on their way: what both runtimes must survive with nothing lost."""

from __future__ import annotations

import random

from polyhead import LLM, SamplingParams


def churn(llm: LLM, count: int, seed: int) -> None:
    """Runs ``count`` requests side by side and drops a third of them at random moments, some at once.

    Those that end have the tokens that they get alone (the model must be deterministic), and every block is free.
    """
    rng = random.Random(seed)
    vocab = llm.model.decoder.vocab
    shared = [rng.randrange(vocab) for _ in range(24)]
    asked = []
    for number in range(count):
        prompt = shared[: rng.choice([0, 0, 8, 24])] + [rng.randrange(vocab) for _ in range(rng.randint(1, 30))]
        params = SamplingParams(
            max_tokens=rng.randint(1, 24),
            temperature=rng.choice([0.0, 1.0]),
            seed=number,
            ignore_eos=rng.random() < 0.7,
            stop_token_ids=rng.choice([(), (vocab // 2,)]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
            logprobs=rng.choice([None, None, 2]),
        )
        asked.append((prompt, params))
    streams = [llm.stream(*one, priority=rng.choice([0, 0, 1])) for one in asked]
    dropped = {number: rng.randint(0, 12) for number in rng.sample(range(count), count // 3)}
    tokens: list[list[int]] = [[] for _ in asked]
    alive = list(range(count))
    while alive:
        rng.shuffle(alive)
        for number in list(alive):
            if len(tokens[number]) >= dropped.get(number, 10**9):
                streams[number].close()
                alive.remove(number)
                continue
            delta = next(streams[number], None)
            if delta is None:
                alive.remove(number)
            else:
                tokens[number] += delta.token_ids
    assert llm._generation.free_blocks == llm.plan.num_blocks
    llm._generation.check_integrity()
    for number in rng.sample(range(count), min(count, 25)):
        (alone,) = llm.generate([asked[number][0]], asked[number][1])
        whole = list(alone.token_ids)
        assert tokens[number] == (whole[: len(tokens[number])] if number in dropped else whole)
