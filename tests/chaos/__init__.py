"""Storms: everything is killed, again and again, while jobs run."""
