"""A million virtual devices on one machine: who they are, what they train, when they come and go, what came of it."""
