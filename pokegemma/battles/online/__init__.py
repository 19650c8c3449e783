"""Battles on a Pokémon Showdown server: against people on this machine, or on the public ladder."""
