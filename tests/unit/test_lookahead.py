"""Steps handed over before the last one's tokens are known never change a result, whatever ends or comes meanwhile."""

from __future__ import annotations

import memory_source
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polyhead import SamplingParams
from polyhead.engine import NgramDrafter, Speculation
from polyhead.generation import Generation
from polyhead.model import Model
from polyhead.runtime.contract import RuntimeOptions
from polyhead.runtime.cpu.model import CpuModel


class Ahead(CpuModel):
    """The CPU runtime, saying that steps may be handed over early; it then counts how many were."""

    runs_ahead = True
    foreseen = 0

    def submit(self, batch, rows, after=None):
        self.foreseen += after is not None
        return super().submit(batch, rows, after)


@pytest.fixture(scope="module")
def parts(tiny_model, registry):
    with Model(tiny_model("llama-gqa"), registry) as model:
        return model.decoder, {spec.name: model.file.dequantise(spec.name) for spec in model.claims.specs}


def drain(generation: Generation, requests: list[str], abort: dict[str, int]) -> dict[str, list[int]]:
    """Steps until all requests have ended, dropping some after so many tokens."""
    tokens: dict[str, list[int]] = {request: [] for request in requests}
    alive = set(requests)
    while alive:
        for request in sorted(alive):
            delta = generation.take(request)
            if delta is None:
                continue
            tokens[request] += delta.token_ids
            if delta.finish_reason is not None:
                alive.discard(request)
            elif len(tokens[request]) == abort.get(request):
                generation.abort(request)
                alive.discard(request)
        if alive:
            generation.step()
    return tokens


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 9),
    max_tokens=st.integers(1, 14),
    stop_token_ids=st.lists(st.integers(0, 96), max_size=30),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    min_tokens=st.sampled_from([0, 0, 1]),
    logprobs=st.sampled_from([None, 2]),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=st.lists(st.tuples(st.lists(st.integers(0, 96), min_size=1, max_size=9), PARAMS), min_size=1, max_size=5),
    dropped=st.dictionaries(st.integers(0, 4), st.integers(1, 5), max_size=3),
)
def test_results_are_those_without_lookahead(parts, requests, dropped):
    decoder, weights = parts
    found = []
    for kind in (CpuModel, Ahead):
        options = RuntimeOptions(context=24, block_size=4, max_tokens=8, max_batch=3)
        generation = Generation(kind(decoder, memory_source.MemorySource(weights), options), None)
        ids = [generation.add(prompt, params) for prompt, params in requests]
        tokens = drain(generation, ids, {ids[i]: n for i, n in dropped.items() if i < len(ids)})
        assert generation.free_blocks == generation.model.plan.num_blocks
        generation.check_integrity()
        found.append([tokens[request] for request in ids])
    assert found[0] == found[1]


@pytest.mark.parametrize("count", [1, 5])
def test_a_long_generation_is_foreseen_but_for_the_first_step(parts, count):
    decoder, weights = parts
    options = RuntimeOptions(context=64, block_size=4, max_batch=5, max_tokens=40)
    model = Ahead(decoder, memory_source.MemorySource(weights), options)
    generation = Generation(model, None)
    requests = [generation.add([5 + i] * (3 + i), SamplingParams(temperature=0.0, max_tokens=40)) for i in range(count)]
    drain(generation, requests, {})
    assert model.foreseen == 38, "of 39 decodes all but the first; new blocks are there before they are needed"


def test_steps_are_foreseen_while_guesses_rest(parts):
    decoder, weights = parts
    options = RuntimeOptions(context=64, block_size=4, max_batch=8, max_tokens=40)
    found, foreseen = [], []
    # One token is enough to guess by, so nearly every guess is wrong, and a request soon rests for long.
    for speculation in (None, Speculation(NgramDrafter(3, ngram_max=1, ngram_min=1))):
        model = Ahead(decoder, memory_source.MemorySource(weights), options)
        generation = Generation(model, None, speculation=speculation)
        params = SamplingParams(temperature=1.0, seed=3, max_tokens=50, ignore_eos=True)
        requests = [generation.add([*range(10 * i, 10 * i + 9)], params) for i in range(2)]
        found.append(drain(generation, requests, {}))
        foreseen.append(model.foreseen)
    assert found[0] == found[1]
    assert foreseen[0] == 48
    assert 5 < foreseen[1] < 48
