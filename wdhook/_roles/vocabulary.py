"""What names say about a parameter's role: the class name of its owner, and its own local name.

Both are read like English compounds, from the last word to the first: `logit_scale`, `expert_bias` and
`gate_up_proj` are a scale, a bias and a projection; a `LayerNormLinear` is a linear layer, an `AdaLayerNorm`
a norm. The full path is never read: paths hold "norm", "bias" or "pos" for reasons of their own.
"""

from __future__ import annotations

import enum
import re
from functools import lru_cache


class Role(str, enum.Enum):
    """What a parameter does in its model."""

    WEIGHT = "weight"
    EMBEDDING = "embedding"
    BIAS = "bias"
    NORM = "norm"
    SCALE = "scale"
    POSITION = "position"
    OTHER = "other"

    def __str__(self) -> str:
        return self.value


class Family(enum.Enum):
    """What the class name of an owner promises about its parameters."""

    NORM = enum.auto()
    SCALE = enum.auto()
    WEIGHT = enum.auto()
    EMBEDDING = enum.auto()
    COMPOSITE = enum.auto()  # an attention, a block, a model: the name promises nothing


_WORD = r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])"


def _words(name: str) -> list[str]:
    """The words of a CamelCase or snake_case name in lower case, without digits."""
    return [word.lower() for word in re.findall(_WORD, name)]


# ---------------------------------------------------------------------------------------------- class names

_CLASS_NICKNAME = (
    r"(?P<NORM>^(?i:dyt|dynamic_?(?:tanh|erf)|derf|[fg]rn|cln|[lbgi]n\d?d?|evo)(?![a-z])|[LBG]N$)"
    r"|(?P<SCALE>^Dora)"
)
"""Norms that are not called so, and the magnitude layers of DoRA, which are called linear or convolution."""

_CLASS_WORD = (
    r"(?P<NORM>norm$)|(?P<SCALE>^(?:scale|rescale|layerscale|snake|snakebeta|prelu|affine)$)"
    r"|(?P<EMBEDDING>^embed|embeddings?$|^lookup$)"
    r"|(?P<WEIGHT>(?:linear|conv|dense|projection|projector|router|head)$|^(?:proj|experts?|lora|mlp)$)"
    r"|(?P<COMPOSITE>(?:attention|attn|block|model|network|encoder|decoder|transformer|stem|ffn|mixer|layers?"
    r"|net)$)"
)

_WEIGHT_CLASS = r"(?i:linear|conv|embed|dense)"


@lru_cache(maxsize=4096)
def family_of(class_name: str) -> Family | None:
    """The family that a class name speaks of, if any."""
    nickname = re.search(_CLASS_NICKNAME, class_name)
    candidates = (
        [nickname]
        if nickname
        else [re.search(_CLASS_WORD, word) for word in reversed(_words(class_name))]
    )
    return next(
        (Family[found.lastgroup] for found in candidates if found and found.lastgroup), None
    )


def may_hold_weight(class_name: str) -> bool:
    """Whether a class name says linear, convolution or embedding anywhere, as `ConvNormAct` does."""
    return re.search(_WEIGHT_CLASS, class_name) is not None


# ---------------------------------------------------------------------------------------------- local names


class Hint(enum.Enum):
    """A name that decides only together with the shape."""

    MATRIX = enum.auto()  # a weight, but as a vector a scale: weight, gate
    FIRM_WEIGHT = enum.auto()  # a weight of any shape: kernel, proj
    SHAPE = enum.auto()  # the earlier words must not decide: delta


Meaning = Role | Hint


def _meaning(name: str) -> Meaning:
    return Role[name] if name in Role.__members__ else Hint[name]


def _dictionary(**nouns: str) -> dict[str, Meaning]:
    return {noun: _meaning(kind) for kind, listed in nouns.items() for noun in listed.split()}


_NOUNS = _dictionary(
    BIAS="bias biases beta betas shift shifts offset offsets sink sinks threshold thresholds",
    SCALE="scale scales scaling gamma gammas gain gains alpha alphas temperature temperatures temp lambda "
    "lambdas tau ls layerscale skipscale multiplier slope slopes magnitude",
    NORM="norm ln bn",
    EMBEDDING="codebook codebooks codevectors",
    POSITION="pos position positions positional rel relpos rpe ape rope rotary freq freqs frequencies "
    "encoding enc embed embeds embedding embeddings emb posembed token tokens cls latent latents prompt "
    "prompts register registers newline separator sep sos bos eos query queries probe anchor anchors pointer ptr mem "
    "memory memories null pad padding state states",
    OTHER="decay bound bounds",
    FIRM_WEIGHT="kernel kernels proj projs projection matrix qkv spectrum",
    MATRIX="weight weights gate gates gating filter filters fn",
    SHAPE="delta factor factors coef coeff coeffs",
)
"""What the last known word of a local name says."""

_LATE_NOUNS = _dictionary(POSITION="table tables", MATRIX="w")
"""Words that speak only where no other does: not in `scale_shift_table`, nor in `rel_pos_w` (a width)."""

_STEM = (
    r"(?P<POSITION>embed|token|relpos|position|prompt|latent)|(?P<BIAS>bias)"
    r"|(?P<SCALE>scale|gamma|temperature)"
)
"""For words that are written as one (`qkvbias`)."""

_SPECIAL = (
    r"(?P<NORM>(?:norm|(?<![a-z])(?:ln|bn))\d*_(?:weight|w|scale|gamma|g)$)"
    r"|(?P<FIRM_WEIGHT>lora_?(?:embedding_?)?(?:[AB]|down|up)(?![a-z])|time_(?:maa|decay)_\w*w\d$)"
    # The constants of state-space and linear recurrent layers, where a capital letter means something.
    r"|(?P<OTHER>^A_?logs?(?![a-z])|^(?:log|inv)_?A(?![a-z])|^A_(?:re|im|real|imag)|^Ds?$|^D_|^dt_\w*bias"
    r"|^(?:log|inv)_dt|^log_(?:step|delta)$|^log_\w*decay"
    r"|time_(?:decay|first|faaaa|mix|maa)|^recurrent_param$)"
    r"|(?P<EMBEDDING>(?:word|vocab|token)s?_embed|embedding_table|^wte$)"
    # A relative position bias is a position; `pos_proj_weight` is not.
    r"|(?P<POSITION>(?:^|_)(?:rel|relative|pos|position|positional)_(?:\w*_)?"
    r"(?:bias|biases|scale|table|embed\w*)(?![a-z])"
    r"|attention_bias(?:es)?$|^bias_table)"
)


@lru_cache(maxsize=16384)
def meaning_of(local: str) -> Meaning | None:
    """What a local name says: a role, a hint that needs the shape, or nothing."""
    special = re.search(_SPECIAL, local)
    if special and special.lastgroup:
        return _meaning(special.lastgroup)
    words = _words(local)
    for nouns in (_NOUNS, _LATE_NOUNS):
        for word in reversed(words):
            if word in nouns:
                return nouns[word]
    stem = re.search(_STEM, local.lower())
    return _meaning(stem.lastgroup) if stem and stem.lastgroup else None
