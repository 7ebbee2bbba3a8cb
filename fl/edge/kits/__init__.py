"""What devices run: a kit for each platform, equal by the protocol's table and shared test vectors."""
