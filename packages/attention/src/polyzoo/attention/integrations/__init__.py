"""Hooks that let other libraries' models use `polyzoo.attention`. Nothing is imported here."""
