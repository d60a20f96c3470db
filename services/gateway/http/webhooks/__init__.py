"""Telling other services that a job has ended, by signed HTTP calls that survive a restart."""
