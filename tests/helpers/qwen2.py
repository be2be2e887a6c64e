"""Qwen2's layers, a family that is not among ours: what a new one takes."""

from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2RotaryEmbedding

from modeling_spiralformer.layers_spiralformer import LayerFamily

QWEN2 = LayerFamily(
    config_class=Qwen2Config,
    layer=Qwen2DecoderLayer,
    attention=Qwen2Attention,
    rotary_embedding=Qwen2RotaryEmbedding,
    outputs=("self_attn.o_proj", "mlp.down_proj"),
    norm="rms_norm",
    more_fields={"head_dim": None},
    unread_fields=("max_window_layers",),
)
