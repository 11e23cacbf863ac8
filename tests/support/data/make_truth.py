"""Remake truth.jsonl.gz, the copy for a few dozen architectures, from a full truth file.

    python tests/support/data/make_truth.py PATH/TO/truth.jsonl.gz

A full truth file has one JSON line for each architecture, with a row for every distinct kind of
parameter: who owns it, its local name, its number of dimensions, and what the forward pass does
with it. Kept of a row: owner, local name, ndim, verdict, role, and where one kind has several roles
the names that it is about.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

ARCHITECTURES = {
    "torch": """
        AdaptiveLogSoftmax Bilinear EmbeddingBag GRU LSTM_proj MHA MHA_kdim Transformer
        layernorm_3d weight_norm_param
    """,
    "torchvision": """
        convnext_tiny deeplabv3_mobilenet_v3_large efficientnet_b0
        fasterrcnn_mobilenet_v3_large_320_fpn googlenet maxvit_t mobilenet_v3_small mvit_v2_s
        raft_small resnet18 ssd300_vgg16 swin_v2_t vit_b_16
    """,
    "timm": """
        beitv2_base_patch16_224 botnet26t_256 coat_mini coatnet_rmlp_nano_rw_224 convit_base
        deit_base_distilled_patch16_224 dm_nfnet_f0 edgenext_xx_small efficientformer_l1
        ese_vovnet39b_evos focalnet_tiny_srf gmlp_ti16_224 hieradet_small resnet50_clip
        resnetv2_50d_frn samvit_base_patch16 swiftformer_xs swinv2_cr_tiny_224
        swinv2_tiny_window8_256 tnt_s_legacy_patch16_224
    """,
    "transformers": """
        BambaModel BlipModel CLIPSegModel CsmDepthDecoderForCausalLM DebertaModel DeepseekV4Model
        DeiTForMaskedImageModeling Deimv2Model DiffLlamaModel EdgeTamVideoModel EsmFold2Model
        FalconMambaForCausalLM FunnelForMultipleChoice GPTNeoXForCausalLM
        Gemma3ForConditionalGeneration GraniteMoeHybridForCausalLM HunYuanVLVisionTransformer
        IBertForMaskedLM LevitModel MBartModel MMGroundingDinoModel NeoMMEForMaskedLM
        Nemotron3_5AsrForRNNT OpenAIPrivacyFilterModel PerceiverModel
        PocketTTSForConditionalGeneration PoolFormerModel RecurrentGemmaForCausalLM
        RfDetrForInstanceSegmentation RwkvModel SLANetSLAHead TvpModel VideoPrismTextModel
        Wav2Vec2ConformerForPreTraining YolosModel
    """,
}
"""Chosen so that few of them hold most (local name, ndim, role) combinations of their library."""

HERE = Path(__file__).parent


def main(path: str) -> None:
    """Write the chosen architectures beside this script."""
    wanted = {(library, name) for library, names in ARCHITECTURES.items() for name in names.split()}
    with gzip.open(path, "rt") as lines:
        records = [record for record in map(json.loads, lines) if "rows" in record]
    kept = sorted(
        (kept for record in records if (kept := compact(record))[:2] in wanted), key=lambda r: r[:2]
    )
    missing = wanted - {record[:2] for record in kept}
    if missing:
        raise SystemExit(f"not in {path}: {sorted(missing)}")
    text = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in kept)
    (HERE / "truth.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def compact(record: dict[str, Any]) -> tuple[str, str, list[list[Any]]]:
    """(library, name, rows)."""
    rows = [
        [
            row["owner"],
            row["local"],
            row["ndim"],
            row["verdict"],
            row["role"],
            row.get("names", []) + row.get("pats", []),
        ]
        for row in record["rows"]
    ]
    return record["lib"], record["name"], rows


if __name__ == "__main__":
    main(*sys.argv[1:])
