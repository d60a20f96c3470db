"""Checkpoint folders: making synthetic ones, checking any."""
