"""Kits: what a consortium's plan says of each host, made into signed folders, checked and started there."""
