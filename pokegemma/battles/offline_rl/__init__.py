"""Offline reinforcement learning of a battle policy, after AMAGO 3.3 with other targets of the critics."""
