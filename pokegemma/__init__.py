"""Recorded Pokémon play in, a Gemma 3 vision-language model that plays out."""
