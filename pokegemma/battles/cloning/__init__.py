"""Behaviour cloning: a policy learns the actions of recorded battles with TRL's SFTTrainer."""
