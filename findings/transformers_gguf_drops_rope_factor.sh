#!/usr/bin/env bash
# transformers 5.23.0: gguf_file= ignores the position factor and the attention scale of a Gemma 3.
#
# Assumed: AutoConfig and AutoModel with gguf_file= give the model that the file describes.
# What happens: the keys gemma3.rope.scaling.type and .factor, which llama.cpp's converter writes for 4B, 12B and 27B (linear, 8), are
# in no table of the loader, so full-attention layers get unscaled positions; and query_pre_attn_scalar stays at the default
# of 256, although llama.cpp takes another scale for the 27B (168, known by its 62 layers). There is no warning.
#
# Seen with transformers 5.23.0, gguf 0.19.0 (2026-11-29):
#   in the file:  gemma3.rope.scaling.factor = 8.0, 62 layers
#   as loaded:    full_attention {'rope_type': 'default', 'rope_theta': 1000000.0}, query_pre_attn_scalar 256
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0
"$tmp/venv/bin/python" - "$tmp" <<'P'
import sys

import gguf
from transformers import AutoConfig

# The metadata of a 27B, as llama.cpp's converter writes it; the config is read from nothing else.
writer = gguf.GGUFWriter(f"{sys.argv[1]}/model.gguf", "gemma3")
writer.add_context_length(131072)
writer.add_embedding_length(5376)
writer.add_block_count(62)
writer.add_feed_forward_length(21504)
writer.add_head_count(32)
writer.add_head_count_kv(16)
writer.add_key_length(128)
writer.add_value_length(128)
writer.add_layer_norm_rms_eps(1e-6)
writer.add_sliding_window(1024)
writer.add_rope_freq_base(1_000_000.0)
writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
writer.add_rope_scaling_factor(8.0)
writer.add_vocab_size(262208)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

fields = gguf.GGUFReader(f"{sys.argv[1]}/model.gguf").fields
print(f"in the file: factor {fields['gemma3.rope.scaling.factor'].contents()}, "
      f"{fields['gemma3.block_count'].contents()} layers")
config = AutoConfig.from_pretrained(sys.argv[1], gguf_file="model.gguf")
full = config.rope_parameters["full_attention"]
print(f"as loaded: full_attention {full}, query_pre_attn_scalar {config.query_pre_attn_scalar}")
assert config.num_hidden_layers == 62
assert "factor" not in full and config.query_pre_attn_scalar == 256, "the behaviour changed"
P
