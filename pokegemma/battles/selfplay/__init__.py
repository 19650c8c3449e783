"""Self-play in rounds, and policy-space response oracles (PSRO): both run the project's scripts as kept steps."""
