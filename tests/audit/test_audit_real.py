"""Audits of real architectures: torchvision, timm and transformers, with random weights and
small inputs.
"""

from __future__ import annotations

import pytest
import torch

import wdhook


def test_resnet() -> None:
    """In a ResNet that trains, decay acts on the step size alone in every convolution, row by
    row, and nowhere else.
    """
    torchvision = pytest.importorskip("torchvision", exc_type=ImportError)
    model = torchvision.models.resnet18(zero_init_residual=True)
    found = wdhook.audit(model, torch.randn(4, 3, 64, 64))
    weights = {n: f for n, f in found.items() if f.use == "contraction"}
    assert {n for n, f in weights.items() if not f.invariant} == {"fc.weight"}
    assert all(f.acts_on == "step size, row by row" for n, f in weights.items() if n != "fc.weight")
    assert not found.contradictions
    still = wdhook.audit(model.eval(), torch.randn(4, 3, 64, 64))
    assert not any(f.invariant for f in still.values())


def test_vision_transformer() -> None:
    """With norms of queries and keys, a fused qkv is a contraction whose scale matters through
    the values.
    """
    timm = pytest.importorskip("timm", exc_type=ImportError)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, qk_norm=True, img_size=32)
    found = wdhook.audit(model, torch.randn(2, 3, 32, 32))
    assert found["cls_token"].use == "token"
    assert found["pos_embed"].use == "addition"
    assert found["blocks.0.attn.q_norm.weight"].use == "norm"
    assert found["blocks.0.attn.qkv.weight"].invariant is False
    assert not found.contradictions


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_bert(autocast: bool) -> None:
    """Keyword inputs, a dataclass of loss, logits and hidden states, tied embeddings, dropout;
    under autocast too.
    """
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=50,
    )
    model = transformers.BertForMaskedLM(config).train()
    ids = torch.randint(0, 50, (2, 9))
    before = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = wdhook.audit(model, input_ids=ids, labels=ids, output_hidden_states=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.dtype == "float64"
    words = found["bert.embeddings.word_embeddings.weight"]
    assert {op.partition("[")[0] for op in words.operations} == {"embedding", "addmm"}
    assert all(f.sensitivity is not None for n, f in found.items() if not n.endswith("key.bias"))
    assert (
        found["bert.encoder.layer.0.attention.self.key.bias"].sensitivity is None
    )  # softmax does not see it
    assert not found.contradictions


def test_llama_in_low_precision() -> None:
    """Norms that compute in float32 on purpose, in a model in bfloat16: the audit is in float64
    throughout.
    """
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=50,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    found = wdhook.audit(model, input_ids=torch.randint(0, 50, (2, 9)))
    assert found.dtype == "float64"
    assert found.threshold is not None
    assert found.threshold < 1e-6
    assert found["model.layers.0.input_layernorm.weight"].use == "multiplication"
    assert found["model.layers.0.input_layernorm.weight"].agrees


def test_positions_that_are_kept_in_an_embedding() -> None:
    """A position table in an `nn.Embedding` that is added whole: the type says embedding, the
    use says position.
    """
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    config = transformers.Qwen2AudioEncoderConfig(
        d_model=32,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=10,
    )
    model = transformers.Qwen2AudioEncoder(config).requires_grad_(True)
    found = wdhook.audit(model, torch.randn(2, 8, 20))
    assert found["embed_positions.weight"].use == "addition"
    assert found["embed_positions.weight"].role is wdhook.Role.POSITION
    assert found.overrides == {"embed_positions.weight": 0.0}
