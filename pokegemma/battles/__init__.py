"""Battles of Pokémon Showdown: trajectories in metamon's format, simulation, players, training and arena."""
