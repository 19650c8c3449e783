"""Battles of every player against every other: results battle by battle, ratings, and a report with replays."""
