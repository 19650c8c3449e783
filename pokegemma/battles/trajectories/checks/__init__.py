"""Checks of trajectories before training: of their files, and of folders that were packed."""
