"""Battles as files of metamon's format: read, write, check, and turn into text, numbers, actions and rewards."""
