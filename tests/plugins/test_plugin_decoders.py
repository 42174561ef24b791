"""What a plugin does with a file: faults in decoder() and in layers of its own, refused metadata, rival claims."""

from __future__ import annotations

import re

import pytest
from polyhead import LLM, PolyheadError, SamplingParams
from polyhead.errors import ConfigError, MissingKeyError, PluginError
from polyhead.plugins import discover

TEMPLATE = """
class Mine(LlamaGQA):
    name, gguf_names = "mine", ("mine",)

    def decoder(self, meta):
        {}

@hookimpl
def polyhead_register_architectures():
    return [Mine()]
"""
SOME = """
        x = Linear("x")
        attn = Attention(heads=1, kv_heads=1, head_dim=2, qkv=FusedQKV(x), out=x)
        layer = {layer}
        block = Block(attn_norm=None, attn=attn, mlp_norm=None, mlp=layer)
        return Decoder(hidden=2, vocab=3, context=4, tokens=Embedding("e"), blocks={blocks}, final_norm={norm})
"""
LAYER = """
class Layer(Module):
    def tensors(self, hidden):
        {tensors}
    def scratch(self, hidden):
        return {scratch}
"""
VALUES = {"general.architecture": "mine", "mine.block_count": 1, "mine.width": "wide", "general.name": "x"}
ORIGIN = r"plugin strange \(stranger 1\.2\)"


def some(layer="MLP(size=1, up=x, down=x, activation='relu')", blocks="(block,)", norm="None") -> str:
    return SOME.format(layer=layer, blocks=blocks, norm=norm).strip()


def layered(tensors: str = "yield TensorSpec('t', (hidden,))", scratch: str = "{}") -> str:
    return LAYER.format(tensors=tensors, scratch=scratch) + TEMPLATE.format(some(layer="Layer()"))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("1 / 0", r"failed on this file: ZeroDivisionError: division by zero"),
        ("import sys; sys.exit('no')", r"failed on this file: SystemExit: no"),
        ("raise type('Odd', (BaseException,), {})('x')", r"failed on this file: Odd: x"),
        ("raise type('Bad', (Exception,), {'__str__': None})", r"failed on this file: Bad \(its message cannot"),
        ("return self.decoder(meta)", r"failed on this file: RecursionError"),
        ("return None", r"decoder\(\) returned NoneType, expected Decoder"),
        ("return {'hidden': 3}", r"decoder\(\) returned dict, expected Decoder"),
        (
            some(norm="'output_norm.weight'"),
            r"Decoder: final_norm is 'output_norm\.weight', expected RMSNorm, LayerN",
        ),
        (some(layer="x"), r"Block: mlp is Linear\(.*\), expected MLP or Module"),
        (some(blocks="(b for b in [block])"), r"Decoder: blocks is <generator .*>, expected a tuple of Blocks"),
        (
            some(layer="Module()"),
            r"failed on this file: NotImplementedError: Module does not say which tensors it reads",
        ),
    ],
)
def test_a_fault_in_decoder_names_the_plugin_and_is_no_crash(install, body, reason):
    install(TEMPLATE.format(body))
    with pytest.raises(PluginError, match=f"{ORIGIN}:? {reason}"):
        discover().decoder(VALUES, {"e": (3, 2)})


def test_what_a_plugin_prints_about_a_file_is_no_result(install, capsys):
    install(TEMPLATE.format("print('looking')\n        " + some()))
    with pytest.raises(ConfigError):  # for the keys it does not know
        discover().decoder(VALUES, {"e": (3, 2)})
    assert capsys.readouterr() == ("", "looking\n")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (layered("yield 'weight'"), r"blocks\[0\]\.mlp, a Layer, yields 'weight', expected a TensorSpec"),
        (layered("yield TensorSpec('t', [hidden])"), r"TensorSpec\(t\): shape is \[2\], expected a tuple of integers"),
        (layered(scratch="{'a': 0}"), r"wants 0 values of scratch 'a', expected an integer above 0"),
        (layered(scratch="{'a': 2.5}"), r"wants 2\.5 values of scratch 'a'"),
        (layered(scratch="None"), r"a Layer, returns None from scratch\(\), expected a dict of names and sizes"),
        (layered(scratch="{5: 3}"), r"a Layer, names scratch 5, expected a string"),
        (layered("return None"), r"a Layer, returns None from tensors\(\), expected to yield each TensorSpec"),
        (layered("yield TensorSpec('', (2,))"), r"TensorSpec: name is '', expected a tensor's name"),
        (layered("yield TensorSpec('\\ud800', (2,))"), r"TensorSpec: name is .*, expected a tensor's name, in UTF-8"),
        (layered("yield TensorSpec('t', ())"), r"TensorSpec\(t\): shape is \(\), expected a tuple of integers"),
        (layered("yield TensorSpec('t', (2.0,))"), r"TensorSpec\(t\): shape is \(2\.0,\), expected a tuple of int"),
        (layered("yield TensorSpec('t', (2,), None)"), r"TensorSpec\(t\): owner is None, expected a string"),
    ],
)
def test_a_layer_that_misdescribes_itself_is_refused_before_anything_relies_on_it(install, source, reason):
    install(source)
    with pytest.raises(PluginError, match=f"{ORIGIN}.*{reason}"):
        discover().decoder(VALUES, {"e": (3, 2)})


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("meta.get(int, 'width')", ConfigError, r"^mine\.width is 'wide', expected an integer \(plugin mine\)$"),
        ("meta.get(int, 'depth')", MissingKeyError, r"^the file has no metadata key mine\.depth \(int\), which plugin"),
        ("meta.require(width='narrow')", ConfigError, r"mine\.width is 'wide'; plugin mine supports only 'narrow'"),
        ("meta.vocab('absent')", PolyheadError, r"no tensor absent, which plugin mine needs"),
        (some(blocks="()"), ConfigError, r"Decoder: blocks is empty"),
        (some(), ConfigError, r"does not know the metadata mine\.block_count = 1, mine\.width = 'wide'; the model"),
        (some(), ConfigError, r"set model\.ignore_metadata: \[mine\.block_count, mine\.width\]$"),
        ("meta.ignore('*')\n        " + some(), None, ""),
        ("meta.layers(); meta.get(str, 'width')\n        " + some(), None, ""),
    ],
)
def test_metadata_that_is_missing_wrong_or_unread_is_refused_by_name(install, body, kind, message):
    install(TEMPLATE.format(body))
    registry = discover()
    if kind is None:
        assert registry.decoder(VALUES, {"e": (3, 2)})[0].hidden == 2
    else:
        with pytest.raises(kind, match=message):
            registry.decoder(VALUES, {"e": (3, 2)})


def test_unread_metadata_is_accepted_once_the_user_says_so(install):
    install(TEMPLATE.format(some()))
    registry, tensors = discover(), {"e": (3, 2)}
    decoder, plugin, architecture = registry.decoder(VALUES, tensors, ignore=["mine.block_count", "mine.width"])
    assert (decoder.vocab, plugin.origin, architecture.name) == (3, "strange (stranger 1.2)", "mine")
    with pytest.raises(ConfigError, match=r"ignore_metadata: \[mine\.block_count\]"):
        registry.decoder(VALUES, tensors, ignore=["mine.width"])


def test_messages_stay_short_however_long_the_metadata_is(install):
    install(TEMPLATE.format(some()))
    values = {"general.architecture": "mine", **{f"mine.{'k' * 90}{i}": "v" * 10_000 for i in range(1000)}}
    with pytest.raises(ConfigError, match="and 990 more") as error:
        discover().decoder(values, {"e": (3, 2)})
    assert len(str(error.value)) < 5000
    with pytest.raises(PluginError) as unknown:
        discover().decoder({"general.architecture": "q" * 100_000}, {})
    assert len(str(unknown.value)) < 2000


def test_a_file_without_an_architecture_says_so():
    with pytest.raises(MissingKeyError, match=r"general\.architecture"):
        discover().decoder({}, {})


RIVAL = """
class Mine(LlamaGQA):
    name, gguf_names = "{}", ("llama", "rival")

@hookimpl
def polyhead_register_architectures():
    return [Mine()]
"""


def test_two_distributions_that_claim_one_name_are_both_named(install):
    install(RIVAL.format("mine"))
    with pytest.raises(PluginError) as error:
        discover().find("llama")
    message = str(error.value)
    assert re.search(r"architecture llama_gqa of plugin llama_gqa \(polyhead [0-9.]+\)", message)
    assert "architecture mine of plugin strange (stranger 1.2)" in message
    assert "architecture: llama_gqa or mine" in message
    assert "plugins.disable: [llama_gqa] or plugins.disable: [strange]" in message


def test_the_config_decides_between_rivals(install, tiny_model):
    install(RIVAL.format("mine"))
    base = {"model": str(tiny_model("llama-gqa")), "device": "cpu"}
    with pytest.raises(PluginError, match="claimed by"):
        LLM(base)
    for choice, origin in [
        ({"architecture": "mine"}, "stranger"),
        ({"architecture": "llama_gqa"}, "polyhead"),
        ({"plugins": {"disable": ["strange"]}}, "polyhead"),
        ({"plugins": {"disable": ["stranger"]}}, "polyhead"),
        ({"plugins": {"disable": ["Llama-GQA"]}}, "stranger"),
    ]:
        with LLM({**base, **choice}) as llm:
            assert llm.model.plugin.distribution == origin


def test_rivals_with_one_architecture_name_can_only_be_left_out(install):
    install(RIVAL.format("llama_gqa"))
    for wanted in (None, "llama_gqa"):
        with pytest.raises(PluginError) as error:
            discover().find("llama", wanted)
        assert "llama_gqa or" not in str(error.value).replace("[llama_gqa] or", "")
        assert "plugins.disable: [llama_gqa] or plugins.disable: [strange]" in str(error.value)
    # Names of architectures may be shared as long as the files differ.
    assert discover().find("rival", "llama_gqa")[0].name == "strange"
    assert discover(["strange"]).find("llama", "llama_gqa")[0].distribution == "polyhead"


def test_rivals_with_one_entry_point_name_are_told_apart_by_distribution(install):
    install(RIVAL.format("mine"), name="llama_gqa")
    with pytest.raises(PluginError, match=r"\[polyhead\] or plugins\.disable: \[stranger\]"):
        discover().find("llama")
    assert discover(["stranger"]).find("llama")[0].distribution == "polyhead"


@pytest.mark.parametrize("spelling", ["my-plugin", "My_Plugin", "my.plugin"])
def test_a_distribution_may_be_disabled_in_any_spelling(install, spelling):
    install(RIVAL.format("mine"), distribution="my-plugin")
    registry = discover([spelling])
    assert [plugin.state for plugin in registry.plugins if plugin.name == "strange"] == ["disabled"]
    with pytest.raises(PluginError, match=r"disabled: plugin strange \(my-plugin 1\.2\)"):
        registry.find("rival")


def test_a_disabled_plugin_is_not_even_imported(install):
    install("raise KeyboardInterrupt")
    assert discover(["strange"]).find("llama")


def test_disabling_an_unknown_name_is_an_error_that_names_the_known(install):
    with pytest.raises(PluginError, match=r"'lama_gqa', which is not installed\. Did you mean llama_gqa\?.*gpt_mha"):
        discover(["lama_gqa"])


def test_an_architecture_that_disagrees_with_the_file_is_refused():
    registry = discover()
    with pytest.raises(PluginError, match=r"architecture: gpt_mha, which answers to gpt2, gptneox, but .* is 'llama'"):
        registry.find("llama", "gpt_mha")
    with pytest.raises(PluginError, match=r"no plugin provides architecture 'gpt_mah'\. Did you mean gpt_mha\?"):
        registry.find("gpt2", "gpt_mah")


OWN_LAYER = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Layer(Module):
    name: str
    def tensors(self, hidden):
        yield TensorSpec(self.name + ".ffn_up.weight", (88, hidden))
        yield TensorSpec(self.name + ".ffn_gate.weight", (88, hidden))
        yield TensorSpec(self.name + ".ffn_down.weight", (hidden, 88))

class Mine(LlamaGQA):
    name, gguf_names = "mine", ("llama",)
    def block(self, meta, index):
        from dataclasses import replace
        return replace(super().block(meta, index), mlp=Layer(f"blk.{{index}}"))

@hookimpl
def polyhead_register_architectures():
    return [Mine()]

def load(spec, weights):
    {load}
    def run(x, out, scratch):
        {run}
    return run

{kinds}
"""
KINDS = "@hookimpl\ndef polyhead_register_modules():\n    return [ModuleKind(Layer, load)]\n"


def own_layer(load: str = "pass", run: str = "out[:] = x", kinds: str = KINDS) -> str:
    return OWN_LAYER.format(load=load, run=run, kinds=kinds)


def own(tiny_model) -> LLM:
    return LLM({"model": str(tiny_model("llama-gqa")), "device": "cpu", "architecture": "mine"})


def test_a_layer_of_its_own_runs(install, tiny_model):
    install(own_layer())
    with own(tiny_model) as llm:
        assert len(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3


def test_a_layer_without_an_implementation_is_a_clear_error(install, tiny_model):
    install(own_layer(kinds=""))
    with pytest.raises(PluginError, match=r"is a Layer, for which no plugin registers a ModuleKind"):
        own(tiny_model)


def test_a_layer_without_an_implementation_is_refused_before_weights_are_read(install, tiny_model):
    install(own_layer(kinds=""))
    settings = {"model": str(tiny_model("llama-gqa")), "device": "cpu", "architecture": "mine"}
    with pytest.raises(PluginError, match="no plugin registers a ModuleKind"):
        LLM(settings, progress=lambda done, total: pytest.fail("weights were read"))


def test_a_layer_that_fails_to_load_is_named(install, tiny_model):
    install(own_layer(load="weights['absent']"))
    with pytest.raises(PluginError, match=r"blk\.0\.mlp: module Layer failed to load: KeyError: 'absent'"):
        own(tiny_model)


@pytest.mark.parametrize("run", ["raise KeyError('w')", "out[:] = x[:, :3]", "scratch['absent']"])
def test_a_layer_that_fails_while_running_is_named_and_leaks_nothing(install, tiny_model, run):
    install(own_layer(run=run))
    with own(tiny_model) as llm:
        for _ in range(2):
            with pytest.raises(PluginError, match=r"blk\.0\.mlp: module Layer failed: (Key|Value)Error"):
                llm.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=3))
            assert llm._generation.free_blocks == llm.plan.num_blocks
            llm._generation.check_integrity()


def test_a_step_that_is_interrupted_leaves_nothing_behind_and_the_model_usable(install, tiny_model):
    # As Ctrl-C in a notebook would: no error of the model's, and nothing to swallow.
    counter = "import itertools\nCALLS = itertools.count()\n"
    install(own_layer(run="out[:] = x\n        if next(CALLS) == 10: raise KeyboardInterrupt", kinds=KINDS + counter))
    with own(tiny_model) as llm:
        greedy = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[1, 2, 3], [4, 5]], greedy)
        assert llm._generation.free_blocks == llm.plan.num_blocks
        llm._generation.check_integrity()
        first = llm.generate([[1, 2, 3]], greedy)
        assert first == llm.generate([[1, 2, 3]], greedy)
        assert len(first[0].token_ids) == 6


@pytest.mark.parametrize("fault", ["raise SystemExit(4)", "raise type('Bad', (Exception,), {'__str__': None})"])
@pytest.mark.parametrize("place", ["load", "run"])
def test_a_layer_that_exits_or_fails_unspeakably_does_not_end_the_program(install, tiny_model, place, fault):
    install(own_layer(**{place: fault}))
    with (
        pytest.raises(PluginError, match=r"blk\.0\.mlp: module Layer failed.*: (SystemExit: 4|Bad \()"),
        own(tiny_model) as llm,
    ):
        llm.generate([[1, 2]], SamplingParams(max_tokens=2))


def test_a_layer_that_returns_its_result_instead_of_writing_it_is_refused(install, tiny_model):
    install(own_layer(run="return x * 2"))
    with own(tiny_model) as llm, pytest.raises(PluginError, match="returned ndarray; it must write"):
        llm.generate([[1, 2]], SamplingParams(max_tokens=1))


SHARING = """
class Mine(LlamaGQA):
    name, gguf_names = "{}", ("{}",)

    def accepts(self, meta):
        {}

@hookimpl
def polyhead_register_architectures():
    return [Mine()]
"""


def choose(**keys):
    """The plugin for a file called shared; a plugin that does not accept it fails only after it was chosen."""
    values = {"general.architecture": "shared"} | {f"shared.{key}": value for key, value in keys.items()}
    try:
        discover().decoder(values, {})
    except MissingKeyError as error:
        return re.search(r"which plugin (\w+) needs", str(error))[1]
    raise AssertionError("the file has no keys, so it cannot have been understood")


def test_plugins_may_share_a_name_where_the_file_tells_whose_it_is(install):
    install(SHARING.format("dense", "shared", "return not meta.has('routed')"), name="a", distribution="dist-a")
    assert choose(routed=8) == "dense"  # alone, it is not asked, and its own error says what is wrong
    install(SHARING.format("sparse", "shared", "return meta.has('routed')"), name="b", distribution="dist-b")
    assert choose() == "dense"
    assert choose(routed=8) == "sparse"
    # The config's word is not questioned.
    values = {"general.architecture": "shared"}
    with pytest.raises(MissingKeyError, match="which plugin sparse needs"):
        discover().decoder(values, {}, architecture="sparse")


@pytest.mark.parametrize("answer", ["return True", "return False"])
def test_plugins_that_all_accept_a_file_or_all_decline_it_are_named(install, answer):
    for name in ("one", "two"):
        install(SHARING.format(name, "shared", answer), name=name, distribution=f"dist-{name}")
    with pytest.raises(PluginError, match=r"architecture one of plugin one \(dist-one 1\.2\) and architecture two"):
        choose()


def test_a_plugin_that_fails_to_say_whether_it_accepts_is_blamed(install):
    install(SHARING.format("one", "shared", "return 1 / 0"), name="one", distribution="dist-one")
    install(SHARING.format("two", "shared", "return True"), name="two", distribution="dist-two")
    with pytest.raises(PluginError, match=r"plugin one \(dist-one 1\.2\) failed on this file: ZeroDivisionError"):
        choose()


def test_a_file_with_experts_is_left_to_a_plugin_for_them_if_there_is_one(install):
    values = {"general.architecture": "llama", "llama.expert_count": 8}
    with pytest.raises(ConfigError, match=r"llama\.expert_count is 8; plugin llama_gqa supports only 0"):
        discover().decoder(values, {})
    install(SHARING.format("mine", "llama", "return meta.get(int, 'expert_count', 0) > 0"))
    assert discover().find("llama", accepts=lambda plugin, _: plugin.name == "strange")[0].name == "strange"
    with pytest.raises(ConfigError, match="plugin mine supports only 0"):
        discover().decoder(values, {})
