"""A Gemma 3 for text alone: its checkpoint and its tokenizer's files."""

TEXT_MODEL = "gemma3_text"
"""Its `model_type`: it plays battles and is trained on no pictures."""
