"""Reads names: the class name of an owner and the local name of a parameter.

Both are read like English compounds, from the last word to the first: `logit_scale`, `expert_bias`
and `gate_up_proj` are a scale, a bias and a projection; a `LayerNormLinear` is a linear layer, an
`AdaLayerNorm` a norm. The full path is not read: a path holds "norm", "bias" or "pos" for reasons
of its own.
"""

from __future__ import annotations

import enum
import re
from functools import lru_cache


class Role(str, enum.Enum):
    """The job of a parameter in its model."""

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
    """The kind of layer that a class name speaks of."""

    NORM = enum.auto()
    SCALE = enum.auto()
    WEIGHT = enum.auto()
    FLAT = enum.auto()  # tensor products: all their matrices in one vector
    EMBEDDING = enum.auto()
    COMPOSITE = enum.auto()  # an attention, a block, a model: the name promises nothing


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def words_of(name: str) -> list[str]:
    """The words of a CamelCase or snake_case name in lower case, without digits."""
    return [word.lower() for word in _WORD.findall(name)]


# ------------------------------------------------------------------------------------ class names

# The long patterns are strings: `re` compiles and keeps them at their first use, not at the import.

# Norms with other names, also at the end of a compound (`BlockV2GRN`); DoRA's magnitude layers,
# which are called linear or convolution.
_CLASS_NICKNAME = (
    r"(?P<NORM>^(?i:dyt|dynamic_?(?:tanh|erf)|derf|[fg]rn|cln|[lbgi]n\d?d?(?!n)|evo)(?![a-z])|[LBG]N$"
    r"|(?<=[a-z\d])(?:[FG]RN|DyT|[CLBG]N)$)"
    r"|(?P<SCALE>^Dora|(?i:element_?wise)(?!.*(?i:linear|conv|dense)))"
    r"|(?P<FLAT>(?i:tensor_?(?:product|square)))"
)

_CLASS_WORD = (
    r"(?P<NORM>norm$)"
    r"|(?P<SCALE>^(?:scale|scaler|rescale|layerscale|snake|snakebeta|prelu|affine|periodic)$)"
    r"|(?P<EMBEDDING>^embed|embeddings?$|^lookup$)"
    r"|(?P<WEIGHT>(?:linear|conv|dense|projection|projector|router|head)$"
    r"|^(?:proj|experts?|lora|mlp)$)"
    r"|(?P<COMPOSITE>(?:attention|attn|block|model|network|encoder|decoder|transformer|stem|ffn"
    r"|mixer|net)$)"
)

_POSITION_CLASS = frozenset({"pos", "position", "positional", "positions", "relative", "cls"})
_WAVE_CLASS = frozenset(
    {"fourier", "frequency", "frequencies", "periodic", "rotary", "sinusoidal", "sinusoid", "sine"}
)
_MATRIX_CLASS = re.compile(r"(?i:linear|conv|embed|dense)")


@lru_cache(maxsize=4096)
def family_of(class_name: str) -> Family | None:
    """The family that a class name speaks of, if any."""
    nickname = re.search(_CLASS_NICKNAME, class_name)
    if nickname is not None:
        return Family[str(nickname.lastgroup)]
    is_layer = False
    for word in reversed(words_of(class_name)):
        if word in ("layer", "layers"):
            is_layer = True  # a BatchNormLayer is a norm, a GPTNeoXLayer a composite
            continue
        found = re.search(_CLASS_WORD, word)
        if found is not None:
            return Family[str(found.lastgroup)]
    return Family.COMPOSITE if is_layer else None


def names_positions(class_name: str) -> bool:
    """True where a class name speaks of positions or class tokens: `PositionalEmbedding`."""
    return not _POSITION_CLASS.isdisjoint(words_of(class_name))


def names_waves(class_name: str) -> bool:
    """True where a class name speaks of waves, whose frequencies are drawn at random."""
    return not _WAVE_CLASS.isdisjoint(words_of(class_name))


def names_a_matrix_layer(class_name: str) -> bool:
    """True where a class name says linear, convolution or embedding, as `ConvNormAct` does."""
    return _MATRIX_CLASS.search(class_name) is not None


# ------------------------------------------------------------------------------------ local names


class Hint(enum.Enum):
    """A name that decides only together with the shape or the values."""

    MATRIX = enum.auto()  # a weight as a matrix, a scale as a vector: weight, filter
    GATE = enum.auto()  # like a matrix, and a scale too where it broadcasts
    FIRM_WEIGHT = enum.auto()  # a weight of any shape: kernel, proj
    READ_OUT = enum.auto()  # contracts, also as a vector: att_src, lower_entries
    PLACE = enum.auto()  # a position as a vector; as a matrix perhaps a weight: freq, query
    SHAPE = enum.auto()  # the earlier words must not decide: delta


Meaning = Role | Hint


def _meaning(name: str) -> Meaning:
    return Role[name] if name in Role.__members__ else Hint[name]


def _dictionary(**nouns: str) -> dict[str, Meaning]:
    meanings: dict[str, Meaning] = {}
    for kind, listed in nouns.items():
        meanings.update(dict.fromkeys(listed.split(), _meaning(kind)))
    return meanings


# The meaning of the last known word of a local name.
_NOUNS = _dictionary(
    BIAS="bias biases beta betas shift shifts offset offsets sink sinks threshold thresholds",
    SCALE="scale scales scaling gamma gammas gain gains alpha alphas temperature temperatures temp "
    "lambda lambdas tau ls layerscale skipscale multiplier slope slopes magnitude modulation width "
    "widths height heights lengthscale outputscale bandwidth bandwidths timescale timescales "
    "precision amplitude amplitudes variance variances derivatives affine",
    NORM="norm ln bn",
    EMBEDDING="codebook codebooks codevectors",
    POSITION="pos position positions positional rel relpos rpe ape rope rotary encoding enc embed "
    "embeds embedding embeddings emb posembed token tokens cls latent latents prompt prompts "
    "register registers newline separator sep sos bos eos probe anchor anchors pointer ptr null "
    "pad padding point points knot knots grid grids",
    PLACE="freq freqs frequencies query queries mem memory memories state states",
    OTHER="decay bound bounds",
    FIRM_WEIGHT="kernel kernels proj projs projection matrix qkv spectrum fn",
    MATRIX="weight weights filter filters",
    GATE="gate gates gating",
    READ_OUT="entries att attn",
    SHAPE="delta factor factors coef coeff coeffs",
)

# Words that speak only where no other does: not in `scale_shift_table`, nor in `rel_pos_w`, a
# width, nor in `weight_mu`, the mean of a weight.
_LATE_NOUNS = _dictionary(
    POSITION="table tables", MATRIX="w", BIAS="mu loc constant", SCALE="phase phases"
)

# Of a name that is one letter: by custom b is added, and g, r and s multiply.
_LETTERS = _dictionary(BIAS="b", SCALE="g r s")

# Standard deviations, masks and diagonals are so wherever the word stands (`weight_log_sigma`,
# `rho_kernel`, `_diag_weight`), unless a projection makes them.
_SPREAD = _words(
    "sigma sigmas rho std stddev var logvar logsigma logstd "
    "cov covar covariance tril diag diagonal mask masks"
)
_PROJECTION = frozenset(("proj", "projs", "projection", "fc", "linear", "net"))

# A function of the parameter is used, not the parameter: said first, or where no noun is known
# anywhere (`edge_log_probs`, `A_unconstrained`).
_TRANSFORMED = _words("log raw unnormalized unconstrained inv inverse")
_TRANSFORMED_ANYWHERE = _words("log unnormalized unconstrained logit logits")

# What a weight may be named after. `weight_query` is the weight of the query; `W_pos` is a table.
_WEIGHT_FIRST = frozenset(("weight", "weights", "w", "kernel", "kernels", "proj"))
_TRUE_POSITION = frozenset(
    ("pos", "position", "positions", "positional", "rel", "relpos", "rpe", "ape", "rope", "cls")
)

# For words that are written as one (`qkvbias`).
_STEM = re.compile(
    r"(?P<POSITION>embed|token|relpos|position|prompt|latent)|(?P<BIAS>bias)"
    r"|(?P<SCALE>scale|gamma|temperature)"
)

_SPECIAL = (
    r"(?P<NORM>(?:norm|(?<![a-z])(?:ln|bn))\d*_(?:weight|w|scale|gamma|g)$)"
    r"|(?P<FIRM_WEIGHT>lora_?(?:embedding_?)?(?:[AB]|down|up)(?![a-z])|time_(?:maa|decay)_\w*w\d$)"
    # The constants of state-space and linear recurrent layers, where a capital letter counts.
    r"|(?P<OTHER>^A_?logs?(?![a-z])|^(?:log|inv)_?A(?![a-z])|^A_(?:re|im|real|imag)|^Ds?$|^D_"
    r"|^dt_\w*bias|^(?:log|inv)_dt|^log_(?:step|delta)$|^log_\w*decay"
    r"|time_(?:decay|first|faaaa|mix|maa)|^recurrent_param$"
    # The distribution of a variational Gaussian process.
    r"|variational|^natural_|(?:^|_)chol(?:esky)?(?![a-z]))"
    r"|(?P<EMBEDDING>(?:word|vocab|token)s?_embed|embedding_table|^wte$)"
    # A relative position bias is a position; `pos_proj_weight` is not.
    r"|(?P<POSITION>(?:^|_)(?:rel|relative|pos|position|positional)_(?:\w*_)?"
    r"(?:bias|biases|scale|table|embed\w*)(?![a-z])"
    r"|attention_bias(?:es)?$|^bias_table|inducing)"
)


@lru_cache(maxsize=16384)
def meaning_of(local: str) -> Meaning | None:
    """The meaning of a local name: a role, a hint that needs the shape, or None."""
    special = re.search(_SPECIAL, local)
    if special is not None:
        return _meaning(str(special.lastgroup))
    letter = local.strip("_0123456789")
    if letter in _LETTERS:
        return _LETTERS[letter]
    words = words_of(local)
    if not _SPREAD.isdisjoint(words) and _PROJECTION.isdisjoint(words):
        return Role.POSITION if "token" in words else Role.SCALE
    return _compound(words) or _stem(local)


def _compound(words: list[str]) -> Meaning | None:
    """The meaning of the last known word, seen together with the first."""
    last = _last_noun(words)
    if not words:
        return last
    if words[0] in _WEIGHT_FIRST and last in (None, Role.POSITION, Role.EMBEDDING, Hint.PLACE):
        return last if not _TRUE_POSITION.isdisjoint(words) else Hint.MATRIX
    if last in (None, Hint.SHAPE) and not _TRANSFORMED_ANYWHERE.isdisjoint(words):
        return Role.SCALE
    if words[0] in _TRANSFORMED and last in (None, Hint.MATRIX, Hint.SHAPE):
        return Hint.MATRIX if words[0] == "raw" and last is Hint.MATRIX else Role.SCALE
    return last


def _last_noun(words: list[str]) -> Meaning | None:
    for nouns in (_NOUNS, _LATE_NOUNS):
        for word in reversed(words):
            if word in nouns:
                return nouns[word]
    return None


# Words that mean the same at any shape. As a matrix, `alpha` may be a weight, and so may `points`.
_FIRM_NOUNS = (
    _SPREAD
    | _TRUE_POSITION
    | _words(
        "bias biases scale scales gain gains temperature embed embeds embedding embeddings emb "
        "token tokens codebook codebooks codevectors encoding modulation layerscale slope slopes "
        "log raw unnormalized unconstrained"
    )
)


def is_firm_name(local: str) -> bool:
    """True where a name has one meaning at any shape, as `bias` has and `alpha` has not."""
    words = words_of(local)
    return not _FIRM_NOUNS.isdisjoint(words) or re.search(_SPECIAL, local) is not None


def is_plural(local: str) -> bool:
    """True for `weights`: a vector of them may weigh the terms of a sum."""
    return "weights" in words_of(local)


def _stem(local: str) -> Meaning | None:
    found = _STEM.search(local.lower())
    return None if found is None else _meaning(str(found.lastgroup))


def is_matrix_name(local: str) -> bool:
    """True for a capital letter, which names a matrix by custom."""
    return re.fullmatch(r"[A-Z]\d*", local) is not None


def siblings_of(local: str) -> frozenset[str]:
    """The names beside which a `query` is one of the three projections of an attention."""
    others = ("key", "keys", "value", "values")
    return frozenset(re.sub("quer(?:y|ies)", other, local) for other in others) - {local}
