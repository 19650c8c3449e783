"""A Gemma 3 for text alone that scores the 13 actions of a battle's state."""
