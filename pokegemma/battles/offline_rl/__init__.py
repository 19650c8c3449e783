"""Offline reinforcement learning of a battle policy: actor and critics over whole battles, as AMAGO 3.3 does it."""
