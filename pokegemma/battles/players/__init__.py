"""What chooses actions in battles: one interface, and players that need no model."""
