"""Tensors of a Gemma 3 get the names that published checkpoints give them."""

import pytest

from pokegemma.gemma.weight_files import published_name


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"),
        ("language_model.model.model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        ("model.language_model.norm.weight", "language_model.model.norm.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        (
            "model.vision_tower.embeddings.patch_embedding.bias",
            "vision_tower.vision_model.embeddings.patch_embedding.bias",
        ),
        ("vision_tower.post_layernorm.bias", "vision_tower.vision_model.post_layernorm.bias"),
        ("model.vision_tower.vision_model.post_layernorm.bias", "vision_tower.vision_model.post_layernorm.bias"),
        ("model.multi_modal_projector.mm_soft_emb_norm.weight", "multi_modal_projector.mm_soft_emb_norm.weight"),
    ],
)
def test_a_tensor_gets_its_published_name(name: str, published: str) -> None:
    assert published_name(name) == published
    assert published_name(published) == published
