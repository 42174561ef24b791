"""A small plugin, sound, and what breaks it: for each test of polyhead.testing a fault that only plugins can have."""

from __future__ import annotations

from dataclasses import dataclass

from polyhead.testing import Case

CASE = Case(
    architecture="mine",
    metadata={
        "block_count": 2,
        "context_length": 48,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-3,
        "rope.freq_base": 500.0,
    },
)

SOUND = """
from polyhead.errors import ConfigError, MissingKeyError, TensorError

class Mine:
    name, gguf_names, api_version = "mine", ("mine",), 1

    def decoder(self, meta):
        hidden = meta.get(int, "embedding_length", minimum=1)
        head = meta.optional("output.weight")
        return Decoder(
            hidden=hidden,
            vocab=meta.vocab(),
            context=meta.context(),
            tokens=Embedding("token_embd.weight"),
            blocks=tuple(self.block(meta, index) for index in range(meta.layers())),
            final_norm=RMSNorm("output_norm.weight", self.eps(meta)),
            head=Linear(head) if head else None,
            unused=(),
        )

    def eps(self, meta):
        return meta.get(float, "attention.layer_norm_rms_epsilon")

    def block(self, meta, index):
        hidden = meta.get(int, "embedding_length", minimum=1)
        heads = meta.get(int, "attention.head_count", minimum=1)
        if hidden % heads:
            raise ConfigError("heads do not divide the width")
        head_dim = hidden // heads
        name = f"blk.{index}.{{}}.weight".format
        return Block(
            attn_norm=RMSNorm(name("attn_norm"), self.eps(meta)),
            attn=Attention(
                heads=heads,
                kv_heads=meta.get(int, "attention.head_count_kv", minimum=1),
                head_dim=head_dim,
                qkv=SplitQKV(Linear(name("attn_q")), Linear(name("attn_k")), Linear(name("attn_v"))),
                out=Linear(name("attn_output")),
                rope=read_rope(meta, head_dim, "half"),
            ),
            mlp_norm=RMSNorm(name("ffn_norm"), self.eps(meta)),
            mlp=MLP(
                size=meta.get(int, "feed_forward_length", minimum=1),
                gate=Linear(name("ffn_gate")),
                up=Linear(name("ffn_up")),
                down=Linear(name("ffn_down")),
                activation="silu",
            ),
        )

@hookimpl
def polyhead_register_architectures():
    return [Mine()]
"""


@dataclass(frozen=True)
class Fault:
    """``old`` in the sound source becomes ``new``; the test named ``test`` then fails with ``message`` (a pattern)."""

    test: str
    old: str
    new: str
    message: str
    sound: str = SOUND
    case: Case = CASE

    @property
    def source(self) -> str:
        assert self.old in self.sound, self.old
        return self.sound.replace(self.old, self.new)


_LOADS = "test_the_plugin_loads_as_an_installed_package_would"
_PURE = "test_decoder_is_pure_and_repeatable"
_BLOCK = "test_block_returns_the_layers_of_the_decoder"
_READ = "test_every_metadata_key_of_the_case_is_read"
_UNKNOWN = "test_an_unknown_metadata_key_is_refused"
_MISSING = "test_a_missing_metadata_key_is_named"
_VALUES = "test_every_metadata_value_matters"
_STRANGE = "test_strange_metadata_is_refused_or_works"
_CLAIMS = "test_the_tree_claims_every_tensor_of_a_file_once"
_LACKING = "test_a_missing_tensor_is_named"
_SURPLUS = "test_a_surplus_tensor_is_refused"
_MATTERS = "test_every_weight_matters"
_QUANTS = "test_quantised_files_agree_with_their_dequantised_weights"
_CAUSAL = "test_a_changed_token_changes_later_logits_and_no_earlier_ones"
_LOGITS = "test_logits_equal_the_reference"
_GREEDY = "test_greedy_tokens_equal_the_reference"
_COUNT = "    calls = 0\n    def count(self):\n        Mine.calls += 1\n        return Mine.calls\n\n    def eps("
_EPS = 'return meta.get(float, "attention.layer_norm_rms_epsilon")'
_NORMED = Case("mine", CASE.metadata, tensors={"blk.0.attn_k_norm.weight": (8,), "blk.1.attn_k_norm.weight": (8,)})
_WIDE = Case("mine", {**CASE.metadata, "attention.key_length": 16, "attention.value_length": 16})
_ARCHITECTURES = "def polyhead_register_architectures():"

FAULTS = {
    "misspells a hook": Fault(
        _LOADS, "_architectures", "_architecture", "which is not a hook; did you mean polyhead_re"
    ),
    "gives a hook's argument a default": Fault(
        _LOADS,
        _ARCHITECTURES,
        f"def polyhead_register_commands(cli=None): pass\n@hookimpl\n{_ARCHITECTURES}",
        "a default",
    ),
    "was written for another version": Fault(_LOADS, '("mine",), 1', '("mine",), 7', "plugin API version 7; this poly"),
    "answers to another name": Fault(
        _LOADS, '("mine",)', '("yours",)', "no plugin answers to general.architecture 'mi"
    ),
    "raises at import": Fault(_LOADS, "class Mine:", "1 / 0\nclass Mine:", "does not load: ZeroDivisionError"),
    "remembers the first file": Fault(
        _PURE,
        '        hidden = meta.get(int, "embedding_length", minimum=1)\n        head =',
        "        if not hasattr(self, 'made'): self.made = self.make(meta)\n        return self.made\n"
        "    def make(self, meta):\n"
        '        hidden = meta.get(int, "embedding_length", minimum=1)\n        head =',
        r"failed when asked again after a file with 129 rows(.|\n)*\[128, 32\].*It must not remember other files",
    ),
    "counts its calls": Fault(
        _PURE,
        "            context=meta.context(),",
        "            context=meta.context() + self.count(),",
        "returned another Decoder when asked again after a file with all optional tensors; it must depend on its meta",
        SOUND.replace("    def eps(", _COUNT),
    ),
    "remembers a value of another file": Fault(
        _PURE,
        _EPS,
        "self.last, before = meta.get(float, 'attention.layer_norm_rms_epsilon'), getattr(self, 'last', 1e-3)\n"
        "        return before",
        r"another Decoder when asked again after a file with mine\.attention\.layer_norm_rms_epsilon = 0\.002",
    ),
    "builds one layer for all": Fault(
        _BLOCK,
        "tuple(self.block(meta, index) for",
        "tuple(self.layer(meta, index) for",
        r"block\(meta, 1\) differs from decoder\(meta\)\.blocks\[1\]",
        SOUND.replace(
            "    def block(self, meta, index):",
            "    def block(self, meta, index):\n        return self.layer(meta, 0)\n    def layer(self, meta, index):",
        ),
    ),
    "fails on a layer alone": Fault(
        _BLOCK,
        "        return Block(",
        "        if not hasattr(self, 'seen'): raise KeyError(index)\n        return Block(",
        r"block\(meta, 0\) failed where decoder\(meta\) did not: KeyError: 0",
        SOUND.replace("        head = meta", "        self.seen = True\n        head = meta").replace(
            "            unused=(),\n        )",
            "            unused=(), logit_scale=1.0 + 0 * self.__dict__.pop('seen'))",
        ),
    ),
    "forgets a key": Fault(
        _READ,
        'read_rope(meta, head_dim, "half")',
        'Rope(500.0, head_dim, "half")',
        "does not know the metadata mine.rope.freq_base = 500.0",
    ),
    "derives head_dim though the file says it": Fault(
        _VALUES,
        "        head =",
        "        meta.get(int, 'attention.key_length'); meta.get(int, 'attention.value_length')\n        head =",
        r"other values of mine\.attention\.key_length, mine\.attention\.value_length give the same Decoder: use what",
        case=_WIDE,
    ),
    "ignores what decides": Fault(
        _VALUES,
        "        head =",
        "        meta.ignore('attention.key_length', 'attention.value_length')\n        head =",
        r"mine\.attention\.key_length, mine\.attention\.value_length give .* meta\.ignore \(not sizes of the model\)",
        case=_WIDE,
    ),
    "reads eps and uses its own": Fault(
        _VALUES, _EPS, _EPS + " and 1e-5", r"other values of mine\.attention\.layer_norm_rms_epsilon give the same Dec"
    ),
    "takes a layer's value for all": Fault(
        _VALUES,
        'meta.get(int, "feed_forward_length", minimum=1)',
        "meta.layer(int, 'feed_forward_length', 0, minimum=1)",
        r"other values of mine\.feed_forward_length\[1\] give the same",
        case=Case("mine", {**CASE.metadata, "feed_forward_length": [64, 64]}),
    ),
    "ignores whatever it does not know": Fault(
        _UNKNOWN,
        "        head =",
        "        meta.ignore('*')\n        head =",
        "mine.polyhead_testing_unknown is accepted",
    ),
    "has a silent default": Fault(
        _MISSING,
        _EPS,
        _EPS.replace(")", ", 1e-5)"),
        r'without mine\.attention\.layer_norm_rms_epsilon runs with a default.*optional=\("attention\.layer_norm_rms',
    ),
    "swallows a missing key": Fault(
        _MISSING,
        _EPS,
        f"try: {_EPS}\n        except MissingKeyError: return 1e-5",
        r"without mine\.attention\.layer_norm_rms_epsilon, which the plugin reads without a default, decoder\(\)",
    ),
    "hides which key is missing": Fault(
        _MISSING,
        _EPS,
        f"try: {_EPS}\n        except MissingKeyError: raise ConfigError('a bad file')",
        r"without mine\.attention\.layer_norm_rms_epsilon the error does not name it: a bad file",
    ),
    "raises an error of its own for a missing key": Fault(
        _MISSING,
        _EPS,
        f"try: {_EPS}\n        except MissingKeyError: raise OSError('no eps')",
        r"decoder\(\) raises OSError: no eps, expected a MissingKeyError that names the key",
    ),
    "divides by what it read": Fault(
        _STRANGE,
        '"attention.head_count", minimum=1)',
        '"attention.head_count")',
        r"with mine\.attention\.head_count = 0 the plugin raises ZeroDivisionError",
    ),
    "loops as often as a file says": Fault(
        _STRANGE,
        "range(meta.layers())",
        'range(meta.get(int, "block_count", minimum=1))',
        r"with mine\.block_count = 2147483647 decoder\(\) does not end; bound what it loops over, as meta\.layers",
    ),
    "fails with an optional tensor": Fault(
        _CLAIMS,
        "head=Linear(head) if",
        "head=Linear(head.name) if",
        r"decoder\(\) failed on the case's metadata, with all optional tensors: AttributeError: 'str' object has",
    ),
    "has a string for a leaf that is optional": Fault(
        _CLAIMS, "head=Linear(head) if", "head=head if", "Decoder: head is 'output.weight', expected Linear or None"
    ),
    "looks for tensors without end": Fault(
        _CLAIMS,
        "        head =",
        "        while meta.has_tensor(f'more.{self.count()}'): pass\n        head =",
        r"asks whether there is more\.\d+, .* say in the case which that is: Case\(tensors=\{name: None\}\)",
        SOUND.replace("    def eps(", _COUNT),
    ),
    "claims a tensor twice": Fault(
        _CLAIMS, 'Linear(name("attn_v"))', 'Linear(name("attn_k"))', r"claimed twice: blk\.0\.attn_k\.weight, by blocks"
    ),
    "lacks a norm that the file has": Fault(
        _CLAIMS, "class Mine:", "class Mine:", r"not claimed: blk\.0\.attn_k_norm\.weight \[8\]", case=_NORMED
    ),
    "swaps the sides of a matrix": Fault(
        _CLAIMS,
        'meta.get(int, "attention.head_count_kv", minimum=1)',
        "heads + 0 * meta.get(int, 'attention.head_count_kv')",
        r"wrong shape: blk\.1\.attn_k\.weight is \[16, 32\] in the file, .* needs \[32, 32\]",
        case=Case("mine", CASE.metadata, tensors={f"blk.{i}.attn_{n}.weight": (16, 32) for i in (0, 1) for n in "kv"}),
    ),
    "hides which tensor is missing": Fault(
        _LACKING,
        "vocab=meta.vocab(),",
        "vocab=self.rows(meta),",
        r"without the tensor token_embd\.weight the error does not name it: no vocabulary",
        SOUND.replace(
            "    def eps(",
            "    def rows(self, meta):\n        try: return meta.vocab()\n"
            "        except TensorError: raise ConfigError('no vocabulary')\n\n    def eps(",
        ),
    ),
    "stumbles over a missing tensor": Fault(
        _LACKING,
        "vocab=meta.vocab(),",
        "vocab=meta._tensors['token_embd.weight'][0],",
        r"without the tensor token_embd\.weight the plugin raises KeyError",
    ),
    "excuses every tensor": Fault(
        _SURPLUS, "unused=()", "unused=('blk.*',)", r"surplus tensor blk\.0\.polyhead_testing\.weight is accepted: Dec"
    ),
    "excuses a bias that files of the family may have": Fault(
        _SURPLUS, "unused=()", "unused=('blk.*.attn_?.bias',)", r"surplus tensor blk\.0\.attn_q\.bias is accepted: Dec"
    ),
    "excuses norms that files of the family may have": Fault(
        _SURPLUS, "unused=()", "unused=('*_norm.weight',)", r"surplus tensor token_embd_norm\.weight is accepted: Dec"
    ),
    "switches its layers off": Fault(
        _MATTERS,
        "        return Block(",
        "        return Block(residual_scale=0.0,",
        r"on cpu, with all optional tensors, zeroing these tensors changes no logit: blk\.0\.attn_norm\.weight "
        r"\(blocks\[0\]\.attn_norm\), .* and 6 more",
    ),
    "takes the type of the file for something else": Fault(
        _QUANTS,
        "unused=()",
        "unused=(), embedding_scale=1.0 + meta.file(int, 'general.file_type', 0)",
        r"a file with matrices of type F16 on cpu is 0\.\d+ off its own weights as float32, expected less than 1e-05",
    ),
    "sees no past": Fault(
        _CAUSAL,
        'read_rope(meta, head_dim, "half"),',
        'read_rope(meta, head_dim, "half"), window=1,',
        r"changing token 6 leaves the logits of token 7 as they were; does attention reach back \(Attention\.window\)",
    ),
    "overflows": Fault(_CAUSAL, "unused=()", "unused=(), logit_scale=1e39", "logits .* are not finite with random"),
    "pairs RoPE otherwise": Fault(
        _LOGITS,
        '"half"',
        '"interleaved"',
        r"logits on cpu, with all optional tensors, are 0\.\d+ off the reference, expected less than 1e-05 .*"
        r"Token 0 agrees, token 1 is the first that does not \(.*\): look at .* RoPE pairing, theta",
    ),
    "swaps gate and up": Fault(
        _LOGITS,
        'gate=Linear(name("ffn_gate")),\n                up=Linear(name("ffn_up")),',
        'gate=Linear(name("ffn_up")),\n                up=Linear(name("ffn_gate")),',
        r"off the reference.*Token 0, which sees itself alone, is 0\.\d+ off already: look at norms .* gate and up",
    ),
    "takes another theta than the file's": Fault(
        _LOGITS,
        'read_rope(meta, head_dim, "half")',
        'Rope(0 * meta.get(float, "rope.freq_base") + 1e4, head_dim, "half")',
        "off the reference.*Token 0 agrees",
    ),
    "misreads eps": Fault(_LOGITS, _EPS, _EPS + " / 100", r"off the reference.*Token 0, .* norms and their eps"),
    "activates otherwise": Fault(
        _GREEDY, '"silu"', '"relu"', r"greedy token \d on cpu, .*; the reference has \d+, whose"
    ),
}
